"""What leaves a node, and what it may rest on: the assembly of Readys, and what of them is durable.

A message may leave at once only if its sender's term and vote are durable (R14), and an acknowledgement only if what
it acknowledges is; everything else waits for the write it rests on.    See: Ongaro 3.8, 10.2.1.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from raftkv.raft.messages import Message
from raftkv.raft.ready import Event, Ready
from raftkv.raft.types import HardState, Index, NodeId, Term

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


class Output:
    """See the module."""

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self.messages: list[tuple[NodeId, Message]] = []
        self.messages_after: list[tuple[NodeId, Message]] = []
        self.send_snapshots: list[tuple[NodeId, Index]] = []
        self.events: list[Event] = []
        self.role_changed = False
        self._number = 0
        self._handed: tuple[Term, NodeId] = (raft.term, raft.vote)  # term and vote in the last Ready that had any
        self.durable = self._handed  # term and vote on disk
        self._hard_writes: deque[tuple[int, tuple[Term, NodeId]]] = deque()  # (number of Ready, what it makes durable)
        self.stall_ticks = 0  # how long the disk has finished nothing
        self._oldest_write = 0

    @property
    def pending(self) -> bool:
        """Whether there is anything to hand out."""
        raft, log = self._raft, self._raft.log
        return bool(
            self.messages
            or log.handed < log.last
            or log.has_committed
            or self.messages_after
            or self._handed != (raft.term, raft.vote)
            or log.install is not None
            or self.send_snapshots
            or self.events
        )

    def take(self) -> Ready:
        """Everything that must happen next."""
        raft, log = self._raft, self._raft.log
        self._number += 1
        install = log.take_install()
        entries = log.take_unstable()
        hard = (raft.term, raft.vote)
        must_sync = bool(entries) or install is not None or hard != self._handed
        hard_state = None
        if must_sync:
            # The commit index goes along in the same write: who holds a conf change on disk then also knows there that
            # the one before it is committed, which keeps conf states in use adjacent.
            hard_state = HardState(raft.term, raft.vote, log.commit)
            log.write_begins(self._number)
            if hard != self._handed:
                self._hard_writes.append((self._number, hard))
                self._handed = hard
        messages, after = self.messages, self.messages_after
        if hard != self.durable:
            messages, after = [], messages + after  # R14: nothing is said in a term that is not durable
        elif after and not log.writing:
            messages, after = messages + after, []  # the disk was quicker than this turn
        ready = Ready(
            self._number,
            hard_state,
            entries,
            install,
            tuple(messages),
            tuple(after),
            log.take_committed(raft.config.committed_bytes_max),
            tuple(raft.reads.confirmed),
            tuple(raft.reads.dropped),
            tuple(self.send_snapshots),
            self.role_changed,
            tuple(self.events),
            must_sync,
        )
        self._clear()
        return ready

    def _clear(self) -> None:
        reads = self._raft.reads
        self.messages = []
        self.messages_after = []
        self.role_changed = False
        # A list is only made anew where there was something: most turns have none of these.
        if reads.confirmed:
            reads.confirmed = []
        if reads.dropped:
            reads.dropped = []
        if self.send_snapshots:
            self.send_snapshots = []
        if self.events:
            self.events = []

    def persisted(self, number: int) -> bool:
        """Ready `number`, and all before it, are durable; whether more of the log is."""
        self.stall_ticks = 0
        hard_writes = self._hard_writes
        while hard_writes and hard_writes[0][0] <= number:
            self.durable = hard_writes.popleft()[1]
        return self._raft.log.persisted(number)

    def tick(self) -> None:
        """Watch whether the disk gets anywhere while it has something to do."""
        raft = self._raft
        write = raft.log.oldest_write
        if write and write == self._oldest_write:
            self.stall_ticks += 1
        else:
            self._oldest_write = write
            self.stall_ticks = 0
        if self.stall_ticks == raft.config.disk_stall_ticks:
            raft.event("disk_stalled", detail=f"nothing written for {self.stall_ticks} ticks")
