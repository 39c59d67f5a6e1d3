"""Consensus under anything: messages lost, repeated, reordered and late; crashes that lose what was not synced;
partitions; proposals, reads, transfers, changes of the conf state, snapshots, evidence right and wrong.

The rules are the moves, the invariants bear the names of Ongaro Figure 3.2 and of the invariants R1 to R15. At the end
all faults stop, and the cluster must make progress. `RAFTKV_TEST_EXAMPLES=500` looks longer.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from raftkv.raft import quorum
from raftkv.raft.errors import InvalidTransferee, NoLeader, ProposalRefused
from raftkv.raft.messages import AppendReply, HeartbeatReply, InstallSnapshot, Message, PreVote, PreVoteReply, VoteReply
from raftkv.raft.ready import Ready
from raftkv.raft.types import ConfChange, ConfChangeKind, ConfState, Entry, EntryKind, Role
from tests.unit.raft.harness import FAST, Cluster, Envelope, Node

EXAMPLES = int(os.environ.get("RAFTKV_TEST_EXAMPLES", "30"))
CONFIG = replace(
    FAST, election_ticks=5, candidate_ticks=2, strict_conf_change=False, append_bytes_max=100, cache_bytes_max=300
)
NODES = st.integers(1, 5)


class Watched(Cluster):
    """A cluster that looks at everything a node says before it is on the wire."""

    def __init__(self, *, size: int, learners: tuple[int, ...], seed: int) -> None:
        self.votes: dict[tuple[int, int], int] = {}
        super().__init__(size, learners=learners, config=CONFIG, seed=seed)
        for node in self:
            node.slow_disk = True

    def send(self, sender: int, to: int, message: Message) -> None:
        disk = self[sender].disk
        if not isinstance(message, PreVote) and not (isinstance(message, PreVoteReply) and message.granted):
            assert message.term <= disk.hard_state.term, f"R14: {sender} says {message} before it is durable"
        if isinstance(message, VoteReply) and message.granted:
            assert self.votes.setdefault((sender, message.term), to) == to, "R12: two votes in one term"
        if isinstance(message, AppendReply) and not message.rejected:
            assert disk.last_index() >= message.index, f"D1: {sender} acknowledges {message.index} before it is durable"
        super().send(sender, to, message)


class Consensus(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster: Watched
        self.leader_of: dict[int, int] = {}
        self.leader_log: dict[int, list[Entry]] = {}  # of the leader of each term
        self.entry_at: dict[tuple[int, int], tuple[int, Entry]] = {}  # (index, term) -> (term before it, entry)
        self.applied_at: dict[int, Entry] = {}
        self.committed: dict[int, int] = {}  # index -> term
        self.committed_to = 0
        self.commit_of: dict[int, tuple[object, int]] = {}  # node -> (its life, its commit index)
        self.conf_of: dict[int, ConfState] = {}  # before the last move
        self.asked: dict[tuple[int, int], int] = {}  # (node, context) -> what was committed when it was asked
        self.context = 0
        self.proposed = 0

    @initialize(seed=st.integers(0, 1 << 30), learner=st.booleans(), leader=st.integers(0, 4))
    def start(self, seed: int, learner: bool, leader: int) -> None:
        self.chance = random.Random(seed)
        self.cluster = Watched(size=5, learners=(5,) if learner else (), seed=seed)
        self.cluster.watch = self.look_at
        if leader:
            self.cluster[leader].raft.campaign()
            self.calm()

    def look_at(self, node: Node, ready: Ready) -> None:
        """What a node is about to do."""
        for entry in ready.committed:
            known = self.applied_at.setdefault(entry.index, entry)
            assert known == entry, f"state machine safety: {node.id} applies {entry}, others {known}"
            assert entry.index <= node.disk.last_index(), "applied before it is durable"
        for context, index in ready.reads:
            assert index >= self.asked[node.id, context], "a read misses what was committed before it was asked"

    # Moves.

    def some_moves(self, count: int) -> None:
        """What a busy scheduler might do."""
        cluster, chance = self.cluster, self.chance
        nodes = list(cluster)
        for _ in range(count):
            node = chance.choice(nodes)
            move = chance.random()
            if move < 0.5 and cluster.wire:
                at = chance.randrange(min(len(cluster.wire), 8))
                envelope = cluster.wire[at]
                del cluster.wire[at]
                if chance.random() < 0.1:
                    cluster.wire.append(envelope)
                if chance.random() > 0.1 or isinstance(envelope.message, InstallSnapshot):
                    cluster.deliver(envelope)
            elif move < 0.75:
                node.take()
            elif move < 0.93:
                node.persist()
            elif node.up:
                node.raft.tick()
            self.check()

    @rule(count=st.integers(1, 150))
    def run(self, count: int) -> None:
        self.some_moves(count)

    @rule(ticks=st.integers(1, 12))
    def time_passes(self, ticks: int) -> None:
        """Everybody works on quickly."""
        for _ in range(ticks):
            for node in self.cluster:
                if node.up:
                    node.raft.tick()
            self.some_moves(60)

    @rule()
    def calm(self) -> None:
        """All that is under way arrives."""
        for _ in range(200):
            busy = False
            for node in self.cluster:
                while node.take() or node.persist():
                    busy = True
            self.check()
            if not busy and not self.cluster.wire:
                return
            while self.cluster.wire:
                self.cluster.deliver(self.cluster.wire.popleft())
                self.check()
        raise AssertionError("does not come to rest")

    @rule(node=NODES, count=st.integers(1, 4))
    def propose(self, node: int, count: int) -> None:
        for known in self.cluster:
            if known.role is Role.LEADER and known.up and (known.id == node or self.chance.random() < 0.5):
                try:
                    known.raft.propose([b"%d" % (self.proposed + at) for at in range(count)])
                except ProposalRefused:
                    continue
                self.proposed += count

    @rule(node=NODES)
    def read(self, node: int) -> None:
        known = self.cluster[node]
        if known.up:
            self.context += 1
            self.asked[node, self.context] = self.committed_to
            with contextlib.suppress(NoLeader):
                known.raft.read_index(self.context)

    @rule(node=NODES)
    def campaign(self, node: int) -> None:
        if self.cluster[node].up:
            self.cluster[node].raft.campaign()

    @rule(node=NODES, believers=st.sets(NODES))
    def evidence(self, node: int, believers: set[int]) -> None:
        """True or not."""
        for known in self.cluster:
            if known.up and known.id not in believers:
                known.raft.leader_unreachable(node)

    @rule(heir=NODES)
    def transfer(self, heir: int) -> None:
        for known in self.cluster:
            if known.role is Role.LEADER and known.up:
                with contextlib.suppress(InvalidTransferee):
                    known.raft.transfer_leadership(heir)

    @rule(changes=st.lists(st.tuples(st.sampled_from(ConfChangeKind), NODES), min_size=1, max_size=3))
    def change_members(self, changes: list[tuple[ConfChangeKind, int]]) -> None:
        for known in self.cluster:
            if known.role is Role.LEADER and known.up:
                with contextlib.suppress(ProposalRefused):
                    known.raft.propose_conf_change(ConfChange(tuple(changes)))

    @rule(node=NODES)
    def crash(self, node: int) -> None:
        self.cluster[node].crash()

    @rule(node=NODES)
    def restart(self, node: int) -> None:
        self.cluster[node].restart()

    @rule(node=NODES)
    def compact(self, node: int) -> None:
        known = self.cluster[node]
        if known.up and not known.writes and known.state:
            known.compact(self.chance.randint(known.disk.meta.index, known.state[-1].index))

    @rule(node=NODES, peer=NODES)
    def connection_breaks(self, node: int, peer: int) -> None:
        self.cluster[node].raft.peer_unreachable(peer)
        self.cluster.wire = type(self.cluster.wire)(
            envelope
            for envelope in self.cluster.wire
            if {envelope.sender, envelope.to} != {node, peer} or isinstance(envelope.message, InstallSnapshot)
        )

    @rule(seed=st.integers(0, 1 << 20))
    def cut(self, seed: int) -> None:
        """Any set of links, each way by itself."""
        chance = random.Random(seed)
        self.cluster.cuts = {
            (a, b) for a in range(1, 6) for b in range(1, 6) if a != b and chance.random() < chance.choice([0.1, 0.5])
        }

    @rule()
    def heal(self) -> None:
        self.cluster.cuts.clear()

    # Invariants.

    def check(self) -> None:
        """The cheap ones, after every move."""
        for node in self.cluster:
            raft = node.raft
            if not node.up:
                continue
            if raft.role is Role.LEADER:
                self.check_leader(node)
            life, commit = self.commit_of.get(node.id, (raft, 0))
            assert life is not raft or raft.commit >= commit, "R7: the commit index falls"
            self.commit_of[node.id] = (raft, raft.commit)
            self.conf_of[node.id] = raft.conf
            assert raft.log.applied <= raft.log.applying <= raft.commit <= raft.log.last

    def check_leader(self, node: Node) -> None:
        raft = node.raft
        first = raft.term not in self.leader_of
        known = self.leader_of.setdefault(raft.term, node.id)
        assert known == node.id, f"election safety: {known} and {node.id} lead term {raft.term}"
        if first:
            for index, term in self.committed.items():
                found = raft.log.term(index)
                assert found == term or index < raft.log.first, f"leader completeness: {node.id} lacks {term}/{index}"
        if raft.commit > self.committed_to:
            for index in range(self.committed_to + 1, raft.commit + 1):
                self.committed[index] = raft.log.term(index) or 0
            self.check_quorum(node, raft.commit)
            self.committed_to = raft.commit

    def check_quorum(self, node: Node, index: int) -> None:
        """R7: a quorum has it durably."""
        term = node.raft.log.term(index)
        have = {}
        for other in self.cluster:
            disk = other.disk
            have[other.id] = disk.meta.index >= index or (disk.last_index() >= index and disk.term(index) == term)
        # Taking a Ready may apply a conf change; it was committed by the conf state before.
        confs = {node.raft.conf, self.conf_of.get(node.id, node.raft.conf)}
        assert any(quorum.has_quorum(conf, have) for conf in confs), (
            f"committed {index} without a durable quorum: {have}"
        )

    @invariant()
    def election_safety(self) -> None:
        if hasattr(self, "chance"):
            self.check()

    @invariant()
    def leader_append_only(self) -> None:
        if not hasattr(self, "chance"):
            return
        for node in self.cluster:
            if node.up and node.role is Role.LEADER:
                log = [entry for entry in node.log() if entry.term == node.raft.term]
                before = self.leader_log.get(node.raft.term, [])
                still = [entry for entry in before if entry.index >= node.raft.log.first]
                assert log[: len(still)] == still, "a leader overwrites its own log"
                self.leader_log[node.raft.term] = log

    @invariant()
    def log_matching(self) -> None:
        if not hasattr(self, "chance"):
            return
        for node in self.cluster:
            if node.up:
                before = node.raft.log.term(node.raft.log.first - 1)
                assert before is not None
                for entry in node.log():
                    known = self.entry_at.setdefault((entry.index, entry.term), (before, entry))
                    assert known == (before, entry), f"log matching: {node.id} has {entry}, others {known}"
                    before = entry.term

    @invariant()
    def conf_states_in_use_are_adjacent(self) -> None:
        """C1: majorities of adjacent conf states overlap. Whoever holds a change knows that the one before it is
        committed, also after a crash, so nobody stands by a conf state two steps behind."""
        if not hasattr(self, "chance"):
            return
        for node in self.cluster:
            disk = node.disk
            known = max(disk.hard_state.commit, disk.state[-1].index if disk.state else 0)
            open_changes = [entry for entry in disk.log if entry.index > known and entry.kind is EntryKind.CONF_CHANGE]
            assert len(open_changes) <= 1, f"C1: {node.id} has {open_changes} on disk and knows {known} committed"
            if node.role is Role.LEADER and node.up:
                unapplied = [
                    entry
                    for entry in node.log()
                    if entry.index > node.raft.log.applied and entry.kind is EntryKind.CONF_CHANGE
                ]
                assert len(unapplied) <= 1, "C2: two conf changes that are not applied"

    def teardown(self) -> None:
        """All faults stop: there must be a leader, and everybody must get what it commits."""
        if not hasattr(self, "chance"):
            return
        cluster = self.cluster
        cluster.heal()
        for node in cluster:
            node.slow_disk = False
            if not node.up:
                node.restart()
        leader = cluster.wait_leader(400)
        for _ in range(100):
            if leader.raft.accepts_proposals():
                break
            cluster.tick()
            leader = cluster.wait_leader(400)
        index = cluster.propose("the end", leader.id)
        for _ in range(100):
            cluster.tick()
            members = [cluster[member] for member in leader.raft.conf.members()]
            if all(node.state and node.state[-1].index >= index for node in members):
                break
        else:
            raise AssertionError(f"not all have {index}: {[node.raft.status() for node in cluster]}")
        self.check()
        for node in members:
            progress = leader.raft.status().progress.get(node.id)
            assert progress is None or progress.inflight_bytes == 0, "bytes in flight although all has arrived"
        assert leader.raft.status().uncommitted_bytes == 0


def one_move(walk: Consensus, chance: random.Random) -> None:
    """Most moves are such that the cluster gets somewhere."""
    node, other = chance.randint(1, 5), chance.randint(1, 5)
    changes = [(chance.choice(list(ConfChangeKind)), chance.randint(1, 5)) for _ in range(chance.randint(1, 3))]
    moves: dict[Callable[[], None], int] = {
        lambda: walk.time_passes(chance.randint(1, 12)): 22,
        lambda: walk.run(chance.randint(1, 150)): 10,
        walk.calm: 10,
        lambda: walk.propose(node, chance.randint(1, 4)): 14,
        lambda: walk.read(node): 8,
        lambda: walk.campaign(node): 3,
        lambda: walk.evidence(node, {other}): 3,
        lambda: walk.transfer(node): 4,
        lambda: walk.change_members(changes): 6,
        lambda: walk.crash(node): 3,
        lambda: walk.restart(node): 6,
        lambda: walk.compact(node): 3,
        lambda: walk.connection_breaks(node, other): 2,
        lambda: walk.cut(chance.getrandbits(20)): 2,
        walk.heal: 4,
    }
    [move] = chance.choices(list(moves), list(moves.values()))
    move()


def long_walk(seed: int, moves: int) -> Consensus:
    """Many more moves than Hypothesis makes; one seed decides everything."""
    chance = random.Random(seed)
    walk = Consensus()
    walk.start(seed, chance.random() < 0.5, chance.randint(0, 4))
    for _ in range(moves):
        one_move(walk, chance)
        walk.leader_append_only()
        walk.log_matching()
        walk.conf_states_in_use_are_adjacent()
    walk.teardown()
    return walk


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_long_walk(seed: int) -> None:
    long_walk(seed, 150)


Consensus.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestConsensus = Consensus.TestCase


def test_the_checks_can_fail() -> None:
    """A reply that leaves before its write is caught."""
    cluster = Watched(size=3, learners=(), seed=0)
    for message in (VoteReply(1, True), AppendReply(0, 1), HeartbeatReply(5, 1)):
        try:
            cluster.send(1, 2, message)
        except AssertionError:
            continue
        raise AssertionError(f"{message} was not caught")
    cluster.send(1, 2, AppendReply(0, 0))
    assert list(cluster.wire) == [Envelope(1, 2, AppendReply(0, 0))]
