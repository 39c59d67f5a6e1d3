"""Log replication and commitment: the claims of Ongaro 3.5, 3.6 and 10.2, one test each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raftkv.raft.errors import NotLeader, Overloaded
from raftkv.raft.messages import Append, AppendReply, Heartbeat, HeartbeatReply, Message
from raftkv.raft.types import Entry, EntryKind, HardState, Role
from tests.unit.raft.harness import FAST, Cluster, Envelope, Node


def entry(index: int, term: int, data: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.NORMAL, data)


def with_log(node: Node, terms: list[int], term: int = 0) -> None:
    """Give `node` a log with entries of these terms, as if recovered from disk."""
    node.disk.log = [entry(index, t, b"%d.%d" % (t, index)) for index, t in enumerate(terms, 1)]
    node.disk.hard_state = HardState(term or terms[-1], 0, 0)
    node.restart()


def terms_of(node: Node) -> list[int]:
    return [found.term for found in node.log()]


def sent(node: Node, to: int) -> list[Message]:
    """What a node says to another now."""
    ready = node.raft.ready()
    return [message for peer, message in ready.messages + ready.messages_after if peer == to]


def test_a_command_reaches_every_log_and_state_in_one_order() -> None:
    """Ongaro 3.5."""
    cluster = Cluster(5)
    cluster.elect(1)
    for number in range(20):
        cluster.propose(f"{number}")
    cluster.tick(2)
    assert [node.data for node in cluster] == [[b"%d" % number for number in range(20)]] * 5


def test_a_new_leader_appends_a_no_op() -> None:
    """Ongaro 6.4: so that it learns what is committed."""
    cluster = Cluster(3)
    cluster.elect(1)
    assert cluster[1].log() == [entry(1, 1)]
    assert cluster[1].raft.commit == 1


def test_a_majority_commits_although_the_rest_is_away() -> None:
    """Ongaro 3.5."""
    cluster = Cluster(5)
    cluster.elect(1)
    cluster[4].crash()
    cluster[5].crash()
    index = cluster.propose("a")
    assert cluster[1].raft.commit == index


def test_a_minority_commits_nothing() -> None:
    """Ongaro 3.5."""
    cluster = Cluster(5)
    leader = cluster.elect(1)
    cluster.cut([1, 2], [3, 4, 5])
    cluster.propose("lost", 1)
    assert leader.data == []
    cluster.wait_leader(among=[3, 4, 5])
    cluster.propose("kept")
    cluster.heal()
    cluster.tick(5)
    assert [node.data for node in cluster] == [[b"kept"]] * 5


def test_only_the_leader_takes_proposals_and_others_name_it() -> None:
    cluster = Cluster(3)
    cluster.elect(2)
    with pytest.raises(NotLeader) as refused:
        cluster[1].raft.propose([b"x"])
    assert refused.value.leader == 2


def test_what_is_proposed_in_one_turn_travels_in_one_append() -> None:
    """And the followers that stand at the same index get the very same message, to be encoded once."""
    cluster = Cluster(3)
    raft = cluster.elect(1).raft
    raft.propose([b"a"])
    raft.propose([b"b", b"c"])
    appends = [message for _, message in raft.ready().messages if isinstance(message, Append)]
    assert len(appends) == 2
    assert appends[0] is appends[1]
    assert [found.data for found in appends[0].entries] == [b"a", b"b", b"c"]


def test_appends_are_pipelined() -> None:
    """Ongaro 10.2.2: the next is sent before the first is acknowledged."""
    raft = Cluster(3).elect(1).raft
    for number in range(3):
        raft.propose([b"%d" % number])
        assert sum(isinstance(message, Append) for _, message in raft.ready().messages) == 2


FIGURE_7 = {
    "a": [1, 1, 1, 4, 4, 5, 5, 6, 6],
    "b": [1, 1, 1, 4],
    "c": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6],
    "d": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7],
    "e": [1, 1, 1, 4, 4, 4, 4],
    "f": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3],
}


@pytest.mark.parametrize("follower", list(FIGURE_7))
def test_the_leader_makes_any_follower_agree_with_it(follower: str) -> None:
    """Figure 7 of the paper (Ongaro 3.5): missing, extraneous, or both."""
    cluster = Cluster(3)
    with_log(cluster[1], [1, 1, 1, 4, 4, 5, 5, 6, 6, 6], 7)
    with_log(cluster[2], FIGURE_7[follower], 7)
    with_log(cluster[3], [1, 1, 1, 4, 4, 5, 5, 6, 6, 6], 7)
    cluster.isolate(2)
    cluster.elect(1)
    cluster.heal()
    cluster.tick(20)
    leader = cluster.leader()
    assert leader is not None
    assert cluster[2].log() == leader.log()
    assert cluster[2].state == leader.state


def test_one_refusal_skips_a_whole_term() -> None:
    """Ongaro 3.5, after the proof; etcd's hint of index and term. At most one round trip a differing term."""
    cluster = Cluster(3)
    with_log(cluster[1], [1] * 3 + [5] * 100 + [6], 6)
    with_log(cluster[2], [1] * 3 + [2] * 60 + [3] * 60, 6)
    cluster.isolate(2)
    cluster.elect(1)
    refusals = []

    def count(envelope: Envelope, ok: bool) -> None:
        if ok and isinstance(envelope.message, AppendReply) and envelope.message.rejected:
            refusals.append(envelope.message)

    cluster.heal()
    cluster.delivered = count
    cluster.tick(10)
    assert cluster[2].log() == cluster[1].log()
    assert 1 <= len(refusals) <= 3


def test_an_entry_of_an_earlier_term_is_not_committed_by_counting() -> None:
    """Figure 8 of the paper (Ongaro 3.6.2): stored on a majority, it can still be overwritten."""
    cluster = Cluster(5)
    for node, terms in {1: [1, 2], 2: [1, 2], 3: [1], 4: [1], 5: [1, 3]}.items():
        with_log(cluster[node], terms, 3)
    cluster.cut([1, 2, 3, 4], [5])
    # (c): 1 leads term 4, brings its entry of term 2 onto a majority, and does not get further.
    cluster.drop = lambda envelope: (
        isinstance(envelope.message, Append) and any(found.term == 4 for found in envelope.message.entries)
    )
    leader = cluster.elect(1)
    assert leader.raft.term == 4
    leader.raft.step(2, AppendReply(4, 2))
    leader.raft.step(3, AppendReply(4, 2))
    assert leader.raft.commit == 0
    # (e): an entry of its own term commits both.
    leader.raft.step(2, AppendReply(4, 3))
    leader.raft.step(3, AppendReply(4, 3))
    cluster.work()
    assert leader.raft.commit == 3


def test_a_follower_commits_only_what_an_append_has_verified() -> None:
    """Ongaro 3.5, R9: not the unverified rest of its own log, whatever the leader says."""
    cluster = Cluster(3)
    with_log(cluster[2], [1, 1, 1], 1)
    raft = cluster[2].raft
    raft.step(1, Append(2, 1, 1, (), 3))
    assert raft.commit == 1
    raft.step(1, Heartbeat(2, 3, 1))
    assert raft.commit == 1
    raft.step(1, Append(2, 2, 1, (), 3))
    raft.step(1, Heartbeat(2, 99, 0))
    assert raft.commit == 2


def test_a_restarted_follower_lets_the_leader_verify_it_anew() -> None:
    """The leader counts on an acknowledgement from before the restart; one more append settles it."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose("a")
    cluster[2].restart()
    assert cluster[2].raft.commit < leader.raft.commit
    cluster.tick(2)
    assert cluster[2].raft.commit == leader.raft.commit
    assert cluster[2].data == [b"a"]


def test_lost_appends_are_sent_again() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.drop = lambda envelope: envelope.to == 2 and isinstance(envelope.message, Append)
    cluster.propose("a")
    cluster.heal()
    cluster.tick(3)
    assert cluster[2].data == [b"a"]


def test_lost_acknowledgements_are_asked_for_again() -> None:
    """Ongaro 3.3: everything may be repeated."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.drop = lambda envelope: isinstance(envelope.message, AppendReply)
    cluster.propose("a")
    assert leader.data == []
    cluster.heal()
    cluster.tick(3)
    assert leader.data == [b"a"]


def test_late_and_repeated_messages_change_nothing() -> None:
    """Ongaro 3.3: RPCs are idempotent. An old append does not truncate what came after it."""
    cluster = Cluster(3)
    cluster.elect(1)
    seen: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: seen.append(envelope)
    for number in range(5):
        cluster.propose(f"{number}")
    before = [node.log() for node in cluster]
    for envelope in [*seen, *reversed(seen)]:
        cluster[envelope.to].raft.step(envelope.sender, envelope.message)
    cluster.settle()
    assert [node.log() for node in cluster] == before


def test_flow_to_a_slow_follower_is_bounded() -> None:
    """In appends and in bytes; and it is over when the follower has caught up (raft PR #54)."""
    small = replace(FAST, append_bytes_max=132)
    for config in (replace(small, inflight_appends_max=4), replace(small, inflight_bytes_max=4 * 132)):
        cluster = Cluster(3, config=config)
        leader = cluster.elect(1)
        cluster.drop = lambda envelope: envelope.to == 3
        for _ in range(20):
            cluster.propose("x" * 100)
        progress = leader.raft.status().progress[3]
        assert progress.inflight_appends == 4
        assert progress.inflight_bytes == 4 * 132
        cluster.heal()
        cluster.tick(20)
        assert cluster[3].data == leader.data
        assert leader.raft.status().progress[3].inflight_bytes == 0


def test_an_append_is_cut_at_its_limit_but_takes_one_entry_of_any_size() -> None:
    cluster = Cluster(3, config=replace(FAST, append_bytes_max=200))
    leader = cluster.elect(1)
    leader.raft.propose([b"x" * 60] * 5 + [b"y" * 1000] + [b"z"])
    appends = [message for to, message in leader.raft.ready().messages if to == 2 and isinstance(message, Append)]
    assert [len(append.entries) for append in appends] == [2, 2, 1, 1, 1]


def test_a_follower_far_behind_is_fed_from_disk_one_append_at_a_time() -> None:
    """Reading old entries must never hold up a turn for long."""
    cluster = Cluster(3, config=replace(FAST, cache_bytes_max=0, append_bytes_max=10 * 33))
    leader = cluster.elect(1)
    cluster[3].crash()
    for _ in range(100):
        cluster.propose("x")
    cluster[3].restart()
    cluster.tick(2)
    reads = leader.disk.reads
    cluster.tick(10)
    assert cluster[3].data == leader.data
    assert reads > 5


def test_entries_that_keep_up_are_never_read_from_disk() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    reads = [node.disk.reads for node in cluster]
    for number in range(50):
        cluster.propose(f"{number}")
    cluster.tick(3)
    assert [node.disk.reads for node in cluster] == reads


def test_uncommitted_bytes_are_bounded() -> None:
    """One proposal is always taken; what is committed or lost is not counted any more."""
    cluster = Cluster(3, config=replace(FAST, uncommitted_bytes_max=300))
    leader = cluster.elect(1)
    cluster.drop = lambda envelope: True
    leader.raft.propose([b"x" * 1000])
    assert not leader.raft.accepts_proposals()
    with pytest.raises(Overloaded) as refused:
        leader.raft.propose([b"y"])
    assert refused.value.limit == 300
    leader.raft.propose([b"z"], force=True)
    cluster.heal()
    cluster.tick(3)
    assert leader.raft.status().uncommitted_bytes == 0
    leader.raft.propose([b"y"])
    cluster.elect(2)
    assert leader.raft.status().uncommitted_bytes == 0


def test_the_commit_index_travels_with_what_is_sent_anyway() -> None:
    """Or on request, to those whose callers wait: a notice without a reply."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.tick(2)
    notices: list[Envelope] = []
    cluster.delivered = lambda envelope, ok: notices.append(envelope)
    cluster.propose("a")
    assert {type(envelope.message) for envelope in notices} == {Append, AppendReply}
    assert [node.data for node in cluster] == [[b"a"], [], []]
    notices.clear()
    leader.raft.notify_commit([2])
    leader.raft.notify_commit([2, 9])  # no news, nobody
    cluster.settle()
    assert [(envelope.to, envelope.message) for envelope in notices] == [(2, Heartbeat(1, 2, 0))]
    assert [node.data for node in cluster] == [[b"a"], [b"a"], []]
    cluster.tick(2)
    assert cluster[3].data == [b"a"]


def test_a_broken_connection_makes_the_leader_probe() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.drop = lambda envelope: envelope.to == 2
    cluster.propose("a")
    cluster.propose("b")
    leader.raft.peer_unreachable(2)
    leader.raft.peer_unreachable(77)
    cluster.settle()
    progress = leader.raft.status().progress[2]
    assert (progress.state, progress.match, progress.next) == ("probe", 1, 2)
    cluster.heal()
    cluster.tick(2)
    assert leader.raft.status().progress[2].state == "replicate"
    assert cluster[2].data == [b"a", b"b"]


def test_match_never_falls_within_a_term() -> None:
    """A follower that lost what it acknowledged is not believed (D8)."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose("a")
    leader.raft.step(2, AppendReply(1, 2, True, 0, 0))
    leader.raft.step(2, AppendReply(1, 0, True, 0, 0))
    cluster.settle()
    assert leader.raft.status().progress[2].match == 2


def test_a_follower_that_contradicts_what_is_committed_is_left_alone() -> None:
    """Log matching says that it cannot be; a message that would need it is ignored."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    cluster.tick(2)
    raft = cluster[2].raft
    raft.step(1, Append(1, 0, 0, (entry(1, 1), entry(2, 1, b"other")), 9))
    raft.step(1, Append(1, 2, 1, (entry(4, 1),), 9))
    raft.step(1, Append(1, 2, 1, (entry(3, 7),), 9))
    assert [found.data for found in cluster[2].log()] == [b"", b"a"]
    assert raft.commit == 2


def test_heartbeat_replies_of_others_do_not_disturb() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raft.step(9, HeartbeatReply(1, 5))
    leader.raft.step(9, AppendReply(1, 1))
    cluster[2].raft.step(1, HeartbeatReply(1, 5))
    cluster[2].raft.step(1, AppendReply(1, 1))
    assert leader.role is Role.LEADER
