"""Watches that go on by themselves: through leader changes, dead or frozen nodes and broken connections.

    feed (one task, one stream) --bounded queue of batches--> Watch --one by one--> the caller

A watch knows the revision up to which it has everything, and after any break asks another node for what comes next, so
that no event is lost, doubled or reordered. Where history has been compacted in between it ends with Compacted. A
caller that does not read stops the stream by flow control; nothing piles up.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, NoReturn, Self, TypeAlias

import grpc
import grpc.aio

from raftkv._pb import common_pb2, watch_pb2
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import Connection
from raftkv.client.errors import Closed, Compacted, DeadlineExceeded, InvalidRequest, RaftkvError
from raftkv.client.faults import error_of, understand
from raftkv.client.keys import Namespace, Text
from raftkv.client.methods import WATCH
from raftkv.client.options import DEFAULT, TimeoutArg, timeout_from
from raftkv.client.results import Event, KeyValue, WatchBatch
from raftkv.client.retry import Retry, backoff_s

if TYPE_CHECKING:
    from raftkv.client.kv import Context
    from raftkv.client.pool import Pool

Filter: TypeAlias = Literal["noput", "nodelete"]
FILTERS: Final = {"noput": watch_pb2.WatchCreateRequest.NOPUT, "nodelete": watch_pb2.WatchCreateRequest.NODELETE}
QUEUE_BATCHES: Final = 16
WATCH_ID: Final = 1
BACKOFF: Final = Retry()

_Stream = grpc.aio.StreamStreamCall[watch_pb2.WatchRequest, watch_pb2.WatchResponse]


class WatchCalls:
    """The watch half of `AsyncClient`."""

    _context: Context

    def watch(
        self,
        key: Text,
        end: Text | None = None,
        *,
        prefix: bool = False,
        start_revision: int = 0,
        prev: bool = False,
        progress: bool = False,
        filters: Collection[Filter] = (),
        timeout: TimeoutArg = DEFAULT,
    ) -> Watch:
        """Watch keys as they change: `async with client.watch("config/", prefix=True) as w: async for event in w: ...`.

        Inside the `async with` everything that is written from then on is seen.

        Args:
            key, end, prefix: as in `range`.
            start_revision: the first revision of interest, past or future; 0 is from now on.
            prev: events also carry what the key held before.
            progress: `.batches()` also yields batches without events, when the server tells how far it is.
            filters: "noput" leaves puts out, "nodelete" deletes.
            timeout: for entering; a watch that has begun goes on until it is closed.
        Raises:
            Compacted: while iterating: history from where it stood on is gone, `.compact_revision` is the oldest left.
            InvalidRequest: the server refuses it for good.
            Unavailable: while entering: it could not begin in time.
            Closed: the client was closed.

        Same as etcd v3 `Watch`.
        """
        unknown = set(filters) - set(FILTERS)
        if unknown:
            raise InvalidRequest(f"filters: {sorted(unknown)} are not of {sorted(FILTERS)}", code="INVALID_FILTER")
        context = self._context
        first, range_end = context.namespace.span(key, end, prefix)
        try:
            request = watch_pb2.WatchCreateRequest(
                key=first,
                range_end=range_end,
                start_revision=start_revision,
                progress_notify=True,  # or a watch that matches nothing would resume from long ago
                filters=[FILTERS[name] for name in filters],
                prev_kv=prev,
                watch_id=WATCH_ID,
            )
        except ValueError as error:
            raise InvalidRequest(f"the request cannot be encoded: {error}", code="INVALID_ARGUMENT") from None
        limit_s = timeout_from(timeout, context.timeout).total
        return Watch(context.pool, Feed(context.pool, context.namespace, request), limit_s, progress)


class Feed:
    """The task behind a watch. It must not know its Watch, so that one which was forgotten can be collected."""

    def __init__(self, pool: Pool, namespace: Namespace, request: watch_pb2.WatchCreateRequest) -> None:
        self._pool = pool
        self._namespace = namespace
        self._request = request
        self._parts: list[common_pb2.Event] = []  # of a response whose other fragments are still to come
        self._waits = 0
        self.next_revision = request.start_revision  # everything below was delivered; 0: not begun yet
        self.created = asyncio.Event()
        self.endpoint = ""  # of the node that serves it now
        self.queue: asyncio.Queue[WatchBatch | RaftkvError] = asyncio.Queue(QUEUE_BATCHES)
        self.failure: RaftkvError | None = None  # why it ended

    async def run(self) -> None:
        """Feed the queue until the watch can go on no more."""
        try:
            while self.failure is None:
                try:
                    connection = await self._pool.pick_for_stream()
                    await self._watch_at(connection)
                except RaftkvError as error:
                    self.failure = error
                if self.failure is None:
                    pause_s = backoff_s(BACKOFF, self._waits, self._pool.random.random())
                    self._waits += 1
                    await asyncio.sleep(pause_s if self._waits > 1 else 0)
        except asyncio.CancelledError:
            if self.failure is None:
                self.failure = Closed("the watch was closed")
            raise
        finally:
            self.created.set()
            if not self.queue.full():  # else the reader finds the failure behind what is queued
                failure = self.failure
                self.queue.put_nowait(Closed("the watch was closed") if failure is None else failure)

    async def _watch_at(self, connection: Connection) -> None:
        """Watch over a stream to this node until it ends."""
        epoch = connection.breaker.epoch
        call: _Stream = connection.open_stream(WATCH, (("hasleader", "true"),))
        self._parts.clear()
        self._request.start_revision = self.next_revision
        try:
            await self._ask(call)
            while self.failure is None:
                response = await call.read()
                if not isinstance(response, watch_pb2.WatchResponse):
                    return
                connection.answered(epoch)
                self._pool.observe(connection, response.header)
                if not await self._take(response, connection.endpoint):
                    return
        except grpc.aio.AioRpcError as error:
            fault = understand(error.code(), error.details() or "", error.trailing_metadata())
            if fault.kind.blames_endpoint:
                self._pool.unanswered(connection, epoch, silent=False)
            elif fault.kind.is_final:
                self.failure = error_of(fault, endpoint=connection.endpoint, attempts=1)
        except asyncio.InvalidStateError:
            return  # ended before the first write
        except asyncio.CancelledError:
            if not call.cancelled() or being_cancelled():
                raise
            # Abandoned by the pool: the node fell silent or stopped serving.
        finally:
            self.endpoint = ""
            connection.close_stream(call)
            connection.breaker.released(epoch)

    async def _ask(self, call: _Stream) -> None:
        """Send the request, which nobody reads beside yet."""
        writing = asyncio.ensure_future(call.write(watch_pb2.WatchRequest(create_request=self._request)))

        def ended(_: object) -> None:
            writing.cancel()

        # In grpc.aio a write waits for ever when its call ends before the call's metadata was sent.
        call.add_done_callback(ended)
        try:
            await writing
        except asyncio.CancelledError:
            if being_cancelled() or call.cancelled():
                raise
            await call.read()  # raises what the call ended with

    async def _take(self, response: watch_pb2.WatchResponse, endpoint: str) -> bool:
        """One response. False where this stream is of no more use."""
        if response.canceled:
            if response.compact_revision:
                text = f"history before revision {response.compact_revision} is gone"
                compacted = Compacted(text, code="COMPACTED")
                compacted.compact_revision = response.compact_revision
                self.failure = compacted
            elif response.created:
                kind = Compacted if "compacted" in response.cancel_reason else InvalidRequest
                self.failure = kind(response.cancel_reason or "the server refused it", code="WATCH_REFUSED")
            return False
        if response.created:
            self._waits = 0
            self.endpoint = endpoint
            if not self.next_revision:
                self.next_revision = response.header.revision + 1
            self.created.set()
            return True
        if response.events:
            self._parts.extend(response.events)
            if response.fragment:
                return True
            parts, self._parts = self._parts, []
            # A node may say again what the one before it said; never twice to the caller.
            new = [event for event in parts if event.kv.mod_revision >= self.next_revision]
            if new:
                self.next_revision = new[-1].kv.mod_revision + 1
                await self.queue.put(self.batch(new, self.next_revision - 1, response.header))
        elif response.header.revision >= self.next_revision:
            self.next_revision = response.header.revision + 1
            await self.queue.put(self.batch([], response.header.revision, response.header))
        return True

    def batch(self, events: Sequence[common_pb2.Event], revision: int, header: common_pb2.ResponseHeader) -> WatchBatch:
        """What goes into the queue; for those who override it, `header` is that of the answer it came with."""
        return WatchBatch(tuple(self._event(event) for event in events), revision)

    def _event(self, event: common_pb2.Event) -> Event:
        previous: KeyValue | None = self._namespace.item(event.prev_kv) if event.HasField("prev_kv") else None
        kind: Literal["put", "delete"] = "put" if event.type == common_pb2.Event.PUT else "delete"
        return Event(kind, self._namespace.item(event.kv), previous, event.expired)


class Watch:
    """A watch; made by `client.watch`. Use it in an `async with`, iterate it for events or `batches()`."""

    def __init__(self, pool: Pool, feed: Feed, limit_s: float | None, progress: bool) -> None:
        self._pool = pool
        self._feed = feed
        self._limit_s = limit_s
        self._progress = progress
        self._left: list[Event] = []  # of the current batch, last first
        self._end: Callable[[], None] | None = None
        self._revision = 0

    @property
    def revision(self) -> int:
        """Up to this revision all events have been taken out of this watch; 0 before it began."""
        return self._revision

    @property
    def endpoint(self) -> str:
        """The node that serves it now, as host:port; empty while it goes from one to another."""
        return self._feed.endpoint

    def _begin(self) -> None:
        if self._end is None:
            loop = self._pool.enter()
            self._end = end = self._pool.spawn(self._feed.run(), f"watch {self._feed.next_revision}")

            def forgotten() -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(end)

            weakref.finalize(self, forgotten)

    async def __aenter__(self) -> Self:
        self._begin()
        feed = self._feed
        try:
            async with asyncio.timeout(self._limit_s):
                await feed.created.wait()
        except TimeoutError:
            await self.aclose()
            raise _not_begun(self._pool) from None
        except BaseException:
            await self.aclose()
            raise
        if feed.failure is not None and not isinstance(feed.failure, Compacted):
            raise feed.failure
        self._revision = max(0, feed.next_revision - 1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def stop(self) -> None:
        """End it, without waiting. What was not taken out of it yet is dropped; whoever waits for an event is told."""
        if self._end is not None:
            self._end()
        feed = self._feed
        if feed.failure is None:
            feed.failure = Closed("the watch was closed")
        feed.created.set()
        if feed.queue.empty():
            feed.queue.put_nowait(feed.failure)

    async def aclose(self) -> None:
        """As `stop`."""
        self.stop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._left:
            batch = await self._next_batch()
            self._left = list(reversed(batch.events))
        event = self._left.pop()
        self._revision = max(self._revision, event.revision - bool(self._left))
        return event

    async def batches(self) -> AsyncIterator[WatchBatch]:
        """The events as they arrived together, one or more whole revisions at a time."""
        while True:
            try:
                batch = await self._next_batch()
            except StopAsyncIteration:
                return
            if batch.events or self._progress:
                self._revision = batch.revision
                yield batch

    async def _next_batch(self) -> WatchBatch:
        self._begin()
        feed = self._feed
        if feed.failure is not None and (feed.queue.empty() or isinstance(feed.failure, Closed)):
            _raise(feed.failure)
        got = await feed.queue.get()
        if isinstance(got, RaftkvError):
            feed.failure = got
            _raise(got)
        return got


def _raise(failure: RaftkvError) -> NoReturn:
    if isinstance(failure, Closed) and failure.message == "the watch was closed":
        raise StopAsyncIteration
    raise failure


def _not_begun(pool: Pool) -> RaftkvError:
    """Nobody began the watch in time."""
    return DeadlineExceeded(f"no node began the watch in time: {', '.join(pool.endpoints)}", code="UNREACHABLE")
