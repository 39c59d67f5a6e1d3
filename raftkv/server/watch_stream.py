"""What waits between the hub and those it tells: the responses of a client's stream, the changes for a waiter inside.

    hub --take--> StreamBuffer: a response for each watch, which later changes join --pop--> the stream
    hub --take--> Listener: the changes one by one --next--> a lock's waiter, an observer

Both are bounded in bytes and tell the hub when there is room again. Responses leave in the order in which they were
begun, so nothing overtakes: a progress report is never ahead of a change it speaks of.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from raftkv._pb.watch_pb2 import WatchResponse
from raftkv.server.errors import Stopping
from raftkv.server.watch import BUFFERED_BYTES_MAX, Watch, WatchHub
from raftkv.server.watch_changes import Change, varint

STREAM_BYTES_MAX = 256 * 1024
LISTENER_BYTES_MAX = 256 * 1024

RESPONSE_BYTES_MAX = 16 * 1024
"""A response that has this much takes no further revision; one revision may be larger.

Of each client that does not read, or catches up, one response is under way, and exists twice, here and in gRPC: that
of the large ones there were for those who catch up made up most of a node's memory (ADR 0013).
"""
RESPONSE_CHANGES_MAX = 1000

FRAGMENT_BYTES = 2 * 1024 * 1024
"""Responses of this size are split for clients that want that; as etcd, 1.5 MiB and 512 KiB."""

WAKES_AT_ONCE = 4
"""Of streams with changes to write, in one round of the loop: about half a millisecond, with responses of that size."""

_WATCH_ID = b"\x10"
_FRAGMENT = b"\x38\x01"


class Wakes:
    """Wakes those who write the streams, some in each round of the loop.

    A change that a thousand watch is a thousand messages. In one round they would keep the node from all else for as
    long as they take, and the next write would wait for all of them.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._waiting: dict[asyncio.Event, None] = {}
        self._due = False

    def wake(self, sleeper: asyncio.Event) -> None:
        """Set this, soon."""
        if not sleeper.is_set():
            self._waiting[sleeper] = None
            self._go_on()

    def _go_on(self) -> None:
        if not self._due:
            self._due = True
            self._call_soon(self._wake_some)

    def _wake_some(self) -> None:
        self._due = False
        for sleeper in list(itertools.islice(self._waiting, WAKES_AT_ONCE)):
            del self._waiting[sleeper]
            sleeper.set()
        if self._waiting:
            self._go_on()


class _Response:
    """Changes for one watch that have not been sent."""

    __slots__ = ("fragment", "frames", "size", "through", "watch", "watch_id")

    def __init__(self, watch: Watch, watch_id: int, fragment: bool) -> None:
        self.watch = watch
        self.watch_id = watch_id
        self.fragment = fragment
        self.frames: list[bytes] = []
        self.size = 0
        self.through = 0


class StreamBuffer:
    """What one stream has still to send; a `Sink`. See the module."""

    def __init__(
        self, hub: WatchHub, wakes: Wakes, header: Callable[[int], bytes], bytes_max: int = STREAM_BYTES_MAX
    ) -> None:
        """
        Args:
            wakes: of the node.
            header: the bytes of a WatchResponse that has only the header, for a revision.
        """
        self._hub = hub
        self._wakes = wakes
        self._header = header
        self._bytes_max = bytes_max
        self.ids: dict[Watch, tuple[int, bool]] = {}
        """Of the stream's watches: id, and whether it wants fragments."""
        self.reported: set[int] = set()
        """Ids to which something was sent since this was last looked at."""
        self.on_cancelled: Callable[[int], None] = lambda watch_id: None
        self.bytes = 0
        self._queue: deque[_Response | bytes] = deque()
        self._open: dict[Watch, _Response] = {}  # responses in the queue that may be joined
        self._changed = asyncio.Event()
        self._drained: asyncio.Event | None = None  # somebody waits for room
        self._ended = False
        self._stopping = False

    # The hub's side.

    def room(self) -> int:
        left = BUFFERED_BYTES_MAX - self._hub.buffered_bytes
        if not self.bytes:  # whoever reads gets on, however much those hold who do not: by a response at a time
            left = max(left, RESPONSE_BYTES_MAX)
        return min(self._bytes_max - self.bytes, left)

    def take(self, watch: Watch, changes: Sequence[Change], through: int) -> None:
        prev_kv = watch.prev_kv
        frames = [change.frame(prev_kv) for change in changes]
        begin = 0
        for end in self._ends(watch, changes, frames):
            response = self._open.get(watch)
            if response is None:
                response = self._open[watch] = _Response(watch, *self.ids[watch])
                self._queue.append(response)
            part = frames[begin:end]
            size = sum(map(len, part))
            response.frames += part
            response.size += size
            response.through = through if end == len(changes) else changes[end].revision - 1
            self._count(size)
            if response.size >= RESPONSE_BYTES_MAX or len(response.frames) >= RESPONSE_CHANGES_MAX:
                del self._open[watch]
            begin = end
        self._wakes.wake(self._changed)

    def _ends(self, watch: Watch, changes: Sequence[Change], frames: Sequence[bytes]) -> Iterator[int]:
        """Where responses end: with the revision that fills one, and the last with the changes."""
        response = self._open.get(watch)
        size, count = (response.size, len(response.frames)) if response is not None else (0, 0)
        for number in range(1, len(changes)):
            size += len(frames[number - 1])
            count += 1
            full = size >= RESPONSE_BYTES_MAX or count >= RESPONSE_CHANGES_MAX
            if full and changes[number].revision != changes[number - 1].revision:
                yield number
                size = count = 0
        yield len(changes)

    def cancelled(self, watch: Watch, compact_revision: int) -> None:
        watch_id = self.forget(watch)
        self.tell(self._hub.revision, watch_id=watch_id, canceled=True, compact_revision=compact_revision)
        self.on_cancelled(watch_id)

    def closed(self) -> None:
        self._stopping = True
        if self._drained is not None:
            self._drained.set()

    # The stream's side.

    def tell(
        self,
        revision: int,
        *,
        watch_id: int,
        created: bool = False,
        canceled: bool = False,
        compact_revision: int = 0,
        cancel_reason: str = "",
    ) -> None:
        """Queue a response without events."""
        response = WatchResponse(
            watch_id=watch_id,
            created=created,
            canceled=canceled,
            compact_revision=compact_revision,
            cancel_reason=cancel_reason,
        )
        raw = self._header(revision) + response.SerializeToString()
        self._queue.append(raw)
        self._count(len(raw))
        self._changed.set()

    def forget(self, watch: Watch) -> int:
        """A watch has ended; what is queued for it is still sent. Returns its id."""
        self._open.pop(watch, None)
        return self.ids.pop(watch)[0]

    def has_pending(self, watch: Watch) -> bool:
        """Whether changes for the watch wait to be sent."""
        return watch in self._open

    def pop(self) -> Iterable[bytes]:
        """The next response, in its parts; nothing when there is none."""
        if not self._queue:
            self._changed.clear()
            return ()
        item = self._queue.popleft()
        if isinstance(item, bytes):
            self._count(-len(item))
            return (item,)
        if self._open.get(item.watch) is item:
            del self._open[item.watch]
        self._count(-item.size)
        self.reported.add(item.watch_id)
        return self._parts(item)

    async def wait(self) -> None:
        """Until there is something to send, or `end` was called."""
        if not self._ended:
            await self._changed.wait()

    def yield_turn(self) -> None:
        """`wait` waits for a turn among the others, even if there is something to send."""
        if not self._ended:
            self._changed.clear()
            self._wakes.wake(self._changed)

    async def wait_room(self) -> None:
        """Until the buffer is not over its bound: whoever adds responses of his own waits here first."""
        while self.bytes > self._bytes_max and not self._stopping:
            self._drained = asyncio.Event()
            await self._drained.wait()

    def end(self) -> None:
        """Nothing will be added, the watches have ended; what is queued is still sent, and `wait` waits no more."""
        for watch in self.ids:
            self._hub.remove(watch)
        self.ids.clear()
        self._open.clear()
        self._ended = True
        self._changed.set()

    @property
    def ended(self) -> bool:
        """Whether all has been sent that ever will be."""
        return self._ended and not self._queue

    def close(self) -> None:
        """Forget everything, in the hub too."""
        self.end()
        self._queue.clear()
        self._hub.buffered_bytes -= self.bytes
        self.bytes = 0

    def _count(self, size: int) -> None:
        self.bytes += size
        self._hub.buffered_bytes += size
        # Only when there is plenty of room: what is stuck is read from the store, and that should be worth it.
        if size < 0 and self.bytes <= self._bytes_max // 2:
            if self._drained is not None:
                self._drained.set()
            self._hub.drained(self)

    def _parts(self, response: _Response) -> Iterator[bytes]:
        head = self._header(response.through)
        if response.watch_id:
            head += _WATCH_ID + varint(response.watch_id)
        frames = response.frames
        if not response.fragment or len(frames) < 2 or len(head) + response.size < FRAGMENT_BYTES:
            yield head + b"".join(frames)
            return
        begin = 0
        while begin < len(frames):
            end, size = begin + 1, len(head) + len(_FRAGMENT) + len(frames[begin])
            while end < len(frames) and size + len(frames[end]) < FRAGMENT_BYTES:
                size += len(frames[end])
                end += 1
            yield head + (_FRAGMENT if end < len(frames) else b"") + b"".join(frames[begin:end])
            begin = end


class HistoryGone(Exception):
    """What a listener needed next has been compacted; read afresh."""


class Listener:
    """Changes for somebody inside this node; a `Sink`. Use it as a context manager, so that it ends."""

    def __init__(self, hub: WatchHub) -> None:
        self._hub = hub
        self._watches: list[Watch] = []
        self._changes: deque[Change] = deque()
        self._bytes = 0
        self._fault: Exception | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watch in self._watches:
            self._hub.remove(watch)

    def add(self, key: bytes, stop: bytes | None, start_revision: int, *, no_put: bool = False) -> None:
        """Listen for this too. Raises Stopping."""
        self._watches.append(self._hub.add(self, key, stop, start_revision=start_revision, no_put=no_put))

    async def next(self) -> Change:
        """The next change; of one key in order, of several keys nearly so.

        Raises:
            HistoryGone: it was compacted before it could be read.
            Stopping: the node stops.
        """
        while not self._changes:
            if self._fault is not None:
                raise self._fault
            self._changed.clear()
            await self._changed.wait()
        change = self._changes.popleft()
        if not self._changes:
            self._bytes = 0
            self._hub.drained(self)
        return change

    def room(self) -> int:
        return LISTENER_BYTES_MAX - self._bytes

    def take(self, watch: Watch, changes: Sequence[Change], through: int) -> None:
        self._changes.extend(changes)
        self._bytes += sum(len(change.frame(False)) for change in changes)
        self._changed.set()

    def cancelled(self, watch: Watch, compact_revision: int) -> None:
        self._fault = HistoryGone(compact_revision)
        self._changed.set()

    def closed(self) -> None:
        self._fault = Stopping()
        self._changed.set()
