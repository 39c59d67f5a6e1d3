"""One LevelDB as raftkv uses it: opened paranoid, its errors told apart, dead after the first failed write.

    OPEN --a write raises--> POISONED    nothing is written any more; the handle is never closed or used again
    OPEN --close()--> CLOSED

Why poisoned for good: LevelDB remembers only a failed *sync*. After a failed append its log writer is mis-framed,
and later writes that it reports as done are gone at the next open. So the first error is the last thing this
object does, and the process is expected to exit without closing anything (reliability rule Z1).

One thread writes; closing while another thread still uses the handle crashes the interpreter, so `close` belongs
after the writing thread was joined.
"""

from __future__ import annotations

import ctypes
import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raftkv.storage._leveldb import leveldb
from raftkv.storage.errors import (
    DAMAGED_WAY_OUT,
    NodeFatal,
    StoreDamaged,
    StoreForeign,
    StoreLocked,
    StoreMissing,
    SyncFailed,
    WriteFailed,
)

_AFTER_EVERY_KEY = b"\xff" * 256

# Directories that are open in this process.
_open_paths: set[Path] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How much memory one LevelDB may take. A node has two, and five nodes share a developer's machine."""

    write_buffer_bytes: int = 4 << 20
    """A memtable; LevelDB holds up to two. 4 MiB is its own default."""
    cache_bytes: int = 2 << 20
    """Uncompressed blocks kept; the page cache of the system does the rest."""
    open_files_max: int = 64
    """Each open table is mapped into memory; its own default of 1000 lets the resident size grow with the data."""
    block_bytes: int = 4 << 10
    """Of a table. Each is a write of its own when one is made, and is read and checked as a whole."""
    compression: str | None = "snappy"
    bloom_filter_bits: int = 0


class Engine:
    """A LevelDB handle that stops for good at its first failed write."""

    def __init__(self, path: Path, handle: leveldb.DB) -> None:
        self.path = path
        self.handle = handle
        self._failure: NodeFatal | None = None
        _open_paths.add(path.resolve())
        self.get = handle.get  # bound here: a read costs no extra call

    @classmethod
    def open(cls, path: Path, options: EngineOptions, *, create: bool) -> Engine:
        """Open the LevelDB in the directory `path`.

        Args:
            path: its directory.
            options: sizes.
            create: make a new one where there is none.
        Raises:
            StoreMissing: no LevelDB here and `create` is false.
            StoreLocked: open in another process, or elsewhere in this one.
            StoreDamaged: LevelDB refuses what it finds.
            StoreForeign: the path is no directory.
        """
        if path.exists() and not path.is_dir():
            raise StoreForeign(path, "is not a directory", "point --data-dir at the node's own directory")
        # LevelDB would refuse it, too, but give up this process's lock on the directory while doing so.
        if path.resolve() in _open_paths:
            raise StoreLocked(path, "open in this process", "close it first")
        # LevelDB makes the directory and a lock file even when told not to create: look first.
        if not (path / "CURRENT").exists():
            if any(_database_files(path)):
                raise StoreDamaged(path / "CURRENT", "the file is missing beside other database files", DAMAGED_WAY_OUT)
            if not create:
                way_out = "check --data-dir; a new node is started with --initial-cluster-state new"
                raise StoreMissing(path, "no store here", way_out)
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = leveldb.DB(
                str(path),
                create_if_missing=create,
                paranoid_checks=True,
                write_buffer_size=options.write_buffer_bytes,
                lru_cache_size=options.cache_bytes,
                max_open_files=options.open_files_max,
                block_size=options.block_bytes,
                compression=options.compression,
                bloom_filter_bits=options.bloom_filter_bits,
            )
        except (leveldb.Error, OSError) as error:
            raise _explain_open_failure(path, error) from error
        return cls(path, handle)

    def iterate(
        self, start: bytes | None, stop: bytes | None, *, fill_cache: bool = True
    ) -> Iterator[tuple[bytes, bytes]]:
        """The records in [start, stop), block checksums verified."""
        return self.handle.iterator(start=start, stop=stop, verify_checksums=True, fill_cache=fill_cache)

    def iterate_back(self, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The records before `stop`, the last one first, block checksums verified."""
        return self.handle.iterator(stop=stop, reverse=True, verify_checksums=True, fill_cache=False)

    def view(self) -> leveldb.Snapshot:
        """The database as it is now; `close` it when done, it keeps old records alive."""
        return self.handle.snapshot()

    def batch(self, *, sync: bool) -> leveldb.WriteBatch:
        """A new write batch, to be handed to `write` with the same `sync`."""
        if self._failure is not None:
            raise self._failure
        return self.handle.write_batch(sync=sync)

    def write(self, batch: leveldb.WriteBatch, *, sync: bool) -> None:
        """Write a batch; with `sync` it is durable on return.

        Raises:
            SyncFailed, WriteFailed: whatever went wrong. The store is poisoned and every later write raises the same.
        """
        if self._failure is not None:
            raise self._failure
        try:
            batch.write()
        except BaseException as error:
            raise self.poison(error, sync=sync) from error

    def poison(self, error: BaseException, *, sync: bool) -> NodeFatal:
        """Let no write through any more, because of `error`; returns what to raise."""
        if self._failure is None:
            kind = SyncFailed if sync else WriteFailed
            what = "synced write" if sync else "write"
            self._failure = kind(
                f"{self.path}: {what} failed: {error_text(error)}; the node stops, because "
                "what is written after a failed write may be lost; look after the disk (full? failing?), then start it"
            )
            # Never freed, not even when the interpreter ends: that would close it, and closing flushes.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.handle))
        return self._failure

    def raise_failure(self) -> None:
        """
        Raises:
            NodeFatal: a write had failed.
        """
        if self._failure is not None:
            raise self._failure

    @property
    def poisoned(self) -> bool:
        """True once a write has failed."""
        return self._failure is not None

    @property
    def closed(self) -> bool:
        """True once it was closed."""
        return bool(self.handle.closed)

    def compact(self) -> None:
        """Rewrite everything into fresh tables, dropping what was deleted. Blocks; others may go on meanwhile."""
        if self._failure is not None:
            raise self._failure
        try:
            # Given no bounds, plyvel hands LevelDB two empty keys, and nothing is compacted.
            self.handle.compact_range(start=b"", stop=_AFTER_EVERY_KEY)
        except BaseException as error:
            raise self.poison(error, sync=False) from error

    def size_bytes(self) -> int:
        """Bytes on disk."""
        total = 0
        for file in self.path.iterdir():
            try:
                total += file.stat().st_size
            except FileNotFoundError:  # LevelDB's own thread removes what it has merged
                continue
        return total

    def close(self) -> None:
        """Close the handle; nothing on a poisoned one. No other thread may be using it."""
        if self._failure is None:
            self.handle.close()
            _open_paths.discard(self.path.resolve())


def is_locked(path: Path) -> bool:
    """Whether the LevelDB in `path` is open somewhere: then not even a repair may touch it."""
    # Our own must be known before the file is touched: closing it would give up this process's lock on it.
    if path.resolve() in _open_paths:
        return True
    try:
        with (path / "LOCK").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def error_text(error: BaseException) -> str:
    """LevelDB's message as text: plyvel hands it over as bytes."""
    if isinstance(error, leveldb.Error) and error.args and isinstance(error.args[0], bytes):
        return error.args[0].decode("utf-8", "replace")
    return str(error) or type(error).__name__


def _database_files(path: Path) -> Iterator[Path]:
    for file in path.iterdir() if path.is_dir() else ():
        is_log = re.fullmatch(r"\d+\.log", file.name)
        if re.fullmatch(r"\d+\.(ldb|sst)|MANIFEST-\d+", file.name) or (is_log and file.stat().st_size > 0):
            yield file


def _explain_open_failure(path: Path, error: Exception) -> Exception:
    text = error_text(error)
    if "LOCK" in text and ("already held" in text or "temporarily unavailable" in text):
        return StoreLocked(path, "open in another process", "stop that process, or give this node its own --data-dir")
    if isinstance(error, leveldb.CorruptionError):
        return StoreDamaged(_file_named_in(path, text), text, DAMAGED_WAY_OUT)
    if "does not match existing comparator" in text or "exists (error_if_exists is true)" in text:
        return StoreForeign(path, text, "point --data-dir at the node's own directory")
    if "No space left" in text:
        return StoreDamaged(path, text, "free some space on this disk and start the node again")
    if "Permission denied" in text or "Read-only" in text:
        return StoreDamaged(path, text, "give the node's user read and write access to this directory")
    return StoreDamaged(_file_named_in(path, text), text, DAMAGED_WAY_OUT)


def _file_named_in(path: Path, text: str) -> Path:
    """The file LevelDB complains about, where its message names one."""
    found = re.search(r"(\d{6,}\.(?:log|ldb|sst)|MANIFEST-\d+|CURRENT)", text)
    return path / found.group(1) if found else path
