"""History for watches that are behind: what is read of it at once, and how fast it is pushed.

Reading and sending to a thousand clients what they have missed would take all of a node's time, and puts would wait.
So beside writes it goes in slices with pauses between them. Each watch in its turn gets a chunk, and every other turn
is of those who are nearly there, so that nobody waits long behind many who are not. A node that has no writes to apply
goes as fast as it can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from raftkv.server.watch_changes import Change
from raftkv.server.watch_matching import Matcher

if TYPE_CHECKING:
    from raftkv.server.watch import Watch
    from raftkv.state.mvcc import Reader

LOOP_REVISIONS_MAX = 64
"""Revisions of a chunk that is read on the loop: about half a millisecond."""

APART_REVISIONS_MAX = 4096
"""Revisions of a chunk that is read in a thread."""

CHUNK_BYTES_MAX = 64 * 1024
"""A chunk ends behind the revision in which it exceeds this many bytes of what somebody wants."""

CHUNK_WATCHES_MAX = 1_024
"""Of those that are behind so many at most share a chunk, and are looked at for it."""

CHUNK_COST_BYTES = 8 * 1024
"""What reading a chunk counts for, so that much that nobody wants takes no more of the loop than what somebody does."""

SLICE_BYTES = 64 * 1024
"""What is pushed at once: four messages, about a millisecond with what gRPC does about them."""

PAUSE_S = 0.010
HALVES_EVERY_S = 120.0
"""After each `SLICE_BYTES`, beside writes: 6.5 MB/s on a node, for all that are behind together. The longer somebody is
behind, the shorter: whoever reads as fast as others write must not stay behind for ever because of this."""

BUSY_S = 0.25
"""How long after a write more of them are expected."""


class Pace:
    """When the next slice may be pushed."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self._busy_until = 0.0
        self._rest_until = 0.0
        self._behind_since = float("inf")
        self._spent = 0

    def set_behind(self, some: bool) -> None:
        """Whether somebody is behind now."""
        self._behind_since = min(self._behind_since, self._time()) if some else float("inf")

    def written(self) -> None:
        """The node has applied a write."""
        self._busy_until = self._time() + BUSY_S

    def spend(self, size: int) -> None:
        """So much was pushed."""
        self._spent += size

    def is_spent(self) -> bool:
        """Whether a slice is pushed."""
        return self._spent >= SLICE_BYTES

    def end(self) -> None:
        """If it is, the next begins after the pause that is due for it."""
        if self.is_spent():
            now = self._time()
            shorter = 2.0 ** (max(0.0, now - self._behind_since) / HALVES_EVERY_S)
            self._rest_until = now + self._spent / SLICE_BYTES * PAUSE_S / shorter
            self._spent = 0

    def pause_s(self) -> float:
        """For how long nothing is to be pushed."""
        now = self._time()
        return max(0.0, self._rest_until - now) if now < self._busy_until else 0.0


class Found(NamedTuple):
    """A chunk of history, as far as somebody wants it."""

    last: int  # the last revision that was looked at, wanted or not
    changes: dict[tuple[bytes, bytes | None], list[Change]]
    """By range, in order."""

    def of(self, watch: Watch) -> list[Change]:
        """What a watch wants of it and has not got."""
        changes = self.changes.get((watch.key, watch.stop), ())
        return [each for each in changes if each.revision >= watch.next_revision and watch.wants(each.event)]


class Plan:
    """A chunk of history to be read for some watches; `read` may run in a thread, so it looks at nothing that moves."""

    __slots__ = ("_matcher", "_prev_kv", "_revisions_max", "first", "watches")

    def __init__(self, watches: Sequence[Watch], revisions_max: int) -> None:
        self.first = min(watch.next_revision for watch in watches)
        self.watches = watches
        self._matcher = Matcher({(watch.key, watch.stop): watch for watch in watches}.values())  # one of each range
        self._prev_kv = any(watch.prev_kv for watch in watches)
        self._revisions_max = revisions_max

    def read(self, reader: Reader) -> Found:
        """Read the chunk."""
        match, wanted = self._matcher.match, self._matcher.touches()
        found: dict[tuple[bytes, bytes | None], list[Change]] = {}
        left = self._revisions_max
        wanted_bytes = 0
        for revision, events in reader.changes(self.first, left, prev_kv=self._prev_kv, wanted=wanted):
            for event in events:
                change = Change(revision, event)
                for watch in match(event.kv.key):
                    found.setdefault((watch.key, watch.stop), []).append(change)
                wanted_bytes += len(event.kv.key) + len(event.kv.value) + len(event.prev_kv.value)
            left -= 1
            if not left or wanted_bytes > CHUNK_BYTES_MAX:
                return Found(revision, found)
        return Found(reader.revision, found)


class Chunk:
    """What was found, on its way to those it was read for."""

    __slots__ = ("found", "waiting")

    def __init__(self, plan: Plan, found: Found) -> None:
        self.found = found
        self.waiting = deque(plan.watches)
