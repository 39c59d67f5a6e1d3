"""A log that is not what was written is refused by name, in every kind of file; it is never silently shorter.

Images are taken without closing: what `kill -9` leaves. Damage is done to the image.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raftkv.raft.types import Entry, HardState
from raftkv.storage import keys
from raftkv.storage.errors import CorruptRecord, StoreDamaged
from raftkv.storage.leveldb_files import last_put, log_files, read_log
from raftkv.storage.log_store import LogStore
from raftkv.storage.watermark import Watermark
from tests.unit.storage.contracts import entries, entry, everything
from tests.unit.storage.stores import IDENTITY, cut, fill, flip, image, new_log, newest_log_file, open_log, place

DATA_BYTES = 400


class Original:
    """A log with content in tables and in its newest log file, and images of it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._images = 0
        log = new_log(directory / "original")
        self.written = fill(log, 40, DATA_BYTES)
        log._engine.compact()  # those are in a table now
        self.written += fill(log, 40, DATA_BYTES)
        self.log = log

    def image(self) -> Path:
        self._images += 1
        return image(self._directory / "original", self._directory / f"image-{self._images}")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Original]:
    made = Original(tmp_path_factory.mktemp("original"))
    yield made
    made.log.close()


def refused(data_dir: Path) -> StoreDamaged:
    with pytest.raises(StoreDamaged) as caught:
        open_log(data_dir).close()
    text = str(caught.value)
    assert text.startswith(str(data_dir)), text
    assert "remove this member" in text  # the way out
    return caught.value


def test_an_image_is_whole(original: Original) -> None:
    log = open_log(original.image())
    assert everything(log) == original.written
    assert log.repaired is None
    log.close()


@pytest.mark.parametrize("index", [41, 60, 79, 80])
def test_a_flipped_bit_in_the_newest_log_file(original: Original, index: int) -> None:
    data_dir = original.image()
    file = newest_log_file(data_dir / "log")
    flip(file, place(file, original.written[index - 1].data[:2] + bytes(DATA_BYTES)) + 100)
    assert "log" in str(refused(data_dir).path)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.97])
def test_a_flipped_bit_in_a_table(original: Original, part: float) -> None:
    data_dir = original.image()
    table = max((data_dir / "log").glob("*.ldb"), key=lambda file: file.stat().st_size)
    flip(table, int(table.stat().st_size * part))
    refused(data_dir)


def test_every_table_byte_matters_or_changes_nothing(original: Original) -> None:
    data_dir = original.image()
    table = max((data_dir / "log").glob("*.ldb"), key=lambda file: file.stat().st_size)
    for offset in range(0, table.stat().st_size, table.stat().st_size // 25):
        damaged = image(data_dir, data_dir.with_name("flipped"))
        flip(damaged / "log" / table.name, offset)
        try:
            log = open_log(damaged)
        except StoreDamaged:
            pass
        else:
            assert everything(log) == original.written
            log.close()
        shutil.rmtree(damaged)


@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_manifest(original: Original, name: str, damage: str) -> None:
    data_dir = original.image()
    (file,) = (data_dir / "log").glob(f"{name}*")
    if damage == "flip":
        flip(file, file.stat().st_size // 2)
    elif damage == "truncate":
        cut(file, file.stat().st_size - 3)
    else:
        file.unlink()
    refused(data_dir)


def test_a_table_that_is_gone(original: Original) -> None:
    data_dir = original.image()
    for table in (data_dir / "log").glob("*.ldb"):
        table.unlink()
    refused(data_dir)


def test_a_newest_log_file_that_is_gone(original: Original) -> None:
    """LevelDB opens such a database without complaint, at an earlier moment."""
    data_dir = original.image()
    newest_log_file(data_dir / "log").unlink()
    assert "was durable: the newest part of the log is lost" in refused(data_dir).fault


@pytest.mark.parametrize("bytes_off", [1, 30, 500, 5_000, 20_000])
def test_a_newest_log_file_that_lost_its_end(original: Original, bytes_off: int) -> None:
    data_dir = original.image()
    cut(newest_log_file(data_dir / "log"), bytes_off)
    assert "was durable: the newest part of the log is lost" in refused(data_dir).fault


def test_a_log_that_is_gone_beside_its_watermark(original: Original) -> None:
    data_dir = original.image()
    shutil.rmtree(data_dir / "log")
    with pytest.raises(StoreDamaged, match=r"is empty, but had \d+ durable batches"):
        open_log(data_dir, create=True)


def test_an_old_log_under_a_new_watermark(tmp_path: Path) -> None:
    log = new_log(tmp_path / "a")
    fill(log, 5)
    old = image(tmp_path / "a", tmp_path / "old")
    fill(log, 5)
    new = image(tmp_path / "a", tmp_path / "new")
    log.close()
    shutil.rmtree(new / "log")
    shutil.copytree(old / "log", new / "log")
    refused(new)


def test_a_watermark_that_is_gone_or_unreadable(original: Original) -> None:
    data_dir = original.image()
    file = data_dir / "log.watermark"
    flip(file, 20)
    flip(file, 4096 + 20)
    assert "neither of its two records is readable" in refused(data_dir).fault
    file.unlink()
    assert "the file is missing" in refused(data_dir).fault


def test_one_slot_of_the_watermark_is_enough(original: Original) -> None:
    for slot in (0, 4096):
        data_dir = original.image()
        flip(data_dir / "log.watermark", slot + 20)
        log = open_log(data_dir)
        assert everything(log) == original.written
        log.close()


def test_the_watermark_keeps_the_newer_slot(tmp_path: Path) -> None:
    path = tmp_path / "w"
    watermark = Watermark.create(path, 1, 2, synced=True)
    for batch in range(1, 8):
        watermark.advance(batch)
        assert Watermark.open(path, 1, 2).batch == batch
    watermark.close()


# A torn last write, which nobody has been told of, is no damage.


def torn(original: Original, tear: Callable[[Path, int], None], *, acknowledged: bool) -> Path:
    """An image taken within the write of one more entry: the file has it in part, the watermark not yet."""
    source = original.image()
    log = open_log(source)
    index = log.last_index() + 1
    if not acknowledged:
        log._watermark.advance = lambda batch: None  # type: ignore[method-assign]
    size = newest_log_file(source / "log").stat().st_size
    log.append(HardState(1, 0, index - 1), [entry(index, 1, bytes(range(256)) * 30)])
    data_dir = original.image()
    shutil.rmtree(data_dir)
    image(source, data_dir)
    log.close()
    tear(newest_log_file(data_dir / "log"), size)
    return data_dir


def cut_it(file: Path, start: int) -> None:
    cut(file, (file.stat().st_size - start) // 2)


def flip_it(file: Path, start: int) -> None:
    flip(file, start + 2000)


def zero_it(file: Path, start: int) -> None:
    content = bytearray(file.read_bytes())
    content[start + 1024 : start + 1536] = bytes(512)
    file.write_bytes(bytes(content))


def zero_all_of_it(file: Path, start: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:start] + bytes(len(content) - start))


TEARS = [cut_it, flip_it, zero_it, zero_all_of_it]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_write_that_was_not_acknowledged_is_cut_off(
    original: Original, tear: Callable[[Path, int], None]
) -> None:
    data_dir = torn(original, tear, acknowledged=False)
    log = open_log(data_dir)
    assert everything(log) == original.written
    if tear in (flip_it, zero_it):  # LevelDB itself takes the others for the end
        assert log.repaired is not None
        assert "cut at offset" in log.repaired
    more = fill(log, 3)
    log.close()
    log = open_log(data_dir)
    assert everything(log) == original.written + more
    log.close()


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_write_that_was_acknowledged_is_damage(original: Original, tear: Callable[[Path, int], None]) -> None:
    refused(torn(original, tear, acknowledged=True))


def test_a_repair_never_touches_a_store_that_is_open(original: Original) -> None:
    file = newest_log_file(original.log._engine.path)
    before = file.read_bytes()
    with pytest.raises(Exception, match="open in this process"):
        open_log(original.log._engine.path.parent)
    assert file.read_bytes() == before


# Records that LevelDB finds sound, but that are not the chain.


def rewrite(data_dir: Path, change: Callable[[LogStore], None]) -> None:
    log = open_log(data_dir)
    change(log)
    log.close()


def put(log: LogStore, key: bytes, value: bytes | None) -> None:
    batch = log._engine.batch(sync=True)
    if value is None:
        batch.delete(key)
    else:
        batch.put(key, value)
    log._engine.write(batch, sync=True)


def swapped(log: LogStore) -> None:
    value = log._engine.get(keys.entry_key(30))
    assert value is not None
    put(log, keys.entry_key(31), value)


def of_another_term(log: LogStore) -> None:
    put(log, *keys.encode_entry(Entry(30, 1, entry(30, 1).kind, b"x"), prev_term=7))


def of_no_kind(log: LogStore) -> None:
    key = keys.entry_key(30)
    put(log, key, keys.seal(key, bytes(7) + b"\x01" + bytes(7) + b"\x01" + b"\x09data"))


def without_tails(log: LogStore) -> None:
    for index in range(81):
        put(log, keys.tail_key(index), None)


CHAIN_FAULTS: list[tuple[Callable[[LogStore], None], str]] = [
    (lambda log: put(log, keys.entry_key(30), None), "log entry 30: the entry is missing, the next is 31"),
    (lambda log: put(log, keys.entry_key(80), None), "the entries end at index 79, term 1; the last write ended at"),
    (lambda log: put(log, *keys.encode_entry(entry(81, 1), 1)), "the entries end at index 81"),
    (lambda log: put(log, keys.entry_key(30), b"short"), "log entry 30: checksum does not match"),
    (swapped, "log entry 31: checksum does not match"),
    (of_another_term, "log entry 30: follows an entry of term 7, but the one before it has term 1"),
    (of_no_kind, "log entry 30: unknown kind 9"),
    (lambda log: put(log, keys.KEY_ENTRY + b"junk", b"junk"), "an entry's key has 9 bytes, this one 5"),
    (lambda log: put(log, keys.tail_key(80), None), "but batch "),
    (lambda log: put(log, keys.tail_key(80), bytes(52)), "checksum does not match"),
    (without_tails, "the record with the hard state is missing"),
    (lambda log: put(log, keys.KEY_META, keys.seal(keys.KEY_META, b"short")), "too short"),
    (lambda log: put(log, keys.KEY_STATE_NAME, b"state-1"), "checksum does not match"),
    (lambda log: put(log, keys.KEY_IDENTITY, keys.encode_identity(IDENTITY)[:-1] + b"?"), "identity: checksum"),
]


@pytest.mark.parametrize(("change", "fault"), CHAIN_FAULTS)
def test_a_broken_chain(original: Original, change: Callable[[LogStore], None], fault: str) -> None:
    data_dir = original.image()
    rewrite(data_dir, change)
    assert fault in refused(data_dir).fault


def test_a_record_that_goes_bad_while_the_node_runs(original: Original) -> None:
    data_dir = original.image()
    log = open_log(data_dir)  # nothing is in memory after a start
    put(log, keys.entry_key(30), b"rotten, but LevelDB knows no better")
    assert len(log.entries(1, 30, 1 << 20)) == 29
    with pytest.raises(CorruptRecord, match="log entry 30: checksum does not match") as caught:
        log.entries(1, 40, 1 << 20)
    assert (caught.value.index, caught.value.key) == (30, keys.entry_key(30))
    put(log, keys.entry_key(50), None)
    with pytest.raises(CorruptRecord, match="log entry 50: the entry is missing"):
        log.entries(50, 51, 1 << 20)
    log.close()


# Reading LevelDB's files.


def test_log_files_are_read_as_leveldb_writes_them(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    for index, size in enumerate([0, 1, 300, 32_700, 32_760, 33_000, 100_000, 5], start=1):
        log.append(HardState(1, 0, 0), [entry(index, 1, bytes([index]) * size)])
    (file,) = log_files(tmp_path / "log")
    content = read_log(file)
    assert (content.fault, content.end) == (None, file.stat().st_size)
    sequences = [record.sequences for record in content.records]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(sequences))
    tail = last_put(content, keys.is_tail_key)
    assert tail is not None
    assert keys.decode_tail(*tail).last_index == 8
    seventh = keys.encode_entry(entry(7, 1, b"\x07" * 100_000), 1)
    assert last_put(content, lambda key: key == keys.entry_key(7)) == seventh
    assert last_put(content, lambda key: key == b"no such key") is None
    log.close()


def test_any_prefix_of_a_log_file_reads_as_a_prefix(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    log.append(HardState(1, 0, 0), entries(1, 1))
    log.append(HardState(1, 0, 0), [entry(2, 1, bytes(40_000)), entry(3, 1)])
    (file,) = log_files(tmp_path / "log")
    whole = read_log(file)
    content = file.read_bytes()
    log.close()
    ends = [0, *(record.end for record in whole.records)]
    for length in range(0, len(content), 97):
        file.write_bytes(content[:length])
        part = read_log(file)
        assert part.fault is None
        assert len(part.records) == sum(end <= length for end in ends[1:])
