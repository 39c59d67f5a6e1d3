"""Watches that go on by themselves: through leader changes, dead or frozen nodes and broken connections.

    feed (one task, one stream) --inbox, a bounded queue of batches--> Watch --one by one--> the caller

A watch knows the revision up to which it has everything, and after any break asks another node for what comes next, so
that no event is lost, doubled or reordered. Where history has been compacted in between it ends with Compacted. A
caller that does not read stops the stream, or leaves one that it shares with equal watches (`feed.py`); nothing piles
up.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Collection
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias

from raftkv._pb import watch_pb2
from raftkv.client.errors import Closed, Compacted, DeadlineExceeded, InvalidRequest, RaftkvError
from raftkv.client.feed import CLOSED, Feed, Inbox, kind_of
from raftkv.client.keys import Text
from raftkv.client.options import DEFAULT, TimeoutArg, timeout_from
from raftkv.client.results import Event, WatchBatch

if TYPE_CHECKING:
    from raftkv.client.kv import Context
    from raftkv.client.pool import Pool

__all__ = ["FILTERS", "WATCH_ID", "Feed", "Filter", "Watch", "WatchCalls"]

Filter: TypeAlias = Literal["noput", "nodelete"]
FILTERS: Final = {"noput": watch_pb2.WatchCreateRequest.NOPUT, "nodelete": watch_pb2.WatchCreateRequest.NODELETE}
WATCH_ID: Final = 1


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

        Inside the `async with` everything that is written from then on is seen. Watches of a client on the same keys
        share one on the wire, as long as their callers read what comes.

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
        pool, namespace = context.pool, context.namespace
        feed = Feed(pool, namespace, request, kind_of(pool, namespace, request))
        return Watch(pool, feed, limit_s, progress)


class Watch:
    """A watch; made by `client.watch`. Use it in an `async with`, iterate it for events or `batches()`."""

    def __init__(self, pool: Pool, feed: Feed, limit_s: float | None, progress: bool) -> None:
        self._pool = pool
        self._inbox = Inbox(feed)
        self._limit_s = limit_s
        self._progress = progress
        self._left: list[Event] = []  # of the current batch, last first
        self._began = False
        self._revision = 0

    @property
    def revision(self) -> int:
        """Up to this revision all events have been taken out of this watch; 0 before it began."""
        return self._revision

    @property
    def endpoint(self) -> str:
        """The node that serves it now, as host:port; empty while it goes from one to another."""
        feed = self._inbox.feed
        return feed.endpoint if feed is not None else ""

    def _begin(self) -> None:
        if not self._began:
            loop, inbox = self._pool.enter(), self._inbox
            self._began = True
            inbox.begin()

            def forgotten() -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(inbox.end, Closed(CLOSED))

            weakref.finalize(self, forgotten)

    async def __aenter__(self) -> Self:
        self._begin()
        inbox = self._inbox
        try:
            async with asyncio.timeout(self._limit_s):
                await inbox.begun.wait()
        except TimeoutError:
            await self.aclose()
            raise _not_begun(self._pool) from None
        except BaseException:
            await self.aclose()
            raise
        if inbox.failure is not None and not isinstance(inbox.failure, Compacted):
            raise inbox.failure
        self._revision = max(0, inbox.first_revision - 1)  # more may have come, and was not taken out yet
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def stop(self) -> None:
        """End it, without waiting. What was not taken out of it yet is dropped; whoever waits for an event is told."""
        self._inbox.end(Closed(CLOSED))

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
        try:
            return await self._inbox.next()
        except Closed as closed:
            if closed.message == CLOSED:
                raise StopAsyncIteration from None
            raise


def _not_begun(pool: Pool) -> RaftkvError:
    """Nobody began the watch in time."""
    return DeadlineExceeded(f"no node began the watch in time: {', '.join(pool.endpoints)}", code="UNREACHABLE")
