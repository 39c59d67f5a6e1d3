"""Every value has one spelling."""

from __future__ import annotations

import pytest

from raftkv.raft import describe
from raftkv.raft.messages import (
    Append,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVote,
    PreVoteReply,
    ReadIndex,
    ReadIndexReply,
    TimeoutNow,
    Vote,
    VoteReply,
)
from raftkv.raft.types import ConfChange, ConfChangeKind, ConfState, Entry, EntryKind, SnapshotMeta
from tests.unit.raft.harness import Cluster

CHANGE = ConfChange(((ConfChangeKind.ADD_VOTER, 4), (ConfChangeKind.ADD_LEARNER, 5), (ConfChangeKind.REMOVE, 1)))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (Entry(3, 1, EntryKind.NORMAL, b""), "1/3"),
        (Entry(3, 1, EntryKind.NORMAL, b"lost"), '1/3 "lost"'),
        (Entry(3, 1, EntryKind.NORMAL, b"\xff" + b"x" * 40), '1/3 "\\xff' + "x" * 23 + '"…'),
        (Entry(3, 1, EntryKind.CONF_CHANGE, CHANGE.encode()), "1/3 conf +4 ~5 -1"),
        (Entry(3, 1, EntryKind.CONF_CHANGE, ConfChange().encode()), "1/3 conf leave"),
        (Entry(3, 1, EntryKind.CONF_CHANGE, b"?"), "1/3 conf (malformed)"),
    ],
)
def test_entries(entry: Entry, text: str) -> None:
    assert describe.entry(entry) == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (PreVote(2, 3, 1), "PreVote term=2 last=1/3"),
        (PreVoteReply(2, True), "PreVoteReply term=2 granted"),
        (Vote(2, 3, 1, True), "Vote term=2 last=1/3 transfer"),
        (VoteReply(2, False), "VoteReply term=2 refused"),
        (Append(1, 2, 1, (Entry(3, 1, EntryKind.NORMAL, b"a"),), 2), 'Append term=1 prev=1/2 commit=2 [1/3 "a"]'),
        (AppendReply(1, 3), "AppendReply term=1 accepted 3"),
        (AppendReply(1, 3, True, 2, 1), "AppendReply term=1 rejected 3 hint=1/2"),
        (Heartbeat(1, 3, 0), "Heartbeat term=1 commit=3"),
        (Heartbeat(1, 3, 7), "Heartbeat term=1 commit=3 token=7"),
        (HeartbeatReply(1, 7), "HeartbeatReply term=1 token=7"),
        (InstallSnapshot(1, SnapshotMeta(3, 1, ConfState((1, 2)))), "InstallSnapshot term=1 1/3 (1 2)"),
        (TimeoutNow(1, 3), "TimeoutNow term=1 last=3"),
        (ReadIndex(1, 77), "ReadIndex term=1"),
        (ReadIndexReply(1, 77, 3), "ReadIndexReply term=1 index=3"),
    ],
)
def test_messages(message: Message, text: str) -> None:
    assert describe.message(message) == text


def test_conf_states() -> None:
    assert describe.conf(ConfState((1, 2), (1, 3), (4,), (3,))) == "(1 2)&(1 3) learners=(4) learners_next=(3)"


def test_status_and_progress() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    assert describe.status(leader.raft.status()) == "leader term=1 commit=1 last=1"
    assert describe.status(cluster[2].raft.status()) == "follower term=1 commit=0 last=1 leader=1"
    assert describe.progress(leader.raft.status())[0] == "2: replicate match=1 next=2"
    assert [describe.event(event) for event in leader.events][-1] == "became_leader"
