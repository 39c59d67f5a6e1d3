"""Several replicas, moved step by step by Hypothesis, on disks that lose what was not synced.

The simulator plays whole stories; this looks for the shortest one. Every move is one event of one replica: a message
handed over (or twice, or lost), a write done, a crash, a tick, a caller. The invariants are those of the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.messages import InstallSnapshot
from raftkv.raft.types import ConfState, NodeId, SnapshotMeta
from raftkv.replica.effects import Answers, Apply, Effects, Forward, PeerMessage, Persist
from raftkv.replica.proposals import Pending
from raftkv.replica.replica import Replica
from raftkv.sim import operations
from raftkv.sim.checkers import Invariants
from raftkv.sim.disk import SimLog
from raftkv.sim.history import READS, History, Kind, Operation, Outcome
from raftkv.state.machine import StateMachine
from raftkv.state.store import MemoryStore

CONF = ConfState((1, 2, 3))
CONFIG = RaftConfig(heartbeat_ticks=1, election_ticks=4, disk_stall_ticks=30, read_retry_ticks=3, append_bytes_max=100)
KINDS = [Kind.PUT, Kind.PUT, Kind.SWAP, Kind.DELETE, Kind.READ]
KEYS = [b"a", b"b"]

nodes = st.integers(1, 3)
picks = st.integers(0, 1 << 16)
"""Chooses one of however many there are."""


class Member:
    """One replica with its disk; everything waits until the machine lets it happen."""

    def __init__(self, node_id: NodeId) -> None:
        self.id = node_id
        self.durable = SimLog(CONF)
        self.writes: list[Persist] = []
        self.state = MemoryStore()  # the state as of its last sync
        self.received: dict[int, MemoryStore] = {}
        self.lives = 0
        self.start()

    def start(self) -> None:
        self.lives += 1
        self.machine = StateMachine(self.state.copy())
        self.calls: dict[Operation, Pending | None] = {}
        self.raft = Raft(self.id, CONFIG, self.durable, self.machine.applied_index, Random(10 * self.id + self.lives))
        self.replica = Replica(self.raft, 100 * self.id + self.lives, commands_good=2, entry_bytes_max=60)

    def done(self, count: int) -> None:
        """The oldest `count` writes are durable."""
        for write in self.writes[:count]:
            self.write(write)
            if write.install is not None:
                self.turn_to_received(write.install)
        if count:
            number = self.writes[count - 1].number
            del self.writes[:count]
            self.replica.persisted(number)

    def write(self, write: Persist) -> None:
        if write.install is not None:
            self.durable.install(write.install, write.hard_state, f"state-{write.install.index}")
            self.durable.append(None, write.entries)
        else:
            self.durable.append(write.hard_state, write.entries)

    def turn_to_received(self, meta: SnapshotMeta) -> None:
        self.state = self.received[meta.index]
        self.machine = StateMachine(self.state.copy())
        self.replica.installed(meta)

    def crash(self, kept: int) -> None:
        """Lose the process, all but `kept` of the writes that are not done, and the state since its last sync."""
        for write in self.writes[:kept]:
            self.write(write)
            if write.install is not None:
                self.state = self.received[write.install.index]
        self.writes.clear()


class Replicas(RuleBasedStateMachine):
    """The moves."""

    @initialize()
    def begin(self) -> None:
        self.checks = Invariants(CONF)
        self.history = History()
        self.members = {node_id: Member(node_id) for node_id in CONF.voters}
        self.links: dict[tuple[NodeId, NodeId], list[PeerMessage]] = {
            (a, b): [] for a in CONF.voters for b in CONF.voters if a != b
        }
        self.by_payload: dict[bytes, Operation] = {}
        self.away = 0  # the node that does not hear of it when all goes well
        for member in self.members.values():
            self.checks.started(member)

    # Moves.

    @rule(node=nodes, count=st.integers(1, 8))
    def time_passes(self, node: int, count: int) -> None:
        for _ in range(count):
            self.members[node].replica.tick()
            self.turn(node)

    @rule(node=nodes, count=st.integers(1, 3))
    def writes_are_done(self, node: int, count: int) -> None:
        member = self.members[node]
        member.done(min(count, len(member.writes)))
        self.turn(node)

    @rule(pick=picks)
    def a_message_arrives(self, pick: int) -> None:
        self.hand_over(pick, keep=False)

    @rule(pick=picks)
    def a_message_arrives_and_will_come_again(self, pick: int) -> None:
        self.hand_over(pick, keep=True)

    @rule(count=st.integers(1, 30))
    def all_goes_well_for_a_while(self, count: int) -> None:
        """Without it few runs would ever get to a leader."""
        for _ in range(count):
            for node, member in self.members.items():
                member.done(len(member.writes))
                self.turn(node)
            for link, messages in self.links.items():
                if self.away in link:
                    continue
                arriving, messages[:] = list(messages), []
                for message in arriving:
                    self.members[link[1]].replica.receive(link[0], message)
                    self.turn(link[1])

    @rule(node=st.integers(0, 3))
    def a_node_goes_away(self, node: int) -> None:
        """And who was away comes back."""
        for link in sorted(self.links):
            if self.away in link:
                self.renew(link, kept=0)
        self.away = node

    @rule(pick=picks)
    def a_stream_breaks(self, pick: int) -> None:
        """It loses a suffix of what is under way, and a new one begins."""
        link = sorted(self.links)[pick % len(self.links)]
        self.renew(link, kept=pick // len(self.links) % (len(self.links[link]) + 1))

    @rule(node=nodes, pick=picks)
    def a_node_crashes(self, node: int, pick: int) -> None:
        member = self.members[node]
        member.crash(pick % (len(member.writes) + 1))
        for operation in list(member.calls):
            self.history.returned(operation, Outcome.UNKNOWN)
        member.start()
        self.checks.started(member)
        for link in sorted(self.links):
            if node in link:
                if link[1] == node:
                    self.links[link].clear()
                self.members[link[0]].replica.connected(link[1])
                self.turn(link[0])

    @rule(node=nodes)
    def a_leader_is_said_to_be_gone(self, node: int) -> None:
        self.members[node].replica.gone(self.members[node].raft.leader)
        self.turn(node)

    @rule(node=nodes, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), key=st.sampled_from(KEYS))
    def callers_come(self, node: int, kinds: list[Kind], key: bytes) -> None:
        member = self.members[node]
        for kind in kinds:
            operation = Operation(len(self.history.operations) + 1, kind, key, node=node)
            if kind in (Kind.PUT, Kind.SWAP):
                operation.value = b"%d" % operation.id
            self.history.called(operation)
            if kind in READS:
                member.calls[operation] = None
                member.replica.read(operation)
            else:
                command_kind, payload = operations.command(operation)
                self.by_payload[payload] = operation
                member.calls[operation] = member.replica.propose(command_kind, payload, operation)
        self.turn(node)

    @rule(node=nodes)
    def callers_lose_patience(self, node: int) -> None:
        member = self.members[node]
        for operation, pending in member.calls.items():
            if pending is not None:
                Replica.abandon(pending)
            failed = pending is None or pending.term == 0
            self.history.returned(operation, Outcome.FAILED if failed else Outcome.UNKNOWN)
        member.calls.clear()

    @precondition(lambda self: any(member.machine.applied_index for member in self.members.values()))
    @rule(kept=st.integers(0, 2))
    def the_logs_are_cut(self, kept: int) -> None:
        for node, member in self.members.items():
            if node != self.away:
                self.cut_log(member, kept)

    def cut_log(self, member: Member, kept: int) -> None:
        index = member.machine.applied_index - kept
        if member.writes or index < member.durable.first_index():
            return
        member.state = self.store_of(member)
        member.durable.compact(SnapshotMeta(index, member.durable.term(index), member.raft.conf_at(index)))
        member.raft.compacted(index)
        self.turn(member.id)

    # What follows from a move.

    def renew(self, link: tuple[NodeId, NodeId], *, kept: int) -> None:
        del self.links[link][kept:]
        sender, receiver = link
        self.members[sender].replica.disconnected(receiver)
        self.members[sender].replica.connected(receiver)
        self.turn(sender)

    def hand_over(self, pick: int, *, keep: bool) -> None:
        waiting = [(link, place) for link in sorted(self.links) for place in range(len(self.links[link]))]
        if not waiting:
            return
        link, place = waiting[pick % len(waiting)]
        messages = self.links[link]
        if isinstance(messages[place], Forward):  # the only kind that needs the order of its stream
            place = next(i for i, message in enumerate(messages) if isinstance(message, Forward))
        message = messages[place] if keep else messages.pop(place)
        self.members[link[1]].replica.receive(link[0], message)
        self.turn(link[1])

    def turn(self, node: int) -> None:
        member = self.members[node]
        while (effects := member.replica.take()) is not None:
            self.obey(member, effects)
            self.checks.turn_done(member)

    def obey(self, member: Member, effects: Effects) -> None:
        if effects.persist is not None:
            self.checks.persisting(member, effects.persist)
            member.writes.append(effects.persist)
        self.checks.committing(member)
        for receiver, message in effects.send:
            self.checks.sending(member, receiver, message)
            self.links[member.id, receiver].append(message)
        self.answer(member, member.replica.applied(effects.apply, self.apply(member, effects.apply)))
        for peer, _ in effects.send_snapshots:
            self.send_snapshot(member, peer)

    def apply(self, member: Member, applies: Sequence[Apply]) -> Sequence[Sequence[Sequence[object]]]:
        if not applies:
            return ()
        for apply in applies:
            if self.checks.applying(member, apply.entry):
                commands = [command for group in apply.groups for command in group.commands]
                self.history.applied(apply.entry.index, [self.by_payload[payload] for _, _, payload in commands])
        results = member.machine.apply_many([(a.entry.index, a.entry.term, a.groups) for a in applies])
        self.checks.applied(member)
        return results

    def answer(self, member: Member, answers: Answers) -> None:
        for ticket, result in answers.results:
            self.tell(member, ticket, lambda _, result=result: operations.answer(result))
        for ticket in answers.reads:
            if ticket in member.calls:
                self.tell(member, ticket, lambda operation: operations.read(member.machine, operation))
        for ticket in answers.unknown:
            assert isinstance(ticket, Operation)
            del member.calls[ticket]
            self.history.returned(ticket, Outcome.UNKNOWN)

    def tell(self, member: Member, ticket: object, answer: object) -> None:
        assert isinstance(ticket, Operation)
        assert callable(answer)
        del member.calls[ticket]
        self.history.returned(ticket, Outcome.OK, answer(ticket))

    def send_snapshot(self, member: Member, peer: NodeId) -> None:
        """It is transferred at once; that it is there is a message like any other."""
        index, term = member.machine.applied_index, member.machine.applied_term
        self.members[peer].received[index] = self.store_of(member)
        self.links[member.id, peer].append(InstallSnapshot(member.raft.term, SnapshotMeta(index, term, CONF)))
        member.raft.snapshot_sent(peer, index, True)

    @staticmethod
    def store_of(member: Member) -> MemoryStore:
        store = member.machine.store
        assert isinstance(store, MemoryStore)
        return store.copy()

    def teardown(self) -> None:
        """All goes well at last: there is a leader, and nobody waits any more."""
        if not hasattr(self, "members"):
            return
        self.away = 0
        for link in sorted(self.links):
            self.renew(link, kept=0)
        for _ in range(60):
            for node in self.members:
                self.time_passes(node, 1)
            self.all_goes_well_for_a_while(4)
        assert len({member.machine.applied_index for member in self.members.values()}) == 1
        for member in self.members.values():
            assert not member.calls, f"node {member.id} still owes {[str(operation) for operation in member.calls]}"


def test_replicas() -> None:
    run_state_machine_as_test(
        Replicas,
        settings=settings(
            max_examples=60,
            stateful_step_count=80,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
