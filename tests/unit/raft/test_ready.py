"""Ready: what may leave when, and what counts before it is on disk."""

from __future__ import annotations

from raftkv.raft.messages import Append, AppendReply, Heartbeat, PreVoteReply, Vote, VoteReply
from raftkv.raft.ready import Ready
from raftkv.raft.types import Entry, EntryKind, Role
from tests.unit.raft.harness import Cluster


def entry(index: int, term: int, data: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.NORMAL, data)


def acknowledged(ready: Ready, *, after: bool) -> list[int]:
    messages = ready.messages_after if after else ready.messages
    return [message.index for _, message in messages if isinstance(message, AppendReply) and not message.rejected]


def test_votes_are_asked_for_once_the_own_is_durable() -> None:
    """And it does not count before."""
    cluster = Cluster(3)
    raft = cluster[1].raft
    raft.campaign()
    assert [type(message).__name__ for _, message in raft.ready().messages] == ["PreVote", "PreVote"]
    raft.step(2, PreVoteReply(1, True))
    ready = raft.ready()
    assert ready.messages == ()
    assert [type(message).__name__ for _, message in ready.messages_after] == ["Vote", "Vote"]
    assert ready.must_sync
    raft.step(2, VoteReply(1, True))
    raft.step(3, VoteReply(1, True))
    roles = [raft.role]
    raft.persisted(ready.number)
    assert [*roles, raft.role] == [Role.CANDIDATE, Role.LEADER]


def test_a_single_voter_waits_for_its_disk_too() -> None:
    """etcd #14370: it committed and answered before its own write was durable."""
    cluster = Cluster(1)
    node = cluster[1]
    node.slow_disk = True
    cluster.tick()
    assert node.role is Role.CANDIDATE
    node.persist()
    cluster.settle()
    node.raft.propose([b"a"])
    cluster.settle()
    assert (node.raft.commit, node.data) == (0, [])
    node.persist()
    cluster.settle()
    node.persist()
    cluster.settle()
    assert (node.raft.commit, node.data) == (2, [b"a"])


def test_the_leader_sends_while_its_own_disk_works() -> None:
    """Ongaro 10.2.1; and it does not count itself before that disk is done."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.slow_disk = True
    cluster[3].crash()
    cluster.propose("a")
    assert cluster[2].raft.log.stable == 2
    assert leader.raft.commit == 1
    leader.persist()
    cluster.settle()
    assert leader.raft.commit == 2


def test_the_others_may_commit_before_the_leaders_disk_is_done_but_it_applies_only_what_is_durable() -> None:
    """Ongaro 10.2.1: the leader's own log is not needed for the majority."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.slow_disk = True
    cluster.propose("a")
    assert (leader.raft.commit, leader.data) == (2, [])
    leader.persist()
    cluster.settle()
    assert leader.data == [b"a"]


def test_an_acknowledgement_waits_for_what_it_acknowledges_and_for_nothing_else() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    raft = cluster[2].raft
    raft.step(1, Append(1, 1, 1, (entry(2, 1),), 1))
    ready = raft.ready()
    assert (acknowledged(ready, after=False), acknowledged(ready, after=True)) == ([], [2])
    raft.step(1, Append(1, 0, 0, (), 1))
    raft.step(1, Heartbeat(1, 1, 7))
    ready_2 = raft.ready()
    assert acknowledged(ready_2, after=False) == [1]
    assert ready_2.messages_after == ()
    raft.persisted(ready.number)
    raft.step(1, Append(1, 1, 1, (entry(2, 1),), 1))
    assert acknowledged(raft.ready(), after=False) == [2]


def test_nothing_is_said_in_a_term_that_is_not_durable() -> None:
    """R14: also in later Readys, as long as the write is under way."""
    cluster = Cluster(3)
    raft = cluster[2].raft
    raft.step(1, Heartbeat(4, 0, 1))
    first = raft.ready()
    raft.step(1, Heartbeat(4, 0, 2))
    second = raft.ready()
    assert (first.messages, second.messages) == ((), ())
    assert len(first.messages_after) == len(second.messages_after) == 1
    assert not second.must_sync
    raft.persisted(first.number)
    raft.step(1, Heartbeat(4, 0, 3))
    assert len(raft.ready().messages) == 1


def test_an_older_write_vouches_only_for_what_was_not_overwritten_since() -> None:
    """The same entries leave the log and come back (ABA); acknowledged too early, a crash would lose them."""
    cluster = Cluster(5)
    raft = cluster[1].raft
    raft.step(2, Append(2, 0, 0, (entry(1, 1), entry(2, 2), entry(3, 2)), 0))
    first = raft.ready()
    raft.step(3, Append(3, 1, 1, (entry(2, 3),), 0))
    second = raft.ready()
    raft.step(4, Append(4, 1, 1, (entry(2, 2), entry(3, 2), entry(4, 4)), 4))
    third = raft.ready()
    raft.persisted(first.number)
    assert raft.log.stable == 1
    raft.step(4, Append(4, 3, 2, (), 4))
    ready = raft.ready()
    assert acknowledged(ready, after=False) == []
    assert [found.index for found in ready.committed] == [1]
    raft.persisted(second.number)
    assert raft.log.stable == 1
    raft.persisted(third.number)
    assert raft.log.stable == 4


def test_several_readys_may_be_reported_at_once() -> None:
    cluster = Cluster(3)
    raft = cluster[1].raft
    for index in range(1, 4):
        raft.step(2, Append(1, index - 1, 1 if index > 1 else 0, (entry(index, 1),), 0))
        last = raft.ready()
    raft.persisted(last.number)
    assert raft.log.stable == 3


def test_a_disk_quicker_than_the_turn_holds_nothing_back() -> None:
    """A reply that was to wait has nothing to wait for when the write ends before the Ready is taken."""
    cluster = Cluster(3)
    raft = cluster[1].raft
    raft.step(2, Append(1, 0, 0, (entry(1, 1),), 0))
    ready = raft.ready()
    raft.step(2, Append(1, 0, 0, (entry(1, 1),), 0))
    raft.persisted(ready.number)
    ready = raft.ready()
    assert acknowledged(ready, after=False) == [1]
    assert ready.messages_after == ()


def test_a_vote_and_the_truncation_of_a_suffix_are_one_write() -> None:
    """Rule Z4."""
    cluster = Cluster(3)
    raft = cluster[1].raft
    raft.step(2, Append(1, 0, 0, (entry(1, 1), entry(2, 1, b"old")), 0))
    cluster.work()
    raft.step(3, Vote(2, 9, 9))
    raft.step(3, Append(2, 1, 1, (entry(2, 2, b"new"),), 0))
    ready = raft.ready()
    assert ready.hard_state is not None
    assert (ready.hard_state.term, ready.hard_state.vote) == (2, 0)  # by the message of term 2 our log is better
    assert [found.data for found in ready.entries] == [b"new"]


def test_there_is_no_ready_when_there_is_nothing_to_do() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.tick(3)
    assert not any(node.raft.has_ready() for node in cluster)
