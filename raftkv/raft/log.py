"""The log as consensus sees it: what is on disk, its tail that is not yet there, and how far it is agreed.

      compacted | on disk ......................... | on its way to the disk | not yet handed out
                ^first                       stable^                  handed^               last^
                       ^applied  ^applying     ^commit

Recent entries are kept in memory (`cache_bytes_max`), everything beyond `stable` always is; older ones are read
back through `LogReader`.

Invariants: applied <= applying <= commit <= last; applying <= stable, so only what is durable here is applied;
stable <= handed <= last; indexes without holes, terms never fall (R6).

Several writes may be under way at once. When a suffix is overwritten in memory while an older version of it is
still being written, that write vouches only for what lies below the overwritten index: each write remembers how
far it may still vouch (`_Write.last`), and every truncation lowers it. Comparing terms would not do: an entry can
leave a log and come back, and then the older write would vouch for what a later one is about to remove.

See: Ongaro 3.5, 3.6, 5.1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from raftkv.raft.types import Entry, EntryKind, HardState, Index, LogReader, SnapshotMeta, Term

ENTRY_OVERHEAD_BYTES = 32
"""What an entry counts beyond its data, so that empty entries have a bound too."""


def entry_bytes(entry: Entry) -> int:
    """What an entry counts against limits."""
    return len(entry.data) + ENTRY_OVERHEAD_BYTES


class _Write:
    """A Ready on its way to the disk."""

    __slots__ = ("last", "number")

    def __init__(self, number: int, last: Index) -> None:
        self.number = number
        self.last = last  # entries up to here are durable once it is done; lowered by truncation


class Log:
    """See the module."""

    def __init__(self, storage: LogReader, hard_state: HardState, applied: Index, cache_bytes_max: int) -> None:
        self._storage = storage
        self._cache_bytes_max = cache_bytes_max
        self.first = storage.first_index()
        self._compacted_term = storage.term(self.first - 1) if self.first > 1 else 0
        self.last: Index = storage.last_index()
        assert self.last >= self.first - 1, f"log ends at {self.last}, before its beginning at {self.first}"
        self.last_term: Term = storage.term(self.last) if self.last >= self.first else self._compacted_term
        self.stable = self.last
        self.handed = self.last
        assert self.first - 1 <= applied <= self.last, (
            f"the state has applied {applied}, the log holds {self.first}..{self.last}"
        )
        # The commit index is written lazily, so the state may know more than the hard state.
        self.commit = max(min(hard_state.commit, self.last), applied)
        self.applied = applied
        self.applying = applied
        self.install: SnapshotMeta | None = None  # received, not yet handed out
        self._offset = self.last + 1  # index of _entries[0]; _offset - 1 <= stable
        self._entries: list[Entry] = []
        self._bytes = 0
        self._writes: deque[_Write] = deque()

    # Questions.

    def term(self, index: Index) -> Term | None:
        """Term of the entry at `index`; None when the log does not have it, compacted or not yet there."""
        if index == self.last:
            return self.last_term
        position = index - self._offset
        if position >= 0:
            return self._entries[position].term if position < len(self._entries) else None
        if index < self.first:
            return self._compacted_term if index == self.first - 1 else None
        try:
            return self._storage.term(index)
        except LookupError:
            return None

    def matches(self, index: Index, term: Term) -> bool:
        """Whether the entry at `index` has `term`; (0, 0), the beginning of every log, matches."""
        return self.term(index) == term

    def up_to_date(self, last_index: Index, last_term: Term) -> bool:
        """Whether a log that ends so holds at least as much as this one (Ongaro 3.6.1)."""
        return last_term > self.last_term or (last_term == self.last_term and last_index >= self.last)

    def in_memory(self, index: Index) -> bool:
        """Whether reading from `index` on costs no access to the disk."""
        return index >= self._offset

    def slice(self, low: Index, high: Index, bytes_max: int) -> tuple[Entry, ...] | None:
        """Entries of [low, high), cut at `bytes_max` but at least one; None when they are compacted."""
        if low >= high:
            return ()
        position = low - self._offset
        if position < 0:
            if low < self.first:
                return None
            try:
                return tuple(self._storage.entries(low, min(high, self._offset), bytes_max))
            except LookupError:
                return None
        entries = self._entries
        stop = high - self._offset
        if stop - position == 1:
            return (entries[position],)
        size = entry_bytes(entries[position])
        for end in range(position + 1, stop):
            size += entry_bytes(entries[end])
            if size > bytes_max:
                return tuple(entries[position:end])
        return tuple(entries[position:stop])

    def last_not_after(self, index: Index, term: Term) -> tuple[Index, Term]:
        """The last entry at or before `index` whose term is at most `term`; (i, 0) when it is compacted.

        Where two logs may meet at best, so one refused append skips a whole term (Ongaro 3.5, after the proof).
        Terms never fall along the log, hence the binary search.
        """
        low, high = self.first - 1, min(index, self.last)
        if high < low or (self.term(low) or 0) > term:
            return max(min(low - 1, high), 0), 0
        while low < high:
            middle = (low + high + 1) // 2
            found = self.term(middle)
            if found is not None and found > term:
                high = middle - 1
            else:  # None: compacted meanwhile, what is left lies above
                low = middle
        return low, self.term(low) or 0

    def has_conf_change(self, low: Index, high: Index, bytes_max: int = 1 << 20) -> bool:
        """Whether [low, high) holds a conf change; True when that cannot be told."""
        while low < high:
            entries = self.slice(low, high, bytes_max)
            if not entries:
                return True
            if any(entry.kind is EntryKind.CONF_CHANGE for entry in entries):
                return True
            low += len(entries)
        return False

    # Changes.

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries right after the last one."""
        last, term, size = self.last, self.last_term, 0
        for entry in entries:
            assert entry.index == last + 1, f"a hole in the log: {entry.index} after {last}"  # R6
            assert entry.term >= term, f"terms fall: {entry.term} after {term} at {entry.index}"  # R6
            last, term = entry.index, entry.term
            size += len(entry.data) + ENTRY_OVERHEAD_BYTES
        self._entries.extend(entries)
        self.last, self.last_term = last, term
        self._bytes += size
        if self._bytes > self._cache_bytes_max:
            self._trim()

    def truncate(self, start: Index) -> None:
        """Drop everything from `start`: a leader has something else there."""
        assert self.commit < start <= self.last, f"truncation at {start} of {self.commit}..{self.last}"  # R7
        if start <= self._offset:
            self._entries.clear()
            self._offset = start
            self._bytes = 0
        else:
            gone = self._entries[start - self._offset :]
            del self._entries[start - self._offset :]
            self._bytes -= sum(map(entry_bytes, gone))
        term = self.term(start - 1) if start > self.first else self._compacted_term
        assert term is not None, f"no entry at {start - 1}"
        self.last, self.last_term = start - 1, term
        self.stable = min(self.stable, self.last)
        self.handed = min(self.handed, self.last)
        for write in self._writes:
            write.last = min(write.last, self.last)

    def commit_to(self, index: Index) -> bool:
        """Raise the commit index; whether it rose."""
        if index <= self.commit:
            return False  # R7: never falls
        assert index <= self.last, f"commit {index} beyond the end {self.last}"  # R7
        self.commit = index
        return True

    def restore(self, meta: SnapshotMeta) -> None:
        """Become the empty log after a received snapshot. Nothing of it is durable until its Ready is."""
        assert meta.index > self.commit, f"snapshot {meta.index} is behind commit {self.commit}"  # R10
        self._entries.clear()
        self._bytes = 0
        self._offset = meta.index + 1
        self.first = meta.index + 1
        self._compacted_term = meta.term
        self.last, self.last_term = meta.index, meta.term
        self.commit = self.applying = meta.index
        self.handed = meta.index
        self.stable = 0
        self.install = meta
        for write in self._writes:
            write.last = 0

    def compacted(self, index: Index) -> None:
        """The store has dropped everything up to `index`; recent entries may still be here in memory."""
        if index < self.first:
            return
        assert index <= self.applied, f"compacted to {index}, applied {self.applied}"
        term = self.term(index)
        if term is None:  # the store has gone further meanwhile
            meta = self._storage.snapshot()
            index, term = meta.index, meta.term
        self.first = index + 1
        self._compacted_term = term

    # What a Ready takes and what comes back.

    @property
    def writing(self) -> bool:
        """Whether a write is under way."""
        return bool(self._writes)

    @property
    def oldest_write(self) -> int:
        """Number of the oldest write under way, 0 when there is none: it moves when the disk does."""
        return self._writes[0].number if self._writes else 0

    def take_unstable(self) -> tuple[Entry, ...]:
        """Entries that go to the disk next."""
        if self.handed == self.last:
            return ()
        entries = tuple(self._entries[self.handed + 1 - self._offset :])
        self.handed = self.last
        return entries

    def take_install(self) -> SnapshotMeta | None:
        """The snapshot that goes to the disk next, before the entries."""
        meta, self.install = self.install, None
        return meta

    def write_begins(self, number: int) -> None:
        """What was taken is on its way as write `number`."""
        self._writes.append(_Write(number, self.handed))

    def persisted(self, number: int) -> bool:
        """Write `number` and all before it are durable; whether `stable` rose."""
        stable = self.stable
        while self._writes and self._writes[0].number <= number:
            stable = max(stable, self._writes.popleft().last)
        if stable == self.stable:
            return False
        assert self.stable < stable <= self.handed, f"durable {self.stable} -> {stable}, handed {self.handed}"
        self.stable = stable
        self.applied = max(self.applied, min(self.first - 1, stable))  # an installed snapshot is applied state
        if self._bytes > self._cache_bytes_max:
            self._trim()
        return True

    @property
    def has_committed(self) -> bool:
        """Whether there is something to apply."""
        return self.applying < self.commit and self.applying < self.stable

    def take_committed(self, bytes_max: int) -> tuple[Entry, ...]:
        """Entries to apply next: committed, and durable here."""
        high = min(self.commit, self.stable)
        if self.applying >= high:
            return ()
        entries = self.slice(self.applying + 1, high + 1, bytes_max)
        assert entries, f"{self.applying + 1} was compacted before it was applied"
        self.applying = entries[-1].index
        return entries

    def applied_to(self, index: Index) -> None:
        """The state machine has applied everything up to `index`."""
        assert index <= self.applying, f"applied {index}, handed out {self.applying}"
        self.applied = max(self.applied, index)

    def _trim(self) -> None:
        """Forget the oldest durable entries until a quarter of the room is free again."""
        target = self._cache_bytes_max - self._cache_bytes_max // 4
        count = 0
        size = self._bytes
        for entry in self._entries:
            if size <= target or entry.index > self.stable:
                break
            size -= entry_bytes(entry)
            count += 1
        if count:
            del self._entries[:count]
            self._offset += count
            self._bytes = size
