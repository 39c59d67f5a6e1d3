"""Failover by evidence: what happens when the leader's process is known to be gone."""

from __future__ import annotations

import pytest

from raftkv.raft.config import RaftConfig
from raftkv.raft.messages import PreVote, Vote
from raftkv.raft.types import Entry, EntryKind, Role
from tests.unit.raft.harness import Cluster


def failover(cluster: Cluster, notice: dict[int, int]) -> int:
    """Kill the leader; each other node notices after so many ticks. Ticks until there is a new one."""
    dead = cluster.wait_leader()
    cluster.tick(7)
    dead.crash()
    for now in range(100):
        for node in cluster:
            if node is not dead and notice.get(node.id, 0) == now:
                node.raft.leader_unreachable(dead.id)
        if cluster.leader():
            return now
        cluster.tick()
    raise AssertionError("no new leader")


@pytest.mark.parametrize("size", [3, 5])
def test_evidence_spares_the_election_timeout(size: int) -> None:
    for seed in range(30):
        assert failover(Cluster(size, config=RaftConfig(), seed=seed), {}) <= 3


def test_voters_that_notice_later_are_asked_again() -> None:
    """The first to notice is refused by those who still believe; asking goes on until they know."""
    for seed in range(30):
        cluster = Cluster(3, config=RaftConfig(), seed=seed)
        assert failover(cluster, {node: node for node in (1, 2, 3)}) <= 8


def test_a_refused_pre_vote_is_answered_when_the_leader_is_found_dead() -> None:
    cluster = Cluster(3, config=RaftConfig())
    cluster.elect(1)
    voter = cluster[2].raft
    voter.step(3, PreVote(2, 1, 1))
    assert not voter.ready().messages
    voter.leader_unreachable(1)
    assert (3, "PreVoteReply") in [(to, type(message).__name__) for to, message in voter.ready().messages]


def test_who_still_hears_the_leader_doubts_it_aloud_but_not_all_the_time() -> None:
    cluster = Cluster(3, config=RaftConfig())
    cluster.elect(1)
    voter = cluster[2].raft
    kinds: list[str] = []
    for _ in range(10):
        voter.step(3, PreVote(2, 1, 1))
        kinds.extend(event.kind for event in voter.ready().events)
    assert kinds == ["leader_doubted"]


def test_a_living_leader_stays_although_one_follower_calls_it_dead() -> None:
    """Wrong evidence costs nothing: the others still believe, and the next heartbeat convinces the doubter."""
    cluster = Cluster(5, config=RaftConfig())
    leader = cluster.elect(1)
    cluster[3].raft.leader_unreachable(1)
    cluster.tick(50)
    assert cluster.leader() is leader
    assert (leader.raft.term, cluster[3].raft.leader, cluster[3].role) == (1, 1, Role.FOLLOWER)


def test_evidence_about_somebody_else_is_ignored() -> None:
    cluster = Cluster(3, config=RaftConfig())
    leader = cluster.elect(1)
    cluster[2].raft.leader_unreachable(3)
    cluster[2].raft.leader_unreachable(0)
    leader.raft.leader_unreachable(1)
    cluster.settle()
    assert {node.raft.leader for node in cluster} == {1}


def test_the_first_in_turn_changes_with_the_term() -> None:
    """The rank rotates, so that no node is always the one that everybody waits for."""
    first = set()
    for term in range(1, 6):
        cluster = Cluster(5, config=RaftConfig(evidence_random_ticks=0))
        for node in cluster:
            node.raft.become_follower(term, 5, "test")
            node.raft.leader_unreachable(5)
        first |= {node.id for node in cluster if node.role is Role.PRE_CANDIDATE}
    assert first == {1, 2, 3, 4}


def test_whoever_refuses_a_vote_lets_that_election_end_before_its_own() -> None:
    """It campaigned in the moment in which the other had won, who stepped down for its later term; those who had heard
    the other helped nobody, and half a second passed without a leader."""
    config = RaftConfig(evidence_random_ticks=0, evidence_rank_ticks=2)
    waiting = 0
    for term in range(1, 6):
        cluster = Cluster(5, config=config)
        for node in cluster:
            node.raft.become_follower(term, 5, "test")
            node.raft.leader_unreachable(5)
        for node in cluster:
            delay = node.raft.candidacy.delay
            if node.id == 5 or delay < 0:
                continue
            waiting += 1
            shorter = Vote(term + 1, 0, 0)
            node.raft.log.append([Entry(1, term, EntryKind.NORMAL, b"more than the candidate has")])
            node.raft.step(node.id % 4 + 1, shorter)
            assert node.raft.vote == 0
            assert node.raft.candidacy.delay >= config.evidence_retry_ticks
    assert waiting > 0
