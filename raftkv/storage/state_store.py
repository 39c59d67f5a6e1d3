"""The state machine's key-value store over LevelDB: atomic batches, not synced, made durable when told.

    write ... write ... sync() ... write ... <power loss>     what `sync` covered is there; of the rest, a prefix

How `sync` works. LevelDB appends each batch to its newest `NNNNNN.log`. When its memtable is full it begins a new one
and turns the old memtable into a table in the background; until that table is synced the old log holds the only copy.
LevelDB's own synced write syncs the newest log alone, so it does *not* make earlier unsynced writes durable once a
memtable was switched. `sync` therefore syncs every log file, oldest first, then the directory. A log that disappears
meanwhile was replaced by a table that LevelDB synced, manifest included, before it removed the log. A log that appears
meanwhile holds later writes, which this sync does not promise.

Why a prefix. After a power loss an older log may end early while a newer one survived: LevelDB would replay both and
show a state with a hole in its history. `open` looks first (`repair_unsynced_tail`): it follows LevelDB's sequence
numbers through its logs and drops what comes after the first record that is missing or damaged. None of that can have
been promised, since a sync of it would have synced the missing part before. The applied index is in every batch, so
the Raft log is replayed from wherever that leaves the state.

Assumed of the file system: fsync makes a file's content and size durable and reports a failure to do so; a rename is
atomic; once the directory was synced the names in it are durable. ext4, XFS and Btrfs with their default options do.

Every value ends with the CRC32C of its key and itself: see `raftkv.storage.keys.seal`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from google_crc32c import value as crc32c

from raftkv.storage._leveldb import leveldb
from raftkv.storage.engine import Engine, EngineOptions, error_text, is_locked
from raftkv.storage.errors import DAMAGED_WAY_OUT, CorruptRecord, StoreDamaged
from raftkv.storage.key_filter import KeyFilter
from raftkv.storage.keys import RESIDUE
from raftkv.storage.leveldb_files import log_files, repair_unsynced_tail
from raftkv.storage.watermark import sync_directory

STATE_OPTIONS = EngineOptions(
    write_buffer_bytes=8 << 20,  # flushing and merging twice as rarely: 7 % of what a put costs, for 5 MB a node
    cache_bytes=4 << 20,
    open_files_max=80,  # of 2 MiB, mapped: this is what a node with a million keys has resident
    compression=None,  # halves what a put costs there; the state is small enough for any disk
    block_bytes=16 << 10,
    bloom_filter_bits=10,
)
FILTERED_AT_OPEN = 50_000
"""So many keys are taken into the filter before the store is used, in some 50 ms at most; the others by and by."""


class StateView:
    """The state as it was when the view was taken; may be read in another thread. Close it: it keeps old records."""

    def __init__(self, path: Path, snapshot: leveldb.Snapshot) -> None:
        self._path = path
        self._snapshot = snapshot

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None.

        Raises:
            CorruptRecord: the disk returned something else than was written.
        """
        return _get(self._snapshot, self._path, key)

    def iterate(self, start: bytes, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Pairs with start <= key < stop in key order (`stop` None: to the end), or from the end if `reverse`."""
        return _iterate(self._snapshot, self._path, start, stop, reverse, fill_cache=False)

    def close(self) -> None:
        """Give back what the view holds. Harmless when repeated."""
        self._snapshot.close()


class StateStore:
    """A `raftkv.state.store.KeyValueStore` on disk."""

    def __init__(self, engine: Engine, handle: leveldb.DB, filtered: bytes) -> None:
        self._engine = engine
        self._handle = handle
        self._filtered = filtered
        self._filter = KeyFilter(_keys(engine, filtered) if filtered else iter(()))
        self._may_have = self._filter.may_have
        self.path = engine.path
        # A compaction switches memtables even when they are empty. The repair at open takes an empty log before a newer
        # one for a lost one, and drops the newer: so none may be synced, that is promised, while that is going on.
        self._maintenance = threading.Lock()
        self.repaired: str | None = None
        """What was cut off at open: writes after a hole that a power loss had left. The Raft log replays them."""

    @classmethod
    def open(cls, path: Path, *, create: bool, filtered: bytes = b"") -> StateStore:
        """Open the state in the directory `path`, its unsynced end repaired after a power loss.

        Args:
            path: its directory.
            create: make a new one where there is none.
            filtered: the first byte of keys that are asked for before they are there: see `key_filter`. Others are not
                filtered, nor is any where it is empty.
        Raises:
            StoreMissing, StoreLocked, StoreForeign, StoreDamaged: as `Engine.open`.
            CorruptRecord: as `get`.
        """
        try:
            repaired = repair_unsynced_tail(path) if (path / "CURRENT").exists() and not is_locked(path) else None
        except OSError as error:
            raise StoreDamaged(path, str(error), DAMAGED_WAY_OUT) from error
        engine = Engine.open(path, STATE_OPTIONS, create=create)
        try:
            sync_directory(path)
            sync_directory(path.parent)
        except OSError as error:
            engine.close()
            raise StoreDamaged(path, str(error), DAMAGED_WAY_OUT) from error
        store = cls(engine, engine.handle, filtered)
        store.repaired = repaired
        try:
            store.learn(FILTERED_AT_OPEN)
        except BaseException:
            engine.close()
            raise
        return store

    @property
    def learning(self) -> bool:
        """Whether the filter does not know of all keys yet: then it is asked in vain."""
        return bool(self._filtered) and not self._filter.complete

    def learn(self, budget: int) -> bool:
        """Take the next `budget` keys into the filter; whether there are more.

        Raises:
            CorruptRecord: as `get`.
        """
        return self.learning and self._filter.step(budget)

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None.

        Raises:
            CorruptRecord: the disk returned something else than was written.
        """
        if key[:1] == self._filtered and not self._may_have(key):
            return None
        return _get(self._handle, self.path, key)

    def iterate(self, start: bytes, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """As `StateView.iterate`, of now: later writes are not seen."""
        return _iterate(self._handle, self.path, start, stop, reverse, fill_cache=True)

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes]) -> None:
        """All puts and deletes as one atomic batch, not synced. No key is in both.

        Raises:
            NodeFatal: the write failed, or an earlier one had.
        """
        batch = self._engine.batch(sync=False)
        put = batch.put
        filtered = self._filtered
        added = []
        for key, value in puts:
            put(key, value + crc32c(key + value).to_bytes(4, "little"))  # in two steps it costs more than the copy
            if key[:1] == filtered:
                added.append(key)
        self._filter.add_all(added)
        for key in deletes:
            batch.delete(key)
        self._engine.write(batch, sync=False)

    def view(self) -> StateView:
        """A consistent view of now, that may be read in another thread while writes go on."""
        return StateView(self.path, self._engine.view())

    def sync(self) -> None:
        """Make everything written before the call durable. Blocks; writes may go on in another thread.

        Raises:
            SyncFailed: the file system could not; nothing is written any more.
        """
        with self._maintenance:
            self._sync()

    def compact(self) -> None:
        """Give space back to the file system. Blocks, `sync` too; reads and writes may go on in another thread."""
        with self._maintenance:
            self._sync()
            self._engine.compact()

    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self._engine.size_bytes()

    @property
    def poisoned(self) -> bool:
        """True once a write has failed."""
        return self._engine.poisoned

    def close(self) -> None:
        """Close the database, unsynced. No other thread may be using it; a poisoned store is left as it is."""
        self._engine.close()

    def _sync(self) -> None:
        self._engine.raise_failure()
        try:
            for file in log_files(self.path):
                _sync_file(file)
            sync_directory(self.path)
        except OSError as error:
            raise self._engine.poison(error, sync=True) from error


def _sync_file(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # replaced by a synced table in the meantime
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _get(source: leveldb.DB | leveldb.Snapshot, path: Path, key: bytes) -> bytes | None:
    try:
        value = source.get(key)
    except leveldb.Error as error:
        raise CorruptRecord(path, key, error_text(error)) from error
    if value is None:
        return None
    if crc32c(key + value) != RESIDUE:
        raise CorruptRecord(path, key, "checksum does not match")
    return value[:-4]


def _keys(engine: Engine, first_byte: bytes) -> Iterator[bytes]:
    """The keys that begin with that byte and are there when the first is asked for."""
    key = first_byte
    try:
        for key, _ in engine.iterate(first_byte, bytes((first_byte[0] + 1,)), fill_cache=False):
            yield key
    except leveldb.Error as error:
        raise CorruptRecord(engine.path, key, f"the record at or after it: {error_text(error)}") from error


def _iterate(
    source: leveldb.DB | leveldb.Snapshot,
    path: Path,
    start: bytes,
    stop: bytes | None,
    reverse: bool,
    *,
    fill_cache: bool,
) -> Iterator[tuple[bytes, bytes]]:
    # Made at once, not at the first `next`: what is written between the two must not be seen.
    if reverse:
        # plyvel's reverse iterator finds nothing where the only record in the range is the one at `start`, so it is
        # given no start, and we stop there ourselves.
        pairs = source.iterator(reverse=True, stop=stop, verify_checksums=True, fill_cache=fill_cache)
        return _down_to(start, _checked(pairs, path, start))
    pairs = source.iterator(start=start, stop=stop, verify_checksums=True, fill_cache=fill_cache)
    return _checked(pairs, path, start)


def _down_to(start: bytes, pairs: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    for pair in pairs:
        if pair[0] < start:
            return
        yield pair


def _checked(pairs: Iterator[tuple[bytes, bytes]], path: Path, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    key = start
    try:
        for key, value in pairs:
            if crc32c(key + value) != RESIDUE:
                raise CorruptRecord(path, key, "checksum does not match")
            yield key, value[:-4]
    except leveldb.Error as error:
        raise CorruptRecord(path, key, f"the record at or after it: {error_text(error)}") from error
