"""What a snapshot looks like, byte for byte. Equal states give equal bytes.

    header     "rkvSNAP1"  length(4)  meta  crc32c of meta(4)
    block*     length(4) > 0  crc32c of the payload(4)  payload: (key length(4) value length(4) key value)*
    end        0(4)  records(8)  padding length(4)  zeros  sha256 of everything before(32)

Records are sorted by key. The padding makes the whole a multiple of 512 bytes long, which is what etcdctl takes for
a complete backup. Numbers are big-endian.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator
from typing import IO, Protocol

from google_crc32c import value as crc32c

from raftkv.raft.types import SnapshotMeta
from raftkv.storage.errors import SnapshotFailed
from raftkv.storage.keys import BadRecord, pack_meta, unpack_meta

MAGIC = b"rkvSNAP1"
UNIT_BYTES = 512
DIGEST_BYTES = 32
BLOCK_BYTES = 64 << 10
BLOCK_BYTES_MAX = 256 << 20  # one record may be larger than a block, but not without bound
META_BYTES_MAX = 1 << 20

_U32 = struct.Struct(">I")
_BLOCK = struct.Struct(">II")
_RECORD = struct.Struct(">II")
_END = struct.Struct(">IQI")


class Records(Protocol):
    """A consistent view of the state; `raftkv.state.store.KeyValueView` is one."""

    def iterate(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]: ...


class Readable(Protocol):
    """What a snapshot is read from: a file, or a part of one."""

    def read(self, length: int, /) -> bytes: ...


def write_snapshot(file: IO[bytes], view: Records, meta: SnapshotMeta) -> bytes:
    """Write the snapshot of `view`; returns its digest."""
    digest = hashlib.sha256()
    size = count = 0

    def put(data: bytes) -> None:
        nonlocal size
        file.write(data)
        digest.update(data)
        size += len(data)

    packed = pack_meta(meta)
    put(MAGIC + _U32.pack(len(packed)) + packed + _U32.pack(crc32c(packed)))
    parts: list[bytes] = []
    block_bytes = 0
    for key, value in view.iterate(b"", None):
        parts += (_RECORD.pack(len(key), len(value)), key, value)
        block_bytes += _RECORD.size + len(key) + len(value)
        count += 1
        if block_bytes >= BLOCK_BYTES:
            put(_block(parts))
            parts, block_bytes = [], 0
            time.sleep(0)  # lets the event loop have the interpreter: this thread would keep it 5 ms at a time
    if parts:
        put(_block(parts))
    padding = -(size + _END.size + DIGEST_BYTES) % UNIT_BYTES
    put(_END.pack(0, count, padding) + bytes(padding))
    file.write(digest.digest())
    return digest.digest()


def _block(parts: list[bytes]) -> bytes:
    payload = b"".join(parts)
    return _BLOCK.pack(len(payload), crc32c(payload)) + payload


class SnapshotParser:
    """Reads a snapshot front to back, in bounded memory, and believes nothing.

    Iterating yields lists of records, each list a block whose checksum was right; only after the last the digest is
    known to be right, so nothing that was built from it counts before.
    """

    def __init__(self, file: Readable) -> None:
        """
        Raises:
            SnapshotFailed: this is not the beginning of a snapshot.
        """
        self._file = file
        self._digest = hashlib.sha256()
        if self._read(len(MAGIC)) != MAGIC:
            raise SnapshotFailed("not a raftkv snapshot, or one in a format this version does not know")
        packed = self._read(self._length(META_BYTES_MAX))
        if _U32.unpack(self._read(_U32.size))[0] != crc32c(packed):
            raise SnapshotFailed("the snapshot's header is damaged")
        try:
            self.meta = unpack_meta(packed)
        except BadRecord as error:
            raise SnapshotFailed(f"the snapshot's header is damaged: {error}") from error
        self.digest = b""
        self.count = 0

    def __iter__(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """
        Raises:
            SnapshotFailed: the snapshot is damaged.
        """
        last_key: bytes | None = None
        while (length := self._length(BLOCK_BYTES_MAX)) > 0:
            (checksum,) = _U32.unpack(self._read(_U32.size))
            payload = self._read(length)
            if crc32c(payload) != checksum:
                raise SnapshotFailed("a block of the snapshot is damaged")
            records = _parse_block(payload)
            for key, _ in records:
                if last_key is not None and key <= last_key:
                    raise SnapshotFailed("the snapshot's records are not in order")
                last_key = key
            self.count += len(records)
            yield records
        self._read_end()

    def _read_end(self) -> None:
        count, padding = struct.unpack(">QI", self._read(12))
        if count != self.count or padding >= UNIT_BYTES or any(self._read(padding)):
            raise SnapshotFailed(f"the snapshot ends wrongly: {self.count} records, {count} expected")
        expected = self._digest.digest()
        found = self._file.read(DIGEST_BYTES)
        if found != expected:
            raise SnapshotFailed("the snapshot's digest does not match its content")
        if self._file.read(1):
            raise SnapshotFailed("something follows the snapshot's end")
        self.digest = expected

    def _length(self, most: int) -> int:
        (length,) = _U32.unpack(self._read(_U32.size))
        if length > most:
            raise SnapshotFailed(f"the snapshot is damaged: a part of {length} bytes, at most {most}")
        return int(length)

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise SnapshotFailed("the snapshot ends too early")
        self._digest.update(data)
        return data


def _parse_block(payload: bytes) -> list[tuple[bytes, bytes]]:
    records = []
    offset = 0
    while offset < len(payload):
        if offset + _RECORD.size > len(payload):
            raise SnapshotFailed("a block of the snapshot is damaged: it ends within a record")
        key_length, value_length = _RECORD.unpack_from(payload, offset)
        offset += _RECORD.size
        value_start = offset + key_length
        end = value_start + value_length
        if end > len(payload):
            raise SnapshotFailed("a block of the snapshot is damaged: it ends within a record")
        records.append((payload[offset:value_start], payload[value_start:end]))
        offset = end
    return records
