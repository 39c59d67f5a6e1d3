"""A backup becomes a data directory: whole and durable, or nothing; and a damaged backup is never taken for one."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from raftkv.raft.types import ConfState, HardState, SnapshotMeta
from raftkv.state.store import MemoryStore
from raftkv.storage import restoring
from raftkv.storage.backup import open_backup
from raftkv.storage.errors import SnapshotFailed, StoreForeign, StoreOccupied
from raftkv.storage.keys import Identity
from raftkv.storage.log_store import LogStore
from raftkv.storage.restoring import restore_data_dir
from raftkv.storage.state_store import StateStore
from tests.unit.storage.backups import sealed, write_backup

META = SnapshotMeta(120, 7, ConfState((1, 2, 3)))
NODE = Identity(cluster_id=0xC2, node_id=5, name="n5")
CONF = ConfState((5, 6, 7))
BEGIN = (10_000_000_120, 10_000_000_007)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def content() -> dict[bytes, bytes]:
    return {b"%05d" % number: os.urandom(number % 700) for number in range(2000)} | {b"": b"empty", b"\xff": b""}


@pytest.fixture
def file(tmp_path: Path, content: dict[bytes, bytes]) -> Path:
    store = MemoryStore()
    store.write(content.items(), ())
    return write_backup(tmp_path / "backup", store.view(), META)


def renew(state: StateStore) -> tuple[int, int]:
    state.write([(b"renewed", b"yes")], [b"00000"])
    return BEGIN


def restore(file: Path, data_dir: Path, identity: Identity = NODE) -> None:
    with open_backup(file) as backup:
        restore_data_dir(data_dir, backup, identity, CONF, renew)


def read(file: Path) -> dict[bytes, bytes]:
    with open_backup(file) as backup:
        return {key: value for block in backup for key, value in block}


# --- the file


def test_a_backup_is_read(file: Path, content: dict[bytes, bytes]) -> None:
    with open_backup(file) as backup:
        assert backup.meta == META
        assert backup.size == file.stat().st_size
        assert {key: value for block in backup for key, value in block} == content
        assert backup.digest == file.read_bytes()[-32:]


@pytest.mark.parametrize("missing", [1, 31, 32, 33, 500, 512, 1024, 50_000, 400_000])
def test_a_backup_that_is_cut_short_is_refused(file: Path, missing: int) -> None:
    whole = file.read_bytes()
    for cut in (whole[:-missing], whole[: missing - 1]):
        file.write_bytes(cut)
        with pytest.raises(SnapshotFailed, match=r"too early|cut off|not a raftkv snapshot|digest") as caught:
            read(file)
        assert str(caught.value).startswith(f"{file}: ")


def test_a_backup_with_something_behind_it_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for more in (b"x", bytes(512), bytes(32)):
        file.write_bytes(whole + more)
        with pytest.raises(SnapshotFailed, match=r"added|digest|end"):
            read(file)


def test_a_flipped_bit_is_found_wherever_it_is(file: Path) -> None:
    """By what is inside, also where the checksum of the whole was made for the damaged bytes."""
    whole = bytearray(file.read_bytes())
    offsets = [*range(0, 200, 3), *range(200, len(whole), 4999), *range(len(whole) - 600, len(whole), 17)]
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(SnapshotFailed):
            read(file)
        if offset < len(whole) - 32:
            file.write_bytes(sealed(damaged[:-32]))
            with pytest.raises(SnapshotFailed):
                read(file)


def test_a_wrong_checksum_alone_is_found(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-32] + bytes(32))
    with pytest.raises(SnapshotFailed, match="the checksum at the end of the backup does not match"):
        read(file)


@pytest.mark.parametrize("garbage", [b"", b"x", b"garbage " * 4096, bytes(1 << 20)])
def test_what_is_no_backup_is_refused(tmp_path: Path, garbage: bytes) -> None:
    file = tmp_path / "garbage"
    file.write_bytes(garbage)
    with pytest.raises(SnapshotFailed, match=r"too early|not a raftkv snapshot"):
        read(file)


def test_a_spooled_snapshot_is_no_backup(file: Path) -> None:
    """It is whole, but nothing at its end says that it arrived whole."""
    file.write_bytes(file.read_bytes()[:-32])
    with pytest.raises(SnapshotFailed, match="not a whole backup"):
        read(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SnapshotFailed, match=str(path)):
            read(path)


# --- the directory


def check_whole(data_dir: Path, content: dict[bytes, bytes]) -> None:
    """It is what a node opens that has just installed a snapshot."""
    with closing(LogStore.open(data_dir / "log", NODE, create=False)) as log:
        index, term = BEGIN
        assert log.snapshot() == SnapshotMeta(index, term, CONF)
        assert log.initial_state() == (HardState(term, 0, index), CONF)
        assert (log.first_index(), log.last_index(), log.term(index)) == (index + 1, index, term)
        assert log.repaired is None
        with closing(StateStore.open(data_dir / log.state_name, create=False)) as state:
            expected = {key: value for key, value in content.items() if key != b"00000"} | {b"renewed": b"yes"}
            assert dict(state.iterate(b"", None)) == expected


@pytest.mark.parametrize("place", ["new", "empty", "deep", "link"])
def test_a_directory_is_made(tmp_path: Path, file: Path, content: dict[bytes, bytes], place: str) -> None:
    data_dir = tmp_path / "data"
    if place == "empty":
        data_dir.mkdir()
    elif place == "deep":
        data_dir = tmp_path / "a" / "b" / "data"
    elif place == "link":
        (tmp_path / "real").mkdir()
        data_dir.symlink_to(tmp_path / "real")
    restore(file, data_dir)
    check_whole(data_dir, content)
    assert sorted(path.name for path in data_dir.iterdir()) == ["log", "log.watermark", "state-1"]
    assert list(tmp_path.rglob("*.restoring-*")) == []


def test_it_is_that_nodes_alone(tmp_path: Path, file: Path) -> None:
    restore(file, tmp_path / "data")
    for other in (Identity(0xC1, 5, "n5"), Identity(0xC2, 6, "n6")):
        with pytest.raises(StoreForeign, match="belongs to node 'n5'"):
            LogStore.open(tmp_path / "data" / "log", other, create=True)


def test_all_is_durable_before_it_has_its_name(
    tmp_path: Path, file: Path, content: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file was synced with all that it has at the end, each directory after the last change of its names."""
    synced: dict[int, tuple[int, int]] = {}
    fsync, rename = os.fsync, Path.rename

    def recording(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = (found.st_size, found.st_mtime_ns)

    def at_rename(path: Path, target: Path) -> Path:
        everything = [path, *path.rglob("*")]
        assert len(everything) > 10
        for each in everything:
            found = each.stat()
            assert synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns), each
        done = rename(path, target)
        synced.clear()
        return done

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(Path, "rename", at_rename)
    data_dir = tmp_path / "a" / "b" / "data"
    restore(file, data_dir)
    for made in (data_dir, *list(data_dir.parents)[:2]):
        assert made.parent.stat().st_ino in synced, f"the name of {made}"
    monkeypatch.undo()
    check_whole(data_dir, content)


def occupied(tmp_path: Path, file: Path, data_dir: Path) -> StoreOccupied:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreOccupied) as caught:
        restore(file, data_dir)
    assert sorted(tmp_path.rglob("*")) == before
    assert caught.value.path == data_dir
    return caught.value


def test_what_is_there_is_never_touched(tmp_path: Path, file: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.write_text("a file")
    assert "not a directory" in str(occupied(tmp_path, file, data_dir))
    assert data_dir.read_text() == "a file"
    data_dir.unlink()
    restore(file, data_dir)
    assert "is not empty (log, log.watermark, state-1)" in str(occupied(tmp_path, file, data_dir))


def test_a_mount_point_is_refused(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == data_dir)
    assert "name a directory in it" in str(occupied(tmp_path, file, data_dir))


def test_who_was_faster_keeps_the_directory(
    tmp_path: Path, file: Path, content: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"

    def meanwhile(state: StateStore) -> tuple[int, int]:
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another command
        restore(file, data_dir)
        return renew(state)

    with pytest.raises(OSError, match="not empty"), open_backup(file) as backup:
        restore_data_dir(data_dir, backup, NODE, CONF, meanwhile)
    check_whole(data_dir, content)
    assert sorted(tmp_path.iterdir()) == [file, data_dir]


@pytest.mark.parametrize("step", ["backup", "renew", "log", "sync", "rename", "interrupt"])
def test_nothing_is_left_of_what_failed(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    error: BaseException = KeyboardInterrupt() if step == "interrupt" else OSError("no more")

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    data_dir = tmp_path / "a" / "b" / "data"
    if step == "backup":
        damaged = bytearray(file.read_bytes())
        damaged[-40] ^= 1
        file.write_bytes(damaged)
        error = SnapshotFailed()
    elif step in ("renew", "interrupt"):
        monkeypatch.setitem(globals(), "renew", fail)
    elif step == "log":
        monkeypatch.setattr(LogStore, "install", fail)
    elif step == "sync":
        monkeypatch.setattr(restoring, "_sync_all", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        restore(file, data_dir)
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    if step != "backup":
        restore(file, data_dir)  # and it can be had at once


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, file: Path) -> None:
    """A real failed write, through LevelDB and the kernel, at several places."""
    script = """
import resource, sys
from pathlib import Path
from raftkv.storage.errors import NodeFatal, StoreUnusable
from tests.unit.storage.test_restoring import restore
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    restore(Path(sys.argv[1]), Path(sys.argv[2]))
except (OSError, NodeFatal, StoreUnusable) as error:
    print(type(error).__name__)
else:
    print("done")
"""
    told = []
    for limit in (10, 300, 5_000, 200_000, 100_000_000):
        command = [sys.executable, "-c", script, file, tmp_path / "data", limit]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
        told.append(run.stdout.strip())
        if told[-1] != "done":
            assert list(tmp_path.iterdir()) == [file], (limit, run.stderr)
    assert told[-1] == "done"
    assert "done" not in told[:-1]
    assert (tmp_path / "data").is_dir()
