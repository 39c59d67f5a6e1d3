"""Membership: the claims of Ongaro 4, with etcd's semantics of joint changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raftkv.raft.errors import ConfChangePending, InvalidConfChange, NotLeader
from raftkv.raft.membership import changed
from raftkv.raft.messages import Append
from raftkv.raft.types import ConfChange, ConfChangeKind, ConfState, Entry, EntryKind, HardState, Role
from tests.unit.raft.harness import FAST, Cluster, Node

ADD, LEARN, REMOVE = ConfChangeKind.ADD_VOTER, ConfChangeKind.ADD_LEARNER, ConfChangeKind.REMOVE


def change(cluster: Cluster, *changes: tuple[ConfChangeKind, int]) -> ConfState:
    """Propose on the leader and let it run its course; the leader's conf state."""
    leader = cluster.leader()
    assert leader is not None
    leader.raft.propose_conf_change(ConfChange(changes))
    cluster.settle()
    return leader.raft.conf


def join(cluster: Cluster, node: int) -> Node:
    """Start a node that is no member yet; it learns everything from the leader."""
    return cluster.add(node, cluster.conf)


class TestChanged:
    """What a change makes of a conf state."""

    PLAIN = ConfState((1, 2, 3), learners=(4,))

    @pytest.mark.parametrize(
        ("changes", "after"),
        [
            ([(ADD, 5)], ConfState((1, 2, 3, 5), learners=(4,))),
            ([(ADD, 4)], ConfState((1, 2, 3, 4))),
            ([(ADD, 1)], ConfState((1, 2, 3), learners=(4,))),
            ([(LEARN, 5)], ConfState((1, 2, 3), learners=(4, 5))),
            ([(LEARN, 4)], ConfState((1, 2, 3), learners=(4,))),
            ([(LEARN, 3)], ConfState((1, 2), learners=(3, 4))),
            ([(REMOVE, 4)], ConfState((1, 2, 3))),
            ([(REMOVE, 2)], ConfState((1, 3), learners=(4,))),
            ([(REMOVE, 9)], ConfState((1, 2, 3), learners=(4,))),
            ([(ADD, 4), (REMOVE, 1)], ConfState((2, 3, 4), (1, 2, 3), auto_leave=True)),
            ([(ADD, 4), (LEARN, 1)], ConfState((2, 3, 4), (1, 2, 3), (), (1,), True)),
            ([(ADD, 5), (LEARN, 6)], ConfState((1, 2, 3, 5), (1, 2, 3), (4, 6), (), True)),
        ],
    )
    def test_to(self, changes: list[tuple[ConfChangeKind, int]], after: ConfState) -> None:
        assert changed(self.PLAIN, ConfChange(tuple(changes))) == after

    def test_leaving_makes_learners_of_those_that_were_to_be(self) -> None:
        joint = ConfState((2, 3, 4), (1, 2, 3), (5,), (1,), True)
        assert changed(joint, ConfChange()) == ConfState((2, 3, 4), learners=(1, 5))

    @pytest.mark.parametrize(
        ("conf", "changes"),
        [
            (PLAIN, []),
            (PLAIN, [(ADD, 0)]),
            (PLAIN, [(ADD, 1 << 64)]),
            (PLAIN, [(ADD, 5), (REMOVE, 5)]),
            (PLAIN, [(REMOVE, 1), (REMOVE, 2), (REMOVE, 3)]),
            (ConfState((1,)), [(REMOVE, 1)]),
            (ConfState((1,)), [(LEARN, 1)]),
            (ConfState((1, 2), (1, 3)), [(ADD, 4)]),
        ],
    )
    def test_impossible(self, conf: ConfState, changes: list[tuple[ConfChangeKind, int]]) -> None:
        with pytest.raises(InvalidConfChange):
            changed(conf, ConfChange(tuple(changes)))


def test_a_learner_catches_up_then_votes() -> None:
    """Ongaro 4.2.1: so that it does not hold up the cluster while it is behind."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    join(cluster, 4)
    assert change(cluster, (LEARN, 4)) == ConfState((1, 2, 3), learners=(4,))
    cluster.tick(5)
    assert cluster[4].data == [b"a"]
    assert change(cluster, (ADD, 4)) == ConfState((1, 2, 3, 4))
    cluster.tick(5)
    assert {node.raft.conf for node in cluster} == {ConfState((1, 2, 3, 4))}
    cluster.elect(4)


def test_a_change_that_needs_silent_voters_is_refused() -> None:
    """etcd #3477: a member that was added before it was started locked the cluster."""
    cluster = Cluster(1)
    leader = cluster.elect(1)
    with pytest.raises(InvalidConfChange, match="learners first"):
        leader.raft.propose_conf_change(ConfChange(((ADD, 2),)))
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster[2].crash()
    cluster.tick(FAST.election_ticks + 1)
    with pytest.raises(InvalidConfChange):
        leader.raft.propose_conf_change(ConfChange(((REMOVE, 3),)))
    assert change(cluster, (REMOVE, 2)) == ConfState((1, 3))


def test_it_may_be_forced() -> None:
    cluster = Cluster(1, config=replace(FAST, strict_conf_change=False))
    cluster.elect(1)
    join(cluster, 2)
    change(cluster, (ADD, 2))
    cluster.tick(5)
    assert cluster[2].raft.conf == ConfState((1, 2))
    cluster.propose("a")
    assert cluster[1].data == [b"a"]


def test_no_second_change_before_the_first_is_applied() -> None:
    """Ongaro 4.1: majorities of adjacent conf states overlap, those of others need not."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raft.propose_conf_change(ConfChange(((LEARN, 4),)))
    with pytest.raises(ConfChangePending):
        leader.raft.propose_conf_change(ConfChange(((LEARN, 5),)))
    cluster.settle()
    change(cluster, (LEARN, 5))


def test_no_change_before_the_term_has_committed_something() -> None:
    """The errata of Ongaro 4.1: two leaders with changes of their own could else commit with disjoint majorities."""
    cluster = Cluster(4)
    cluster.drop = lambda envelope: isinstance(envelope.message, Append)
    leader = cluster.elect(1)
    with pytest.raises(ConfChangePending):
        leader.raft.propose_conf_change(ConfChange(((REMOVE, 4),)))
    with pytest.raises(NotLeader):
        cluster[2].raft.propose_conf_change(ConfChange(((REMOVE, 4),)))
    cluster.heal()
    cluster.tick(3)
    change(cluster, (REMOVE, 4))


def test_several_changes_pass_through_a_joint_conf_state() -> None:
    """Ongaro 4.3; and leave it by themselves."""
    cluster = Cluster(3)
    cluster.elect(1)
    for node in (4, 5):
        join(cluster, node)
        change(cluster, (LEARN, node))
    cluster.tick(3)
    confs: list[ConfState] = []
    cluster.watch = lambda node, ready: (
        confs.append(node.raft.conf) if not confs or confs[-1] != node.raft.conf else None
    )
    assert change(cluster, (ADD, 4), (ADD, 5), (REMOVE, 2), (REMOVE, 3)) == ConfState((1, 4, 5))  # without a tick
    cluster.tick(3)
    assert ConfState((1, 4, 5), (1, 2, 3), auto_leave=True) in confs
    assert {cluster[node].raft.conf for node in (1, 4, 5)} == {ConfState((1, 4, 5))}
    cluster[2].crash()
    cluster[3].crash()
    cluster.propose("a")
    assert cluster[1].data == [b"a"]


@pytest.mark.parametrize("reachable", [[1, 2, 4, 5], [1, 4, 2, 3]])
def test_a_joint_conf_state_needs_both_majorities(reachable: list[int]) -> None:
    """Ongaro 4.3: for commitment and for elections."""
    cluster = Cluster(5)
    joint = ConfState((1, 4, 5), (1, 2, 3))
    for node in cluster:
        node.disk.meta = replace(node.disk.meta, conf=joint)
        node.restart()
    cluster.cut(reachable[:2], reachable[2:])
    cluster[1].raft.campaign()
    cluster.tick(60)
    assert cluster.leader() is None
    cluster.cut(reachable[:3])
    if joint.is_voter(reachable[2]) and {1, 2, 4} == set(reachable[:3]):
        cluster.wait_leader(among=[1, 2, 4])
    else:
        cluster.heal()
        cluster.wait_leader()


def test_a_new_leader_finishes_the_joint_change_of_a_dead_one() -> None:
    """Ongaro 4.3."""
    cluster = Cluster(4, learners=[4])
    leader = cluster.elect(1)
    leader.raft.propose_conf_change(ConfChange(((ADD, 4), (REMOVE, 1))))
    cluster.watch = lambda node, ready: node.crash() if node.id == 1 and node.raft.conf.joint else None
    cluster.settle()
    assert not leader.up
    cluster.wait_leader(among=[2, 3, 4])
    cluster.tick(20)
    assert {cluster[node].raft.conf for node in (2, 3, 4)} == {ConfState((2, 3, 4))}


def test_a_removed_leader_steps_down_and_somebody_takes_over_at_once() -> None:
    """Ongaro 4.2.2, etcd #10563."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raft.propose_conf_change(ConfChange(((REMOVE, 1),)))
    cluster.settle()
    assert leader.role is Role.FOLLOWER
    heir = cluster.leader()
    assert heir is not None
    assert heir.id in (2, 3)
    cluster.tick(50)
    assert cluster.leader() is heir
    assert heir.raft.conf == ConfState((2, 3))


def test_of_two_the_one_that_stays_is_not_stranded() -> None:
    """etcd #10563: the removed node was needed for the election of the other."""
    for gone in (1, 2):
        cluster = Cluster(2)
        cluster.elect(1)
        change(cluster, (REMOVE, gone))
        cluster[gone].crash()
        assert cluster.wait_leader().id == 3 - gone
        cluster.propose("a")
        assert cluster[3 - gone].data == [b"a"]


def test_a_removed_node_disturbs_nobody() -> None:
    """Ongaro 4.2.3, etcd #796."""
    cluster = Cluster(4)
    leader = cluster.elect(1)
    cluster.drop = lambda envelope: envelope.to == 4
    change(cluster, (REMOVE, 4))
    cluster.heal()
    cluster.tick(200)
    assert cluster.leader() is leader
    assert leader.raft.term == 1
    assert 4 not in leader.raft.status().progress


def test_a_node_does_not_stand_on_a_conf_state_that_is_known_to_be_old() -> None:
    """Its votes would be counted by the wrong majority; it stands as soon as it has applied the change."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster[2].slow_apply = True
    leader.raft.propose_conf_change(ConfChange(((LEARN, 3),)))
    cluster.tick(2)
    cluster[2].raft.campaign()
    cluster.work()
    roles = [cluster[2].role]
    cluster[2].apply()
    assert [*roles, cluster[2].role] == [Role.FOLLOWER, Role.PRE_CANDIDATE]


def test_the_voters_that_stay_learn_from_the_removed_ones_that_these_are_out() -> None:
    """Only they may know it; they cannot stand, and their logs are too long to vote for anybody else."""
    cluster = Cluster(4)
    out = ConfChange(((REMOVE, 1), (REMOVE, 3), (REMOVE, 4)))
    log = [
        Entry(1, 1, EntryKind.NORMAL, b""),
        Entry(2, 1, EntryKind.CONF_CHANGE, out.encode()),
        Entry(3, 1, EntryKind.CONF_CHANGE, ConfChange().encode()),
        Entry(4, 1, EntryKind.NORMAL, b"a"),
    ]
    for node in cluster:
        last, commit = (4, 3) if node.id in (1, 3) else (3, 2)
        node.disk.log = log[:last]
        node.disk.hard_state = HardState(1, 1, commit)
        node.disk.state = log[:commit]
        node.restart()
    assert [node.raft.conf.voters for node in cluster] == [(2,)] * 4
    assert [node.raft.conf.joint for node in cluster] == [False, True, False, True]
    assert cluster.wait_leader().id == 2


def test_the_conf_state_is_a_function_of_the_log() -> None:
    """C3: after a restart it is what it was, from the snapshot and the entries applied since."""
    cluster = Cluster(4, learners=[4])
    leader = cluster.elect(1)
    change(cluster, (REMOVE, 2))
    at = leader.state[-1].index
    cluster.propose("a")
    leader.compact(at)
    change(cluster, (ADD, 4))
    conf = leader.raft.conf
    leader.disk.state = list(leader.state)
    leader.restart()
    assert leader.raft.conf == conf == ConfState((1, 3, 4))
    assert leader.raft.conf_at(at) == ConfState((1, 3), learners=(4,))
    with pytest.raises(LookupError):
        leader.raft.conf_at(at - 1)


def test_a_void_entry_changes_nothing() -> None:
    cluster = Cluster(1)
    leader = cluster.elect(1)
    raft = leader.raft
    for data in (b"", b"\xff\xff", ConfChange(((REMOVE, 1),)).encode(), ConfChange().encode()):
        raft.append_own([Entry(raft.log.last + 1, raft.term, EntryKind.CONF_CHANGE, data)])
    cluster.settle()
    assert leader.state[-1].index == 5
    assert raft.conf == ConfState((1,))


def test_encoding() -> None:
    value = ConfChange(((ADD, (1 << 64) - 1), (REMOVE, 1)), b"context")
    assert ConfChange.decode(value.encode()) == value
    for data in (b"", b"\0\1", b"\0\1\7" + bytes(8), b"\xff\xff" + bytes(1000)):
        with pytest.raises(ValueError):
            ConfChange.decode(data)
