"""The Raft log on disk: identity, hard state, entries, the compacted prefix, which state directory is current.

One batch carries hard state, truncation and entries (rule Z4), and every batch carries a `Tail` with its own number,
so that after a crash the log is exactly what some batch left. At open the whole chain is read: each entry's checksum,
index and the term of its predecessor, the end against the tail, the tail against the watermark. What does not fit is
refused by name; nothing that was acknowledged is ever cut off to make it fit (`log_opening`).

Threads: one thread writes (`append`, `compact`, `install`), any may read. Compacted entries leave memory before they
leave the disk, so a reader that comes too late is told `Compacted` and never sees a hole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raftkv.raft.types import Compacted, ConfState, Entry, HardState, SnapshotMeta
from raftkv.storage import keys, log_opening
from raftkv.storage._leveldb import leveldb
from raftkv.storage.engine import Engine, EngineOptions, error_text
from raftkv.storage.errors import (
    DAMAGED_WAY_OUT,
    CorruptRecord,
    NodeFatal,
    StoreDamaged,
)
from raftkv.storage.keys import BadRecord, Identity, Tail
from raftkv.storage.log_opening import LoadedLog, link
from raftkv.storage.watermark import Watermark, sync_directory

LOG_OPTIONS = EngineOptions(
    write_buffer_bytes=4 << 20, cache_bytes=1 << 20, open_files_max=32, compression=None, block_bytes=64 << 10
)

_PURGE_CHUNK = 4096


class LogStore:
    """The durable log of one node; a `raftkv.raft.types.LogReader`."""

    def __init__(
        self,
        engine: Engine,
        watermark: Watermark,
        identity: Identity,
        loaded: LoadedLog,
        repaired: str | None,
    ) -> None:
        self.identity = identity
        self.boots = loaded.boots + 1
        """How often this store was opened, this time included: a number no earlier process of this node had."""
        self.repaired = repaired
        """What was cut off at open because a power loss had torn it before it was durable."""
        self._engine = engine
        self._watermark = watermark
        self._tail = loaded.tail
        self._meta = loaded.meta
        self._state_name = loaded.state_name
        self._index = loaded.index
        self._directory = _DirectorySync(engine.path)

    @classmethod
    def open(cls, path: Path, identity: Identity, *, create: bool, watermark_synced: bool = False) -> LogStore:
        """Open the log in the directory `path` and verify all of it.

        Args:
            path: the log's directory; the watermark is beside it.
            identity: whose log it must be.
            create: make a new one where there is none.
            watermark_synced: see `raftkv.storage.watermark`.
        Raises:
            StoreMissing: there is none and `create` is false.
            StoreLocked: another process has it open.
            StoreForeign: it belongs to another node.
            StoreFormatUnknown: another version wrote it.
            StoreDamaged: it is not what was written.
        """
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        repaired = log_opening.repair(path, identity)
        engine = Engine.open(path, LOG_OPTIONS, create=create)
        watermark: Watermark | None = None
        try:
            own = log_opening.check_identity(engine, identity, create=create)
            watermark = log_opening.open_watermark(path, identity, new=own is None, synced=watermark_synced)
            if own is None:
                own = log_opening.bootstrap(engine, identity)
            sync_directory(path)
            store = cls(engine, watermark, own, log_opening.load(engine, watermark), repaired)
            store._count_boot()
        except (leveldb.Error, BadRecord) as error:
            log_opening.close(engine, watermark)
            raise StoreDamaged(path, error_text(error), DAMAGED_WAY_OUT) from error
        except BaseException:
            log_opening.close(engine, watermark)
            raise
        return store

    # Reading.

    def initial_state(self) -> tuple[HardState, ConfState]:
        """The hard state, and the conf state as of `snapshot().index`."""
        return self.hard_state, self._meta.conf

    def first_index(self) -> int:
        """The index after the compacted prefix."""
        return self._index.first

    def last_index(self) -> int:
        """The last entry's index, or that of the compacted prefix when there is none."""
        return self._index.last

    def term(self, index: int) -> int:
        """Term of an entry, also of the last compacted one. From memory.

        Raises:
            LookupError: the log does not have it (`Compacted` or not yet there).
        """
        return self._index.term(index)

    def entries(self, low: int, high: int, bytes_max: int) -> list[Entry]:
        """The entries of [low, high), cut at `bytes_max` of data but at least one.

        Raises:
            LookupError: the log does not have `low` (`Compacted` or not yet there).
            CorruptRecord: the disk returned something else than was written.
        """
        if high <= low:
            return []
        held_from, held = self._index.recent(low, high)
        if held_from > low:
            result, bytes_left = self._read(low, held_from, bytes_max)
            if bytes_left < 0:
                return result
        else:
            result, bytes_left = [], bytes_max
        for entry in held:
            bytes_left -= len(entry.data)
            if bytes_left < 0 and result:
                break
            result.append(entry)
        return result

    def snapshot(self) -> SnapshotMeta:
        """The compacted prefix; index 0 and the first conf state when nothing was compacted."""
        return self._meta

    @property
    def hard_state(self) -> HardState:
        """As last written."""
        tail = self._tail
        return HardState(tail.term, tail.vote, tail.commit)

    @property
    def state_name(self) -> str:
        """Name of the directory that holds the current state."""
        return self._state_name

    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self._engine.size_bytes()

    @property
    def poisoned(self) -> bool:
        """True once a write has failed."""
        return self._engine.poisoned

    # Writing: the disk thread only.

    def bootstrap(self, conf: ConfState) -> None:
        """Note the conf state that an empty log begins with. Only before anything else was written."""
        assert self._tail.last_index == 0, "only an empty log is bootstrapped"
        meta = SnapshotMeta(0, 0, conf)
        batch = self._engine.batch(sync=True)
        batch.put(keys.KEY_META, keys.encode_meta(meta))
        self._commit(batch, self._tail, sync=True)
        self._meta = meta

    def append(self, hard_state: HardState | None, entries: Sequence[Entry], *, sync: bool = True) -> None:
        """Write hard state and entries as one batch; entries replace the log from the first of them on.

        Args:
            hard_state: None leaves it as it is.
            entries: contiguous; the first is at most one behind the last of the log.
            sync: durable on return. False is for a moved commit index alone.
        Raises:
            NodeFatal: the write failed, or an earlier one had.
        """
        tail = self._tail
        if hard_state is not None:
            tail = _follow(tail, hard_state)
        batch = self._engine.batch(sync=sync)
        if entries:
            assert sync, "entries are never written without sync"
            tail = self._put_entries(batch, tail, entries)
        assert tail.commit <= tail.last_index, f"commit {tail.commit} is after the last index {tail.last_index}"
        self._commit(batch, tail, sync=sync)
        if entries:
            self._index.append(entries)

    def compact(self, meta: SnapshotMeta) -> None:
        """Drop the entries up to `meta.index`; the state up to there must be durable.

        Raises:
            NodeFatal: the write failed, or an earlier one had.
        """
        first = self._index.first
        if meta.index < first:
            return  # already compacted that far
        assert meta.index <= self._index.last, f"compaction at {meta.index} is after the last index {self._index.last}"
        assert meta.term == self._index.term(meta.index), f"compaction at {meta.index} with another term"
        batch = self._engine.batch(sync=True)
        batch.put(keys.KEY_META, keys.encode_meta(meta))
        self._commit(batch, replace(self._tail, commit=max(self._tail.commit, meta.index)), sync=True)
        self._meta = meta
        # Out of memory before off the disk: a reader that finds an entry missing sees that it is compacted.
        self._index.compact(meta.index)
        self._purge(first, meta.index)

    def install(self, meta: SnapshotMeta, hard_state: HardState | None, state_name: str) -> None:
        """Make the received state in directory `state_name` current, and the log begin behind it, in one batch.

        Entries after `meta.index` are kept only where the log has just the entry (index, term) that the snapshot
        ends with: then they follow from it (Ongaro 5.1).

        The commit index is taken as far as the log goes then; `append` it again with the entries behind the snapshot.

        Raises:
            NodeFatal: the write failed, or an earlier one had.
        """
        first, last = self._index.first, self._index.last
        assert meta.index >= first - 1, f"snapshot at {meta.index} is older than the compacted prefix"
        keeps = meta.index <= last and self._index.term(meta.index) == meta.term
        assert keeps or meta.index >= self._tail.commit, f"snapshot at {meta.index} contradicts committed entries"
        tail = self._tail
        if hard_state is not None:
            tail = _follow(tail, hard_state)
        batch = self._engine.batch(sync=True)
        if not keeps:
            _delete(batch, meta.index + 1, last)
            tail = replace(tail, last_index=meta.index, last_term=meta.term)
        batch.put(keys.KEY_META, keys.encode_meta(meta))
        batch.put(keys.KEY_STATE_NAME, keys.seal(keys.KEY_STATE_NAME, state_name.encode()))
        # The commit index may be that of entries to be appended behind the snapshot: as far as the log goes now.
        commit = min(max(tail.commit, meta.index), tail.last_index)
        self._commit(batch, replace(tail, commit=commit), sync=True)
        self._meta = meta
        self._state_name = state_name
        if keeps:
            self._index.compact(meta.index)
        else:
            self._index.reset(meta.index, meta.term)
        self._purge(first, min(meta.index, last))

    def close(self) -> None:
        """Close the database. No other thread may be using it; a poisoned store is left as it is."""
        self._engine.close()
        if not self._engine.poisoned:
            self._watermark.close()

    def _put_entries(self, batch: leveldb.WriteBatch, tail: Tail, entries: Sequence[Entry]) -> Tail:
        next_index, last = entries[0].index, self._index.last
        assert self._tail.commit < next_index, f"entry {next_index} is committed"
        assert self._index.first <= next_index <= last + 1, f"entry {next_index} does not join {last}"
        prev_term = self._index.term(next_index - 1)
        put, encode = batch.put, keys.encode_entry
        for entry in entries:
            term = entry.term
            assert entry.index == next_index, f"entry {entry.index} where {next_index} must follow"
            assert term >= prev_term, f"entry {entry.index} of term {term} follows one of term {prev_term}"
            put(*encode(entry, prev_term))
            prev_term = term
            next_index += 1
        _delete(batch, next_index, last)  # what is left of the suffix that these replace
        assert prev_term <= tail.term, f"an entry of term {prev_term} in term {tail.term}"
        return Tail(tail.batch, tail.term, tail.vote, tail.commit, next_index - 1, prev_term)

    def _commit(self, batch: leveldb.WriteBatch, tail: Tail, *, sync: bool) -> None:
        tail = Tail(self._tail.batch + 1, tail.term, tail.vote, tail.commit, tail.last_index, tail.last_term)
        batch.put(*keys.encode_tail(tail))
        self._engine.write(batch, sync=sync)
        if sync:
            try:
                self._directory.sync_if_changed()
                self._watermark.advance(tail.batch)
            except (OSError, NodeFatal) as error:
                raise self._engine.poison(error, sync=True) from error
        self._tail = tail

    def _purge(self, low: int, high: int) -> None:
        # Not synced: if the deletes are lost, the next open repeats them. With the entry before the first one, whose
        # tail counted when it was dropped itself; what counts now is spared.
        spared = self._tail.last_index
        assert high <= spared, f"entries up to {high} are dropped from a log that ends at {spared}"
        for start in range(max(low - 1, 0), high + 1, _PURGE_CHUNK):
            end = min(start + _PURGE_CHUNK - 1, high)
            batch = self._engine.batch(sync=False)
            _delete(batch, start, min(end, spared - 1))
            if start <= spared <= end:
                batch.delete(keys.entry_key(spared))
            self._engine.write(batch, sync=False)

    def _count_boot(self) -> None:
        batch = self._engine.batch(sync=True)
        batch.put(keys.KEY_BOOTS, keys.encode_number(keys.KEY_BOOTS, self.boots))
        self._commit(batch, self._tail, sync=True)

    def _read(self, low: int, high: int, bytes_max: int) -> tuple[list[Entry], int]:
        """Entries of [low, high) from the disk, and what is left of `bytes_max`: negative when that cut them."""
        result: list[Entry] = []
        path = self._engine.path
        try:
            prev_term = self._index.term(low - 1)
            for key, value in self._engine.iterate(keys.entry_key(low), keys.entry_key(high), fill_cache=False):
                if keys.is_tail_key(key):
                    continue
                bytes_max -= len(value) - keys.ENTRY_OVERHEAD_BYTES
                if bytes_max < 0 and result:
                    return result, bytes_max
                prev_term = link(result, path, key, value, low + len(result), prev_term)
            if len(result) < high - low:
                missing = low + len(result)
                raise CorruptRecord(path, keys.entry_key(missing), "the entry is missing", index=missing)
        except leveldb.Error as error:
            raise CorruptRecord(path, keys.entry_key(low), error_text(error), index=low + len(result)) from error
        except CorruptRecord:
            if low < self._index.first:  # a compaction was faster than we
                raise Compacted(f"index {low} is compacted; the first is {self._index.first}") from None
            raise
        return result, bytes_max


class _DirectorySync:
    """Makes the name of a new `.log` file durable before anything in it is promised.

    LevelDB starts a new file when its memtable is full, syncs what it writes there, but the directory only later.
    On ext4, XFS and Btrfs syncing a new file brings its name along; POSIX does not promise it. Looking at the
    directory's modification time costs a microsecond, so we do not need to rely on it.
    """

    # A change within the same tick of the file system's clock leaves the time as it was.
    _CLOCK_TICK_NS = 50_000_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen_ns = 0

    def sync_if_changed(self) -> None:
        changed_ns = os.stat(self._path).st_mtime_ns  # noqa: PTH116, half the cost of Path.stat on every append
        if changed_ns == self._seen_ns:
            return
        sync_directory(self._path)
        if time.time_ns() - changed_ns > self._CLOCK_TICK_NS:
            self._seen_ns = changed_ns


def _delete(batch: leveldb.WriteBatch, low: int, high: int) -> None:
    """Delete the entries [low, high], and the tails behind them."""
    for index in range(low, high + 1):
        batch.delete(keys.entry_key(index))
        batch.delete(keys.tail_key(index))


def _follow(tail: Tail, hard_state: HardState) -> Tail:
    term, vote = hard_state.term, hard_state.vote
    assert term >= tail.term, f"term falls from {tail.term} to {term}"
    if term == tail.term:
        assert vote == tail.vote or tail.vote == 0, f"a second vote in term {term}"
    return Tail(tail.batch, term, vote, hard_state.commit, tail.last_index, tail.last_term)
