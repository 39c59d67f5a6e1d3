"""Opening a log: whose it is, whether all of it is there, and the chain of its entries.

What does not fit is refused by name. Only a torn last write that was never acknowledged is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raftkv.raft.types import ConfState, Entry, SnapshotMeta
from raftkv.storage import keys
from raftkv.storage.engine import Engine, is_locked
from raftkv.storage.errors import (
    DAMAGED_WAY_OUT,
    CorruptRecord,
    StoreDamaged,
    StoreForeign,
    StoreFormatUnknown,
    StoreMissing,
    StoreUnusable,
)
from raftkv.storage.keys import BadRecord, Identity, Tail
from raftkv.storage.leveldb_files import LogContent, last_put, repair_torn_tail
from raftkv.storage.log_index import LogIndex
from raftkv.storage.watermark import Watermark, sync_directory

FIRST_STATE_NAME = "state-1"


@dataclass(frozen=True, slots=True)
class LoadedLog:
    """What was found in a log that is whole."""

    tail: Tail
    meta: SnapshotMeta
    boots: int
    state_name: str
    index: LogIndex


def watermark_path(path: Path) -> Path:
    """Where the watermark of the log in `path` lies: beside it, so that removing the log alone is noticed."""
    return path.with_name(path.name + ".watermark")


def link(result: list[Entry], path: Path, key: bytes, value: bytes, index: int, prev_term: int) -> int:
    """Append the entry in (key, value), which must be `index` and follow an entry of `prev_term`; returns its term."""
    found = keys.entry_index(key)
    if found != index:
        raise CorruptRecord(path, keys.entry_key(index), f"the entry is missing, the next is {found}", index=index)
    try:
        linked_term, entry = keys.decode_entry(index, key, value)
    except BadRecord as error:
        raise CorruptRecord(path, key, str(error), index=index) from error
    if linked_term != prev_term or entry.term < prev_term:
        fault = f"follows an entry of term {linked_term}, but the one before it has term {prev_term}"
        raise CorruptRecord(path, key, fault, index=index)
    result.append(entry)
    return entry.term


def close(engine: Engine, watermark: Watermark | None) -> None:
    """Close what an opening that failed had opened."""
    if watermark is not None:
        watermark.close()
    engine.close()


def repair(path: Path, identity: Identity) -> str | None:
    """Cut off a torn last write, if the watermark proves that it never was acknowledged."""
    if not (path / "CURRENT").exists() or is_locked(path):
        return None

    def is_whole(content: LogContent) -> bool:
        tail = last_put(content, keys.is_tail_key)
        try:
            watermark = Watermark.open(watermark_path(path), identity.cluster_id, identity.node_id)
        except (OSError, StoreUnusable):
            return False
        watermark.close()
        try:
            return tail is not None and keys.decode_tail(*tail).batch >= watermark.batch
        except BadRecord:
            return False

    try:
        return repair_torn_tail(path, is_whole)
    except OSError as error:
        raise StoreDamaged(path, str(error), DAMAGED_WAY_OUT) from error


def check_identity(engine: Engine, identity: Identity, *, create: bool) -> Identity | None:
    """The identity in the store; None when the store is new."""
    path = engine.path
    value = engine.get(keys.KEY_IDENTITY, verify_checksums=True)
    if value is None:
        if next(engine.iterate(None, None), None) is not None:
            raise StoreForeign(path, "a LevelDB, but not a raftkv log", "point --data-dir at the node's own directory")
        if not create:
            fault = "the store was never finished: it has no identity"
            raise StoreMissing(path, fault, "remove the data directory and start the node as a new one")
        return None
    version = keys.identity_version(value)
    if version != keys.FORMAT_VERSION:
        fault = f"written in format {version}; this version knows format {keys.FORMAT_VERSION}"
        later = ", or a later one" if version > keys.FORMAT_VERSION else ""
        raise StoreFormatUnknown(path, fault, "run the raftkv version that wrote it" + later)
    try:
        own = keys.decode_identity(value)
    except BadRecord as error:
        raise StoreDamaged(path, f"identity: {error}", DAMAGED_WAY_OUT) from error
    if (own.cluster_id, own.node_id, own.name) != (identity.cluster_id, identity.node_id, identity.name):
        raise StoreForeign(
            path,
            f"belongs to node {own.name!r} ({own.node_id:x}) of cluster {own.cluster_id:x}, "
            f"not to node {identity.name!r} ({identity.node_id:x}) of cluster {identity.cluster_id:x}",
            "point --data-dir at this node's own directory, or start it with the name and cluster it was made with",
        )
    return own


def open_watermark(path: Path, identity: Identity, *, new: bool, synced: bool) -> Watermark:
    """The watermark of the log in `path`; a `new` log gets a new one, and must not have lost an old content."""
    place = watermark_path(path)
    try:
        watermark = Watermark.open(place, identity.cluster_id, identity.node_id, synced=synced)
    except FileNotFoundError:
        if not new:
            raise StoreDamaged(
                place, "the file is missing, so the log beside it cannot be proven whole", DAMAGED_WAY_OUT
            ) from None
        return Watermark.create(place, identity.cluster_id, identity.node_id, synced=synced)
    if new and watermark.batch > 0:
        watermark.close()
        raise StoreDamaged(path, f"is empty, but had {watermark.batch} durable batches", DAMAGED_WAY_OUT)
    return watermark


def bootstrap(engine: Engine, identity: Identity) -> Identity:
    """Make an empty database an empty log, durably; returns whose."""
    own = replace(identity, format_version=keys.FORMAT_VERSION)
    batch = engine.batch(sync=True)
    batch.put(keys.KEY_IDENTITY, keys.encode_identity(own))
    batch.put(keys.KEY_BOOTS, keys.encode_number(keys.KEY_BOOTS, 0))
    batch.put(*keys.encode_tail(Tail(0, 0, 0, 0, 0, 0)))
    batch.put(keys.KEY_META, keys.encode_meta(SnapshotMeta(0, 0, ConfState(()))))
    batch.put(keys.KEY_STATE_NAME, keys.seal(keys.KEY_STATE_NAME, FIRST_STATE_NAME.encode()))
    engine.write(batch, sync=True)
    sync_directory(engine.path.parent)
    return own


def load(engine: Engine, watermark: Watermark) -> LoadedLog:
    """Read and verify everything.

    Raises:
        StoreDamaged: it is not what was written.
    """
    tail = _last_tail(engine)
    meta = keys.decode_meta(_must_get(engine, keys.KEY_META, "compacted prefix"))
    boots = keys.decode_number(keys.KEY_BOOTS, _must_get(engine, keys.KEY_BOOTS, "count of starts"))
    name = keys.unseal(keys.KEY_STATE_NAME, _must_get(engine, keys.KEY_STATE_NAME, "name of the state directory"))
    index = LogIndex(meta.index, meta.term)
    if tail.batch < watermark.batch:
        raise StoreDamaged(
            engine.path,
            f"ends with batch {tail.batch} (index {tail.last_index}), but batch {watermark.batch} was durable: "
            "the newest part of the log is lost, and with it what this node has acknowledged",
            DAMAGED_WAY_OUT,
        )
    try:
        _read_chain(engine, index, keys.tail_key(tail.last_index))
    except (CorruptRecord, BadRecord) as error:
        fault = f"log entry {error.index}: {error.fault}" if isinstance(error, CorruptRecord) else str(error)
        raise StoreDamaged(engine.path, fault, DAMAGED_WAY_OUT) from error
    if (index.last, index.last_term) != (tail.last_index, tail.last_term) or tail.commit > index.last:
        raise StoreDamaged(
            engine.path,
            f"the entries end at index {index.last}, term {index.last_term}; "
            f"the last write ended at index {tail.last_index}, term {tail.last_term}, commit {tail.commit}",
            DAMAGED_WAY_OUT,
        )
    return LoadedLog(tail, meta, boots, name.decode(), index)


def _last_tail(engine: Engine) -> Tail:
    """The tail of the last batch. It follows the last entry; where an entry is behind it, the chain will tell."""
    for key, value in engine.iterate_back(keys.KEY_ENTRY_END):
        if keys.is_tail_key(key):
            return keys.decode_tail(key, value)
    raise StoreDamaged(engine.path, "the record with the hard state is missing", DAMAGED_WAY_OUT)


def _read_chain(engine: Engine, index: LogIndex, tail: bytes) -> None:
    """Follow the chain of entries through the whole store into `index`; remove what a compaction left behind.

    Args:
        tail: the key of the last tail, which stays.
    """
    compacted = index.first - 1
    leftover = engine.batch(sync=False)
    stop = keys.entry_key(index.first)
    count = 0
    for key, _ in engine.iterate(keys.KEY_ENTRY, stop, fill_cache=False):
        if key != tail:
            leftover.delete(key)
            count += 1
    if count:
        engine.write(leftover, sync=False)
    prev_term = index.term(compacted)
    expected = index.first
    for key, value in engine.iterate(stop, keys.KEY_ENTRY_END, fill_cache=False):
        if keys.is_tail_key(key):
            continue
        one: list[Entry] = []
        prev_term = link(one, engine.path, key, value, expected, prev_term)
        index.extend_run(expected, prev_term)
        expected += 1


def _must_get(engine: Engine, key: bytes, what: str) -> bytes:
    value = engine.get(key, verify_checksums=True)
    if value is None:
        raise StoreDamaged(engine.path, f"the record with the {what} is missing", DAMAGED_WAY_OUT)
    return value
