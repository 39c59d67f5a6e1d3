"""Fake disks: a log whose writes complete when the simulator says so, and a state that is synced now and then.

What a crash leaves is decided by the seed:
  - of the log: all that was synced, and of what was not a *prefix* of whole writes (partial persistence). A write is
    atomic, as a LevelDB batch is;
  - of the state: what it was at some moment not before the last sync. The log is cut only behind a sync, so the
    rest can always be replayed.

`SimLog` is the in-memory twin of `raftkv.storage.LogStore` and asserts what that asserts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from raftkv.raft.types import Compacted, ConfState, Entry, HardState, Index, SnapshotMeta, Term
from raftkv.sim.clock import TICK, Scheduler
from raftkv.state.store import MemoryStore


class SimLog:
    """What a `LogStore` holds, in memory; a `raftkv.raft.types.LogReader`."""

    def __init__(self, conf: ConfState) -> None:
        self.hard_state = HardState(0, 0, 0)
        self.state_name = "state-1"
        self._meta = SnapshotMeta(0, 0, conf)
        self._entries: list[Entry] = []

    def copy(self) -> SimLog:
        """An independent log with the same content."""
        other = SimLog(self._meta.conf)
        other.hard_state, other.state_name, other._meta = self.hard_state, self.state_name, self._meta
        other._entries = list(self._entries)
        return other

    # Reading.

    def initial_state(self) -> tuple[HardState, ConfState]:
        """The hard state, and the conf state as of `snapshot().index`."""
        return self.hard_state, self._meta.conf

    def first_index(self) -> Index:
        """The index after the compacted prefix."""
        return self._meta.index + 1

    def last_index(self) -> Index:
        """The last entry's index, or that of the compacted prefix when there is none."""
        return self._meta.index + len(self._entries)

    def term(self, index: Index) -> Term:
        """Term of an entry, also of the last compacted one.

        Raises:
            LookupError: the log does not have it.
        """
        if index == self._meta.index:
            return self._meta.term
        return self._entries[self._place(index)].term

    def entries(self, low: Index, high: Index, bytes_max: int) -> list[Entry]:
        """The entries of [low, high), cut at `bytes_max` of data but at least one.

        Raises:
            LookupError: the log does not have `low`.
        """
        if high <= low:
            return []
        result: list[Entry] = []
        for entry in self._entries[self._place(low) : high - self._meta.index - 1]:
            bytes_max -= len(entry.data)
            if bytes_max < 0 and result:
                break
            result.append(entry)
        return result

    def snapshot(self) -> SnapshotMeta:
        """The compacted prefix."""
        return self._meta

    def _place(self, index: Index) -> int:
        place = index - self._meta.index - 1
        if place < 0:
            raise Compacted(f"index {index} is compacted; the first is {self.first_index()}")
        if place >= len(self._entries):
            raise LookupError(f"index {index} is not there yet; the last is {self.last_index()}")
        return place

    # Writing.

    def append(self, hard_state: HardState | None, entries: Sequence[Entry], *, sync: bool = True) -> None:
        """Hard state and entries as one batch; entries replace the log from the first of them on."""
        if entries:
            assert sync, "entries are never written without sync"
            first = entries[0].index
            assert self.first_index() <= first <= self.last_index() + 1, f"{first} does not join {self.last_index()}"
            assert self.hard_state.commit < first, f"entry {first} is committed"
            prev = self.term(first - 1)
            for offset, entry in enumerate(entries):
                assert entry.index == first + offset, f"entry {entry.index} where {first + offset} belongs"  # R6
                assert entry.term >= prev, f"entry {entry.index} of term {entry.term} after term {prev}"  # R6
                prev = entry.term
            del self._entries[first - self._meta.index - 1 :]
            self._entries.extend(entries)
        self._set(hard_state)
        assert self.hard_state.commit <= self.last_index(), "the commit index is behind the end of the log"

    def compact(self, meta: SnapshotMeta) -> None:
        """Drop the entries up to `meta.index`; the state up to there must be durable."""
        if meta.index < self.first_index():
            return
        assert meta.index <= self.last_index(), f"compaction at {meta.index} behind the end {self.last_index()}"
        assert meta.term == self.term(meta.index), f"compaction at {meta.index} with another term"
        del self._entries[: meta.index - self._meta.index]
        self._meta = meta
        self._raise_commit(meta.index)

    def install(self, meta: SnapshotMeta, hard_state: HardState | None, state_name: str) -> None:
        """Make the received state current, and the log begin behind it."""
        assert meta.index >= self._meta.index, f"snapshot {meta.index} is older than the prefix {self._meta.index}"
        keeps = meta.index <= self.last_index() and self.term(meta.index) == meta.term
        assert keeps or meta.index >= self.hard_state.commit, f"snapshot {meta.index} contradicts committed entries"
        if keeps:
            del self._entries[: meta.index - self._meta.index]
        else:
            self._entries.clear()
        self._meta = meta
        self.state_name = state_name
        self._set(hard_state)
        commit = min(max(self.hard_state.commit, meta.index), self.last_index())  # what lies behind is appended next
        self.hard_state = HardState(self.hard_state.term, self.hard_state.vote, commit)

    def _raise_commit(self, index: Index) -> None:
        hard_state = self.hard_state
        self.hard_state = HardState(hard_state.term, hard_state.vote, max(hard_state.commit, index))

    def _set(self, hard_state: HardState | None) -> None:
        if hard_state is None:
            return
        old = self.hard_state
        assert hard_state.term >= old.term, f"term falls from {old.term} to {hard_state.term}"
        assert hard_state.term > old.term or old.vote in (0, hard_state.vote), f"second vote in term {old.term}"
        self.hard_state = hard_state


@dataclass(frozen=True, slots=True)
class Write:
    """One atomic write on its way."""

    change: Callable[[SimLog], None]
    sync: bool
    done: Callable[[], None]


class SimDisk:
    """The log's disk: takes writes, completes them later and in order, several at once like a group commit."""

    def __init__(self, scheduler: Scheduler, random: Random, conf: ConfState) -> None:
        self._scheduler = scheduler
        self._random = random
        self.visible = SimLog(conf)
        """What a reader sees: every completed write."""
        self.durable = self.visible.copy()
        """What is there after a crash at the worst moment."""
        self._unsynced: list[Write] = []  # completed, but not synced by themselves or a later one
        self._queue: list[Write] = []
        self._life = 0
        self._busy = False
        self.delay_ticks = 0.1
        """How long a sync takes on average."""
        self.stalled = False

    def write(self, change: Callable[[SimLog], None], done: Callable[[], None], *, sync: bool = True) -> None:
        """Hand over one write; `done` is called when it is complete."""
        self._queue.append(Write(change, sync, done))
        self._begin()

    @property
    def pending(self) -> int:
        """Writes that are not complete."""
        return len(self._queue)

    def stall(self, stalled: bool) -> None:
        """Complete nothing from now on, or go on."""
        self.stalled = stalled
        self._begin()

    def crash(self) -> None:
        """Power is lost: what remains is what was synced, and a prefix of the rest that the seed chooses."""
        self._life += 1
        self._busy = False
        rest = self._unsynced + self._queue
        kept = self._random.choice((0, 0, len(rest), self._random.randint(0, len(rest))))
        for write in rest[:kept]:
            write.change(self.durable)
        self._unsynced.clear()
        self._queue.clear()
        self.visible = self.durable.copy()

    def _begin(self) -> None:
        if self._queue and not self._busy and not self.stalled:
            self._busy = True
            life, count = self._life, self._random.randint(1, len(self._queue))
            delay = int(self._random.expovariate(1 / (self.delay_ticks * TICK)))
            self._scheduler.after(delay, lambda: self._complete(life, count))

    def _complete(self, life: int, count: int) -> None:
        if life != self._life:
            return
        self._busy = False
        if self.stalled:
            return
        group, self._queue = self._queue[:count], self._queue[count:]
        for write in group:
            write.change(self.visible)
        self._unsynced.extend(group)
        if any(write.sync for write in group):
            for write in self._unsynced:
                write.change(self.durable)
            self._unsynced.clear()
        group_life = self._life
        for write in group:
            if group_life == self._life:  # what `done` does may be the end of this life
                write.done()
        self._begin()


class SimState:
    """One state directory: written without sync, made durable now and then."""

    KEPT_MAX = 4
    """How many un-synced moments a crash can choose from, beside the last sync and the last write."""

    def __init__(self, random: Random, store: MemoryStore) -> None:
        self._random = random
        self.store = store
        self._synced = store.copy()
        self._moments: list[MemoryStore] = []

    def written(self) -> None:
        """One whole write was made."""
        if self._random.random() < 0.2:
            self._moments.append(self.store.copy())
            del self._moments[: -self.KEPT_MAX]

    def begin_sync(self) -> MemoryStore:
        """The state that is durable once the sync, which begins now, is done."""
        return self.store.copy()

    def synced(self, store: MemoryStore) -> None:
        """The sync that began with `store` is done."""
        self._synced = store
        self._moments.clear()

    def crash(self) -> SimState:
        """What the next life finds."""
        choices = [self._synced, self._synced, *self._moments, self.store]
        return SimState(self._random, self._random.choice(choices).copy())
