"""Snapshots from disk to disk: whole or not at all, and never twice what is there already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from google_crc32c import value as crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from raftkv.raft.types import ConfState, HardState, SnapshotMeta
from raftkv.state.store import MemoryStore
from raftkv.storage import snapshots
from raftkv.storage.data_dir import remove_leftovers
from raftkv.storage.errors import ChunkRefused, SnapshotFailed, SyncFailed
from raftkv.storage.snapshots import IncomingSnapshot, SnapshotFile, SnapshotSpool
from raftkv.storage.state_store import StateStore
from tests.unit.storage.stores import flip, image, new_log, open_log

META = SnapshotMeta(120, 7, ConfState((1, 2, 3), (2, 3, 4), (9,), (3,), auto_leave=True))
CHUNK_BYTES = 50_000


@pytest.fixture
def content() -> dict[bytes, bytes]:
    pairs = {b"%05d" % number: os.urandom(number % 700) for number in range(2000)}
    return pairs | {b"": b"empty key", b"big": os.urandom(300_000), b"\xff" * 40: b""}


@pytest.fixture
def state(tmp_path: Path, content: dict[bytes, bytes]) -> Iterator[StateStore]:
    with closing(StateStore.open(tmp_path / "sender" / "state-1", create=True)) as store:
        store.write(content.items(), ())
        yield store


@pytest.fixture
def spool(tmp_path: Path) -> SnapshotSpool:
    return SnapshotSpool(tmp_path / "sender" / "snapshots")


@pytest.fixture
def file(state: StateStore, spool: SnapshotSpool) -> SnapshotFile:
    with closing(state.view()) as view:
        return spool.create(view, META)


@pytest.fixture
def receiver(tmp_path: Path) -> Path:
    directory = tmp_path / "receiver"
    (directory / "state-1").mkdir(parents=True)
    return directory


def incoming(receiver: Path, file: SnapshotFile) -> IncomingSnapshot:
    return IncomingSnapshot.open(receiver, file.snapshot_id, file.meta, file.size)


def send(file: SnapshotFile, to: IncomingSnapshot, until: int | None = None) -> None:
    while to.offset < (file.size if until is None else until):
        chunk = file.read(to.offset, CHUNK_BYTES)
        to.write(chunk.offset, chunk.data, chunk.crc32c)


def pairs_in(directory: Path) -> dict[bytes, bytes]:
    with closing(StateStore.open(directory, create=False)) as store:
        return dict(store.iterate(b"", None))


def test_a_state_arrives(file: SnapshotFile, receiver: Path, content: dict[bytes, bytes]) -> None:
    taking = incoming(receiver, file)
    assert taking.offset == 0
    send(file, taking)
    name = taking.finish()
    assert name == "state-2"
    assert pairs_in(receiver / name) == content
    assert list((receiver / "incoming").iterdir()) == []
    assert sorted(path.name for path in receiver.iterdir()) == ["incoming", "state-1", "state-2"]


def test_an_empty_state_arrives(tmp_path: Path, spool: SnapshotSpool, receiver: Path) -> None:
    file = spool.create(MemoryStore().view(), META)
    assert file.size % 512 == 0
    taking = incoming(receiver, file)
    send(file, taking)
    assert pairs_in(receiver / taking.finish()) == {}


def test_writes_that_go_on_are_not_in_it(state: StateStore, spool: SnapshotSpool, content: dict[bytes, bytes]) -> None:
    class Busy:
        """A view under which the state changes with every record that is read."""

        def __init__(self) -> None:
            self.view = state.view()

        def iterate(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
            for key, value in self.view.iterate(start, stop):
                state.write([(key + b"!", b"new"), (key, b"changed")], [key + b"gone"])
                yield key, value

    busy = Busy()
    file = spool.create(busy, META)
    busy.view.close()
    expected = MemoryStore()
    expected.write(content.items(), ())
    digest = file.digest
    assert spool.create(expected.view(), META).digest == digest


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.binary(max_size=40), st.binary(max_size=2000), max_size=60))
def test_equal_states_give_equal_bytes(tmp_path_factory: pytest.TempPathFactory, pairs: dict[bytes, bytes]) -> None:
    directory = tmp_path_factory.mktemp("equal")
    files = []
    for number, items in enumerate((list(pairs.items()), list(reversed(pairs.items())))):
        store = MemoryStore()
        for item in items:
            store.write([item], ())
        files.append(SnapshotSpool(directory / str(number)).create(store.view(), META))
    assert files[0].path.read_bytes() == files[1].path.read_bytes()
    assert files[0].snapshot_id == files[1].snapshot_id
    assert files[0].size % 512 == 0
    again = SnapshotFile.open(files[0].path)
    assert (again.meta, again.size, again.digest) == (META, files[0].size, files[0].digest)
    shutil.rmtree(directory)


def test_a_broken_connection_costs_nothing(file: SnapshotFile, receiver: Path, content: dict[bytes, bytes]) -> None:
    breaks = range(0, file.size, file.size // 7)
    for until in breaks:
        taking = incoming(receiver, file)
        assert taking.offset >= until - file.size // 7
        send(file, taking, until)
        reached = taking.offset
        taking.close()
        again = incoming(receiver, file)
        assert again.offset == reached
        again.close()
    taking = incoming(receiver, file)
    send(file, taking)
    assert pairs_in(receiver / taking.finish()) == content


def test_a_killed_receiver_goes_on_where_its_disk_ends(
    file: SnapshotFile, receiver: Path, content: dict[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SYNC_BYTES", 150_000)
    taking = incoming(receiver, file)
    send(file, taking, 400_000)  # synced up to 300,000
    killed = image(receiver, tmp_path / "killed")
    taking.close()
    # What was not synced may be anything after a power loss.
    (part,) = (killed / "incoming").glob("*.part")
    with part.open("r+b") as opened:
        opened.seek(300_000)
        opened.write(os.urandom(200_000))
    again = incoming(killed, file)
    assert again.offset == 300_000
    send(file, again)
    assert pairs_in(killed / again.finish()) == content


def test_a_restarted_sender_goes_on_with_the_same_bytes(
    file: SnapshotFile, receiver: Path, content: dict[bytes, bytes]
) -> None:
    taking = incoming(receiver, file)
    send(file, taking, file.size // 2)
    again = SnapshotSpool(file.path.parent).latest()
    assert again is not None
    assert (again.snapshot_id, again.meta, again.size) == (file.snapshot_id, META, file.size)
    send(again, taking)
    assert pairs_in(receiver / taking.finish()) == content


def test_a_spool_keeps_only_what_is_whole_and_newest(state: StateStore, file: SnapshotFile) -> None:
    directory = file.path.parent
    (directory / "0000000000000001-0000000000000001.snap").write_bytes(file.path.read_bytes())
    (directory / "00000000000000ff-0000000000000009.tmp").write_bytes(b"half")
    spool = SnapshotSpool(directory)
    latest = spool.latest()
    assert latest is not None
    assert latest.meta == META
    assert list(directory.iterdir()) == [file.path]
    with closing(state.view()) as view:
        newer = spool.create(view, SnapshotMeta(121, 7, META.conf))
    assert list(directory.iterdir()) == [newer.path]
    assert latest.read(0, 8).data == b"rkvSNAP1"  # a transfer under way goes on
    flip(newer.path, newer.size // 2)
    assert SnapshotSpool(directory).latest() is None
    assert list(directory.iterdir()) == []


def test_a_spool_may_be_dropped(spool: SnapshotSpool, file: SnapshotFile) -> None:
    spool.discard()
    assert spool.latest() is None
    assert not file.path.exists()
    spool.discard()


def test_another_snapshot_replaces_the_one_under_way(
    file: SnapshotFile, receiver: Path, spool: SnapshotSpool, state: StateStore
) -> None:
    taking = incoming(receiver, file)
    send(file, taking, 100_000)
    taking.close()
    state.write([(b"more", b"x")], ())
    with closing(state.view()) as view:
        other = spool.create(view, META)  # the same index, but other bytes
    taking = incoming(receiver, other)
    assert taking.offset == 0
    assert [path.name for path in (receiver / "incoming").iterdir()] == [f"{other.snapshot_id.decode()}.part"]
    send(other, taking)
    assert pairs_in(receiver / taking.finish())[b"more"] == b"x"


def test_a_bad_chunk_is_refused_and_the_next_goes_on(file: SnapshotFile, receiver: Path) -> None:
    taking = incoming(receiver, file)
    send(file, taking, CHUNK_BYTES)
    chunk = file.read(CHUNK_BYTES, 1000)
    wrong = [
        (chunk.offset, chunk.data, chunk.crc32c ^ 1),
        (chunk.offset, chunk.data[:-1], chunk.crc32c),
        (chunk.offset + 1, chunk.data, chunk.crc32c),
        (chunk.offset - 1, chunk.data, chunk.crc32c),
        (1 << 63, chunk.data, chunk.crc32c),
        (chunk.offset, bytes(file.size), crc32c(bytes(file.size))),
    ]
    for offset, data, checksum in wrong:
        with pytest.raises(ChunkRefused) as caught:
            taking.write(offset, data, checksum)
        assert caught.value.expected_offset == taking.offset == CHUNK_BYTES
    again = file.read(0, 1000)
    taking.write(again.offset, again.data, again.crc32c)  # sent twice: passed over
    assert taking.offset == CHUNK_BYTES
    send(file, taking)
    taking.finish()


def test_an_end_before_the_end_is_refused(file: SnapshotFile, receiver: Path) -> None:
    taking = incoming(receiver, file)
    send(file, taking, file.size - CHUNK_BYTES)
    with pytest.raises(SnapshotFailed, match="only"):
        taking.finish()
    send(file, taking)
    taking.finish()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_snapshot_that_went_bad_on_the_disk_is_refused(file: SnapshotFile, receiver: Path, part: float) -> None:
    taking = incoming(receiver, file)
    send(file, taking)
    (stored,) = (receiver / "incoming").glob("*.part")
    flip(stored, int(file.size * part))
    with pytest.raises(SnapshotFailed):
        taking.finish()
    assert sorted(path.name for path in receiver.iterdir()) == ["incoming", "state-1"]
    again = incoming(receiver, file)  # from the beginning
    assert again.offset == 0
    send(file, again)
    again.finish()


def test_every_byte_of_a_snapshot_file_counts(tmp_path: Path) -> None:
    store = MemoryStore()
    store.write([(b"k%d" % number, b"value") for number in range(20)], ())
    file = SnapshotSpool(tmp_path).create(store.view(), META)
    whole = file.path.read_bytes()
    damaged = tmp_path / "damaged"
    for offset in range(0, len(whole), 3):
        content = bytearray(whole)
        content[offset] ^= 1 << offset % 8
        damaged.write_bytes(bytes(content))
        with pytest.raises(SnapshotFailed):
            SnapshotFile.open(damaged)
    for length in range(0, len(whole), 29):
        damaged.write_bytes(whole[:length])
        with pytest.raises(SnapshotFailed):
            SnapshotFile.open(damaged)
    damaged.write_bytes(whole + b"x")
    with pytest.raises(SnapshotFailed, match="something follows"):
        SnapshotFile.open(damaged)


ID = f"{120:016x}-{7:016x}-{'ab' * 8}".encode()


@pytest.mark.parametrize(
    ("snapshot_id", "total", "fault"),
    [
        (b"", 512, "is no id"),
        (b"../../etc/passwd", 512, "is no id"),
        (ID.replace(b"-", b"/"), 512, "is no id"),
        (ID + b"\n", 512, "is no id"),
        (ID[:-1] + b"\xff", 512, "is no id"),
        (b"0" + ID[:-1], 512, "is no id"),
        (f"{121:016x}".encode() + ID[16:], 512, "is no id of a snapshot at index 120"),
        (ID, 0, "not a positive multiple"),
        (ID, -512, "not a positive multiple"),
        (ID, 513, "not a positive multiple"),
        (ID, 1 << 62, "bytes are free"),
    ],
)
def test_what_no_sender_of_ours_announces_is_refused(
    receiver: Path, snapshot_id: bytes, total: int, fault: str
) -> None:
    with pytest.raises(SnapshotFailed, match=fault):
        IncomingSnapshot.open(receiver, snapshot_id, META, total)
    assert not list((receiver / "incoming").glob("*"))


def test_what_was_announced_must_come(file: SnapshotFile, receiver: Path) -> None:
    for wrong_id, wrong_meta, fault in (
        (file.snapshot_id[:34] + b"0" * 16, META, "digest is not the one"),
        (file.snapshot_id, SnapshotMeta(120, 7, ConfState((1,))), "stands for something else"),
    ):
        taking = IncomingSnapshot.open(receiver, wrong_id, wrong_meta, file.size)
        send(file, taking)
        with pytest.raises(SnapshotFailed, match=fault):
            taking.finish()


@pytest.mark.parametrize("progress", [b"", b"junk", bytes(20), b"\x00" * 7 + b"\x7f" + bytes(12)])
def test_an_unreadable_note_of_progress_means_from_the_beginning(
    file: SnapshotFile, receiver: Path, progress: bytes
) -> None:
    taking = incoming(receiver, file)
    send(file, taking, 100_000)
    taking.close()
    (note,) = (receiver / "incoming").glob("*.offset")
    note.write_bytes(progress)
    again = incoming(receiver, file)
    assert again.offset == 0
    again.close()


def test_reads_outside_the_file_are_refused(file: SnapshotFile) -> None:
    for offset in (-1, file.size, 1 << 62):
        with pytest.raises(SnapshotFailed, match="is not within"):
            file.read(offset, 10)
    assert len(file.read(file.size - 5, 100).data) == 5
    with file.path.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(SnapshotFailed, match="ends at 1000"):
        file.read(500, 1000)
    file.close()


def test_a_full_disk_ends_the_transfer_and_not_the_node(
    file: SnapshotFile, receiver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking = incoming(receiver, file)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SnapshotFailed, match="No space left"):
        send(file, taking)
    assert list((receiver / "incoming").iterdir()) == []


def test_a_full_disk_leaves_no_half_spool(state: StateStore, spool: SnapshotSpool, file: SnapshotFile) -> None:
    class Full:
        def iterate(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
            yield b"a", b"b"
            raise OSError(28, "No space left on device")

    with pytest.raises(SnapshotFailed, match="No space left"):
        spool.create(Full(), SnapshotMeta(500, 9, META.conf))
    assert spool.latest() is file
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_failing_disk_stops_the_node(file: SnapshotFile, receiver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking = incoming(receiver, file)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SyncFailed, match="Input/output error"):
        send(file, taking)


def test_the_switch_to_an_installed_state_is_atomic(
    tmp_path: Path, file: SnapshotFile, content: dict[bytes, bytes]
) -> None:
    """Killed before `LogStore.install` returns the node has its old log and state, after it the new ones."""
    data_dir = tmp_path / "node"
    log = new_log(data_dir)
    StateStore.open(data_dir / log.state_name, create=True).close()
    taking = incoming(data_dir, file)
    send(file, taking)
    name = taking.finish()
    before = image(data_dir, tmp_path / "before")
    log.install(META, HardState(8, 0, META.index), name)
    after = image(data_dir, tmp_path / "after")
    log.close()

    log = open_log(before)
    assert (log.state_name, log.last_index()) == ("state-1", 0)
    assert remove_leftovers(before, log.state_name) == ["state-2"]
    assert pairs_in(before / log.state_name) == {}
    log.close()

    log = open_log(after)
    assert (log.state_name, log.first_index(), log.snapshot()) == ("state-2", META.index + 1, META)
    assert remove_leftovers(after, log.state_name) == ["state-1"]
    assert pairs_in(after / log.state_name) == content
    log.close()


def test_a_receiver_killed_while_building_builds_again(
    tmp_path: Path, file: SnapshotFile, receiver: Path, content: dict[bytes, bytes]
) -> None:
    taking = incoming(receiver, file)
    send(file, taking)
    killed = image(receiver, tmp_path / "killed")
    taking.finish()
    half = killed / "state-2.tmp"
    StateStore.open(half, create=True).close()
    again = incoming(killed, file)
    assert again.offset == file.size  # nothing is sent twice
    name = again.finish()
    assert pairs_in(killed / name) == content
    assert remove_leftovers(killed, name) == ["state-1", "state-2.tmp"]
