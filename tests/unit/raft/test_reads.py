"""Linearizable reads: the claims of Ongaro 6.4, and the ways in which others got them wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raftkv.raft.errors import NoLeader
from raftkv.raft.messages import Append, Heartbeat, HeartbeatReply, ReadIndex, ReadIndexReply
from tests.unit.raft.harness import FAST, Cluster, Envelope


def heartbeats(wire: list[Envelope]) -> int:
    return sum(isinstance(envelope.message, Heartbeat) for envelope in wire)


def test_a_read_index_covers_everything_committed_before() -> None:
    """On every node."""
    cluster = Cluster(3)
    cluster.elect(1)
    index = cluster.propose("a")
    for node in cluster:
        node.raft.read_index(42)
    cluster.settle()
    assert [node.reads for node in cluster] == [[(42, index)]] * 3


def test_a_read_needs_a_majority_that_answers_afterwards() -> None:
    """Ongaro 6.4: a deposed leader that does not know it yet must not answer."""
    cluster = Cluster(5)
    leader = cluster.elect(1)
    cluster.cut([1, 2], [3, 4, 5])
    leader.raft.read_index(1)
    cluster.settle()
    assert leader.reads == []
    cluster.wait_leader(among=[3, 4, 5])
    cluster.heal()
    cluster.tick(5)
    assert (leader.reads, leader.dropped_reads) == ([], [1])


def test_all_reads_of_a_turn_share_one_round() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.tick(2)
    seen: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: seen.append(envelope)
    for context in range(100):
        leader.raft.read_index(context)
    cluster.settle()
    assert len(leader.reads) == 100
    assert heartbeats(seen) == 2


def test_a_follower_forwards_the_reads_of_a_turn_as_one() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    seen: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: seen.append(envelope)
    for context in range(100):
        cluster[2].raft.read_index(context)
    cluster.settle()
    assert [context for context, _ in cluster[2].reads] == list(range(100))
    assert sum(isinstance(envelope.message, ReadIndex) for envelope in seen) == 1


def test_no_read_before_the_leader_has_committed_in_its_term() -> None:
    """Ongaro 6.4, etcd #7331: until then its commit index may be behind what is committed."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    cluster.drop = lambda envelope: isinstance(envelope.message, Append)
    leader = cluster.elect(2)
    cluster.tick()
    leader.raft.read_index(1)
    cluster[3].raft.read_index(2)
    cluster.tick(3)
    assert leader.reads == cluster[3].reads == []
    cluster.heal()
    cluster.tick(5)
    assert [context for context, _ in leader.reads] == [1]
    assert leader.reads[0][1] >= 3
    assert [context for context, _ in cluster[3].reads] == [2]


def test_an_answer_to_an_earlier_round_does_not_confirm_a_later_read() -> None:
    """etcd #20418: a retry under the same name was confirmed by late answers to the first attempt."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raft.read_index(7)
    old = [message.token for _, message in leader.raft.ready().messages if isinstance(message, Heartbeat)]
    leader.raft.read_index(7)
    new = [message.token for _, message in leader.raft.ready().messages if isinstance(message, Heartbeat)]
    assert set(old).isdisjoint(new)
    leader.raft.step(2, HeartbeatReply(1, old[0]))
    leader.raft.step(2, HeartbeatReply(1, old[0]))
    leader.raft.step(3, HeartbeatReply(1, 0))
    assert len(leader.raft.ready().reads) == 1
    leader.raft.step(3, HeartbeatReply(1, 10**9))  # never given out
    assert not leader.raft.has_ready()
    leader.raft.step(3, HeartbeatReply(1, new[0]))
    assert len(leader.raft.ready().reads) == 1


def test_a_lost_round_is_made_up_by_the_next_heartbeat() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.drop = lambda envelope: True
    leader.raft.read_index(1)
    cluster.settle()
    cluster.heal()
    cluster.tick(2)
    assert [context for context, _ in leader.reads] == [1]


def test_a_lost_forward_is_sent_again() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.drop = lambda envelope: isinstance(envelope.message, (ReadIndex, ReadIndexReply))
    cluster[2].raft.read_index(1)
    cluster.settle()
    cluster.heal()
    cluster.tick(FAST.read_retry_ticks + 1)
    assert [context for context, _ in cluster[2].reads] == [1]
    cluster.tick(20)
    assert len(cluster[2].reads) == 1


def test_a_late_answer_to_an_earlier_life_confirms_nothing() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    answers: list[Envelope] = []

    def drop(envelope: Envelope) -> bool:
        if isinstance(envelope.message, ReadIndexReply):
            answers.append(envelope)
            return True
        return False

    cluster.drop = drop
    cluster[2].raft.read_index(1)
    cluster.settle()
    cluster[2].restart()
    cluster.tick(2)
    cluster[2].raft.read_index(1)
    cluster.work()
    cluster[2].raft.step(1, answers[0].message)
    cluster.work()
    assert cluster[2].reads == []


def test_reads_under_way_are_dropped_when_the_leader_changes() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.drop = lambda envelope: isinstance(envelope.message, ReadIndex)
    cluster[2].raft.read_index(5)
    cluster.settle()
    cluster[2].raft.leader_unreachable(1)
    cluster.work()
    assert cluster[2].dropped_reads == [5]
    with pytest.raises(NoLeader):
        cluster[2].raft.read_index(6)


def test_a_single_voter_reads_at_once() -> None:
    cluster = Cluster(1)
    cluster.tick()
    cluster.propose("a")
    cluster[1].raft.read_index(1)
    ready = cluster[1].raft.ready()
    assert ready.reads == ((1, 2),)


def test_rounds_under_way_are_bounded_and_the_rest_shares_the_next() -> None:
    cluster = Cluster(3, config=replace(FAST, read_rounds_max=2))
    leader = cluster.elect(1)
    cluster.tick(2)
    seen: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: seen.append(envelope)
    for context in range(10):
        leader.raft.read_index(context)
        cluster.work()
    cluster.settle()
    assert sorted(context for context, _ in leader.reads) == list(range(10))
    assert heartbeats(seen) == 2 * 3


def test_forwarded_reads_are_bounded() -> None:
    cluster = Cluster(3, config=replace(FAST, reads_max=5))
    leader = cluster.elect(1)
    answers: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: answers.append(envelope)
    for context in range(50):
        leader.raft.step(2, ReadIndex(1, context))
    cluster.settle()
    assert sum(isinstance(envelope.message, ReadIndexReply) for envelope in answers) == 5
    assert not leader.raft.reads.want_round
