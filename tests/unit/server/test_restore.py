"""What `snapshot restore` makes is what a node of the new cluster starts with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from raftkv._pb.kv_pb2 import PutRequest
from raftkv._pb.state_pb2 import MemberAttributes, SessionOpen
from raftkv.raft.types import ConfState, HardState, SnapshotMeta
from raftkv.server.config import NodeConfig
from raftkv.server.errors import ConfigError
from raftkv.server.restore import BackupStatus, RestoreConfig, RestoreFailed, inspect, restore
from raftkv.server.stores import Stores
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.keys import STATE_FORMAT, STATE_KEY
from raftkv.state.machine import StateMachine
from raftkv.state.restoring import BUMP_MAX, BUMP_MIN
from raftkv.state.store import MemoryStore
from tests.unit.storage.backups import write_backup

CLUSTER = {"n1": "127.0.0.1:1", "n2": "127.0.0.1:2", "n3": "127.0.0.1:3"}
TOKEN = "raftkv-cluster"


def entry(*requests: tuple[CommandKind, Any]) -> list[Group]:
    return [Group(1, 1, tuple(Command(seq, kind, r.SerializeToString()) for seq, (kind, r) in enumerate(requests)))]


@pytest.fixture
def machine() -> StateMachine:
    """An old cluster's, of other members."""
    made = StateMachine(MemoryStore())
    made.apply(1, 1, [])
    made.apply(2, 1, entry((CommandKind.MEMBER_ATTR, MemberAttributes(id=7, name="n7", peer_urls=["http://old:1"]))))
    made.apply(3, 2, entry((CommandKind.SESSION_OPEN, SessionOpen())))
    for number in range(100):
        made.apply(4 + number, 2, entry((CommandKind.PUT, PutRequest(key=b"k%d" % (number % 60), value=b"v"))))
    return made


def backup_of(machine: StateMachine, path: Path, index: int | None = None) -> Path:
    applied = machine.applied_index if index is None else index
    return write_backup(path, machine.store.view(), SnapshotMeta(applied, machine.applied_term, ConfState((7,))))


@pytest.fixture
def file(tmp_path: Path, machine: StateMachine) -> Path:
    return backup_of(machine, tmp_path / "backup")


def config(tmp_path: Path, name: str = "n1", **settings: Any) -> RestoreConfig:
    defaults: dict[str, Any] = {"data_dir": tmp_path / name, "initial_cluster": CLUSTER, "initial_cluster_token": TOKEN}
    return RestoreConfig(name=name, **(defaults | settings))


@contextmanager
def started(tmp_path: Path, name: str, **settings: Any) -> Iterator[Stores]:
    """As `raftkv node` opens it."""
    node = NodeConfig(
        name=name, data_dir=tmp_path / name, listen_peer=CLUSTER[name], initial_cluster=CLUSTER, **settings
    )
    with closing(Stores(node)) as stores, closing(stores.log):
        yield stores


def test_all_nodes_begin_alike(tmp_path: Path, file: Path, machine: StateMachine) -> None:
    told = [restore(file, config(tmp_path, name)) for name in CLUSTER]
    assert len({each.node_id for each in told}) == 3
    dumps, hashes, conf = [], set(), ConfState(tuple(sorted(each.node_id for each in told)))
    for name, made in zip(CLUSTER, told, strict=True):
        with started(tmp_path, name) as stores:
            own = stores.machine
            assert (stores.identity.cluster_id, stores.identity.node_id) == (made.cluster_id, made.node_id)
            assert stores.log.initial_state() == (HardState(own.applied_term, 0, own.applied_index), conf)
            assert set(stores.peer_addresses(conf).values()) == set(CLUSTER.values())
            stores.check_membership(conf)
            assert stores.repaired == []
            assert made.backup_revision == machine.revision
            assert own.revision == made.revision == machine.revision + BUMP_MIN
            dumps.append(list(own.dump()))
            hashes.add(own.rolling_hash)
    assert dumps[0] == dumps[1] == dumps[2]
    assert len(hashes) == 1


def test_a_restored_node_starts_again_and_again(tmp_path: Path, file: Path) -> None:
    restore(file, config(tmp_path))
    for boots in (2, 3, 4):
        with started(tmp_path, "n1") as stores:
            assert stores.log.boots == boots


def test_only_the_node_it_was_made_for_starts(tmp_path: Path, file: Path) -> None:
    restore(file, config(tmp_path, initial_cluster_token="another"))
    with pytest.raises(Exception, match="belongs to node 'n1'"), started(tmp_path, "n1"):
        pass
    with started(tmp_path, "n1", initial_cluster_token="another"):
        pass


@pytest.mark.parametrize(
    ("settings", "field", "problem"),
    [
        ({"name": "n4"}, "name", "'n4' is not in --initial-cluster: n1, n2, n3; did you mean"),
        ({"initial_cluster": {}}, "initial_cluster", "names no member"),
        ({"initial_cluster_token": ""}, "initial_cluster_token", "1 to 256"),
        ({"bump_revision": BUMP_MIN - 1}, "bump_revision", f"must be from {BUMP_MIN} to"),
        ({"bump_revision": BUMP_MAX + 1}, "bump_revision", f"to {BUMP_MAX}"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **settings)
    assert caught.value.field == field
    assert problem in caught.value.problem


def nothing_was_made(tmp_path: Path, file: Path) -> str:
    with pytest.raises(RestoreFailed) as caught:
        restore(file, config(tmp_path))
    assert list(tmp_path.iterdir()) == [file]
    return str(caught.value)


def test_a_damaged_backup_is_refused(tmp_path: Path, file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[200] ^= 1
    file.write_bytes(damaged)
    assert nothing_was_made(tmp_path, file) == f"{file}: a block of the snapshot is damaged"
    with pytest.raises(RestoreFailed, match="a block of the snapshot is damaged"):
        inspect(file)


def test_a_backup_that_says_what_it_is_not_is_refused(tmp_path: Path, machine: StateMachine) -> None:
    """S1: a state under another index would be applied on from there."""
    file = backup_of(machine, tmp_path / "backup", machine.applied_index + 1)
    assert "as of index 104, but is of 103" in nothing_was_made(tmp_path, file)


def test_a_backup_without_a_state_is_refused(tmp_path: Path) -> None:
    file = write_backup(tmp_path / "backup", MemoryStore().view(), SnapshotMeta(1, 1, ConfState((7,))))
    assert "the state has no record" in nothing_was_made(tmp_path, file)
    with pytest.raises(RestoreFailed, match=r"backup: the state has no record"):
        inspect(file)


@pytest.mark.parametrize("other", [STATE_FORMAT - 1, STATE_FORMAT + 1])
def test_a_state_of_another_format_is_refused(tmp_path: Path, machine: StateMachine, other: int) -> None:
    stored = machine.store.get(STATE_KEY)
    assert stored is not None
    machine.store.write([(STATE_KEY, bytes((other,)) + stored[1:])], ())
    assert f"not of format {STATE_FORMAT}" in nothing_was_made(tmp_path, backup_of(machine, tmp_path / "backup"))


def test_numbers_that_would_run_out_are_refused(tmp_path: Path, machine: StateMachine) -> None:
    machine.apply(1 << 43, 2, [])
    assert "too high" in nothing_was_made(tmp_path, backup_of(machine, tmp_path / "backup"))


def test_a_directory_in_use_is_refused(tmp_path: Path, file: Path) -> None:
    restore(file, config(tmp_path))
    with pytest.raises(RestoreFailed, match=r"n1: is not empty \(log, .*; nothing was changed; name a directory"):
        restore(file, config(tmp_path))


def test_what_a_backup_holds(file: Path, machine: StateMachine) -> None:
    content = file.read_bytes()
    assert inspect(file) == BackupStatus(int.from_bytes(content[-32:-28], "big"), machine.revision, 60, len(content))
