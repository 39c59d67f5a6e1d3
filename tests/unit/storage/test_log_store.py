"""The log across restarts: what was appended is there, what belongs to others is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from raftkv.raft.types import Compacted, ConfState, HardState, SnapshotMeta
from raftkv.storage import keys
from raftkv.storage._leveldb import leveldb
from raftkv.storage.errors import StoreDamaged, StoreForeign, StoreFormatUnknown, StoreLocked, StoreMissing, WriteFailed
from raftkv.storage.log_index import RECENT_BYTES_MAX
from raftkv.storage.log_store import LogStore
from tests.unit.storage.contracts import CONF, MISTAKES, entries, entry, everything, prepare_for_mistakes
from tests.unit.storage.stores import IDENTITY, fill, image, new_log, open_log


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    log.append(HardState(3, 2, 1), entries(1, 1, 1, 2, 2, 3))
    log.append(HardState(4, 1, 2), entries(4, 4))
    log.compact(SnapshotMeta(2, 1, ConfState((1, 2))))
    log.close()
    log = open_log(tmp_path)
    assert log.initial_state() == (HardState(4, 1, 2), ConfState((1, 2)))
    assert (log.first_index(), log.last_index()) == (3, 4)
    assert everything(log) == [entry(3, 2), entry(4, 4)]
    assert [log.term(index) for index in (2, 3, 4)] == [1, 2, 4]
    assert log.snapshot() == SnapshotMeta(2, 1, ConfState((1, 2)))
    log.close()


def test_an_installed_snapshot_is_there_after_a_restart(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    written = fill(log, 5)
    meta = SnapshotMeta(3, 1, CONF)
    log.install(meta, HardState(2, 0, 3), "state-4")
    log.close()
    log = open_log(tmp_path)
    assert (log.state_name, log.snapshot(), everything(log)) == ("state-4", meta, written[3:])
    far = SnapshotMeta(900, 7, CONF)
    log.install(far, HardState(8, 0, 900), "state-5")
    log.close()
    log = open_log(tmp_path)
    assert (log.state_name, log.snapshot(), everything(log)) == ("state-5", far, [])
    assert (log.hard_state, log.last_index(), log.term(900)) == (HardState(8, 0, 900), 900, 7)
    log.close()


def test_a_commit_index_may_be_written_lazily(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    log.append(HardState(1, 1, 0), entries(1, 1, 1))
    log.append(HardState(1, 1, 2), (), sync=False)
    log.close()
    log = open_log(tmp_path)
    assert log.hard_state == HardState(1, 1, 2)
    log.close()


def test_refused_mistakes_change_nothing(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    prepare_for_mistakes(log)
    before = (log.initial_state(), everything(log), log.snapshot(), log.state_name)
    for mistake in MISTAKES:
        with pytest.raises(AssertionError):
            mistake(log)
    log.close()
    log = open_log(tmp_path)
    assert (log.initial_state(), everything(log), log.snapshot(), log.state_name) == before
    log.close()


def test_each_start_has_a_new_number(tmp_path: Path) -> None:
    numbers = []
    for create in (True, False, True):
        log = open_log(tmp_path, create=create)
        numbers.append(log.boots)
        log.close()
    assert numbers == [1, 2, 3]


def test_entries_come_from_memory_and_disk_alike(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    big = RECENT_BYTES_MAX // 8
    written = [entry(index, 1, bytes([index]) * big) for index in range(1, 21)]
    for one in written:
        log.append(HardState(1, 0, 0), [one])
    assert everything(log) == written
    for low, high in ((1, 3), (5, 20), (15, 21), (20, 21), (1, 21)):
        assert log.entries(low, high, 1 << 40) == written[low - 1 : high - 1]
        for count in range(1, high - low + 1):
            assert log.entries(low, high, big * count + 5) == written[low - 1 : low - 1 + count]
    held = log._index.recent(1, 21)[1]
    assert 0 < sum(len(one.data) for one in held) <= RECENT_BYTES_MAX
    log.close()


def test_compaction_gives_the_space_back(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    fill(log, 300, data_bytes=100_000)
    before = log.size_bytes()
    log.compact(SnapshotMeta(290, 1, CONF))
    log._engine.compact()
    assert log.size_bytes() < before / 5
    log.close()
    log = open_log(tmp_path)
    assert [one.index for one in everything(log)] == list(range(291, 301))
    log.close()


def test_a_compaction_cut_short_is_ended_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = new_log(tmp_path / "a")
    written = fill(log, 50)
    monkeypatch.setattr(LogStore, "_purge", lambda *_: None)  # killed between the batch and the deletes
    log.compact(SnapshotMeta(20, 1, CONF))
    image(tmp_path / "a", tmp_path / "b")
    log.close()
    log = open_log(tmp_path / "b")
    assert everything(log) == written[20:]
    assert stored_keys(log) == with_tails(range(21, 51))
    log.close()


def stored_keys(log: LogStore) -> list[bytes]:
    return [key for key, _ in log._engine.iterate(keys.KEY_ENTRY, keys.KEY_ENTRY_END)]


def with_tails(indexes: Iterable[int]) -> list[bytes]:
    return [key for index in indexes for key in (keys.entry_key(index), keys.tail_key(index))]


def test_tails_go_with_their_entries_but_for_the_one_that_counts(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    fill(log, 50)
    log.compact(SnapshotMeta(50, 1, CONF))
    assert stored_keys(log) == [keys.tail_key(50)]
    log.close()
    log = open_log(tmp_path)  # with nothing but the tail
    assert (log.first_index(), log.last_index()) == (51, 50)
    assert stored_keys(log) == [keys.tail_key(50)]
    fill(log, 10)
    log.compact(SnapshotMeta(55, 1, CONF))
    assert stored_keys(log) == with_tails(range(56, 61))
    log.install(SnapshotMeta(100, 2, CONF), HardState(2, 0, 100), "state-2")
    assert stored_keys(log) == [keys.tail_key(100)]
    log.close()
    log = open_log(tmp_path)
    assert (log.last_index(), log.hard_state) == (100, HardState(2, 0, 100))
    log.close()


def test_entries_that_are_replaced_take_their_tails_with_them(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    fill(log, 5)
    log.append(HardState(1, 0, 4), [entry(index, 1) for index in range(6, 10)])
    log.append(HardState(2, 0, 4), [entry(6, 2)])  # a new leader's
    assert stored_keys(log) == [keys.tail_key(0), *with_tails(range(1, 7))]
    log.close()
    log = open_log(tmp_path)
    assert (log.last_index(), log.term(6), log.hard_state) == (6, 2, HardState(2, 0, 4))
    log.close()


def test_the_tables_of_a_growing_log_do_not_overlap(tmp_path: Path) -> None:
    """So that LevelDB has nothing to merge: it would write each entry twice more."""
    log = new_log(tmp_path)
    written = fill(log, 500, data_bytes=100_000)  # twelve tables
    log.close()
    told = (tmp_path / "log" / "LOG").read_text()
    assert len(re.findall(r"Level-0 table #\d+: \d+ bytes OK", told)) > 8
    assert "Compacting" not in told
    log = open_log(tmp_path)
    assert everything(log) == written
    log.close()


def test_a_reader_that_a_compaction_overtakes_is_told_so(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    data = bytes(20_000)
    for first in range(1, 2001, 100):
        log.append(HardState(1, 0, first - 1), [entry(index, 1, data) for index in range(first, first + 100)])
    surprises: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            low = log.first_index()
            try:
                found = log.entries(low, low + 20, 1 << 40)
                assert [one.index for one in found] == list(range(low, low + 20))
            except Compacted:
                continue
            except BaseException as error:  # noqa: BLE001, the main thread reports it
                surprises.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(5, 1900, 5):
        log.compact(SnapshotMeta(index, 1, CONF))
    ended.set()
    reader.join()
    log.close()
    assert not surprises


def test_no_store_is_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing, match="no store here"):
        open_log(tmp_path)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, cluster_id=0xC2),
        replace(IDENTITY, node_id=0x3),
        replace(IDENTITY, name="n3"),
    ],
)
def test_another_nodes_store_is_refused(tmp_path: Path, other: keys.Identity) -> None:
    log = new_log(tmp_path)
    written = fill(log, 3)
    log.close()
    for create in (False, True):
        with pytest.raises(StoreForeign, match=r"belongs to node 'n2' \(2\) of cluster c1, not to node") as caught:
            open_log(tmp_path, other, create=create)
        assert caught.value.path == tmp_path / "log"
    log = open_log(tmp_path, replace(IDENTITY, created_unix_s=5))
    assert (everything(log), log.identity) == (written, IDENTITY)
    log.close()


def test_a_leveldb_of_another_program_is_refused(tmp_path: Path) -> None:
    other = leveldb.DB(str(tmp_path / "log"), create_if_missing=True)
    batch = other.write_batch()
    batch.put(b"theirs", b"1")
    batch.write()
    other.close()
    with pytest.raises(StoreForeign, match="not a raftkv log"):
        open_log(tmp_path, create=True)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("not a directory")
    with pytest.raises(StoreForeign, match="is not a directory"):
        open_log(tmp_path, create=True)


def put_identity(log: LogStore, value: bytes) -> None:
    batch = log._engine.batch(sync=True)
    batch.put(keys.KEY_IDENTITY, value)
    log._engine.write(batch, sync=True)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    later = keys.encode_identity(replace(IDENTITY, format_version=keys.FORMAT_VERSION + 1))
    put_identity(log, later[:-6] + b"whatever that format has here")
    log.close()
    with pytest.raises(
        StoreFormatUnknown, match=r"written in format 3; this version knows format 2; .* or a later one"
    ):
        open_log(tmp_path)


def test_a_format_of_before_is_refused(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    put_identity(log, keys.encode_identity(replace(IDENTITY, format_version=1)))
    log.close()
    with pytest.raises(StoreFormatUnknown, match=r"format 1; this version knows format 2; .* version that wrote it$"):
        open_log(tmp_path)


def test_a_start_cut_short_before_anything_was_stored_is_repeated(tmp_path: Path) -> None:
    leveldb.DB(str(tmp_path / "log"), create_if_missing=True).close()
    with pytest.raises(StoreMissing, match="never finished"):
        open_log(tmp_path)
    log = open_log(tmp_path, create=True)
    assert log.last_index() == 0
    log.close()


def test_a_second_opener_is_refused(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    with pytest.raises(StoreLocked, match="open in this process"):
        open_log(tmp_path)
    code = (
        "import sys; from pathlib import Path; from raftkv.storage.errors import StoreLocked;"
        "from tests.unit.storage.stores import open_log\n"
        "try: open_log(Path(sys.argv[1]))\n"
        "except StoreLocked as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    for _ in range(2):  # the first attempt must not have given up our lock
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3], check=True
        )
        assert f"{tmp_path / 'log'}: open in another process; stop that process" in result.stdout
    fill(log, 1)
    log.close()


def test_after_a_failed_write_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = new_log(tmp_path / "a")
    written = fill(log, 3)
    before = (log.hard_state, log.last_index())

    class Failing:
        def put(self, key: bytes, value: bytes) -> None: ...

        def write(self) -> None:
            raise leveldb.IOError(b"IO error: 000003.log: No space left on device")

    monkeypatch.setattr(log._engine, "batch", lambda *, sync: Failing())
    with pytest.raises(WriteFailed, match=r"synced write failed: IO error: 000003\.log: No space left"):
        log.append(HardState(9, 9, 3), entries(4, 9))
    monkeypatch.undo()
    assert log.poisoned
    attempts: list[Callable[[], None]] = [
        lambda: log.append(HardState(9, 9, 3), entries(4, 9)),
        lambda: log.compact(SnapshotMeta(2, 1, CONF)),
        lambda: log.install(SnapshotMeta(9, 9, CONF), None, "state-9"),
    ]
    for attempt in attempts:
        with pytest.raises(WriteFailed, match="No space left"):
            attempt()
    assert (log.hard_state, log.last_index(), everything(log)) == (*before, written)
    log.close()
    assert not log._engine.closed  # closing would flush
    image(tmp_path / "a", tmp_path / "b")
    after = open_log(tmp_path / "b")
    assert everything(after) == written
    after.close()


def test_a_watermark_that_cannot_be_written_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = new_log(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(log._watermark, "_write", fail)
    with pytest.raises(WriteFailed, match="Input/output error"):
        fill(log, 1)
    monkeypatch.undo()
    with pytest.raises(WriteFailed):
        fill(log, 1)


def test_a_store_without_rights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root every directory can be read, so LevelDB's answer is given for it.
    new_log(tmp_path).close()

    def refuse(*_: object, **__: object) -> None:
        raise leveldb.IOError(b"IO error: /x/log/LOCK: Permission denied")

    monkeypatch.setattr(leveldb, "DB", refuse)
    with pytest.raises(StoreDamaged, match="read and write access"):
        open_log(tmp_path)
