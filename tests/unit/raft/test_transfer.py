"""Leadership transfer: the claims of Ongaro 3.10."""

from __future__ import annotations

import pytest

from raftkv.raft.errors import InvalidTransferee, NotLeader, TransferInProgress
from raftkv.raft.messages import Append, TimeoutNow, Vote
from raftkv.raft.types import Role
from tests.unit.raft.harness import FAST, Cluster, Envelope


def test_leadership_goes_to_the_target_at_once() -> None:
    """Ongaro 3.10: no election timeout passes, and stickiness does not stand in its way."""
    cluster = Cluster(5)
    cluster.elect(1).raft.transfer_leadership(4)
    cluster.settle()
    assert cluster[4].role is Role.LEADER
    assert cluster[1].role is Role.FOLLOWER
    assert cluster[4].raft.term == 2


def test_a_target_that_is_behind_gets_the_log_first() -> None:
    """Ongaro 3.10, step 2."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.drop = lambda envelope: envelope.to == 2
    cluster.propose("a")
    cluster.heal()
    leader.raft.transfer_leadership(2)
    cluster.tick(3)
    assert cluster[2].role is Role.LEADER
    assert cluster[2].log()[1].data == b"a"


def test_the_leader_takes_nothing_meanwhile_and_goes_on_when_it_fails() -> None:
    """Ongaro 3.10, steps 1 and the abort after an election timeout."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster[2].crash()
    leader.raft.transfer_leadership(2)
    assert not leader.raft.accepts_proposals()
    with pytest.raises(TransferInProgress) as refused:
        leader.raft.propose([b"x"])
    assert refused.value.target == 2
    cluster.tick(FAST.election_ticks)
    assert leader.raft.status().lead_transferee == 0
    cluster.propose("y")
    assert leader.data == [b"y"]
    assert "transfer_aborted" in [event.kind for event in leader.events]


def test_a_late_word_of_an_aborted_transfer_deposes_nobody() -> None:
    """raft-rs #234: it arrived after the abort and won an election."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    held: list[Envelope] = []

    def drop(envelope: Envelope) -> bool:
        if isinstance(envelope.message, TimeoutNow):
            held.append(envelope)
            return True
        return False

    cluster.drop = drop
    leader.raft.transfer_leadership(2)
    cluster.tick(FAST.election_ticks + 1)
    assert held
    for envelope in held:
        cluster[2].raft.step(1, envelope.message)
    cluster.tick(30)
    assert cluster.leader() is leader
    assert leader.raft.term == 1


def test_even_a_target_that_missed_the_abort_does_not_win() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    held: list[Envelope] = []

    def drop(envelope: Envelope) -> bool:
        if isinstance(envelope.message, TimeoutNow):
            held.append(envelope)
        return isinstance(envelope.message, (TimeoutNow, Append)) and envelope.to == 2

    cluster.drop = drop
    leader.raft.transfer_leadership(2)
    cluster.tick(FAST.election_ticks + 1)
    cluster[2].raft.step(1, held[0].message)
    cluster.settle()
    assert cluster[2].role is not Role.LEADER


def test_a_lost_word_is_repeated() -> None:
    cluster = Cluster(3)
    cluster.elect(1).raft.transfer_leadership(2)
    cluster.work()
    cluster.wire.clear()
    cluster.tick(2)
    assert cluster[2].role is Role.LEADER


def test_a_word_from_another_than_the_leader_is_void() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].raft.step(3, TimeoutNow(1, 1))
    cluster[2].raft.step(1, TimeoutNow(1, 99))
    assert cluster[2].role is Role.FOLLOWER


def test_who_cannot_lead_is_refused() -> None:
    cluster = Cluster(3, learners=[3])
    leader = cluster.elect(1)
    for target in (3, 9, 0):
        with pytest.raises(InvalidTransferee):
            leader.raft.transfer_leadership(target)
    with pytest.raises(NotLeader):
        cluster[2].raft.transfer_leadership(1)
    leader.raft.transfer_leadership(1)  # it leads already
    assert leader.raft.accepts_proposals()


def test_the_candidate_says_that_it_was_asked() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    seen: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: seen.append(envelope)
    cluster[1].raft.transfer_leadership(2)
    cluster.settle()
    votes = [envelope.message for envelope in seen if isinstance(envelope.message, Vote)]
    assert votes == [Vote(2, 1, 1, True)] * 2


def test_another_target_replaces_the_first() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster[2].crash()
    leader.raft.transfer_leadership(2)
    leader.raft.transfer_leadership(3)
    cluster.tick(3)
    assert cluster[3].role is Role.LEADER
