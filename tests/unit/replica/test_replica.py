"""What a replica does, in which order, and what becomes of its callers' commands."""

from __future__ import annotations

import pytest

from raftkv.raft.config import RaftConfig
from raftkv.raft.messages import Append, AppendReply, Heartbeat, InstallSnapshot, ReadIndex, Vote, VoteReply
from raftkv.raft.types import ConfState, EntryKind, Role, SnapshotMeta
from raftkv.replica.effects import Forward, PeerMessage
from raftkv.replica.replica import FORGET_TICKS, Replica
from raftkv.state.commands import Command, decode_batch
from tests.unit.replica import nodes
from tests.unit.replica.nodes import Node, Table


@pytest.fixture
def three() -> Table:
    """Three nodes, the first leads."""
    table = Table(3)
    table.elect(1)
    return table


# Order.


def test_a_vote_leaves_only_when_it_is_durable() -> None:
    node = Node(1, (1, 2, 3))
    node.replica.receive(2, Vote(5, 0, 0))
    (effects,) = node.turn()
    assert effects.persist is not None
    assert effects.persist.hard_state is not None
    assert (effects.persist.hard_state.term, effects.persist.hard_state.vote) == (5, 2)
    assert node.out == []
    node.disk()
    node.turn()
    assert node.out == [(2, VoteReply(5, True))]


def test_an_acknowledgement_leaves_only_when_the_entries_are_durable(three: Table) -> None:
    three[1].propose(b"a")
    three[1].turn()
    three.deliver(Append)
    three[2].turn()
    assert not [message for _, message in three[2].out if isinstance(message, AppendReply)]
    three[2].disk()
    three[2].turn()
    assert [message for _, message in three[2].out if isinstance(message, AppendReply)]


def test_acknowledgements_wait_for_their_own_write_only(three: Table) -> None:
    follower, term = three[2], three[1].raft.term
    last, last_term = follower.raft.log.last, follower.raft.log.last_term
    entries = three[1].log.entries(last, last + 1, 1)
    one = entries[0].__class__(last + 1, term, EntryKind.NORMAL, b"")
    two = entries[0].__class__(last + 2, term, EntryKind.NORMAL, b"")
    follower.out.clear()
    follower.replica.receive(1, Append(term, last, last_term, (one,), 0))
    follower.turn()
    follower.replica.receive(1, Append(term, last + 1, term, (two,), 0))
    follower.turn()
    assert len(follower.writes) == 2
    follower.disk(1)
    follower.turn()
    assert [message.index for _, message in follower.out if isinstance(message, AppendReply)] == [last + 1]
    follower.disk(1)
    follower.turn()
    assert [message.index for _, message in follower.out if isinstance(message, AppendReply)] == [last + 1, last + 2]


def test_the_leader_sends_while_its_own_write_is_under_way(three: Table) -> None:
    leader = three[1]
    leader.propose(b"a")
    (effects,) = leader.turn()
    assert effects.persist is not None
    assert sorted(to for to, message in effects.send if isinstance(message, Append)) == [2, 3]


def test_the_leader_counts_itself_only_when_its_own_write_is_done(three: Table) -> None:
    three.cut = {3}
    leader, follower = three[1], three[2]
    leader.propose(b"a")
    leader.turn()
    three.deliver()
    follower.work()
    three.deliver()
    leader.turn()  # it has the acknowledgement of 2, but its own disk is slow
    assert leader.answered() == []
    leader.disk()
    leader.turn()
    assert leader.answered() == [b"a"]


def test_a_single_node_applies_only_what_is_durable() -> None:
    node = Node(1, (1,))
    node.replica.tick()
    node.work()
    node.replica.tick()
    node.work()
    node.propose(b"a")
    node.turn()
    assert node.answered() == []
    node.disk()
    node.turn()
    assert node.answered() == [b"a"]


# Batches.


def test_everything_of_a_turn_is_one_entry(three: Table) -> None:
    for payload in (b"a", b"b"):
        three[2].propose(payload)
    three[3].propose(b"c")
    three[2].turn()
    three[3].turn()
    three.deliver(Forward)
    three[1].propose(b"d")
    three.settle()
    assert three[1].payloads() == [[b"a", b"b", b"c", b"d"]]
    assert three[2].answered() == [b"a", b"b"]
    assert three[3].answered() == [b"c"]


def test_followers_hear_of_a_commit_within_two_ticks_unless_an_append_carries_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Watches on followers saw a lone write only with the next beat."""
    patient = RaftConfig(heartbeat_ticks=20, election_ticks=100, disk_stall_ticks=1000)
    monkeypatch.setattr(nodes, "CONFIG", patient)
    table = Table(3)
    leader = table.elect(1)
    table.tick(3)
    leader.propose(b"a")
    table.settle()
    assert leader.payloads() == [[b"a"]]
    assert [table[id].payloads() for id in (2, 3)] == [[], []]
    table.tick(2)
    assert [table[id].payloads() for id in (2, 3)] == [[[b"a"]], [[b"a"]]]

    beats: list[PeerMessage] = []
    for payload in (b"b", b"c", b"d", b"e"):  # in each tick one: each carries the commit of the one before
        leader.propose(payload)
        leader.turn()
        beats += [message for _, message in leader.out if isinstance(message, Heartbeat)]
        table.settle()
        leader.replica.tick()
        leader.turn()
        beats += [message for _, message in leader.out if isinstance(message, Heartbeat)]
        table.settle()
    assert beats == []


def test_while_an_entry_is_under_way_commands_gather(three: Table) -> None:
    leader = three[1]
    leader.propose(b"a")
    leader.turn()
    for payload in (b"b", b"c"):
        leader.propose(payload)
        leader.turn()
    assert len(leader.writes) == 1
    three.settle()
    assert leader.payloads() == [[b"a"], [b"b", b"c"]]


def test_a_follower_gathers_too(three: Table) -> None:
    follower = three[2]
    for payload in (b"a", b"b", b"c"):
        follower.propose(payload)
        follower.turn()
    assert [[c.payload for c in forward.commands] for forward in follower.forwards()] == [[b"a"]]
    three.settle()
    assert follower.payloads() == [[b"a"], [b"b", b"c"]]


def test_many_commands_do_not_wait() -> None:
    table = Table(3, commands_good=2, entries_max=3)
    leader = table.elect(1)
    for number in range(8):
        leader.propose(b"%d" % number)
        leader.turn()
    # The first goes at once, then two by two, until three entries are under way.
    assert len(leader.writes) == 3
    table.settle()
    assert leader.payloads() == [[b"0"], [b"1", b"2"], [b"3", b"4"], [b"5", b"6", b"7"]]


def test_entries_and_forwarded_messages_are_cut_by_bytes() -> None:
    """What gathers without a leader may be any amount; as one message no peer would accept it."""
    table = Table(3, entry_bytes_max=10)
    for number in range(5):
        table[2].propose(b"x" * 4 + b"%d" % number)
    table[2].propose(b"y" * 50)
    table.elect(1)
    sizes = [[sum(len(p) for _, _, p in g.commands) for g in decode_batch(e.data)] for e in table[1].entries]
    assert [sum(size) for size in sizes if size] == [10, 10, 5, 50]
    assert len(table[2].answered()) == 6


# Callers.


def test_without_a_leader_commands_wait() -> None:
    table = Table(3)
    table[2].propose(b"a")
    table.settle()
    assert table[2].out == []
    table.elect(1)
    assert table[2].answered() == [b"a"]


def test_what_is_abandoned_before_it_is_sent_never_gets_into_the_log() -> None:
    table = Table(3)
    pending = table[2].replica.propose(1, b"a", "a")
    table[2].propose(b"b")
    Replica.abandon(pending)
    table.elect(1)
    assert table[1].payloads() == [[b"b"]]


def test_a_lost_command_is_proposed_again_to_the_next_leader_once(three: Table) -> None:
    three[3].propose(b"a")
    three[3].turn()
    three[3].out.clear()  # and it never arrives
    three.cut = {1}
    three[2].replica.gone(1)
    three[3].replica.gone(1)
    three.tick(5)
    assert three[3].payloads() == [[b"a"]]
    assert three[3].answered() == [b"a"]
    three.cut = set()
    three.tick(5)
    assert three[1].payloads() == [[b"a"]]


def test_a_command_that_the_old_leader_had_committed_is_not_proposed_again(three: Table) -> None:
    three[3].propose(b"a")
    three[3].turn()
    three.deliver(Forward)
    three[1].work()  # an entry, appended to
    three.deliver(Append)
    three[2].work()
    three[3].work()
    three.deliver(AppendReply)
    three[1].work()  # and committed, but nobody hears of it
    assert three[1].payloads() == [[b"a"]]
    three[1].out.clear()
    three.cut = {1}
    three[2].replica.gone(1)
    three[3].replica.gone(1)
    three.tick(5)
    assert three[3].payloads() == [[b"a"]]
    assert three[3].answered() == [b"a"]


def test_a_command_sent_in_an_old_term_is_refused_by_whoever_leads_now(three: Table) -> None:
    old = Forward(three[1].raft.term - 1, 7, (Command(1, 1, b"late"),))
    three[1].replica.receive(3, old)
    three[2].replica.receive(3, Forward(three[2].raft.term, 7, (Command(1, 1, b"astray"),)))
    three.settle()
    assert three[1].payloads() == []


def test_what_a_broken_stream_has_lost_is_sent_again(three: Table) -> None:
    three[3].propose(b"a")
    three[3].turn()
    three[3].out.clear()
    three.settle()
    assert three[1].payloads() == []
    three[3].replica.connected(1)
    three.settle()
    assert three[3].answered() == [b"a"]


def test_what_was_not_lost_and_is_sent_again_is_taken_once(three: Table) -> None:
    three[3].propose(b"a")
    three[3].turn()
    three.deliver(Forward)
    three[3].replica.connected(1)
    three.settle()
    assert three[1].payloads() == [[b"a"]]


def test_a_stream_renewed_while_no_leader_is_known_is_remembered(three: Table) -> None:
    """Found by simulation: who lost sight of the leader for a moment lost its command for the whole term."""
    follower = three[3]
    follower.propose(b"a")
    follower.turn()
    follower.out.clear()
    follower.replica.gone(1)
    assert follower.raft.leader == 0
    follower.replica.connected(1)
    follower.turn()
    assert follower.forwards() == []
    three.tick(2)  # a heartbeat of the same leader
    assert follower.raft.leader == 1
    assert follower.answered() == [b"a"]


def test_a_caller_that_has_gone_does_not_hold_up_the_others(three: Table) -> None:
    """What is under way holds back later commands; a lost one that nobody waits for must not do so for ever."""
    follower = three[3]
    pending = follower.replica.propose(1, b"a", "a")
    follower.turn()
    follower.out.clear()
    Replica.abandon(pending)
    follower.propose(b"b")
    follower.turn()
    assert follower.forwards() == []
    follower.replica.connected(1)
    three.settle()
    assert follower.answered() == [b"b"]


# What a leader proposes by itself.


def test_what_a_leader_says_of_leases_goes_before_what_clients_want(three: Table) -> None:
    leader = three[1]
    three[2].propose(b"forwarded")
    three[2].work()
    three.deliver(Forward)
    leader.propose(b"own")
    leader.replica.propose(1, b"a lease has ended", "ended", leading=True)
    leader.replica.propose(1, b"and another", "another", leading=True)
    three.settle()
    assert leader.payloads() == [[b"a lease has ended", b"and another", b"forwarded", b"own"]]
    assert leader.answered() == ["ended", "another", b"own"]


def test_what_a_leader_says_of_leases_is_forwarded_by_nobody(three: Table) -> None:
    """Whoever lost his office without knowing it, and says it then; clients' commands do go to the next leader."""
    three.cut = {1}
    three[1].replica.propose(1, b"sent", "sent", leading=True)
    three[1].propose(b"client's, sent")
    three[1].work()
    three[1].replica.propose(1, b"queued", "queued", leading=True)
    three[1].propose(b"client's, queued")
    three[1].work()
    three.tick(30)
    three.elect(2)
    three[2].propose(b"of the next leader")
    three.settle()
    three.cut = set()
    three.tick(5)
    assert three[1].raft.leader == 2
    done = [payload for payloads in three[2].payloads() for payload in payloads]
    assert sorted(done) == [b"client's, queued", b"client's, sent", b"of the next leader"]
    assert three[1].unknown == ["queued", "sent"]
    assert three[1].answered() == [b"client's, queued", b"client's, sent"]
    assert three[1].replica.waiting == 0
    three[1].replica.propose(1, b"by a follower", "never", leading=True)
    three.tick(5)
    assert three[1].forwards() == []
    assert three[1].replica.waiting == 0


def test_a_restarted_node_takes_no_answers_of_its_earlier_life(three: Table) -> None:
    follower = three[3]
    follower.propose(b"a")
    follower.turn()
    three.deliver(Forward)
    follower.crash()
    follower.propose(b"b")
    follower.replica.connected(1)
    three.tick(2)
    assert three[1].payloads() == [[b"a"], [b"b"]]
    assert follower.answered() == [b"b"]


def test_a_snapshot_makes_the_fate_of_what_was_sent_unknown(three: Table) -> None:
    follower, term = three[3], three[1].raft.term
    follower.propose(b"a")
    follower.turn()
    follower.out.clear()
    follower.propose(b"b")
    meta = SnapshotMeta(50, term, ConfState((1, 2, 3)))
    follower.replica.receive(1, InstallSnapshot(term, meta))
    follower.turn()
    assert follower.unknown == []
    follower.disk()
    follower.turn()
    assert follower.unknown == [b"a"]
    assert [[c.payload for c in forward.commands] for forward in follower.forwards()] == [[b"b"]]


# Content.


def test_an_entry_that_is_no_batch_is_passed_over(three: Table) -> None:
    three[1].raft.propose([b"no batch"])
    three[2].propose(b"a")
    three.settle()
    three.tick()
    assert three[2].answered() == [b"a"]
    assert {node.raft.log.applied for node in three.nodes.values()} == {3}


def test_a_command_that_cannot_be_encoded_is_ignored(three: Table) -> None:
    three[1].replica.receive(2, Forward(three[1].raft.term, 7, (Command(1, 256, b""),)))
    three[1].replica.receive(2, Forward(three[1].raft.term, 7, ()))
    three.settle()
    assert three[1].payloads() == []
    assert three[1].raft.role is Role.LEADER


# Reads.


def test_a_read_waits_until_its_index_is_applied(three: Table) -> None:
    leader, follower = three[1], three[2]
    leader.propose(b"a")
    leader.work()
    three.deliver(Append)
    three[3].work()
    three.deliver(AppendReply)
    leader.work()  # committed by 1 and 3; 2 has it in memory only
    follower.out.clear()
    follower.replica.read("r")
    follower.turn()
    assert [message for _, message in follower.out if isinstance(message, ReadIndex)]
    assert follower.reads == []
    three.settle()
    assert follower.reads == ["r"]
    assert follower.payloads() == [[b"a"]]


def test_a_read_without_a_leader_waits_for_one() -> None:
    table = Table(3)
    table[2].replica.read("r")
    table.settle()
    assert table[2].reads == []
    table.elect(1)
    table.tick(2)
    assert table[2].reads == ["r"]


def test_without_a_leader_those_who_come_and_go_leave_nothing() -> None:
    table = Table(3)
    replica = table[2].replica
    for number in range(1000):
        replica.abandon(replica.read(number))
        replica.abandon(replica.propose(1, b"x", number))
        table[2].turn()
    replica.read("r")
    for _ in range(FORGET_TICKS):
        replica.tick()
    assert replica.waiting == 1
    table.elect(1)
    table.tick(2)
    assert table[2].reads == ["r"]


def test_a_leader_without_a_quorum_keeps_no_reads_of_those_who_have_gone(three: Table) -> None:
    three.cut = {2, 3}
    replica = three[1].replica
    for number in range(FORGET_TICKS):
        replica.abandon(replica.read(number))
        three[1].turn()
    for _ in range(FORGET_TICKS):
        replica.tick()
    assert replica.waiting == 0


def test_a_leader_that_is_cut_off_serves_no_read(three: Table) -> None:
    three.cut = {2, 3}
    three[1].replica.read("r")
    three.tick(3)
    assert three[1].reads == []
    three.cut = set()
    three.tick(3)
    assert three[1].reads == ["r"]


# Who waits for news.


def test_where_somebody_watches_a_commit_is_heard_of_at_once(three: Table) -> None:
    three[2].raft.eager = True
    three.tick(5)  # a heartbeat's reply says so
    before = three[2].raft.commit
    three[1].propose(b"a")
    three.settle()  # no tick
    assert three[2].raft.commit == before + 1
    assert three[3].raft.commit == before
    three[2].raft.eager = False
    three.tick(5)
    before = three[2].raft.commit
    three[1].propose(b"b")
    three.settle()
    assert three[2].raft.commit == before
