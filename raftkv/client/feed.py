"""Where the events of watches come from: streams that go on at another node, and are shared by equal watches.

    Feed (one task, one stream) --batches--> Inbox of a watch --one by one--> its reader
                                       \\---> Inbox of another watch on the same keys

Every watch begins with a feed of its own. One that has come to the present is offered to the equal watches of the
client: they move over to it once they are as far, so that a thousand watches on a key are one on the wire. With one
reader, a feed waits for it, and flow control stops the node. With several it waits for none: whose inbox is full leaves
the feed, and when it has read what it has, it goes on from there with a feed of its own until it is as far again.

    own feed --as far as the shared one--> shared feed --inbox full--> none --read to the end--> own feed

Invariants: an inbox has everything before its `next_revision` and nothing else; a feed tells everything from its own
`next_revision` on, which is not beyond that of any of its inboxes. So whoever moves filters, and misses nothing.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

import grpc
import grpc.aio

from raftkv._pb import common_pb2, watch_pb2
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import Connection
from raftkv.client.errors import Closed, Compacted, InvalidRequest, RaftkvError
from raftkv.client.faults import error_of, understand
from raftkv.client.keys import Namespace
from raftkv.client.methods import WATCH
from raftkv.client.results import Event, KeyValue, WatchBatch
from raftkv.client.retry import Retry, backoff_s

if TYPE_CHECKING:
    from raftkv.client.pool import Pool

QUEUE_BATCHES: Final = 16
CLOSED: Final = "the watch was closed"
BACKOFF: Final = Retry()

_Stream = grpc.aio.StreamStreamCall[watch_pb2.WatchRequest, watch_pb2.WatchResponse]


class Kind:
    """What equal watches of one client have in common: they ask for the same events, whatever they start from."""

    __slots__ = ("__weakref__", "shared")

    def __init__(self) -> None:
        self.shared: Feed | None = None  # for all who are as far


def kind_of(pool: Pool, namespace: Namespace, request: watch_pb2.WatchCreateRequest) -> Kind:
    """The kind of a watch that asks for this."""
    kinds: weakref.WeakValueDictionary[object, Kind]
    kinds = pool.parts.setdefault("watches", weakref.WeakValueDictionary())
    asked = (namespace.prefix, request.key, request.range_end, request.prev_kv, frozenset(request.filters))
    kind = kinds.get(asked)
    if kind is None:
        kind = kinds[asked] = Kind()
    return kind


class Inbox:
    """What came for one watch and was not read yet. It must not know its Watch, so that one can be forgotten."""

    __slots__ = ("_last", "_queue", "begun", "failure", "feed", "first_revision", "next_revision")

    def __init__(self, feed: Feed) -> None:
        """
        Args:
            feed: a new one, which `begin` starts.
        """
        self.feed: Feed | None = None  # None: not begun, ended, or left behind by a shared one
        self._last = feed
        self.first_revision = feed.next_revision  # nothing below is wanted; 0: known when it has begun
        self.next_revision = feed.next_revision  # everything below has come
        self.begun = asyncio.Event()  # or ended
        self.failure: RaftkvError | None = None  # why nothing more comes
        self._queue: asyncio.Queue[WatchBatch | RaftkvError] = asyncio.Queue(QUEUE_BATCHES)

    def begin(self) -> None:
        """Have the feed begin. Raises Closed."""
        self._last.start()
        self._last.add(self)

    async def next(self) -> WatchBatch:
        """The next batch. Raises what ended it."""
        failure, queue = self.failure, self._queue
        if failure is not None and (queue.empty() or isinstance(failure, Closed)):
            raise failure
        if self.feed is None and queue.empty():
            self._go_on()
        got = await queue.get()
        if isinstance(got, RaftkvError):
            raise got
        return got

    def end(self, failure: RaftkvError) -> None:
        """Nothing more comes; the first reason stays."""
        if self.feed is not None:
            self.feed.remove(self)
        if self.failure is None:
            self.failure = failure
        self.begun.set()
        if self._queue.empty():  # somebody may be waiting for it
            self._queue.put_nowait(self.failure)

    # --- the feed's side --------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether it has no room."""
        return self._queue.full()

    @property
    def keeps_up(self) -> bool:
        """Whether little is left to be read."""
        return self._queue.qsize() < QUEUE_BATCHES // 2

    def begins_at(self, revision: int) -> None:
        """A node has begun to tell everything from this revision on."""
        self.first_revision = self.first_revision or revision
        self.next_revision = max(self.next_revision, revision)
        self.begun.set()

    async def wait_and_take(self, batch: WatchBatch) -> None:
        """As `take`, when there is room."""
        if batch.revision >= self.next_revision:
            await self._queue.put(self._new(batch))

    def take(self, batch: WatchBatch) -> None:
        """More of what the watch is to have; there is room for it."""
        if batch.revision >= self.next_revision:
            self._queue.put_nowait(self._new(batch))

    def ended(self, failure: RaftkvError) -> None:
        """The feed has ended. Who is beyond what was compacted needs none of that, and goes on."""
        feed = self.feed
        assert feed is not None
        feed.remove(self)
        compacted = failure.compact_revision if isinstance(failure, Compacted) else 0
        if feed.next_revision < compacted <= self.next_revision:
            try:
                self._go_on()
            except RaftkvError as error:
                self.end(error)
        else:
            self.end(failure)

    def _new(self, batch: WatchBatch) -> WatchBatch:
        first, self.next_revision = self.next_revision, batch.revision + 1
        if not batch.events or batch.events[0].revision >= first:
            return batch
        return WatchBatch(tuple(event for event in batch.events if event.revision >= first), batch.revision)

    def _go_on(self) -> None:
        """From where it is: with the shared feed where that is not further, else with one of its own."""
        kind = self._last.kind
        if kind is not None and kind.shared is not None and kind.shared.serves_from(self.next_revision):
            kind.shared.add(self)
        else:
            self._last = self._last.another(self.next_revision)
            self.begin()


class Feed:
    """The task behind one or several equal watches; see the module."""

    def __init__(
        self, pool: Pool, namespace: Namespace, request: watch_pb2.WatchCreateRequest, kind: Kind | None = None
    ) -> None:
        """
        Args:
            kind: of the watches that it may be shared with; None for one that stays alone.
        """
        self._pool = pool
        self._namespace = namespace
        self._request = request
        self.kind = kind
        self._inboxes: dict[Inbox, None] = {}
        self._end: Callable[[], None] = lambda: None
        self._parts: list[common_pb2.Event] = []  # of a response whose other fragments are still to come
        self._waits = 0
        self._past: int | None = 0  # what is beyond this revision is told as it happens; None: nobody knows
        self.next_revision = request.start_revision  # everything below was delivered; 0: not begun yet
        self.endpoint = ""  # of the node that serves it now
        self.failure: RaftkvError | None = None  # why it ended

    def another(self, next_revision: int) -> Feed:
        """A new one like this, from a revision on."""
        request = watch_pb2.WatchCreateRequest()
        request.CopyFrom(self._request)
        request.start_revision = next_revision
        return type(self)(self._pool, self._namespace, request, self.kind)

    def start(self) -> None:
        """Run until nobody reads it, or it can go on no more. Raises Closed."""
        self._pool.enter()
        self._end = self._pool.spawn(self._run(), f"watch {self.next_revision}")

    # --- who reads it -----------------------------------------------------------------------------------------------

    def add(self, inbox: Inbox) -> None:
        """For this one too."""
        inbox.feed = self
        self._inboxes[inbox] = None

    def remove(self, inbox: Inbox) -> None:
        """Not for this one any more."""
        inbox.feed = None
        del self._inboxes[inbox]
        if not self._inboxes:
            self._withdraw()
            self._end()

    def serves_from(self, revision: int) -> bool:
        """Whether who has everything before this revision misses nothing here, and somebody serves it."""
        return self.endpoint != "" and self.next_revision <= revision

    async def _deliver(self, batch: WatchBatch) -> None:
        if len(self._inboxes) > 1:
            for inbox in tuple(self._inboxes):
                if inbox.full:
                    self.remove(inbox)
                else:
                    inbox.take(batch)
            return
        for inbox in tuple(self._inboxes):
            if inbox.full:
                self._withdraw()  # nobody else shall wait for this reader
                self._past = None
            await inbox.wait_and_take(batch)
        self._join(offer=self._past is not None and self.next_revision > self._past)

    def _join(self, *, offer: bool) -> None:
        """Move whoever reads this over to the shared feed, if that is not further; or let this be the shared one."""
        kind = self.kind
        if kind is None:
            return
        if kind.shared is None:
            if offer and self._inboxes:
                kind.shared = self
        elif kind.shared is not self and kind.shared.serves_from(self.next_revision):
            for inbox in tuple(self._inboxes):
                if inbox.keeps_up:
                    self.remove(inbox)
                    kind.shared.add(inbox)

    def _withdraw(self) -> None:
        if self.kind is not None and self.kind.shared is self:
            self.kind.shared = None

    # --- where it comes from ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
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
                self.failure = Closed(CLOSED)
            raise
        finally:
            self._withdraw()
            for inbox in tuple(self._inboxes):
                inbox.ended(Closed(CLOSED) if self.failure is None else self.failure)

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
            if being_cancelled():
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
            self._created(response.header.revision)
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
                await self._deliver(self.batch(new, self.next_revision - 1, response.header))
        elif response.header.revision >= self.next_revision:
            self.next_revision = response.header.revision + 1
            await self._deliver(self.batch([], response.header.revision, response.header))
        return True

    def _created(self, revision: int) -> None:
        """A node has begun to serve it; the node's store is at this revision."""
        self._past = revision
        if not self.next_revision:
            self.next_revision = revision + 1
        for inbox in self._inboxes:
            inbox.begins_at(self.next_revision)
        self._join(offer=self.next_revision == revision + 1)

    def batch(self, events: Sequence[common_pb2.Event], revision: int, header: common_pb2.ResponseHeader) -> WatchBatch:
        """What goes into the queue; for those who override it, `header` is that of the answer it came with."""
        return WatchBatch(tuple(self._event(event) for event in events), revision)

    def _event(self, event: common_pb2.Event) -> Event:
        previous: KeyValue | None = self._namespace.item(event.prev_kv) if event.HasField("prev_kv") else None
        kind: Literal["put", "delete"] = "put" if event.type == common_pb2.Event.PUT else "delete"
        return Event(kind, self._namespace.item(event.kv), previous, event.expired)
