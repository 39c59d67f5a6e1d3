"""Each invariant of consensus is reported when it is broken: hand-made steps of nodes that do what they must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from raftkv.raft.messages import Append, AppendReply, Heartbeat, PreVote, PreVoteReply, VoteReply
from raftkv.raft.types import ConfState, Entry, EntryKind, HardState, Role, SnapshotMeta
from raftkv.replica.effects import Persist
from raftkv.sim.checkers import Invariants
from raftkv.sim.disk import SimLog
from raftkv.sim.history import Violation

CONF = ConfState((1, 2, 3))


def entry(index: int, term: int, data: bytes = b"x") -> Entry:
    return Entry(index, term, EntryKind.NORMAL, data)


@dataclass
class FakeNode:
    """A node that does what the test says."""

    id: int
    durable: SimLog = field(default_factory=lambda: SimLog(CONF))
    raft: Any = field(
        default_factory=lambda: SimpleNamespace(
            term=0, commit=0, role=Role.FOLLOWER, conf=CONF, conf_at=lambda _: CONF, log=SimpleNamespace(first=1)
        )
    )
    machine: Any = field(default_factory=lambda: SimpleNamespace(applied_index=0, rolling_hash=0))


class World:
    """Three nodes, and what they do."""

    def __init__(self) -> None:
        self.invariants = Invariants(CONF)
        self.nodes = {node_id: FakeNode(node_id) for node_id in CONF.voters}
        self._number = 0
        for node in self.nodes.values():
            self.invariants.started(node)

    def write(self, node_id: int, term: int, *entries: Entry, vote: int = 0, durable: bool = True) -> None:
        node = self.nodes[node_id]
        self._number += 1
        hard_state = HardState(term, vote, node.raft.commit)
        self.invariants.persisting(node, Persist(self._number, hard_state, entries, None, True))
        if durable:
            node.durable.append(hard_state, entries)

    def install(self, node_id: int, meta: SnapshotMeta) -> None:
        self.invariants.persisting(self.nodes[node_id], Persist(0, None, (), meta, True))

    def turn(self, node_id: int, term: int, commit: int = 0, role: Role = Role.FOLLOWER) -> None:
        node = self.nodes[node_id]
        node.raft.term, node.raft.commit, node.raft.role = term, commit, role
        self.invariants.committing(node)
        self.invariants.turn_done(node)

    def lead(self, node_id: int, term: int, commit: int = 0) -> None:
        self.turn(node_id, term, commit, Role.LEADER)

    def send(self, node_id: int, message: Any, to: int = 2) -> None:
        self.invariants.sending(self.nodes[node_id], to, message)

    def apply(self, node_id: int, applied: Entry) -> None:
        self.invariants.applying(self.nodes[node_id], applied)

    def state(self, node_id: int, index: int, rolling_hash: int) -> None:
        node = self.nodes[node_id]
        node.machine = SimpleNamespace(applied_index=index, rolling_hash=rolling_hash)
        self.invariants.applied(node)

    def restart(self, node_id: int) -> None:
        self.invariants.started(self.nodes[node_id])

    def agree(self) -> None:
        """Node 1 leads term 1, and 1/1 is committed."""
        for node_id in (1, 2):
            self.write(node_id, 1, entry(1, 1))
        self.lead(1, 1)
        self.lead(1, 1, commit=1)


def test_nothing_is_wrong_with_an_ordinary_day() -> None:
    world = World()
    world.agree()
    world.turn(2, 1, commit=1)
    for node_id in (1, 2):
        world.apply(node_id, entry(1, 1))
        world.state(node_id, 1, 77)
    world.write(3, 2, vote=2)
    world.send(3, VoteReply(2, True), to=2)
    world.write(2, 2, entry(2, 2), vote=2)
    world.lead(2, 2, commit=1)
    world.send(2, Append(2, 1, 1, (entry(2, 2),), 1), to=3)
    world.send(2, Heartbeat(2, 1, 1), to=3)
    world.send(1, PreVote(9, 1, 1))
    world.send(1, PreVoteReply(9, True))
    world.write(3, 2, entry(1, 1), entry(2, 2), vote=2)
    world.send(3, AppendReply(2, 2), to=2)
    world.lead(2, 2, commit=2)
    world.install(1, SnapshotMeta(2, 2, CONF))
    world.restart(3)


def two_leaders(world: World) -> None:
    world.write(1, 1)
    world.write(2, 1)
    world.lead(1, 1)
    world.lead(2, 1)


def a_leader_overwrites_its_log(world: World) -> None:
    world.agree()
    world.write(1, 1, entry(2, 1))
    world.write(1, 1, entry(2, 1, b"other"))


def same_place_other_content(world: World) -> None:
    world.write(1, 1, entry(1, 1))
    world.write(2, 1, entry(1, 1, b"other"))


def same_place_other_past(world: World) -> None:
    world.write(1, 2, entry(1, 1), entry(2, 2))
    world.write(2, 2, entry(1, 2), entry(2, 2))


def a_leader_lacks_what_is_committed(world: World) -> None:
    world.agree()
    world.write(3, 2, entry(1, 2))
    world.lead(3, 2)


def nodes_apply_different_entries(world: World) -> None:
    world.apply(1, entry(1, 1))
    world.apply(2, entry(1, 2))


def an_entry_is_skipped(world: World) -> None:
    world.apply(1, entry(2, 1))


def a_hole_in_the_log(world: World) -> None:
    world.write(1, 1, entry(2, 1), durable=False)


def terms_fall_along_the_log(world: World) -> None:
    world.write(1, 2, entry(1, 2), entry(2, 1), durable=False)


def commit_falls(world: World) -> None:
    world.agree()
    world.lead(1, 1, commit=0)


def commit_beyond_the_log(world: World) -> None:
    world.turn(1, 1, commit=1)


def commit_of_another_entry(world: World) -> None:
    world.agree()
    world.write(3, 1, entry(1, 0, b"other"))
    world.turn(3, 1, commit=1)


def commits_before_the_leader(world: World) -> None:
    world.write(1, 1, entry(1, 1))
    world.lead(1, 1)
    world.write(2, 1, entry(1, 1))
    world.turn(2, 1, commit=1)


def a_committed_entry_is_overwritten(world: World) -> None:
    world.agree()
    world.turn(2, 1, commit=1)
    world.write(2, 2, entry(1, 2), durable=False)


def a_leader_commits_an_earlier_term(world: World) -> None:
    for node_id in (1, 2):
        world.write(node_id, 2, entry(1, 1))
    world.lead(1, 2)
    world.lead(1, 2, commit=1)


def a_snapshot_of_something_else(world: World) -> None:
    world.agree()
    world.write(3, 1, entry(1, 0, b"other"))
    world.install(2, SnapshotMeta(1, 0, CONF))


def a_snapshot_that_goes_back(world: World) -> None:
    world.agree()
    world.turn(2, 1, commit=1)
    world.install(2, SnapshotMeta(1, 1, CONF))


def a_term_is_forgotten(world: World) -> None:
    world.write(1, 3)
    world.turn(1, 3)
    world.nodes[1].durable = SimLog(CONF)
    world.restart(1)


def a_term_falls(world: World) -> None:
    world.write(1, 3)
    world.turn(1, 3)
    world.turn(1, 2)


def two_votes(world: World) -> None:
    world.write(1, 1, vote=2)
    world.send(1, VoteReply(1, True), to=2)
    world.send(1, VoteReply(1, True), to=3)


def a_vote_is_forgotten(world: World) -> None:
    world.write(1, 1, vote=2)
    world.send(1, VoteReply(1, True), to=2)
    world.nodes[1].durable = SimLog(CONF)
    world.nodes[1].durable.append(HardState(1, 0, 0), ())
    world.restart(1)


def a_vote_before_the_disk(world: World) -> None:
    world.write(1, 1)
    world.send(1, VoteReply(1, True), to=2)


def speaks_in_a_term_that_is_not_durable(world: World) -> None:
    world.send(1, Heartbeat(1, 0, 1))


def acknowledges_before_the_disk(world: World) -> None:
    world.write(2, 1)
    world.write(2, 1, entry(1, 1), durable=False)
    world.send(2, AppendReply(1, 1), to=1)


def acknowledges_another_entry(world: World) -> None:
    world.write(1, 2, entry(1, 2))
    world.lead(1, 2)
    world.write(2, 2, entry(1, 1))
    world.send(2, AppendReply(2, 1), to=1)


def commits_without_a_quorum(world: World) -> None:
    world.write(1, 1, entry(1, 1))
    world.lead(1, 1)
    world.lead(1, 1, commit=1)


def conf_states_differ(world: World) -> None:
    world.nodes[1].raft.conf_at = lambda _: ConfState((1, 2))
    world.state(1, 1, 77)
    world.state(2, 1, 77)


def states_differ(world: World) -> None:
    world.state(1, 1, 77)
    world.state(2, 1, 78)


BAD: list[tuple[str, Callable[[World], None]]] = [
    ("R1", two_leaders),
    ("R2", a_leader_overwrites_its_log),
    ("R3", same_place_other_content),
    ("R3", same_place_other_past),
    ("R4", a_leader_lacks_what_is_committed),
    ("R5", nodes_apply_different_entries),
    ("R5", an_entry_is_skipped),
    ("R6", a_hole_in_the_log),
    ("R6", terms_fall_along_the_log),
    ("R7", commit_falls),
    ("R7", commit_beyond_the_log),
    ("R7", commit_of_another_entry),
    ("R9", commits_before_the_leader),
    ("R7", a_committed_entry_is_overwritten),
    ("R8", a_leader_commits_an_earlier_term),
    ("R10", a_snapshot_of_something_else),
    ("R10", a_snapshot_that_goes_back),
    ("R11", a_term_is_forgotten),
    ("R11", a_term_falls),
    ("R12", two_votes),
    ("R12", a_vote_is_forgotten),
    ("D1", a_vote_before_the_disk),
    ("R14", speaks_in_a_term_that_is_not_durable),
    ("D1", acknowledges_before_the_disk),
    ("D1", acknowledges_another_entry),
    ("D1", commits_without_a_quorum),
    ("S1", states_differ),
    ("C3", conf_states_differ),
]


@pytest.mark.parametrize(("rule", "act"), BAD, ids=[act.__name__ for _, act in BAD])
def test_a_broken_invariant_is_reported(rule: str, act: Callable[[World], None]) -> None:
    with pytest.raises(Violation) as caught:
        act(World())
    assert caught.value.rule == rule
