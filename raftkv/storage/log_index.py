"""What the log store keeps in memory so that consensus seldom reads the disk: terms, and the newest entries.

Terms change rarely, so they are kept as runs: (first index of the run, term). Entries that were just appended are
about to be sent and applied, so the newest few are kept as they are.

    compacted | first ........................ last
               run of term 1 | run of term 4 |
                                     recent ...

Invariants: runs begin at `first - 1` (the compacted index, whose term must be known), their indexes and terms rise;
`recent` is contiguous and ends at `last`. Written by the disk thread and read by the loop: each public call is atomic.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

from raftkv.raft.types import Compacted, Entry

RECENT_BYTES_MAX = 2 << 20
_ENTRY_OVERHEAD_BYTES = 128  # a small entry costs its object, not its data


class LogIndex:
    """Terms of the whole log and the newest entries."""

    def __init__(self, compacted_index: int, compacted_term: int) -> None:
        self.first = compacted_index + 1
        self.last = compacted_index
        self._run_starts = [compacted_index]
        self._run_terms = [compacted_term]
        self._recent: list[Entry] = []
        self._recent_bytes = 0
        self._lock = threading.Lock()

    @property
    def last_term(self) -> int:
        """Term of the last entry, or of the compacted index when there is none."""
        return self._run_terms[-1]

    def term(self, index: int) -> int:
        """
        Raises:
            Compacted: below the compacted index.
            LookupError: above the last entry.
        """
        with self._lock:
            return self._term(index)

    def _term(self, index: int) -> int:
        if index > self.last:
            raise LookupError(f"index {index} is after the last, {self.last}")
        if index >= self._run_starts[-1]:
            return self._run_terms[-1]
        if index < self.first - 1:
            raise Compacted(f"index {index} is compacted; the first is {self.first}")
        return self._run_terms[bisect_right(self._run_starts, index) - 1]

    def recent(self, low: int, high: int) -> tuple[int, list[Entry]]:
        """The first index held in memory within [low, high), and the entries from there; `high` when there are none.

        Raises:
            Compacted: `low` is compacted.
            LookupError: `low` is after the last entry.
        """
        with self._lock:
            if low < self.first:
                raise Compacted(f"index {low} is compacted; the first is {self.first}")
            if low > self.last:
                raise LookupError(f"index {low} is after the last, {self.last}")
            high = min(high, self.last + 1)
            held_from = self.last + 1 - len(self._recent)
            start = max(low, held_from)
            if start >= high:
                return high, []
            return start, self._recent[start - held_from : high - held_from]

    def append(self, entries: Sequence[Entry]) -> None:
        """Put `entries` behind the log, in place of whatever it has from their first index on."""
        with self._lock:
            first = entries[0].index
            if first <= self.last:
                self._truncate(first)
            terms = self._run_terms
            if entries[-1].term != terms[-1]:
                for entry in entries:
                    if entry.term != terms[-1]:
                        self._run_starts.append(entry.index)
                        terms.append(entry.term)
            self._recent.extend(entries)
            for entry in entries:
                self._recent_bytes += len(entry.data) + _ENTRY_OVERHEAD_BYTES
            self.last = entries[-1].index
            if self._recent_bytes > RECENT_BYTES_MAX:
                self._shrink_recent(RECENT_BYTES_MAX // 2)

    def extend_run(self, index: int, term: int) -> None:
        """Take note of the next entry without keeping it: while the store is being opened."""
        with self._lock:
            if term != self._run_terms[-1]:
                self._run_starts.append(index)
                self._run_terms.append(term)
            self.last = index

    def compact(self, index: int) -> None:
        """Forget everything up to and including `index`, but its term."""
        with self._lock:
            term = self._term(index)
            keep = bisect_right(self._run_starts, index)
            self._run_starts[:keep] = [index]
            self._run_terms[:keep] = [term]
            self.first = index + 1
            held_from = self.last + 1 - len(self._recent)
            if held_from <= index:
                self._drop_recent(index + 1 - held_from)

    def reset(self, index: int, term: int) -> None:
        """Forget everything; the log goes on behind (index, term)."""
        with self._lock:
            self._run_starts[:] = [index]
            self._run_terms[:] = [term]
            self._recent.clear()
            self._recent_bytes = 0
            self.first = index + 1
            self.last = index

    def _truncate(self, index: int) -> None:
        keep = max(1, bisect_right(self._run_starts, index - 1))
        del self._run_starts[keep:]
        del self._run_terms[keep:]
        held_from = self.last + 1 - len(self._recent)
        cut = max(0, index - held_from)
        for entry in self._recent[cut:]:
            self._recent_bytes -= len(entry.data) + _ENTRY_OVERHEAD_BYTES
        del self._recent[cut:]
        self.last = index - 1

    def _shrink_recent(self, bytes_max: int) -> None:
        # Always keeps the last one: it is what is asked for next.
        count, size = 0, self._recent_bytes
        while size > bytes_max and count < len(self._recent) - 1:
            size -= len(self._recent[count].data) + _ENTRY_OVERHEAD_BYTES
            count += 1
        del self._recent[:count]
        self._recent_bytes = size

    def _drop_recent(self, count: int) -> None:
        for entry in self._recent[:count]:
            self._recent_bytes -= len(entry.data) + _ENTRY_OVERHEAD_BYTES
        del self._recent[:count]
