"""`step` survives any field values, and nothing that is agreed changes (T4, etcd #21518)."""

from __future__ import annotations

import dataclasses
import random

import pytest

from raftkv.raft import messages
from raftkv.raft.messages import (
    Append,
    AppendReply,
    Heartbeat,
    InstallSnapshot,
    Message,
    PreVoteReply,
    ReadIndexReply,
    TimeoutNow,
    Vote,
)
from raftkv.raft.types import ConfState, Entry, EntryKind, Role, SnapshotMeta
from tests.unit.raft.harness import Cluster

KINDS: list[type[Message]] = [getattr(messages, name) for name in messages.__all__ if name != "Message"]
NUMBERS = [0, 1, 2, 3, 4, 5, 9, 1000, (1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 80, -1]


def garbage(chance: random.Random, kind: type[Message], terms: list[int]) -> Message:
    fields: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        value: object
        match field.type:
            case "bool":
                value = chance.random() < 0.5
            case "tuple[Entry, ...]":
                first = chance.choice(NUMBERS)
                value = tuple(
                    Entry(first + at, chance.choice([1, 1, 2, 9]), chance.choice(list(EntryKind)), b"garbage")
                    for at in range(chance.randrange(4))
                )
            case "SnapshotMeta":
                # Whoever is the leader of the term may replace our log: that is its office. So only of nobody's.
                value = SnapshotMeta(chance.choice(NUMBERS), chance.choice(NUMBERS), ConfState((7, 8)))
            case _:
                value = chance.choice(terms if field.name == "term" else NUMBERS)
        fields[field.name] = value
    return kind(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["leader", "follower", "candidate"])
def test_garbage(role: str) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        cluster = Cluster(3, seed=seed)
        leader = cluster.elect(1)
        cluster.propose("a")
        cluster.tick(2)
        node = leader if role == "leader" else cluster[2]
        if role == "candidate":
            node.raft.become_candidate()
            cluster.work()
        state = list(node.state)
        for _ in range(200):
            # Of the present term, so that it stays in its role.
            message = garbage(chance, chance.choice(KINDS), [node.raft.term, node.raft.term, 0])
            node.raft.step(chance.choice([1, 2, 3, 9, 0, -1, 1 << 64]), message)
            if chance.random() < 0.2:
                node.raft.tick()
            cluster.wire.clear()
            while node.take():
                pass
            while node.persist():
                pass
        assert node.state[: len(state)] == state


def test_terms_beyond_all_elections_are_ignored() -> None:
    """Else term + 1 would not fit its field, and no election would ever work again."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    for kind in KINDS:
        leader.raft.step(2, garbage(random.Random(1), kind, [1 << 62, (1 << 64) - 1]))
        assert leader.raft.term == 1


@pytest.mark.parametrize(
    "message",
    [
        Heartbeat(1, 1 << 63, 1),
        Append(1, 1, 1, (), 1 << 63),
        Append(1, 1 << 63, 1, (), 5),
        Append(1, -1, 0, (), 5),
        Append(1, 2, 1, (Entry(9, 1, EntryKind.NORMAL, b""),), 9),
        Append(1, 2, 1, (Entry(3, 99, EntryKind.NORMAL, b""),), 9),
        Append(1, 1, 1, (Entry(2, 1, EntryKind.NORMAL, b"x"), Entry(3, 0, EntryKind.NORMAL, b"x")), 9),
        TimeoutNow(1, 1 << 63),
        ReadIndexReply(1, 3, 1 << 63),
        PreVoteReply(1 << 61, True),
        InstallSnapshot(1, SnapshotMeta(1 << 61, 99, ConfState((1, 2, 3)))),
        InstallSnapshot(1, SnapshotMeta(-1, 1, ConfState((1, 2, 3)))),
    ],
)
def test_a_follower_takes_nothing_impossible(message: Message) -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose("a")
    cluster.tick(2)
    before = cluster[2].log()
    cluster[2].raft.step(1, message)
    cluster.tick(3)
    assert cluster[2].log() == before
    assert (cluster[2].raft.term, cluster[2].raft.commit, cluster[2].role) == (1, 2, Role.FOLLOWER)


@pytest.mark.parametrize(
    "message",
    [
        AppendReply(1, 1 << 63),
        AppendReply(1, -5),
        AppendReply(1, 1 << 63, True, 1 << 63, 1 << 63),
        AppendReply(1, 2, True, -7, 3),
        Vote(1, 1 << 63, 1 << 63),
        Heartbeat(1, 9, 9),
        TimeoutNow(1, 2),
    ],
)
def test_a_leader_takes_nothing_impossible(message: Message) -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose("a")
    leader.raft.step(2, message)
    cluster.tick(3)
    cluster.propose("b")
    cluster.tick(3)
    assert cluster.leader() is leader
    assert [node.data for node in cluster] == [[b"a", b"b"]] * 3
