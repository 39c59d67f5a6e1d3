"""Raft: one node's consensus, without any I/O.

Inputs (`step`, `tick`, `propose`, ...) change the state and collect what must happen; `ready` hands that out, and
`persisted` and `applied_to` report back what was done of it. Everything depends on the inputs and the injected
randomness only, so a run can be replayed.

This file holds the state, the rule of terms, and every change of role. What a message means is decided in
`election`, `replication`, `reads` and `membership`.

Invariants, asserted where they could break: R2, R6-R9, R12, R15, C2 (see each `assert`).

See: Ongaro 3 (Figure 3.1), 4, 6.4, 9.6, 10.2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from raftkv.raft import election, leading, membership, replication, transfer
from raftkv.raft.config import RaftConfig
from raftkv.raft.election import Candidacy
from raftkv.raft.errors import NotLeader, Overloaded, TransferInProgress
from raftkv.raft.log import ENTRY_OVERHEAD_BYTES, Log
from raftkv.raft.messages import (
    Append,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVote,
    PreVoteReply,
    ReadIndex,
    ReadIndexReply,
    TimeoutNow,
    Vote,
    VoteReply,
)
from raftkv.raft.output import Output
from raftkv.raft.progress import Progress, ProgressState
from raftkv.raft.reads import Reads
from raftkv.raft.ready import EVENT_KINDS, Event, Ready
from raftkv.raft.status import Status, status_of
from raftkv.raft.thrift import Thrift
from raftkv.raft.types import (
    INDEX_MAX,
    NODE_ID_MAX,
    TERM_MAX,
    ConfChange,
    ConfState,
    Entry,
    EntryKind,
    Index,
    LogReader,
    NodeId,
    Role,
    Term,
)


class Raft:
    """See the module. Not thread-safe: one loop owns it."""

    def __init__(self, node_id: NodeId, config: RaftConfig, storage: LogReader, applied: int, random: Random) -> None:
        """
        Args:
            node_id: this node, 1 to 2^64-1; it need not be in the conf state (yet).
            config: see `RaftConfig`.
            storage: the recovered log; its conf state is that of its snapshot.
            applied: what the state machine has applied durably, at least the compacted prefix.
            random: the only source of chance.
        """
        assert 0 < node_id <= NODE_ID_MAX, f"node id {node_id}"
        hard_state, conf = storage.initial_state()
        self.node_id = node_id
        self.config = config
        self.random = random
        self.now = 0  # ticks of this life

        self.term: Term = hard_state.term
        self.vote: NodeId = hard_state.vote
        self.role = Role.FOLLOWER
        self.leader: NodeId = 0
        self.log = Log(storage, hard_state, applied, config.cache_bytes_max)
        self.conf_history = membership.recover(storage, conf, applied)
        self.conf = self.conf_history.last[1]

        # Anybody but the leader.
        self.election_elapsed = 0
        self.election_timeout = 0
        self.candidacy = Candidacy()
        self.verified: Index = 0  # up to here our log is known to be as this term's leader's

        # The leader.
        self.progress: dict[NodeId, Progress] = {}  # the other members; empty on anybody else
        self.term_start: Index = 0  # its first entry
        self.token = 0  # of the last heartbeat round
        self.pending_conf_index: Index = 0  # at or before it may be a conf change that is not applied
        self.uncommitted: deque[tuple[Index, int]] = deque()  # (last index, bytes) of each proposal
        self.uncommitted_bytes = 0
        self.lead_transferee: NodeId = 0
        self.dirty = False  # something may be there to append
        self.eager = False  # somebody here waits to hear what is committed; the driver says so
        self.transfer_elapsed = 0
        self.thrift = Thrift(self)
        self.heartbeat_elapsed = 0
        self.beat_due = False

        # Out.
        self.reads = Reads(self)
        self.out = Output(self)

        self._draw_election_timeout()

    # Cheap questions.

    @property
    def commit(self) -> Index:
        """Everything up to here is agreed for ever."""
        return self.log.commit

    @property
    def disk_stalled(self) -> bool:
        """Whether the own disk has finished nothing for too long."""
        return self.out.stall_ticks >= self.config.disk_stall_ticks

    def accepts_proposals(self) -> bool:
        """Whether `propose` would take something now."""
        return (
            self.role is Role.LEADER
            and not self.lead_transferee
            and self.uncommitted_bytes < self.config.uncommitted_bytes_max
        )

    def conf_at(self, index: Index) -> ConfState:
        """The conf state as of what is applied, or before, back to the compacted prefix. (`conf` is ahead of what is
        applied while a received snapshot is on its way to the disk.)

        Raises:
            LookupError: it is compacted.
        """
        return self.conf_history.at(index)

    def status(self) -> Status:
        """A frozen view."""
        return status_of(self)

    # Inputs: messages.

    def step(self, sender: NodeId, message: Message) -> None:
        """Take a message from a peer. Never raises: what cannot be is ignored, with an event."""
        term = message.term
        if not (0 < sender <= NODE_ID_MAX and sender != self.node_id and 0 <= term <= TERM_MAX):
            self.ignored(sender, f"{type(message).__name__} of term {term} from {sender}")
            return
        if term < self.term:
            self._step_older(sender, message)
            return
        if term > self.term and not self._step_newer(sender, message):
            return
        _HANDLERS[type(message)](self, sender, message)

    def _step_older(self, sender: NodeId, message: Message) -> None:
        """A message of a term that is over: help the sender to notice (etcd #8501, #8243), or ignore it."""
        if isinstance(message, (Append, Heartbeat, InstallSnapshot)):
            self.send(sender, AppendReply(self.term, 0, True))
        elif isinstance(message, Vote):
            self.send(sender, VoteReply(self.term, False))
        elif isinstance(message, PreVote):
            self.send(sender, PreVoteReply(self.term, False))

    def _step_newer(self, sender: NodeId, message: Message) -> bool:
        """A message of a later term: follow it (Ongaro 3.3); whether the message is to be handled."""
        if isinstance(message, PreVote):
            return True  # asks about a term nobody is in yet
        if isinstance(message, PreVoteReply) and message.granted:
            return True  # answers such a question
        if isinstance(message, Vote) and not message.transfer and election.sticky(self):
            return False  # somebody who was cut off or removed; it must not depose a working leader (Ongaro 4.2.3)
        leads = isinstance(message, (Append, Heartbeat))
        if isinstance(message, InstallSnapshot) and message.meta.index > INDEX_MAX:
            return False
        self.become_follower(message.term, sender if leads else 0, f"{sender} is in term {message.term}")
        return True

    def heard_leader(self, sender: NodeId) -> bool:
        """A message that only the leader of our term sends; False when it cannot be that."""
        if sender == self.leader and self.role is Role.FOLLOWER:
            self.election_elapsed = 0
            return True
        if self.leader:
            self.ignored(sender, f"claims to lead term {self.term} of leader {self.leader}")  # R1
            return False
        self.become_follower(self.term, sender, f"{sender} leads term {self.term}")
        return True

    # Inputs: time.

    def tick(self) -> None:
        """One tick of time has passed."""
        self.now += 1
        self.out.tick()
        if self.role is Role.LEADER:
            leading.tick(self)
        else:
            election.tick(self)
        self.reads.tick()

    # Inputs: proposals.

    def propose(self, data: Sequence[bytes], *, force: bool = False) -> tuple[int, int]:
        """Append one NORMAL entry for each element.

        Args:
            data: never empty elements: an empty entry is a no-op.
            force: take it although too much is uncommitted; for a caller that has just asked `accepts_proposals`.
        Returns:
            The term, and the index of the first entry. They are committed when an entry of that term is committed
            at that index; lost when one of another term is.
        Raises:
            NotLeader: `.leader` may be.
            TransferInProgress: leadership is on its way elsewhere.
            Overloaded: `uncommitted_bytes_max` is reached.
        """
        self._check_proposal()
        size = sum(map(len, data)) + ENTRY_OVERHEAD_BYTES * len(data)
        limit = self.config.uncommitted_bytes_max
        # One proposal is always taken, however big: else it could never be.
        if self.uncommitted_bytes and self.uncommitted_bytes + size > limit and not force:
            raise Overloaded(self.uncommitted_bytes, limit)
        term, first = self.term, self.log.last + 1
        normal = EntryKind.NORMAL
        self.append_own([Entry(index, term, normal, item) for index, item in enumerate(data, first)])
        return term, first

    def propose_conf_change(self, change: ConfChange) -> tuple[int, int]:
        """Append a change of the conf state: several changes pass through a joint one, none leaves it.

        Returns:
            Term and index, as `propose`.
        Raises:
            NotLeader, TransferInProgress: as `propose`.
            ConfChangePending: another one is not applied, or this term has committed nothing yet; try again.
            InvalidConfChange: it makes no sense, or (`strict_conf_change`) no majority would answer afterwards.
        """
        self._check_proposal()
        return membership.propose(self, change)

    def _check_proposal(self) -> None:
        if self.role is not Role.LEADER:
            raise NotLeader(self.leader)
        if self.lead_transferee:
            raise TransferInProgress(self.lead_transferee)

    def append_own(self, entries: list[Entry]) -> None:
        """The leader appends entries of its own term."""
        assert self.role is Role.LEADER
        if not entries:
            return
        self.log.append(entries)
        size = sum(len(entry.data) for entry in entries) + ENTRY_OVERHEAD_BYTES * len(entries)
        self.uncommitted.append((entries[-1].index, size))
        self.uncommitted_bytes += size
        self.dirty = True

    # Inputs: other wishes of the driver.

    def read_index(self, context: int) -> None:
        """Ask up to where one must have applied to read linearizably; the answer is in `Ready.reads`.

        Raises:
            NoLeader: nobody is known to lead.
        """
        self.reads.add(context)

    def hurry(self, peer: NodeId) -> None:
        """A caller at `peer` waits for what was proposed: it is not left out (see `thrift`). Only a leader can."""
        if self.role is Role.LEADER:
            self.thrift.want(peer)

    def transfer_leadership(self, target: NodeId) -> None:
        """Hand leadership to a voter as soon as it has the whole log; given up after `election_ticks`.

        Raises:
            NotLeader: `.leader` may be.
            InvalidTransferee: it is no voter.
        """
        transfer.start(self, target)

    def campaign(self) -> None:
        """Stand for election now, with a pre-vote first."""
        election.campaign(self, election.REQUESTED)

    def leader_unreachable(self, leader: NodeId) -> None:
        """There is proof that the leader's process is gone: forget it, and campaign after a short delay.

        Another leader than the present one, or a node that leads itself: nothing happens.
        """
        election.leader_unreachable(self, leader)

    def peer_unreachable(self, peer: NodeId) -> None:
        """What was sent to `peer` may be lost: find out anew what it has."""
        progress = self.progress.get(peer)
        if progress is not None and progress.state is ProgressState.REPLICATE:
            progress.become_probe()
            self.dirty = True

    def snapshot_sent(self, peer: NodeId, index: int, ok: bool) -> None:
        """The snapshot asked for in `Ready.send_snapshots`, of `index`, got there completely, or it did not."""
        replication.snapshot_sent(self, peer, index, ok=ok)

    def notify_commit(self, peers: Iterable[NodeId]) -> None:
        """Tell these followers the commit index now, if it is news to them; otherwise it travels with the next append
        or heartbeat."""
        if self.role is Role.LEADER:
            replication.notify_commit(self, peers)

    def apply_conf_change(self, entry: Entry) -> ConfState:
        """The driver applies a CONF_CHANGE entry; the conf state as of it."""
        return membership.apply(self, entry)

    def applied_to(self, index: int) -> None:
        """The state machine has applied everything up to `index`."""
        self.log.applied_to(index)
        if self.conf.auto_leave:
            membership.maybe_leave(self)
        if self.candidacy.postponed:
            election.campaign(self, self.candidacy.postponed)

    def compacted(self, index: int) -> None:
        """The store has dropped the entries up to `index`."""
        self.log.compacted(index)
        self.conf_history.compacted(self.log.first - 1)

    # Output; see `output` for what it is made of.

    def has_ready(self) -> bool:
        """Whether `ready` has anything to say."""
        return bool(
            self.dirty
            or self.beat_due
            or self.reads.want_round
            or self.reads.want_forward
            or self.reads.confirmed
            or self.reads.dropped
            or self.out.pending
        )

    def ready(self) -> Ready:
        """Take what must happen next; see `raftkv.raft.ready` for the order in which to obey it."""
        if self.role is Role.LEADER:
            if self.beat_due or self.reads.want_round:
                replication.beat(self, to_learners=self.beat_due)
                self.beat_due = False
            if self.dirty:
                replication.flush(self)
        elif self.reads.want_forward:
            self.reads.forward()
        return self.out.take()

    def persisted(self, number: int) -> None:
        """Ready `number`, and all before it, are durable."""
        moved = self.out.persisted(number)
        if self.role is Role.LEADER:
            if moved and self.log.stable > self.log.commit:
                replication.maybe_commit(self)
        elif self.role is Role.CANDIDATE and self.out.durable == (self.term, self.node_id):
            election.own_vote_durable(self)

    def send(self, to: NodeId, message: Message) -> None:
        """Let a message leave with the next Ready, in parallel with the disk."""
        self.out.messages.append((to, message))

    def send_after(self, to: NodeId, message: Message) -> None:
        """Let a message leave once everything so far is durable."""
        self.out.messages_after.append((to, message))

    def event(self, kind: str, *, by: NodeId = 0, detail: str = "") -> None:
        """Something a log line is worth."""
        assert kind in EVENT_KINDS, kind
        self.out.events.append(Event(kind, self.term, self.leader, by, detail))

    def ignored(self, sender: NodeId, fault: str) -> None:
        """A message has impossible content."""
        self.event("message_ignored", by=sender, detail=fault)

    # Changes of role.

    def set_leader(self, leader: NodeId) -> None:
        """Who leads, as far as we know; reads that were begun with another one do not count."""
        if leader != self.leader:
            self.leader = leader
            self.reads.drop()
            self.event("leader_changed")

    def become_follower(self, term: Term, leader: NodeId, why: str) -> None:
        """Follow `leader` (0: whoever will be elected) in `term`."""
        assert term >= self.term, f"term falls from {self.term} to {term}"  # R11
        was = self.role
        again = self.candidacy.evidence and not leader and was in (Role.PRE_CANDIDATE, Role.CANDIDATE)
        if term > self.term:
            self.term = term
            self.vote = 0  # a vote is only ever forgotten together with its term (R12)
            self.verified = 0
        self._set_role(Role.FOLLOWER)
        self.set_leader(leader)
        if was is Role.LEADER:
            self.reads.drop()
            self.out.send_snapshots = []
            self.progress = {}
            self.uncommitted.clear()
            self.uncommitted_bytes = 0
            self.lead_transferee = 0
            self.dirty = self.beat_due = False
        if was is not Role.FOLLOWER:
            self.event("stepped_down", detail=why)
        self._reset_election_timer()
        self.candidacy.votes.clear()
        self.candidacy.postponed = ""
        if leader:
            self.candidacy.clear()
        elif again:
            election.plan_again(self)

    def become_pre_candidate(self) -> None:
        """Ask whether we would be elected; term and vote stay."""
        assert self.role is not Role.LEADER
        self._set_role(Role.PRE_CANDIDATE)
        self.set_leader(0)
        self.candidacy.votes.clear()
        self.candidacy.delay = -1
        self._reset_election_timer()

    def become_candidate(self) -> None:
        """Stand in the next term, with our own vote."""
        assert self.role is not Role.LEADER
        self.term += 1
        self.vote = self.node_id
        self.verified = 0
        self._set_role(Role.CANDIDATE)
        self.set_leader(0)
        self.candidacy.votes.clear()
        self.candidacy.delay = -1
        self._reset_election_timer()

    def become_leader(self) -> None:
        """Lead the term we were elected in."""
        assert self.role is Role.CANDIDATE
        assert self.out.durable == (self.term, self.node_id), "elected on a vote that is not durable"  # D1
        self._set_role(Role.LEADER)
        self.set_leader(self.node_id)
        self.candidacy.clear()
        log = self.log
        self.token = 0
        self.heartbeat_elapsed = 0
        self.beat_due = False
        self.lead_transferee = 0
        self.progress = {}
        membership.sync_progress(self)
        # There may be a change among what is not applied yet; to look would cost more than to wait for it (C2).
        self.pending_conf_index = log.last
        self.term_start = log.last + 1
        self.thrift.reset()
        self.event("became_leader")
        # Entries of earlier terms are only committed together with one of its own (Ongaro 3.6.2), and until then it
        # does not know what is (Ongaro 6.4): so it appends one at once.
        self.append_own([Entry(self.term_start, self.term, EntryKind.NORMAL, b"")])

    def _set_role(self, role: Role) -> None:
        if role is not self.role:
            self.role = role
            self.out.role_changed = True

    def _reset_election_timer(self) -> None:
        self.election_elapsed = 0
        self._draw_election_timeout()

    def _draw_election_timeout(self) -> None:
        ticks = self.config.election_ticks
        self.election_timeout = self.random.randrange(ticks, 2 * ticks)


# Each handler takes the kind it stands beside; a mapping cannot say so.
_HANDLERS: dict[type, Callable[[Raft, NodeId, Any], None]] = {
    Append: replication.on_append,
    AppendReply: replication.on_append_reply,
    Heartbeat: replication.on_heartbeat,
    HeartbeatReply: replication.on_heartbeat_reply,
    InstallSnapshot: replication.on_install_snapshot,
    PreVote: election.on_pre_vote,
    PreVoteReply: election.on_pre_vote_reply,
    ReadIndex: lambda raft, sender, message: raft.reads.on_read_index(sender, message),
    ReadIndexReply: lambda raft, sender, message: raft.reads.on_read_index_reply(sender, message),
    TimeoutNow: election.on_timeout_now,
    Vote: election.on_vote,
    VoteReply: election.on_vote_reply,
}
