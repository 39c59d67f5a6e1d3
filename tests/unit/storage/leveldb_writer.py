"""LevelDB log files made by hand: what a power loss leaves behind can then be said in one line."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from google_crc32c import value as crc32c

from raftkv.storage.keys import seal

_BLOCK_BYTES = 32768


def write_log(path: Path, batches: Iterable[bytes]) -> None:
    """A log file with these write batches."""
    content = bytearray()
    for payload in batches:
        rest, first = payload, True
        while rest or first:
            left = _BLOCK_BYTES - len(content) % _BLOCK_BYTES
            if left < 7:
                content += bytes(left)
                left = _BLOCK_BYTES
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if not rest else 2) if first else (4 if not rest else 3)
            content += struct.pack("<IHB", _mask(crc32c(bytes([kind]) + part)), len(part), kind) + part
            first = False
    path.write_bytes(bytes(content))


def batch(sequence: int, puts: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A write batch as `StateStore.write` makes it; its first operation has number `sequence`."""
    operations = [b"\x01" + _string(key) + _string(seal(key, value)) for key, value in puts]
    return struct.pack("<QI", sequence, len(operations)) + b"".join(operations)


def _mask(checksum: int) -> int:
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _string(data: bytes) -> bytes:
    length, head = len(data), bytearray()
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + data
