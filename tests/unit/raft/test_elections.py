"""Leader election: the claims of Ongaro 3.4, 3.6.1, 6.2 and 9.6, one test each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raftkv.raft.messages import Append, Heartbeat, PreVote, PreVoteReply, Vote, VoteReply
from raftkv.raft.types import ConfState, Entry, EntryKind, HardState, Role
from tests.unit.raft.harness import FAST, Cluster


def test_a_silent_cluster_elects_exactly_one_leader() -> None:
    """Ongaro 3.4: followers that hear nobody campaign, and one of them wins."""
    for seed in range(20):
        cluster = Cluster(5, seed=seed)
        leader = cluster.wait_leader()
        assert [node.id for node in cluster if node.role is Role.LEADER] == [leader.id]
        assert {node.raft.leader for node in cluster} == {leader.id}


def test_at_most_one_vote_a_term() -> None:
    """Ongaro 3.4: first come, first served; the vote is not given twice."""
    cluster = Cluster(3)
    voter = cluster[1].raft
    voter.step(2, Vote(5, 0, 0))
    voter.step(3, Vote(5, 0, 0))
    voter.step(2, Vote(5, 0, 0))
    ready = voter.ready()
    assert ready.hard_state == HardState(5, 2, 0)
    answers = [(to, reply.granted) for to, reply in ready.messages_after if isinstance(reply, VoteReply)]
    assert answers == [(2, True), (3, False), (2, True)]


def test_a_vote_survives_a_crash() -> None:
    """Ongaro 3.8: term and vote are durable before the reply, so a restarted voter does not vote twice."""
    cluster = Cluster(3)
    cluster[1].raft.step(2, Vote(5, 0, 0))
    cluster.work()
    cluster[1].restart()
    cluster[1].raft.step(3, Vote(5, 0, 0))
    ready = cluster[1].raft.ready()
    assert ready.messages == ((3, VoteReply(5, False)),)


def test_stepping_down_within_a_term_keeps_the_vote() -> None:
    """A node that loses its office in a term has still voted in it (CCF #8094)."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(1)
    cluster.tick(15, only=1)
    assert leader.role is not Role.LEADER
    assert (leader.raft.term, leader.raft.vote) == (1, 1)
    leader.raft.step(2, Vote(1, 99, 99))
    assert leader.raft.vote == 1


def test_only_an_up_to_date_log_gets_a_vote() -> None:
    """Ongaro 3.6.1: later last term wins, then the longer log."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    voter = cluster[2].raft  # its log ends at 1/2
    for last_index, last_term, granted in [(9, 0, False), (1, 1, False), (2, 1, True), (1, 2, True), (3, 1, True)]:
        voter.step(3, Vote(voter.term + 1, last_index, last_term, transfer=True))
        reply = [m for _, m in voter.ready().messages_after if isinstance(m, VoteReply)]
        assert [m.granted for m in reply] == [granted], (last_index, last_term)


def test_a_later_term_is_followed() -> None:
    """Ongaro 3.3: whoever sees a later term adopts it; a leader that does steps down."""
    cluster = Cluster(3)
    leader = cluster.elect(1).raft
    leader.step(2, VoteReply(7, False))
    assert (leader.role, leader.term, leader.leader) == (Role.FOLLOWER, 7, 0)


def test_an_earlier_term_is_answered_with_the_own() -> None:
    """Ongaro 3.3; also to appends, so that a leader nobody follows learns of it (etcd #8501)."""
    cluster = Cluster(3)
    node = cluster[1].raft
    node.step(2, Vote(9, 0, 0))
    cluster[1].take()
    cluster[1].persist()
    for message in (Append(3, 0, 0, (), 0), Heartbeat(3, 0, 1), Vote(3, 0, 0), PreVote(3, 0, 0)):
        node.step(3, message)
        [(to, reply)] = node.ready().messages
        assert (to, reply.term) == (3, 9)


def test_election_timeouts_are_drawn_anew_from_t_to_2t() -> None:
    """Ongaro 3.4: so that split votes are rare; etcd #10483: never so that all fire together for ever."""
    raft = Cluster(3)[1].raft
    drawn = set()
    for term in range(1, 400):
        raft.become_follower(term, 0, "test")
        drawn.add(raft.election_timeout)
    assert drawn == set(range(FAST.election_ticks, 2 * FAST.election_ticks))


def test_pre_vote_changes_neither_term_nor_vote() -> None:
    """Ongaro 9.6: who cannot win does not raise its term, and who says yes has promised nothing."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(3)
    cluster.tick(100)
    assert cluster[3].role is Role.PRE_CANDIDATE
    assert cluster[3].raft.term == 1
    cluster.heal()
    cluster.tick(3)
    assert cluster.leader() is leader
    assert (leader.raft.term, cluster[3].raft.leader) == (1, 1)


def test_voters_that_hear_a_leader_ignore_candidates() -> None:
    """Ongaro 4.2.3: a node that was cut off or removed cannot depose a working leader."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].raft.step(3, PreVote(2, 99, 9))
    cluster[2].raft.step(3, Vote(8, 99, 9))
    ready = cluster[2].raft.ready()
    assert not ready.messages
    assert not ready.messages_after
    assert cluster[2].raft.term == 1
    assert [event.by for event in ready.events if event.kind == "leader_doubted"] == [3]


def test_a_leader_without_a_quorum_steps_down() -> None:
    """Ongaro 6.2: within an election timeout, so that its clients go elsewhere."""
    cluster = Cluster(5)
    leader = cluster.elect(1)
    cluster.cut([1, 2], [3, 4, 5])
    cluster.tick(FAST.election_ticks + 2)
    assert leader.role is not Role.LEADER
    cluster.wait_leader(among=[3, 4, 5])


def test_a_leader_with_a_bare_quorum_stays() -> None:
    """Ongaro 6.2."""
    cluster = Cluster(5)
    leader = cluster.elect(1)
    cluster.cut([1, 2, 3], [4, 5])
    cluster.tick(100)
    assert cluster.leader() is leader
    assert leader.raft.term == 1


def test_a_leader_whose_disk_hangs_steps_down_and_hands_over() -> None:
    """hashicorp/raft #503: it would keep the cluster waiting for ever, for its heartbeats need no disk."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.slow_disk = True
    leader.raft.propose([b"x"])
    cluster.tick(FAST.disk_stall_ticks + 2)
    assert leader.role is Role.FOLLOWER
    heir = cluster.leader()
    assert heir is not None
    assert heir.id != 1  # at once, without another election timeout
    assert heir.data == [b"x"]
    cluster.tick(50)
    assert cluster.leader() is heir
    leader.slow_disk = False
    cluster.tick(3)
    assert leader.data == [b"x"]


def test_an_idle_leader_is_not_taken_for_one_with_a_hung_disk() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.tick(5 * FAST.disk_stall_ticks)
    assert cluster.leader() is leader


def test_a_disk_that_is_slow_but_moves_is_not_stalled() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.slow_disk = True
    for number in range(30):
        leader.raft.propose([b"%d" % number])
        cluster.tick(FAST.disk_stall_ticks // 2)
        leader.persist()
    assert cluster.leader() is leader


def test_a_single_voter_leads_at_once() -> None:
    cluster = Cluster(1)
    cluster.tick()
    assert cluster[1].role is Role.LEADER
    cluster.propose("a")
    assert cluster[1].data == [b"a"]


def test_a_learner_never_campaigns() -> None:
    """Ongaro 4.2.1: it only listens."""
    cluster = Cluster(3, learners=[3])
    cluster.tick(100, only=3)
    assert (cluster[3].role, cluster[3].raft.term) == (Role.FOLLOWER, 0)
    cluster[3].raft.campaign()
    assert not cluster[3].raft.has_ready()


def test_a_candidate_yields_to_the_leader_of_its_term() -> None:
    """Ongaro 3.4."""
    cluster = Cluster(3)
    cluster.cut([1], [2], [3])
    cluster[1].raft.become_candidate()
    assert cluster[1].raft.term == 1
    cluster[1].raft.step(2, Append(1, 0, 0, (), 0))
    assert (cluster[1].role, cluster[1].raft.leader, cluster[1].raft.vote) == (Role.FOLLOWER, 2, 1)


def test_a_second_leader_of_a_term_is_not_believed() -> None:
    """Election safety says that there is none; a message that claims it changes nothing."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster[2].raft.step(3, Append(1, 1, 1, (), 99))
    leader.raft.step(3, Append(1, 1, 1, (), 99))
    assert cluster[2].raft.leader == 1
    assert leader.role is Role.LEADER
    assert "message_ignored" in [event.kind for event in leader.raft.ready().events]


def test_split_votes_are_resolved_soon() -> None:
    """Ongaro 3.4: each candidate waits a random while. Ours waits less than the silence before a first campaign."""
    cluster = Cluster(5)
    cluster[5].crash()
    cluster.drop = lambda envelope: isinstance(envelope.message, PreVote)
    for node, friend in ((1, 3), (2, 4)):
        raft = cluster[node].raft
        raft.become_pre_candidate()
        raft.candidacy.votes = {node: True, friend: True}
        raft.step(5, PreVoteReply(1, True))
    cluster.drop = lambda envelope: (
        isinstance(envelope.message, Vote)
        and {envelope.sender, envelope.to}
        in (
            {1, 4},
            {2, 3},
        )
    )
    cluster.settle()
    assert cluster.leader() is None
    assert {cluster[1].role, cluster[2].role} == {Role.CANDIDATE}
    cluster.heal()
    cluster.tick(2 * FAST.candidate_ticks)
    assert cluster.leader() is not None


class TestPreVoteDeadlocks:
    """Ways in which pre-vote has left real clusters without a leader for ever."""

    def test_smaller_term_with_longer_log(self) -> None:
        """etcd #8243: its requests are of a term that is over; the refusal tells it the present one."""
        cluster = Cluster(3)
        cluster.elect(1)
        cluster.isolate(3)
        cluster.propose("a")
        cluster[1].crash()
        # 3 has a short log and gets far ahead in terms; it cannot win against 2, and 2 must not be stuck below.
        cluster[3].raft.step(1, VoteReply(9, False))
        cluster.heal()
        leader = cluster.wait_leader()
        assert leader.id == 2
        assert leader.raft.term > 9

    def test_pre_vote_on_and_off_mixed(self) -> None:
        """etcd #8501: during a rolling restart a node without pre-vote gets ahead in terms behind a partition."""
        plain = replace(FAST, pre_vote=False)
        cluster = Cluster(3, configs={3: plain})
        cluster.elect(1)
        cluster.isolate(3)
        cluster.tick(100)
        assert cluster[3].raft.term > 3
        cluster.propose("a")
        cluster.heal()
        leader = cluster.wait_leader(100)
        cluster.propose("b")
        cluster.tick(30)
        assert [node.data for node in cluster] == [[b"a", b"b"]] * 3
        assert leader.raft.term > 3

    def test_half_of_a_joint_change_with_long_log_and_low_term(self) -> None:
        """openraft #1796: long log with low term against short log with high term, both needed for a quorum."""
        cluster = Cluster(4)
        joint = ConfState(voters=(1, 2), outgoing=(3, 4), auto_leave=False)
        for node in cluster:
            disk = node.disk
            disk.meta = replace(disk.meta, conf=joint)
            terms, term = ([1, 1, 1, 1], 2) if node.id in (1, 2) else ([1, 7], 8)
            disk.log = [Entry(index, t, EntryKind.NORMAL, b"") for index, t in enumerate(terms, 1)]
            disk.hard_state = HardState(term, 0, 1)
            node.restart()
        assert cluster.wait_leader().id in (3, 4)

    @pytest.mark.parametrize("bridge", [2, 3])
    def test_an_old_leader_that_reaches_only_a_bridge(self, bridge: int) -> None:
        """openraft #2080, Cloudflare 2020-11-02: its heartbeats keep one voter that a connected majority needs."""
        cluster = Cluster(5)
        cluster.elect(1)
        majority = [node for node in (2, 3, 4) if node != bridge] + [bridge]
        cluster.cut([1], majority, [5])
        cluster.cuts -= {(1, bridge), (bridge, 1)}
        leader = cluster.wait_leader(100, among=majority)
        index = cluster.propose("a", leader.id)
        assert leader.raft.commit >= index
        assert cluster[1].role is not Role.LEADER
        term = leader.raft.term
        cluster.tick(100)
        assert (leader.role, leader.raft.term) == (Role.LEADER, term), "the old leader disturbs the new one"
