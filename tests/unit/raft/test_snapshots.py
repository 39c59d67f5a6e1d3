"""Log compaction and snapshots: the claims of Ongaro 5."""

from __future__ import annotations

from dataclasses import replace

from raftkv.raft.messages import Append, AppendReply, InstallSnapshot
from raftkv.raft.types import ConfState, Entry, EntryKind, HardState, SnapshotMeta
from tests.unit.raft.harness import FAST, Cluster, Envelope, Node

FORGETFUL = replace(FAST, cache_bytes_max=0)
"""No entries in memory: what is compacted is gone."""


def behind(cluster: Cluster, node: int = 3) -> Node:
    """Let a node miss what the leader then compacts; the leader."""
    leader = cluster.elect(1)
    cluster[node].crash()
    for number in range(5):
        cluster.propose(f"{number}")
    leader.compact()
    return leader


def test_who_needs_compacted_entries_gets_a_snapshot_then_entries() -> None:
    """Ongaro 5.1."""
    cluster = Cluster(3, config=FORGETFUL)
    leader = behind(cluster)
    cluster.propose("after")
    cluster[3].restart()
    cluster.tick(5)
    assert cluster[3].disk.meta.index == 7
    cluster.propose("more")
    cluster.tick(2)
    assert cluster[3].data == leader.data
    assert leader.raft.status().progress[3].state == "replicate"


def test_recent_entries_still_come_from_memory_after_compaction() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster[3].crash()
    cluster.propose("a")
    leader.compact()
    cluster[3].restart()
    cluster.tick(3)
    assert cluster[3].data == [b"a"]
    assert cluster[3].disk.meta.index == 0


def test_a_snapshot_carries_the_conf_state() -> None:
    """Ongaro 5.1."""
    cluster = Cluster(3, config=FORGETFUL)
    behind(cluster)
    cluster[3].restart()
    cluster.tick(5)
    assert cluster[3].raft.conf == ConfState((1, 2, 3))
    cluster[3].restart()
    assert cluster[3].raft.conf == ConfState((1, 2, 3))


def install(cluster: Cluster, node: Node, index: int, term: int) -> SnapshotMeta:
    meta = SnapshotMeta(index, term, cluster.conf)
    cluster.states[index, term] = [Entry(at, 1, EntryKind.NORMAL, b"s%d" % at) for at in range(1, index + 1)]
    node.raft.step(1, InstallSnapshot(node.raft.term, meta))
    return meta


def test_an_older_snapshot_changes_nothing() -> None:
    """R10, openraft #753: it removed newer acknowledged entries. The answer says what we have."""
    cluster = Cluster(3)
    cluster.elect(1)
    for number in range(4):
        cluster.propose(f"{number}")
    cluster.tick(2)
    node = cluster[2]
    install(cluster, node, 2, 1)
    ready = node.raft.ready()
    assert ready.install is None
    assert ready.messages == ((1, AppendReply(1, 5)),)
    assert node.raft.log.last == 5


def test_a_snapshot_of_what_the_log_holds_keeps_the_suffix() -> None:
    """R10, Ongaro 5.1: the entries after it are retained, for they may be acknowledged."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    cluster.propose("b")
    node = cluster[2]
    node.disk.hard_state = HardState(1, 1, 0)
    node.restart()
    node.raft.step(1, InstallSnapshot(1, SnapshotMeta(2, 1, cluster.conf)))
    ready = node.raft.ready()
    assert ready.install is None
    assert (node.raft.commit, node.raft.log.last) == (2, 3)
    assert [entry.index for entry in ready.committed] == [1, 2]


def test_a_snapshot_of_something_else_replaces_the_log() -> None:
    """R10, hashicorp/raft #697: a conflicting entry that stays at its index loops for ever."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    node = cluster[2]
    node.restart()
    node.raft.become_follower(5, 1, "test")
    meta = install(cluster, node, 2, 4)
    assert node.raft.log.last == 2
    assert not node.raft.log.has_committed
    ready = node.raft.ready()
    assert (ready.install, ready.entries, ready.messages) == (meta, (), ())
    assert AppendReply(5, 2) in [message for _, message in ready.messages_after]
    node.disk.write(ready, cluster.states)
    node.raft.persisted(ready.number)
    assert node.raft.status().applied == 2
    assert node.raft.log.stable == 2


def test_writes_from_before_an_installed_snapshot_vouch_for_nothing() -> None:
    cluster = Cluster(3)
    node = cluster[2]
    node.raft.become_follower(5, 1, "test")
    node.raft.step(1, Append(5, 0, 0, tuple(Entry(at, 5, EntryKind.NORMAL, b"") for at in (1, 2, 3)), 0))
    first = node.raft.ready()
    install(cluster, node, 2, 4)
    second = node.raft.ready()
    assert second.install is not None
    node.raft.persisted(first.number)
    assert node.raft.log.stable == 0
    node.raft.step(1, Append(5, 2, 4, (Entry(3, 5, EntryKind.NORMAL, b"x"),), 3))
    third = node.raft.ready()
    assert third.committed == ()
    node.raft.persisted(second.number)
    assert (node.raft.log.stable, node.raft.log.applied) == (2, 2)
    node.raft.persisted(third.number)
    assert [entry.index for entry in node.raft.ready().committed] == [3]


def test_two_snapshots_in_short_time() -> None:
    """etcd #18055: a panic."""
    cluster = Cluster(3)
    node = cluster[2]
    node.raft.become_follower(5, 1, "test")
    install(cluster, node, 2, 4)
    install(cluster, node, 3, 4)
    cluster.work()
    install(cluster, node, 5, 4)
    install(cluster, node, 4, 4)
    cluster.work()
    assert node.disk.meta.index == 5
    assert len(node.state) == 5


def test_until_it_is_installed_the_conf_state_of_before_is_known() -> None:
    """C4: the state machine is still there."""
    cluster = Cluster(3)
    node = cluster[2]
    later = ConfState((1, 2), learners=(3,))
    for index, conf in ((2, cluster.conf), (5, later)):
        cluster.states[index, 4] = [Entry(at, 1, EntryKind.NORMAL, b"") for at in range(1, index + 1)]
        node.raft.step(1, InstallSnapshot(5, SnapshotMeta(index, 4, conf)))
        node.take()
    node.slow_disk = True
    assert node.persist()
    applied = node.state[-1].index
    assert (applied, node.raft.conf_at(applied), node.raft.conf) == (2, cluster.conf, later)
    assert node.persist()
    assert node.raft.conf_at(5) == later


def test_a_snapshot_of_a_cluster_we_are_not_in_is_ignored() -> None:
    cluster = Cluster(3)
    node = cluster[2].raft
    node.step(1, InstallSnapshot(1, SnapshotMeta(9, 1, ConfState((1, 3)))))
    node.step(1, InstallSnapshot(1, SnapshotMeta(9, 1, ConfState(()))))
    node.step(1, InstallSnapshot(1, SnapshotMeta(9, 7, cluster.conf)))
    assert node.ready().install is None


def test_a_failed_snapshot_is_asked_for_again_not_at_once() -> None:
    """V3: nor in a tight loop."""
    cluster = Cluster(3, config=FORGETFUL)
    behind(cluster)
    cluster[3].restart()
    failed: list[Envelope] = []

    def drop(envelope: Envelope) -> bool:
        if isinstance(envelope.message, InstallSnapshot) and len(failed) < 3:
            failed.append(envelope)
            return True
        return False

    cluster.drop = drop
    cluster.wait_leader()
    cluster.tick(20)
    assert len(failed) == 3
    assert cluster[3].data == cluster[1].data


def test_nobody_asks_for_a_snapshot_for_a_dead_node() -> None:
    cluster = Cluster(3, config=FORGETFUL)
    leader = behind(cluster)
    asked: list[tuple[int, int]] = []
    cluster.watch = lambda node, ready: asked.extend(ready.send_snapshots)
    cluster.tick(FAST.election_ticks * 3)
    asked.clear()
    leader.raft.peer_unreachable(3)
    cluster.propose("x")
    cluster.tick(20)
    assert asked == []


def test_an_acknowledgement_ends_the_wait_for_a_snapshot() -> None:
    """It may have got what it needs in another way."""
    cluster = Cluster(3, config=FORGETFUL)
    leader = behind(cluster)
    progress = leader.raft.progress[3]
    progress.become_snapshot(6)
    leader.raft.step(3, AppendReply(1, 3))
    assert progress.state.value == "snapshot"
    leader.raft.step(3, AppendReply(1, 6))
    assert progress.state.value == "replicate"


def test_compaction_under_a_follower_that_waits_does_not_fool_it() -> None:
    """etcd raft 76f1249: the unknown term of a compacted entry was taken for a match."""
    cluster = Cluster(3, config=FORGETFUL)
    leader = behind(cluster)
    log = leader.raft.log
    assert log.term(log.first - 2) is None
    assert not log.matches(log.first - 2, 0)
    assert log.slice(1, 3, 1 << 20) is None


def test_a_snapshot_does_not_show_its_sender_to_be_the_leader() -> None:
    """It may have taken long: its content is good, but who sent it may not lead any more."""
    cluster = Cluster(3)
    node = cluster[2]
    node.raft.become_follower(5, 3, "test")
    install(cluster, node, 2, 4)
    assert node.raft.leader == 3
    node.raft.step(1, InstallSnapshot(7, SnapshotMeta(1, 4, cluster.conf)))
    assert (node.raft.term, node.raft.leader) == (7, 0)
    node.raft.step(3, Append(7, 2, 4, (), 2))
    assert node.raft.leader == 3
    cluster.work()
    assert len(node.state) == 2


def test_no_snapshot_is_asked_for_in_the_name_of_a_later_term() -> None:
    cluster = Cluster(3, config=FORGETFUL)
    leader = behind(cluster)
    leader.raft.progress[3].become_probe()
    leader.raft.step(3, AppendReply(1, 1, True, 1, 1))
    assert leader.raft.status().progress[3].state == "snapshot"
    leader.raft.step(2, Append(9, 0, 0, (), 0))
    assert leader.raft.ready().send_snapshots == ()
