"""Linearizable reads without writing to the log (ReadIndex, Ongaro 6.4).

The leader notes its commit index, then makes sure that it still leads: a majority answers a heartbeat sent
after the read arrived. The heartbeat's token is made here, strictly rising within the term and never given by a
caller, so an answer to an earlier heartbeat can never confirm a later read (etcd #20418). An answer to a later
heartbeat confirms all earlier reads, so nothing has to be re-sent when one is lost.

    leader:    waiting --round begins (own term committed)--> in a round --majority answered--> confirmed
    follower:  queued --one message a turn--> forwarded --reply--> confirmed
    either:    leader or term changed --> dropped, the caller asks again

The name a follower gives a batch it forwards starts at a random number in each life, so a late reply to an
earlier life cannot confirm a read of this one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from raftkv.raft import quorum
from raftkv.raft.errors import NoLeader
from raftkv.raft.messages import ReadIndex, ReadIndexReply
from raftkv.raft.types import Index, NodeId, Role

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


class _Round:
    """Reads that one heartbeat round confirms."""

    __slots__ = ("index", "reads", "token")

    def __init__(self, token: int, index: Index, reads: dict[tuple[NodeId, int], None]) -> None:
        self.token = token
        self.index = index
        self.reads = reads  # (origin, context), an ordered set; origin 0 is this node


class Reads:
    """The reads of one node, and on a leader those of others."""

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self._waiting: dict[tuple[NodeId, int], None] = {}
        self._rounds: deque[_Round] = deque()
        self._queued: list[int] = []
        self._forwarded: dict[int, tuple[list[int], int]] = {}  # batch -> (contexts, tick when last asked)
        self._next_batch = raft.random.getrandbits(62)
        self.confirmed: list[tuple[int, Index]] = []  # what the next Ready reports
        self.dropped: list[int] = []

    def add(self, context: int) -> None:
        """A caller of this node wants to read what is committed by now.

        Raises:
            NoLeader: there is nobody to ask.
        """
        raft = self._raft
        if raft.role is Role.LEADER:
            self._waiting[0, context] = None
        elif raft.leader:
            self._queued.append(context)
        else:
            raise NoLeader("no leader is known")

    @property
    def want_round(self) -> bool:
        """Whether a heartbeat round should begin for reads."""
        raft = self._raft
        return (
            bool(self._waiting)
            and len(self._rounds) < raft.config.read_rounds_max
            and raft.log.commit >= raft.term_start  # before, the commit index may be out of date (Ongaro 6.4)
        )

    @property
    def want_forward(self) -> bool:
        """Whether reads wait to be forwarded."""
        return bool(self._queued) and self._raft.leader != 0

    @property
    def in_rounds(self) -> bool:
        """Whether a round is under way."""
        return bool(self._rounds)

    def begin_round(self, token: int) -> None:
        """A heartbeat round with a fresh `token` begins: it serves everything that waits."""
        raft = self._raft
        if self._waiting and raft.log.commit >= raft.term_start:
            self._rounds.append(_Round(token, raft.log.commit, self._waiting))
            self._waiting = {}
            self.check()

    def forward(self) -> None:
        """Send what is queued to the leader, as one batch."""
        raft = self._raft
        batch = self._next_batch
        self._next_batch += 1
        self._forwarded[batch] = (self._queued, raft.now)
        self._queued = []
        raft.send(raft.leader, ReadIndex(raft.term, batch))

    def check(self) -> None:
        """Confirm the rounds that a majority has answered."""
        raft = self._raft
        if not self._rounds:
            return
        tokens = {peer: progress.token for peer, progress in raft.progress.items()}
        tokens[raft.node_id] = raft.token
        agreed = quorum.agreed_value(raft.conf, tokens)
        while self._rounds and self._rounds[0].token <= agreed:
            done = self._rounds.popleft()
            for origin, context in done.reads:
                if origin == 0:
                    self.confirmed.append((context, done.index))
                else:
                    raft.send(origin, ReadIndexReply(raft.term, context, done.index))
                    raft.hurry(origin)  # it reads when it has applied that much

    def on_read_index(self, sender: NodeId, message: ReadIndex) -> None:
        """A follower forwards its reads."""
        raft = self._raft
        # The limit is for a peer gone mad: a follower has a few batches under way, and asks again.
        if raft.role is Role.LEADER and len(self._waiting) < raft.config.reads_max:
            self._waiting[sender, message.context] = None

    def on_read_index_reply(self, sender: NodeId, message: ReadIndexReply) -> None:
        """The leader has confirmed a batch."""
        if sender == self._raft.leader:
            contexts, _ = self._forwarded.pop(message.context, ((), 0))
            self.confirmed.extend((context, message.index) for context in contexts)

    def tick(self) -> None:
        """Ask again for what the leader has not answered."""
        raft = self._raft
        if not self._forwarded or raft.leader == 0:
            return
        # Under the same name: whichever answer comes, its round began after the first asking.
        for batch, (contexts, asked) in self._forwarded.items():
            if raft.now - asked >= raft.config.read_retry_ticks:
                self._forwarded[batch] = (contexts, raft.now)
                raft.send(raft.leader, ReadIndex(raft.term, batch))

    def drop(self) -> None:
        """Whoever led does not any more, or it is another term: nothing that was begun counts."""
        if self._waiting or self._rounds:
            for reads in (*(done.reads for done in self._rounds), self._waiting):
                self.dropped.extend(context for origin, context in reads if origin == 0)
            self._waiting = {}
            self._rounds.clear()
        if self._queued or self._forwarded:
            for contexts, _ in self._forwarded.values():
                self.dropped.extend(contexts)
            self.dropped.extend(self._queued)
            self._queued = []
            self._forwarded.clear()
