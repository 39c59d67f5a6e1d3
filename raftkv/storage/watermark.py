"""How far the log was durable, kept outside LevelDB (reliability rule Z3).

LevelDB cannot tell a log that lost its end from one that never had it: with its newest `.log` file truncated or
deleted it opens without complaint. This file holds the number of the last batch that was synced; a log whose own
batch number is smaller has lost something that was acknowledged.

Two slots in different sectors are written in turn, each with a checksum, so a torn write costs one step, never
both. A slot is written after its batch is durable and is not synced itself: what it says is true at any time, and
exact as long as the machine does not lose power. After a power loss it may be some seconds old, which makes it a
weaker witness, not a false one. `synced=True` closes that gap for the price of a second fdatasync a batch.

    offset 0     slot of even batches      offset 4096   slot of odd batches
    slot: magic, cluster id, node id, batch, crc32c
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from google_crc32c import value as crc32c

from raftkv.storage.errors import DAMAGED_WAY_OUT, StoreDamaged, StoreForeign, SyncFailed

_SLOT = struct.Struct(">8sQQQ")
_CHECKSUM = struct.Struct(">I")
_MAGIC = b"rkvWMRK1"
_SLOT_SPACING = 4096
_FILE_BYTES = 2 * _SLOT_SPACING


class Watermark:
    """The file, open for writing."""

    def __init__(self, path: Path, descriptor: int, cluster_id: int, node_id: int, batch: int, *, synced: bool) -> None:
        self.path = path
        self.batch = batch
        self._descriptor = descriptor
        self._cluster_id = cluster_id
        self._node_id = node_id
        self._synced = synced

    @classmethod
    def create(cls, path: Path, cluster_id: int, node_id: int, *, synced: bool = False) -> Watermark:
        """A new file at batch 0, durable on return."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, bytes(_FILE_BYTES), 0)
            watermark = cls(path, descriptor, cluster_id, node_id, 0, synced=synced)
            watermark._write(0)
            os.fsync(descriptor)
            sync_directory(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return watermark

    @classmethod
    def open(cls, path: Path, cluster_id: int, node_id: int, *, synced: bool = False) -> Watermark:
        """
        Raises:
            FileNotFoundError: there is none.
            StoreDamaged: neither slot is readable.
            StoreForeign: it belongs to another node.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            slots = [slot for offset in (0, _SLOT_SPACING) if (slot := _read_slot(descriptor, offset)) is not None]
            if not slots:
                raise StoreDamaged(
                    path,
                    "neither of its two records is readable, so the log beside it cannot be proven whole",
                    DAMAGED_WAY_OUT,
                )
            cluster, node, batch = max(slots, key=lambda slot: slot[2])
            if (cluster, node) != (cluster_id, node_id):
                raise StoreForeign(
                    path,
                    f"belongs to node {node:x} of cluster {cluster:x}, not to {node_id:x} of {cluster_id:x}",
                    "point --data-dir at this node's own directory",
                )
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, cluster_id, node_id, batch, synced=synced)

    def advance(self, batch: int) -> None:
        """Note that everything up to batch number `batch` is durable.

        Raises:
            SyncFailed: the file could not be written.
        """
        try:
            self._write(batch)
            if self._synced:
                os.fdatasync(self._descriptor)
        except OSError as error:
            raise SyncFailed(f"{self.path}: write failed: {error}; the node stops; look after the disk") from error
        self.batch = batch

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write(self, batch: int) -> None:
        slot = _SLOT.pack(_MAGIC, self._cluster_id, self._node_id, batch)
        written = os.pwrite(self._descriptor, slot + _CHECKSUM.pack(crc32c(slot)), (batch & 1) * _SLOT_SPACING)
        if written != _SLOT.size + _CHECKSUM.size:
            raise OSError(f"only {written} bytes were written")


def _read_slot(descriptor: int, offset: int) -> tuple[int, int, int] | None:
    raw = os.pread(descriptor, _SLOT.size + _CHECKSUM.size, offset)
    if len(raw) != _SLOT.size + _CHECKSUM.size or _CHECKSUM.unpack_from(raw, _SLOT.size)[0] != crc32c(
        raw[: _SLOT.size]
    ):
        return None
    magic, cluster, node, batch = _SLOT.unpack_from(raw)
    return (cluster, node, batch) if magic == _MAGIC else None


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
