"""Who on this node is to be told of which changes: watches, however their clients are reached.

    apply --advance--> SYNCED watches get the changes of this turn, which are read from the store once for all
                          |  ^
             no room for  |  |  has caught up with the store
                          v  |
    STUCK --drained--> BEHIND: reads on from the store in chunks, in turn: see `watch_history`
                          |
                          +--> cancelled: what it needs next has been compacted

Nothing is kept for a watch but the revision it needs next: a client that does not read costs its bounded buffer, and
what it missed waits in the store. Chunks are read on the loop while they are small, else in a thread over a view.

Invariants: a watch gets each change it wants exactly once, in the order of revisions, all of a revision together, and
nothing below its start; or it is cancelled with the compact revision. While there are watches, `revision` is the
machine's whenever anybody else may run.    See: reliability W1 to W8.
"""

from __future__ import annotations

import concurrent.futures
import enum
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raftkv._pb.common_pb2 import Event
from raftkv.server.errors import Stopping
from raftkv.server.watch_changes import Change
from raftkv.server.watch_history import (
    APART_REVISIONS_MAX,
    CHUNK_COST_BYTES,
    CHUNK_WATCHES_MAX,
    LOOP_REVISIONS_MAX,
    Chunk,
    Found,
    Pace,
    Plan,
)
from raftkv.server.watch_matching import Matcher, drop
from raftkv.state.machine import StateMachine
from raftkv.state.mvcc import Reader

BUFFERED_BYTES_MAX = 16 * 1024 * 1024
"""What all sinks of a node may hold together; beyond it, only a sink that holds nothing takes more, and little."""


class State(enum.Enum):
    """See the picture in the module."""

    SYNCED = enum.auto()
    BEHIND = enum.auto()
    STUCK = enum.auto()
    GONE = enum.auto()


class Sink(Protocol):
    """Where changes go: the buffer of a client's stream, or somebody who waits inside this node."""

    def room(self) -> int:
        """Bytes that still fit; a revision that begins within them is taken whole."""
        ...

    def take(self, watch: Watch, changes: Sequence[Change], through: int) -> None:
        """Changes of whole revisions; with them the watch has everything up to the revision `through`."""
        ...

    def cancelled(self, watch: Watch, compact_revision: int) -> None:
        """The watch has ended: what it needs next has been compacted."""
        ...

    def closed(self) -> None:
        """The node stops; nothing will come any more."""
        ...


class Watch:
    """Interest in a key or a range; made by `WatchHub.add`."""

    __slots__ = ("key", "next_revision", "no_delete", "no_put", "prev_kv", "sink", "start_revision", "state", "stop")

    def __init__(
        self, sink: Sink, key: bytes, stop: bytes | None, start_revision: int, prev_kv: bool, filters: tuple[bool, bool]
    ) -> None:
        self.sink = sink
        self.key = key
        self.stop = stop  # None: no end
        self.start_revision = start_revision  # as asked for; 0 is from now on
        self.next_revision = start_revision  # everything before it was delivered, or is not wanted; see `advance`
        self.prev_kv = prev_kv
        self.no_put, self.no_delete = filters
        self.state = State.GONE

    def wants(self, event: Event) -> bool:
        """Whether the filters let an event of its range pass."""
        return not (self.no_delete if event.type == Event.DELETE else self.no_put)


class Loop(Protocol):
    """What the hub needs of asyncio's loop."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any) -> object: ...

    def call_soon(self, callback: Callable[..., object], /, *args: Any) -> object: ...

    def call_soon_threadsafe(self, callback: Callable[..., object], /, *args: Any) -> object: ...


Apart = Callable[[Callable[[Reader], Found]], "concurrent.futures.Future[Found]"]


class WatchHub:
    """All watches of one node; see the module. Belongs to the node's loop."""

    def __init__(
        self,
        machine: Callable[[], StateMachine],
        loop: Loop,
        apart: Apart,
        fatal: Callable[[BaseException], None],
        loop_revisions_max: int = LOOP_REVISIONS_MAX,
        on_watched: Callable[[bool], None] = lambda watched: None,
    ) -> None:
        """
        Args:
            machine: the state as it is now; another one after a snapshot was installed.
            apart: runs its argument in a thread over a view of the state as it is now.
            fatal: what to do about an error that must not be.
            loop_revisions_max: a backlog of more revisions than this is read apart.
            on_watched: told when the first watch comes and when the last one is gone.
        """
        self._current = machine
        self._machine = machine()
        self._loop = loop
        self._apart = apart
        self._fatal = fatal
        self._loop_revisions_max = loop_revisions_max
        self._on_watched = on_watched
        self.revision = self._machine.revision
        """Up to here, synced watches have everything."""
        self.buffered_bytes = 0
        """What all sinks hold; they keep count."""
        self._watches: dict[Watch, None] = {}
        self._synced = Matcher()
        self._with_prev_kv = 0  # of the synced
        self._behind: dict[Watch, None] = {}
        self._stuck: dict[Sink, dict[Watch, None]] = {}
        self._pace = Pace(loop.time)
        self._chunk: Chunk | None = None  # being handed out
        self._near_first = False  # whose turn it was
        self._due = False  # a step is in the loop's queue
        self._reading = False  # a chunk is being read apart
        self._closed = False

    def __len__(self) -> int:
        return len(self._watches)

    @property
    def behind(self) -> int:
        """Watches that do not have everything, whosever fault it is."""
        return len(self._behind) + sum(len(watches) for watches in self._stuck.values())

    def add(
        self,
        sink: Sink,
        key: bytes,
        stop: bytes | None,
        *,
        start_revision: int = 0,
        prev_kv: bool = False,
        no_put: bool = False,
        no_delete: bool = False,
    ) -> Watch:
        """Watch the keys in [key, stop); `stop` None is without end. Nothing reaches the sink before this returns.

        Args:
            start_revision: the first revision that is wanted; 0 is what comes after now, and it may be in the future.
        Raises:
            Stopping: the node stops.
        """
        if self._closed:
            raise Stopping
        if not self._watches:  # nobody has moved these while nobody watched
            self._machine = self._current()
            self.revision = self._machine.revision
            self._on_watched(True)
        watch = Watch(sink, key, stop, start_revision, prev_kv, (no_put, no_delete))
        watch.next_revision = start_revision or self.revision + 1
        self._watches[watch] = None
        self._place(watch)
        return watch

    def remove(self, watch: Watch) -> None:
        """Tell this one nothing any more."""
        if watch.state is not State.GONE:
            self._displace(watch)
            watch.state = State.GONE
            del self._watches[watch]
            if not self._watches:
                self._on_watched(False)

    def current_revision(self) -> int:
        """The store's revision; synced watches have been told everything up to it."""
        return self._current().revision

    def has_all(self, watch: Watch) -> bool:
        """Whether it can be said of the watch that it got everything up to `revision`, and not only from later on.

        One that begins with the next revision, as when a client takes up where it was, counts: nothing is left out.
        """
        return watch.state is State.SYNCED and watch.start_revision <= self.revision + 1

    def advance(self) -> None:
        """The state has moved on: to be called after each apply and each installed snapshot, in the same turn."""
        if not self._watches:
            return
        machine = self._current()
        if machine is not self._machine:
            self._reattach(machine)
            return
        first, revision = self.revision + 1, machine.revision
        if revision < first:
            return
        self.revision = revision
        self._pace.written()
        reader = machine.reader()
        # A compaction in this same turn forbids to read what it followed, though nothing has been taken out yet: the
        # sweep of this compaction has not begun, and no sweep before it went beyond what had been read here.
        reader.compact_revision = min(reader.compact_revision, first - 1)
        found: dict[Watch, list[Change]] = {}
        match, wanted = self._synced.match, self._synced.touches()
        for at, events in reader.changes(first, revision, prev_kv=self._with_prev_kv > 0, wanted=wanted):
            for event in events:
                change = Change(at, event)
                for watch in match(event.kv.key):
                    if at >= watch.next_revision and watch.wants(event):
                        found.setdefault(watch, []).append(change)
        for watch, changes in found.items():
            self._deliver(watch, changes, revision)

    def drained(self, sink: Sink) -> None:
        """The sink has room again."""
        for watch in self._stuck.pop(sink, ()):
            watch.state = State.BEHIND
            self._behind[watch] = None
        self._schedule()

    def close(self) -> None:
        """The node stops: nobody is told anything any more, and those who wait inside this node learn it."""
        self._closed = True
        for sink in {watch.sink: None for watch in self._watches}:
            sink.closed()

    # Where a watch stands.

    def _place(self, watch: Watch) -> None:
        """Put it where its next revision says; it is nowhere yet."""
        if watch.next_revision > self.revision:
            watch.state = State.SYNCED
            self._synced.add(watch)
            self._with_prev_kv += watch.prev_kv
        else:
            watch.state = State.BEHIND
            self._behind[watch] = None
            self._schedule()

    def _displace(self, watch: Watch) -> None:
        if watch.state is State.SYNCED:
            self._synced.discard(watch)
            self._with_prev_kv -= watch.prev_kv
        elif watch.state is State.BEHIND:
            del self._behind[watch]
        elif watch.state is State.STUCK:
            drop(self._stuck, watch.sink, watch)

    def _reattach(self, machine: StateMachine) -> None:
        """Another state took the place of the one we read: what lies between is read from it, if it is there."""
        assert machine.revision >= self.revision, "an installed snapshot went back in time"
        for watch in [watch for watch in self._watches if watch.state is State.SYNCED]:
            self._displace(watch)
            watch.next_revision = max(watch.next_revision, self.revision + 1)
            watch.state = State.BEHIND
            self._behind[watch] = None
        self._machine = machine
        self.revision = machine.revision
        self._schedule()

    def _deliver(self, watch: Watch, changes: list[Change], through: int) -> int:
        """Give a watch what fits; what does not, it reads from the store when there is room. How many bytes it got."""
        sink = watch.sink
        room = sink.room()
        cut = len(changes) if room > 0 else 0
        size, revision = 0, changes[0].revision
        for number in range(cut):
            change = changes[number]
            if size >= room and change.revision != revision:
                cut = number
                break
            revision = change.revision
            size += len(change.frame(watch.prev_kv))
        if cut == len(changes):
            sink.take(watch, changes, through)
            return size
        if cut:
            sink.take(watch, changes[:cut], changes[cut].revision - 1)
        self._displace(watch)
        watch.next_revision = changes[cut].revision
        watch.state = State.STUCK
        self._stuck.setdefault(sink, {})[watch] = None
        return size

    # Catching up.

    def _schedule(self) -> None:
        if (self._behind or self._chunk) and not self._due and not self._reading and not self._closed:
            self._due = True
            pause_s = self._pace.pause_s()
            if pause_s:
                self._loop.call_later(pause_s, self._step)
            else:
                self._loop.call_soon(self._step)

    def _step(self) -> None:
        """Bring those that are behind forward by a slice."""
        try:
            if self._chunk is None and not self._closed:
                self._catch_up()
            if self._chunk is not None and not self._closed:
                self._hand_out(self._chunk)
        except Exception as fault:  # noqa: BLE001 - somebody would miss changes and never know
            self._fatal(fault)
            return
        self._pace.set_behind(bool(self._behind))
        self._pace.end()
        self._due = False  # and not before: what happens here must not plan the next step without the pause
        self._schedule()

    def _whose_turn(self) -> list[Watch]:
        """Those to read the next chunk for: one, and whoever is near it."""
        behind: list[Watch] = []
        compacted = self._machine.compact_revision
        for watch in list(itertools.islice(self._behind, CHUNK_WATCHES_MAX)):
            if watch.next_revision < compacted:
                self.remove(watch)
                watch.sink.cancelled(watch, compacted)
            elif watch.next_revision > self.revision:
                self._displace(watch)
                self._place(watch)
            else:
                behind.append(watch)
        near = self._loop_revisions_max
        first = 0
        self._near_first = not self._near_first
        if self._near_first:
            first = next((n for n, watch in enumerate(behind) if self.revision - watch.next_revision < near), 0)
        return [watch for watch in behind[first:] if 0 <= watch.next_revision - behind[first].next_revision < near]

    def _catch_up(self) -> None:
        """Have the next chunk read."""
        watches = self._whose_turn()
        if not watches:
            return
        plan = Plan(watches, self._loop_revisions_max)
        self._pace.spend(CHUNK_COST_BYTES)
        if self.revision - plan.first < self._loop_revisions_max:
            self._chunk = Chunk(plan, plan.read(self._machine.reader()))
            return
        plan = Plan(watches, APART_REVISIONS_MAX)
        try:
            job = self._apart(plan.read)
        except Stopping:
            self._closed = True  # there is nobody who reads
            return
        self._reading = True
        job.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._read_apart, plan, done))

    def _read_apart(self, plan: Plan, job: concurrent.futures.Future[Found]) -> None:
        self._reading = False
        if self._closed or job.cancelled():
            return
        try:
            self._chunk = Chunk(plan, job.result())
        except Stopping:
            return
        except Exception as fault:  # noqa: BLE001 - as above
            self._fatal(fault)
            return
        self._schedule()

    def _hand_out(self, chunk: Chunk) -> None:
        """Deliver a slice. Watches may have come, gone and stopped since the chunk was planned, but none of those that
        are behind has moved forward."""
        pace = self._pace
        while chunk.waiting and not pace.is_spent():
            watch = chunk.waiting.popleft()
            if watch.state is not State.BEHIND:
                continue
            changes = chunk.found.of(watch)
            if changes:
                pace.spend(self._deliver(watch, changes, chunk.found.last))
            if watch in self._behind and watch.next_revision <= chunk.found.last:
                watch.next_revision = chunk.found.last + 1
                self._displace(watch)
                self._place(watch)  # where it is behind still, that is the end of the queue
        if not chunk.waiting:
            self._chunk = None
