"""Lone entries and reads go to as many as are waited for, and to the others a tick later; nobody ever waits longer."""

from __future__ import annotations

from dataclasses import replace

from raftkv.raft.messages import Append, Heartbeat
from raftkv.raft.types import NodeId
from tests.unit.raft.harness import FAST, Cluster, Envelope, Node

THRIFTY = replace(FAST, heartbeat_ticks=5, election_ticks=20, lone_bytes_max=1000)


def thrifty(size: int = 5) -> tuple[Cluster, Node]:
    """A cluster whose leader, node 1, knows who is quick."""
    cluster = Cluster(size, config=THRIFTY)
    leader = cluster.elect(1)
    cluster.propose("first")
    cluster.tick()
    assert len(leader.raft.thrift.quick) == size // 2
    return cluster, leader


def appends(cluster: Cluster, kind: type[Append | Heartbeat] = Append) -> list[NodeId]:
    """From now on: who gets appends that are not empty (or heartbeats)."""
    receivers: list[NodeId] = []

    def delivered(envelope: Envelope, ok: bool) -> None:
        message = envelope.message
        if isinstance(message, kind) and (not isinstance(message, Append) or message.entries):
            receivers.append(envelope.to)

    cluster.delivered = delivered
    return receivers


def others(leader: Node) -> set[NodeId]:
    return set(leader.raft.progress) - set(leader.raft.thrift.quick)


def test_a_lone_entry_goes_to_a_majority_and_is_committed() -> None:
    cluster, leader = thrifty()
    receivers = appends(cluster)
    index = cluster.propose("lone")
    assert sorted(receivers) == sorted(leader.raft.thrift.quick)
    assert leader.raft.commit == index


def test_the_others_get_what_they_miss_with_the_next_tick_as_one_message() -> None:
    cluster, leader = thrifty()
    spared = others(leader)
    for number in range(4):
        cluster.propose(f"lone {number}")
    receivers = appends(cluster)
    cluster.tick(only=1)
    assert sorted(receivers) == sorted(spared)
    cluster.tick(THRIFTY.heartbeat_ticks)
    assert all(node.data[-4:] == [b"lone %d" % number for number in range(4)] for node in cluster)


def test_nothing_more_is_sent_while_nothing_happens() -> None:
    cluster, _ = thrifty()
    cluster.propose("lone")
    cluster.tick(2, only=1)
    receivers = appends(cluster)
    cluster.tick(3, only=1)
    assert receivers == []


def test_when_the_quick_do_not_answer_everybody_is_asked_and_others_become_quick() -> None:
    cluster, leader = thrifty()
    gone = leader.raft.thrift.quick[0]
    cluster.isolate(gone)
    index = cluster.propose("lone")
    assert leader.raft.commit < index
    cluster.tick(2, only=1)
    assert leader.raft.commit == index
    assert gone not in leader.raft.thrift.quick
    assert leader.raft.thrift.quick
    index = cluster.propose("lone again")
    assert leader.raft.commit == index


def test_an_entry_that_left_just_before_a_tick_is_not_sent_to_everybody_yet() -> None:
    cluster, leader = thrifty()
    quick = leader.raft.thrift.quick
    for peer in quick:
        cluster[peer].slow_disk = True
    index = cluster.propose("lone")
    receivers = appends(cluster)
    cluster.tick(only=1)
    assert receivers == []
    for peer in quick:
        cluster[peer].slow_disk = False
    cluster.settle()
    assert leader.raft.commit == index
    assert leader.raft.thrift.quick == quick


def test_everybody_gets_what_is_large_or_follows_on_something_under_way() -> None:
    cluster, _ = thrifty()
    receivers = appends(cluster)
    cluster.propose("x" * 2000)
    assert sorted(receivers) == [2, 3, 4, 5]
    for each in (2, 3, 4, 5):
        cluster.block(each, 1)  # no acknowledgement arrives
    cluster.propose("under way")
    receivers.clear()
    cluster.propose("next")
    assert set(receivers) == {2, 3, 4, 5}


def test_a_leaders_first_entry_goes_to_everybody() -> None:
    cluster, _ = thrifty()
    receivers = appends(cluster)
    cluster.elect(2)
    assert {1, 3, 4, 5} <= set(receivers)


def test_who_waits_for_an_entry_is_not_left_out() -> None:
    cluster, leader = thrifty()
    asking = max(others(leader))
    receivers = appends(cluster)
    leader.raft.propose([b"forwarded"])
    leader.raft.hurry(asking)
    cluster.settle()
    assert sorted(receivers) == sorted({*leader.raft.thrift.quick, asking})


def test_where_somebody_watches_nothing_comes_later() -> None:
    cluster, leader = thrifty()
    watching = max(others(leader))
    cluster[watching].raft.eager = True
    cluster.tick(THRIFTY.heartbeat_ticks)
    receivers = appends(cluster)
    cluster.propose("lone")
    assert sorted(receivers) == sorted({*leader.raft.thrift.quick, watching})


def test_when_there_are_more_or_fewer_members_others_are_quick() -> None:
    cluster, leader = thrifty(3)
    (quick,) = leader.raft.thrift.quick
    conf = leader.raft.conf
    leader.raft.conf = replace(conf, voters=(1, quick, 4, 5, 6))
    cluster.tick(1)
    assert leader.raft.thrift.quick == ()


def test_who_catches_up_is_sent_the_next_append_with_each_acknowledgement() -> None:
    """Seed 53 of 7 nodes: a new member got one append a tick, because nobody waited for it."""
    cluster = Cluster(5, config=replace(THRIFTY, append_bytes_max=1, inflight_appends_max=1))
    leader = cluster.elect(1)
    behind = 5
    cluster.isolate(behind)
    for number in range(100):
        cluster.propose(f"{number}")
        cluster.tick(only=1)
    cluster.heal()
    cluster.tick(4 * THRIFTY.heartbeat_ticks, only=1)
    assert leader.raft.thrift.quick
    assert cluster[behind].raft.log.last == leader.raft.log.last


def test_a_read_at_a_node_that_was_left_out_brings_it_what_it_misses() -> None:
    """It is served when the node has applied the read index; that must not take until the next tick."""
    cluster, leader = thrifty()
    asking = cluster[max(others(leader))]
    index = cluster.propose("lone")
    assert asking.raft.commit < index
    asking.raft.read_index(7)
    cluster.settle()
    assert asking.reads == [(7, index)]
    assert asking.raft.log.last == index
    cluster.tick(only=1)
    assert asking.state[-1].index == index


def test_a_lone_read_asks_a_majority_and_everybody_when_that_is_silent() -> None:
    cluster, leader = thrifty()
    rounds = appends(cluster, Heartbeat)
    leader.raft.read_index(1)
    cluster.settle()
    assert sorted(rounds) == sorted(leader.raft.thrift.quick)
    assert [context for context, _ in leader.reads] == [1]
    cluster.isolate(leader.raft.thrift.quick[0])
    leader.raft.read_index(2)
    cluster.settle()
    assert [context for context, _ in leader.reads] == [1]
    cluster.tick(only=1)
    assert [context for context, _ in leader.reads] == [1, 2]


def test_the_target_of_a_transfer_gets_what_it_misses() -> None:
    cluster, leader = thrifty()
    target = max(others(leader))
    cluster.propose("lone")
    leader.raft.transfer_leadership(target)
    cluster.settle()
    assert cluster.leader() is cluster[target]


def test_while_membership_changes_everybody_is_asked() -> None:
    """The quick may be a majority of the new members and none of the old."""
    cluster, leader = thrifty()
    conf = leader.raft.conf
    leader.raft.conf = replace(conf, outgoing=conf.voters)
    leader.raft.propose([b"lone"])
    leader.take()
    assert {envelope.to for envelope in cluster.wire} == {2, 3, 4, 5}


def test_a_cluster_of_two_or_one_leaves_nobody_out() -> None:
    for size in (1, 2):
        cluster = Cluster(size, config=THRIFTY)
        cluster.elect(1)
        cluster.propose("first")
        index = cluster.propose("lone")
        assert all(node.raft.log.last == index for node in cluster)


def test_after_a_leaders_death_those_that_were_left_out_catch_up() -> None:
    cluster, leader = thrifty()
    spared = others(leader)
    index = cluster.propose("acknowledged")
    leader.crash()
    for node in cluster:
        if node.up:
            node.raft.leader_unreachable(1)
    winner = cluster.wait_leader(ticks=10, among=[2, 3, 4, 5])
    assert winner.id not in spared  # what is acknowledged is never lost
    cluster.tick(THRIFTY.heartbeat_ticks)
    assert all(node.state[index - 1].data == b"acknowledged" for node in cluster if node.up)
