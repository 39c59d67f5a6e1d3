"""Watch: changes of keys as they happen, or from a past revision on.

    stream.read --create, cancel, progress--> the hub and the stream's buffer --pop--> stream.write

One task reads requests while another writes responses, so a client that does not read costs its bounded buffer and a
waiting task. Same as etcd v3 Watch, down to the texts; a lagging watch may get many revisions in a response.
"""

from __future__ import annotations

import asyncio
import random

from raftkv._pb.watch_pb2 import WatchCreateRequest, WatchRequest, WatchResponse
from raftkv.server.errors import TooManyRequests
from raftkv.server.limits import request_limits
from raftkv.server.services.contract import Node, fill_header
from raftkv.server.services.registry import Method, Service, Stream
from raftkv.server.watch import Watch as Watched
from raftkv.server.watch import WatchHub
from raftkv.server.watch_stream import StreamBuffer, Wakes
from raftkv.state.keys import span
from raftkv.state.validate import DEFAULT_LIMITS, InvalidRequest, RequestLimits, check_watch

STREAMS_MAX = 10_000
WATCHES_MAX = 200_000

PROGRESS_INTERVAL_S = 600.0
"""How long a watch with `progress_notify` may hear nothing; up to a tenth longer, so that not all report at once."""

TOGETHER_BYTES = 4096
"""Small responses of a stream leave together, up to so much: an event is one for each watch."""

AT_ONCE_BYTES = 64 * 1024
"""Of a stream; then it is the turn of others."""

INVALID_ID = -1
"""Of a watch that could not be made, and of a report on all of a stream's."""

DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"
EMPTY_RANGE = "mvcc: watcher range is empty"
COMPACTED = "etcdserver: mvcc: required revision has been compacted"
TOO_MANY = f"raftkv: too many watches on this node, {WATCHES_MAX} are the most"


class Watch:
    """The method of raftkv.v1.Watch, which is that of etcdserverpb.Watch."""

    def __init__(self, node: Node, hub: WatchHub) -> None:
        self._node = node
        self._hub = hub
        self._wakes = Wakes(asyncio.get_running_loop().call_soon)
        self._limits = request_limits(node.config)
        self._headers: dict[tuple[int, int, int], bytes] = {}
        self.streams = 0

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(("raftkv.v1.Watch", "etcdserverpb.Watch"), (Method("Watch", bidi=self.watch, counted=False),))

    async def watch(self, stream: Stream) -> None:
        """Serve one stream until the client sends no more, or something ends it."""
        if self.streams >= STREAMS_MAX:
            raise TooManyRequests("watch_streams_max")
        self.streams += 1
        buffer = StreamBuffer(self._hub, self._wakes, self._header)
        watches = _Watches(self._hub, buffer, self._limits)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_write(stream, buffer))
                while (raw := await stream.read()) is not None:
                    watches.handle(WatchRequest.FromString(raw))
                    await buffer.wait_room()
                buffer.end()
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
        finally:
            self.streams -= 1
            watches.close()
            buffer.close()

    def _header(self, revision: int) -> bytes:
        """A response with nothing but its header, as bytes."""
        node = self._node
        key = (revision, node.term, node.leader)
        found = self._headers.get(key)
        if found is None:
            response = WatchResponse()
            response.header.revision = revision
            fill_header(node, response.header)
            found = response.SerializeToString()
            if len(self._headers) >= 64:
                self._headers.clear()
            self._headers[key] = found
        return found


async def _write(stream: Stream, buffer: StreamBuffer) -> None:
    written = 0
    while not buffer.ended:
        parts: list[bytes] = []
        size = 0
        while size < TOGETHER_BYTES and (popped := tuple(buffer.pop())):
            parts += popped
            size += sum(map(len, popped))
        if parts:
            await stream.write(*parts)
            written += size
            if written >= AT_ONCE_BYTES:
                buffer.yield_turn()
        if not parts or written >= AT_ONCE_BYTES:
            written = 0
            await buffer.wait()


class _Watches:
    """The watches of one stream, by id."""

    def __init__(self, hub: WatchHub, buffer: StreamBuffer, limits: RequestLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._hub = hub
        self._buffer = buffer
        self._by_id: dict[int, Watched] = {}
        self._next_id = 0
        self._notified: set[int] = set()  # those with progress_notify
        self._timer: asyncio.TimerHandle | None = None
        buffer.on_cancelled = self._cancelled

    def handle(self, request: WatchRequest) -> None:
        """Do what a request says; what it says that we do not know is ignored."""
        kind = request.WhichOneof("request_union")
        if kind == "create_request":
            self._create(request.create_request)
        elif kind == "cancel_request":
            self._cancel(request.cancel_request.watch_id)
        elif kind == "progress_request" and all(map(self._hub.has_all, self._by_id.values())):
            self._buffer.tell(self._revision(), watch_id=INVALID_ID)

    def close(self) -> None:
        """No more reports."""
        if self._timer is not None:
            self._timer.cancel()

    def _revision(self) -> int:
        """The store's; everything that is synced has been told up to here."""
        return self._hub.current_revision()

    def _create(self, request: WatchCreateRequest) -> None:
        revision = self._revision()
        reason = self._obstacle(request)
        if reason:
            self._buffer.tell(revision, watch_id=INVALID_ID, created=True, canceled=True, cancel_reason=reason)
            return
        watch_id = request.watch_id or self._free_id()
        self._buffer.tell(revision, watch_id=watch_id, created=True)
        filters = request.filters
        watch = self._hub.add(
            self._buffer,
            *span(request.key or b"\0", request.range_end),
            start_revision=request.start_revision,
            prev_kv=request.prev_kv,
            no_put=WatchCreateRequest.NOPUT in filters,
            no_delete=WatchCreateRequest.NODELETE in filters,
        )
        self._by_id[watch_id] = watch
        self._buffer.ids[watch] = (watch_id, request.fragment)
        if request.progress_notify:
            self._notified.add(watch_id)
            self._expect_silence()

    def _obstacle(self, request: WatchCreateRequest) -> str:
        try:
            check_watch(request, self._limits)
        except InvalidRequest as fault:
            return fault.text
        range_end = request.range_end
        if range_end not in (b"", b"\0") and (request.key or b"\0") >= range_end:
            return EMPTY_RANGE
        if request.start_revision < 0:
            return COMPACTED
        if request.watch_id and request.watch_id in self._by_id:
            return DUPLICATE_ID
        if len(self._hub) >= WATCHES_MAX:
            return TOO_MANY
        return ""

    def _free_id(self) -> int:
        while self._next_id in self._by_id:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1

    def _cancel(self, watch_id: int) -> None:
        watch = self._by_id.get(watch_id)
        if watch is None:
            return
        self._hub.remove(watch)
        self._buffer.forget(watch)
        self._cancelled(watch_id)
        self._buffer.tell(self._revision(), watch_id=watch_id, canceled=True)

    def _cancelled(self, watch_id: int) -> None:
        del self._by_id[watch_id]
        self._notified.discard(watch_id)

    def _expect_silence(self) -> None:
        if self._timer is None and self._notified:
            self._buffer.reported.clear()
            delay_s = PROGRESS_INTERVAL_S * random.uniform(1.0, 1.1)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._report)

    def _report(self) -> None:
        self._timer = None
        for watch_id in sorted(self._notified - self._buffer.reported):
            watch = self._by_id[watch_id]
            if self._buffer.room() <= 0:
                break  # the client does not read: it has more to learn from what is there than from this
            if self._hub.has_all(watch) and not self._buffer.has_pending(watch):
                self._buffer.tell(self._revision(), watch_id=watch_id)
        self._expect_silence()
