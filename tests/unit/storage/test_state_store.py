"""The state on disk: what `sync` promises, and that a power loss leaves a beginning of the history, never a hole."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from raftkv.storage import state_store
from raftkv.storage._leveldb import leveldb
from raftkv.storage.data_dir import next_state_name, remove_leftovers
from raftkv.storage.engine import EngineOptions
from raftkv.storage.errors import CorruptRecord, StoreDamaged, StoreMissing, SyncFailed, WriteFailed
from raftkv.storage.leveldb_files import log_files, oldest_needed_log, read_log
from raftkv.storage.state_store import StateStore
from tests.unit.storage.leveldb_writer import batch, write_log
from tests.unit.storage.stores import cut, flip, image, newest_log_file

SMALL = EngineOptions(write_buffer_bytes=64 << 10, bloom_filter_bits=10)


def write_numbers(store: StateStore, first: int, count: int, value_bytes: int = 100) -> None:
    """One write for each number: the number as a key, and as the value of `last`."""
    for number in range(first, first + count):
        store.write([(b"%08d" % number, bytes(value_bytes)), (b"last", b"%08d" % number)], ())


def history(path: Path) -> int:
    """How many writes the state in `path` holds; it must be a beginning of them."""
    store = StateStore.open(path, create=False)
    numbers = [int(key) for key, _ in store.iterate(b"0", b"a")]
    last = store.get(b"last")
    store.close()
    assert numbers == list(range(len(numbers))), "a hole"
    assert last == (b"%08d" % (len(numbers) - 1) if numbers else None)
    return len(numbers)


def test_everything_is_there_after_a_kill(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state-1", create=True)
    write_numbers(store, 0, 50)
    left = image(tmp_path / "state-1", tmp_path / "left")
    store.close()
    assert history(left) == 50
    assert history(tmp_path / "state-1") == 50


def test_a_state_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing):
        StateStore.open(tmp_path / "state-1", create=False)


def test_sync_covers_every_log_file_that_leveldb_still_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one of a memtable that was switched out and is not yet a table: LevelDB's own sync would not."""
    path = tmp_path / "state-1"
    StateStore.open(path, create=True).close()
    store = StateStore.open(path, create=False)
    write_numbers(store, 0, 5)
    (current,) = log_files(path)
    older = path / "000002.log"
    older.write_bytes(b"")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    store.sync()
    assert synced == ["000002.log", current.name, "state-1"]  # oldest first, the directory last
    store.close()


def test_sync_while_log_files_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_store, "STATE_OPTIONS", SMALL)
    store = StateStore.open(tmp_path / "state-1", create=True)
    ended = threading.Event()
    failures: list[BaseException] = []

    def sync() -> None:
        while not ended.is_set():
            try:
                store.sync()
            except WriteFailed as error:
                failures.append(error)

    syncing = threading.Thread(target=sync)
    syncing.start()
    first = log_files(tmp_path / "state-1")[-1].name
    write_numbers(store, 0, 20_000)
    ended.set()
    syncing.join()
    assert not failures
    assert log_files(tmp_path / "state-1")[-1].name > first  # they did
    left = image(tmp_path / "state-1", tmp_path / "left")
    store.close()
    assert history(left) == 20_000


@pytest.mark.parametrize("lost", [1, 40, 500, 2_000, 1 << 20])
def test_an_unsynced_end_may_be_lost(tmp_path: Path, lost: int) -> None:
    store = StateStore.open(tmp_path / "state-1", create=True)
    write_numbers(store, 0, 20)
    left = image(tmp_path / "state-1", tmp_path / "left")
    store.close()
    cut(newest_log_file(left), lost)
    found = history(left)
    assert found < 20
    assert (found == 0) == (lost == 1 << 20)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.99])
def test_a_page_that_was_not_written_back_ends_the_history(tmp_path: Path, at: float) -> None:
    """The file system may write a later page and not an earlier one; LevelDB alone would refuse the whole state."""
    store = StateStore.open(tmp_path / "state-1", create=True)
    write_numbers(store, 0, 300)
    left = image(tmp_path / "state-1", tmp_path / "left")
    store.close()
    file = newest_log_file(left)
    content = bytearray(file.read_bytes())
    offset = int(len(content) * at) // 512 * 512
    content[offset : offset + 512] = bytes(len(content[offset : offset + 512]))
    file.write_bytes(bytes(content))
    with pytest.raises(leveldb.CorruptionError):
        leveldb.DB(str(image(left, tmp_path / "plain")), paranoid_checks=True)
    assert 0 < history(left) < 300


def two_logs(path: Path, older: list[bytes], newer: list[bytes]) -> None:
    """A state whose memtable was just switched: two log files are needed, and nothing is in a table."""
    StateStore.open(path, create=True).close()
    number = oldest_needed_log(path)
    assert number is not None
    write_log(path / f"{number:06d}.log", older)
    write_log(path / f"{number + 3:06d}.log", newer)


def numbers(first: int, count: int) -> list[bytes]:
    """The write batches of `write_numbers`."""
    return [
        batch(1 + 2 * number, [(b"%08d" % number, b"x" * 40), (b"last", b"%08d" % number)])
        for number in range(first, first + count)
    ]


def test_two_log_files_that_follow_each_other(tmp_path: Path) -> None:
    two_logs(tmp_path / "state-1", numbers(0, 10), numbers(10, 10))
    assert history(tmp_path / "state-1") == 20


@pytest.mark.parametrize("kept", range(10))
def test_an_older_log_file_that_lost_its_end_takes_the_newer_along(tmp_path: Path, kept: int) -> None:
    """Not synced, the older one may lose what the newer one still has. LevelDB alone would show the hole."""
    path = tmp_path / "state-1"
    two_logs(path, numbers(0, kept), numbers(10, 10))
    assert history(path) == kept
    store = StateStore.open(path, create=False)
    write_numbers(store, kept, 5)
    store.close()
    assert history(path) == kept + 5


def test_what_was_cut_is_told(tmp_path: Path) -> None:
    two_logs(tmp_path / "state-1", numbers(0, 3), numbers(10, 10))
    store = StateStore.open(tmp_path / "state-1", create=False)
    assert store.repaired is not None
    assert "cut at offset 0: writes 7 to 20 are missing before it" in store.repaired
    store.close()


def test_an_older_log_file_that_is_gone_takes_the_newer_along(tmp_path: Path) -> None:
    path = tmp_path / "state-1"
    two_logs(path, numbers(0, 10), numbers(10, 10))
    log_files(path)[0].unlink()
    assert history(path) == 0


def test_a_log_file_that_leveldb_needs_no_more_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "state-1"
    store = StateStore.open(path, create=True)
    write_numbers(store, 0, 30)
    store.compact()
    write_numbers(store, 30, 10)
    left = image(path, tmp_path / "left")
    store.close()
    write_log(left / "000003.log", numbers(500, 3))  # its removal was not durable
    needed = oldest_needed_log(left)
    assert needed is not None
    assert needed > 3
    assert history(left) == 40


def test_power_losses_at_any_moment_leave_a_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images while memtables are switched and tables built; in each, unsynced log files lose their ends at random."""
    monkeypatch.setattr(state_store, "STATE_OPTIONS", SMALL)
    path = tmp_path / "state-1"
    store = StateStore.open(path, create=True)
    random = Random(7)
    synced = 0
    synced_sizes: dict[str, int] = {}
    for moment in range(60):
        write_numbers(store, moment * 50, 50, value_bytes=1200)
        if moment % 5 == 2:
            store.sync()
            synced = moment * 50 + 50
            for file in log_files(path):
                with suppress(FileNotFoundError):  # a table has taken its place since
                    synced_sizes[file.name] = file.stat().st_size
        left = image(path, tmp_path / f"left-{moment}")
        for file in log_files(left):
            size = file.stat().st_size
            cut(file, random.randint(0, size - synced_sizes.get(file.name, 0)))
        assert history(left) >= synced
    store.close()


def test_a_value_that_went_bad_is_noticed(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state-1", create=True)
    store.write([(b"a", b"1"), (b"b", b"2"), (b"c", b"3")], ())
    stored = store._engine.get(b"b")
    assert stored is not None
    for bad in (b"", b"abc", stored[:-1] + b"\x00", b"3" + stored[1:], store._engine.get(b"a") or b""):
        raw = store._engine.batch(sync=False)
        raw.put(b"b", bad)
        store._engine.write(raw, sync=False)
        with pytest.raises(CorruptRecord, match=r"state-1: record b'b': checksum does not match") as caught:
            store.get(b"b")
        assert caught.value.key == b"b"
        for reverse in (False, True):
            with pytest.raises(CorruptRecord, match="record b'b'"):
                list(store.iterate(b"", None, reverse=reverse))
        view = store.view()
        with pytest.raises(CorruptRecord, match="record b'b'"):
            view.get(b"b")
        view.close()
    assert store.get(b"a") == b"1"
    store.close()


def test_a_table_that_went_bad_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state-1"
    store = StateStore.open(path, create=True)
    store.write([(b"%04d" % number, os.urandom(100)) for number in range(500)], ())
    store.compact()
    store.close()
    (table,) = path.glob("*.ldb")
    flip(table, table.stat().st_size // 2)
    store = StateStore.open(path, create=False)
    with pytest.raises(CorruptRecord):
        list(store.iterate(b"", None))
    with pytest.raises(CorruptRecord):
        [store.get(b"%04d" % number) for number in range(500)]
    store.close()


@pytest.mark.parametrize("damage", ["manifest", "current", "table"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state-1"
    store = StateStore.open(path, create=True)
    write_numbers(store, 0, 10)
    store.compact()
    store.close()
    if damage == "manifest":
        (file,) = path.glob("MANIFEST-*")
        flip(file, file.stat().st_size // 2)
    elif damage == "current":
        (path / "CURRENT").unlink()
    else:
        (file,) = path.glob("*.ldb")
        file.unlink()
    with pytest.raises(StoreDamaged, match="remove this member"):
        StateStore.open(path, create=True)


def test_a_failed_sync_stops_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore.open(tmp_path / "state-1", create=True)
    write_numbers(store, 0, 3)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SyncFailed, match="Input/output error"):
        store.sync()
    monkeypatch.undo()
    for attempt in (store.sync, store.compact, lambda: store.write([(b"a", b"")], ())):
        with pytest.raises(SyncFailed):
            attempt()
    assert store.poisoned
    assert store.get(b"last") == b"%08d" % 2


def test_compaction_gives_space_back(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state-1", create=True)
    keys = [b"%06d" % number for number in range(3000)]
    store.write([(key, os.urandom(500)) for key in keys], ())
    store.compact()
    before = store.size_bytes()
    store.write((), keys[100:])
    store.compact()
    assert store.size_bytes() < before / 5
    assert sum(1 for _ in store.iterate(b"", None)) == 100
    store.close()


def test_leftovers_of_other_states_are_removed(tmp_path: Path) -> None:
    for name in ("state-1", "state-2", "state-7.tmp", "log", "incoming", "snapshots", "state-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert next_state_name(tmp_path) == "state-8"
    assert remove_leftovers(tmp_path, "state-2") == ["state-1", "state-7.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["incoming", "log", "snapshots", "state-2", "state-x"]


def test_the_hand_made_log_files_are_leveldbs(tmp_path: Path) -> None:
    write_log(tmp_path / "000005.log", [batch(1, [(b"k", bytes(size))]) for size in (0, 100, 32_740, 70_000)])
    content = read_log(tmp_path / "000005.log")
    assert content.fault is None
    assert len(content.records) == 4
