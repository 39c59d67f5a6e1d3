"""Snapshots of the state on their way from one node's disk to another's, resumable on both sides.

    sender      view --SnapshotSpool.create--> snapshots/<index>-<term>.snap --SnapshotFile.read--> chunks
    receiver    chunks --IncomingSnapshot.write--> incoming/<id>.part --finish--> state-<n>/, ready for LogStore.install

The sender's file is written once and serves every follower until a newer one replaces it, also after a restart. The
receiver remembers how much of it is durable and goes on there. The id names the bytes (index, term, begin of the
digest), so a transfer goes on from another sender too, if that has the very same bytes, and begins anew if not.

Nothing of this is on the way of a commit: when a disk is full here, the transfer fails and cleans up, not the node.
Only the new state itself is written through LevelDB, where a failed write is fatal as everywhere.

All calls block; use them from a thread. Each object belongs to one thread at a time, but `SnapshotFile.read`, which
any number may call.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path

from google_crc32c import value as crc32c

from raftkv.raft.types import SnapshotMeta
from raftkv.storage.data_dir import next_state_name
from raftkv.storage.errors import ChunkRefused, SnapshotFailed, SyncFailed
from raftkv.storage.snapshot_format import UNIT_BYTES, Records, SnapshotParser, write_snapshot
from raftkv.storage.state_store import StateStore
from raftkv.storage.watermark import sync_directory

SYNC_BYTES = 4 << 20
"""How much of an incoming snapshot may have to be sent again after a power loss."""

DISK_RESERVE_BYTES = 64 << 20
"""What a snapshot leaves free on the disk: the log needs it more."""

_ID = re.compile(rb"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}")
_PROGRESS = struct.Struct(">QQI")  # durable offset, total, crc32c of both


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of a snapshot."""

    offset: int
    data: bytes
    crc32c: int


class SnapshotFile:
    """A finished snapshot on the sender's disk. Stays readable when the spool has dropped it."""

    def __init__(self, path: Path, meta: SnapshotMeta, size: int, digest: bytes) -> None:
        self.path = path
        self.meta = meta
        self.size = size
        """Bytes; a multiple of 512."""
        self.digest = digest
        self.snapshot_id = f"{meta.index:016x}-{meta.term:016x}-{digest[:8].hex()}".encode()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    @classmethod
    def open(cls, path: Path) -> SnapshotFile:
        """Open a file and verify all of it.

        Raises:
            SnapshotFailed: it is not a whole snapshot.
        """
        try:
            with path.open("rb") as file:
                parser = SnapshotParser(file)
                for _ in parser:
                    pass
                return cls(path, parser.meta, file.tell(), parser.digest)
        except OSError as error:
            raise SnapshotFailed(f"{path}: {error}") from error

    def read(self, offset: int, length: int) -> Chunk:
        """The bytes from `offset` on, `length` of them or up to the end.

        Raises:
            SnapshotFailed: there are none, or the disk fails.
        """
        if not 0 <= offset < self.size:
            raise SnapshotFailed(f"offset {offset} is not within the {self.size} bytes of the snapshot")
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise SnapshotFailed(f"{self.path}: {error}") from error
        if len(data) != min(length, self.size - offset):
            raise SnapshotFailed(f"{self.path}: ends at {offset + len(data)}, not at {self.size}")
        return Chunk(offset, data, crc32c(data))

    def close(self) -> None:
        """Close the file; otherwise that happens when nobody refers to this object."""
        self._close()


class SnapshotSpool:
    """The sender's directory of snapshots: the newest is kept, the others go."""

    def __init__(self, directory: Path) -> None:
        """Take over what an earlier process left, as far as it is whole: that is verified now."""
        self._directory = directory
        self._latest: SnapshotFile | None = None
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.iterdir(), reverse=True):  # newest first
            if self._latest is None and path.suffix == ".snap":
                with contextlib.suppress(SnapshotFailed):
                    self._latest = SnapshotFile.open(path)
                    continue
            path.unlink()

    def latest(self) -> SnapshotFile | None:
        """The newest snapshot, if there is any."""
        return self._latest

    def create(self, view: Records, meta: SnapshotMeta) -> SnapshotFile:
        """Write a snapshot of `view`; it replaces the others.

        Args:
            view: a consistent view of the state.
            meta: what that state is: applied index, its term, the conf state.
        Raises:
            SnapshotFailed: the disk is full or fails; nothing is left of it.
        """
        path = self._directory / f"{meta.index:016x}-{meta.term:016x}.snap"
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb", buffering=1 << 20) as file:
                digest = write_snapshot(file, view, meta)
                size = file.tell()
            # Not synced: whoever opens it after a restart verifies all of it.
            temporary.replace(path)
            made = SnapshotFile(path, meta, size, digest)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise SnapshotFailed(f"{temporary}: {error}") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._latest = made
        for other in self._directory.iterdir():
            if other != path:
                other.unlink()
        return made

    def discard(self) -> None:
        """Drop the kept snapshot; transfers under way go on with the bytes they have open."""
        if self._latest is not None:
            self._latest.path.unlink(missing_ok=True)
            self._latest = None


class IncomingSnapshot:
    """A snapshot being received. One at a time in a data directory: opening another drops what was there."""

    def __init__(self, data_dir: Path, snapshot_id: str, meta: SnapshotMeta, total: int) -> None:
        self._data_dir = data_dir
        self._meta = meta
        self._total = total
        self._part = data_dir / "incoming" / f"{snapshot_id}.part"
        self._progress = self._part.with_suffix(".offset")
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._durable = self.offset = self._load_progress()
        os.ftruncate(self._descriptor, self.offset)

    @classmethod
    def open(cls, data_dir: Path, snapshot_id: bytes, meta: SnapshotMeta, total: int) -> IncomingSnapshot:
        """Begin a transfer, or go on with one: `offset` says where.

        Args:
            data_dir: the node's data directory.
            snapshot_id: the sender's name for the bytes.
            meta: what the snapshot stands for.
            total: bytes of the whole.
        Raises:
            SnapshotFailed: an id or size that no sender of ours has, too little space, or the disk fails.
        """
        if not _ID.fullmatch(snapshot_id) or snapshot_id[:33] != f"{meta.index:016x}-{meta.term:016x}".encode():
            raise SnapshotFailed(f"{snapshot_id[:80]!r} is no id of a snapshot at index {meta.index}, term {meta.term}")
        if total < UNIT_BYTES or total % UNIT_BYTES:
            raise SnapshotFailed(f"total of {total} bytes is not a positive multiple of {UNIT_BYTES}")
        name = snapshot_id.decode()
        directory = data_dir / "incoming"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for other in directory.iterdir():
                if other.stem != name:
                    other.unlink()
            incoming = cls(data_dir, name, meta, total)
        except OSError as error:
            raise SnapshotFailed(f"{directory}: {error}") from error
        # The part, and the state made of it, which takes about as much.
        needed = (total - incoming.offset) + total + DISK_RESERVE_BYTES
        free = shutil.disk_usage(directory).free
        if free < needed:
            incoming.discard()
            raise SnapshotFailed(f"{directory}: {free} bytes are free, {needed} are needed for the snapshot")
        return incoming

    def write(self, offset: int, data: bytes, checksum: int) -> None:
        """Take the next chunk. One that is here already is passed over.

        Raises:
            ChunkRefused: damaged on its way, or not the next one; nothing was taken.
            SnapshotFailed: the disk is full.
            SyncFailed: the disk fails.
        """
        if crc32c(data) != checksum:
            raise ChunkRefused("the chunk's checksum does not match", self.offset)
        if offset + len(data) <= self.offset:
            return
        if offset != self.offset or offset + len(data) > self._total:
            raise ChunkRefused(f"a chunk of {len(data)} bytes at offset {offset} is not the next one", self.offset)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, self.offset)
                self.offset += written
                view = view[written:]
        except OSError as error:
            self.discard()
            raise SnapshotFailed(f"{self._part}: {error}") from error
        if self.offset - self._durable >= SYNC_BYTES or self.offset == self._total:
            self._sync()

    def finish(self) -> str:
        """Verify the whole and make a state directory of it, durable on return.

        Returns:
            The directory's name, for `LogStore.install`.
        Raises:
            SnapshotFailed: it is not whole, or not what was announced; it is dropped, the transfer begins anew.
            NodeFatal: the new state could not be written.
        """
        if self.offset != self._total:
            raise SnapshotFailed(f"only {self.offset} of {self._total} bytes are here")
        name = next_state_name(self._data_dir)
        building = self._data_dir / f"{name}.tmp"
        try:
            with self._part.open("rb", buffering=1 << 20) as file:
                parser = SnapshotParser(file)
                if parser.meta != self._meta:
                    raise SnapshotFailed("the snapshot stands for something else than was announced")
                self._build(parser, building)
            if not self._part.name.endswith(f"-{parser.digest[:8].hex()}.part"):
                raise SnapshotFailed("the snapshot's digest is not the one that was announced")
        except (SnapshotFailed, OSError) as error:
            shutil.rmtree(building, ignore_errors=True)
            self.discard()
            if isinstance(error, OSError):
                raise SnapshotFailed(f"{self._part}: {error}") from error
            raise
        try:
            # The name without .tmp stands for a complete state: it exists only from here on.
            building.rename(self._data_dir / name)
            sync_directory(self._data_dir)
        except OSError as error:
            raise SyncFailed(f"{self._data_dir / name}: {error}; the node stops; look after the disk") from error
        self.discard()
        return name

    def close(self) -> None:
        """Leave the transfer to be resumed."""
        try:
            if self._close.alive and self.offset > self._durable:
                self._sync()
        finally:
            self._release()

    def discard(self) -> None:
        """Drop what was received."""
        self._release()
        self._progress.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _release(self) -> None:
        self._close()
        self._descriptor = -1  # the number may soon be another file's

    def _build(self, parser: SnapshotParser, building: Path) -> None:
        shutil.rmtree(building, ignore_errors=True)
        store = StateStore.open(building, create=True)
        try:
            for records in parser:
                store.write(records, ())
            store.sync()
        finally:
            store.close()

    def _load_progress(self) -> int:
        try:
            raw = self._progress.read_bytes()
        except FileNotFoundError:
            return 0
        if len(raw) != _PROGRESS.size:
            return 0
        offset, total, checksum = _PROGRESS.unpack(raw)
        size = os.fstat(self._descriptor).st_size
        if checksum != crc32c(raw[:-4]) or total != self._total or offset > min(size, total):
            return 0
        return int(offset)

    def _sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise SyncFailed(f"{self._part}: sync failed: {error}; the node stops; look after the disk") from error
        self._durable = self.offset
        head = struct.pack(">QQ", self.offset, self._total)
        try:
            # After the bytes, and itself not synced: it may be behind them after a power loss, never ahead.
            self._progress.write_bytes(head + struct.pack(">I", crc32c(head)))
        except OSError as error:
            self.discard()
            raise SnapshotFailed(f"{self._progress}: {error}") from error
