"""What the leader knows about one follower.

PROBE: we do not know where the logs meet; one append at a time. REPLICATE: we do; appends
are pipelined, `next` runs ahead of `match`. SNAPSHOT: the entries it needs are compacted.

    PROBE --accepted--> REPLICATE --rejected, unreachable--> PROBE
    PROBE --needs a compacted entry--> SNAPSHOT --done, failed--> PROBE

Invariant: 0 <= match < next (R15).    See: Ongaro 3.5, 10.2.2.
"""

from __future__ import annotations

import enum
from collections import deque

from raftkv.raft.types import Index


class ProgressState(enum.Enum):
    """See the module."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class Inflights:
    """Appends that were sent and not yet acknowledged, in order of their last index."""

    __slots__ = ("_appends", "appends_max", "bytes", "bytes_max")

    def __init__(self, appends_max: int, bytes_max: int) -> None:
        self.appends_max = appends_max
        self.bytes_max = bytes_max
        self._appends: deque[tuple[Index, int]] = deque()
        self.bytes = 0  # the sum over _appends

    def __len__(self) -> int:
        return len(self._appends)

    @property
    def full(self) -> bool:
        """Whether the next append must wait."""
        return len(self._appends) >= self.appends_max or self.bytes >= self.bytes_max

    def add(self, last: Index, size: int) -> None:
        """An append that ends at `last` leaves."""
        assert len(self._appends) < self.appends_max, "too many appends in flight"  # R15
        self._appends.append((last, size))
        self.bytes += size

    def free_to(self, index: Index) -> None:
        """Everything up to `index` is acknowledged."""
        appends = self._appends
        while appends and appends[0][0] <= index:
            self.bytes -= appends.popleft()[1]

    def clear(self) -> None:
        """Nothing is in flight any more."""
        self._appends.clear()
        self.bytes = 0


class Progress:
    """See the module."""

    __slots__ = (
        "acked",
        "active_tick",
        "commit_sent",
        "eager",
        "inflights",
        "match",
        "next",
        "notice_due",
        "paused",
        "pending_snapshot",
        "state",
        "token",
    )

    def __init__(self, next_index: Index, tick: int, inflights: Inflights) -> None:
        self.state = ProgressState.PROBE
        self.match: Index = 0  # the follower has this durably, as we do
        self.next: Index = next_index  # what we send next
        self.paused = False  # nothing may be sent until an answer comes
        self.pending_snapshot: Index = 0  # it waits for a snapshot at least this new
        self.inflights = inflights
        self.active_tick = tick  # when it was last heard in this term
        self.acked = False  # whether it acknowledged something since its last heartbeat reply
        self.commit_sent: Index = 0  # the greatest commit index we told it, as far as we know
        self.notice_due: Index = 0  # a commit index it is to hear of as soon as it has the entry; 0: none
        self.eager = False  # somebody there waits to hear what is committed
        self.token = 0  # the greatest heartbeat token it sent back

    def become_probe(self) -> None:
        """Find out anew where the logs meet; a finished snapshot is where they do."""
        if self.state is ProgressState.SNAPSHOT:
            self.next = max(self.match + 1, self.pending_snapshot + 1)
        else:
            self.next = self.match + 1
        self._enter(ProgressState.PROBE)

    def become_replicate(self) -> None:
        """The logs are known to meet at `match`."""
        self.next = self.match + 1
        self._enter(ProgressState.REPLICATE)

    def become_snapshot(self, index: Index) -> None:
        """It needs what is compacted."""
        self._enter(ProgressState.SNAPSHOT)
        self.pending_snapshot = index
        self.paused = True

    def _enter(self, state: ProgressState) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.commit_sent = 0
        self.inflights.clear()

    def sent(self, last: Index, size: int) -> None:
        """An append leaves that ends at `last`, with `size` bytes of entries (0: it is empty)."""
        if self.state is ProgressState.PROBE:
            self.paused = True
        elif size:
            assert last >= self.next
            self.next = last + 1
            self.inflights.add(last, size)
            self.paused = self.inflights.full

    def accepted(self, index: Index) -> bool:
        """It has everything up to `index`; whether that is news."""
        if index <= self.match:
            return False
        self.match = index
        self.next = max(self.next, index + 1)
        self.inflights.free_to(index)
        self.paused = False
        return True

    def rejected(self, index: Index, meet: Index) -> bool:
        """It has no entry like ours at `index`, the logs may meet at `meet`; False when that is old news.

        `match` never falls: what was acknowledged within a term is durable there (D8 says what happens to a
        node for which that is not so).
        """
        if self.state is ProgressState.REPLICATE:
            # At or below match: it restarted and asks to be verified again, or an old reply came late.
            self.become_probe()
            return True
        if self.state is ProgressState.SNAPSHOT or index != self.next - 1:
            return False
        self.next = max(min(index, meet + 1), self.match + 1)
        self.paused = False
        return True
