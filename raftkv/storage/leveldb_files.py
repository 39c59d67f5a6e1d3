"""LevelDB's own files, read without LevelDB: to look at a database before opening it, and to put a torn end right.

LevelDB replays its log files at open, and there it is either too strict for us or too lax. With paranoid checks it
refuses a log whose last, never acknowledged record was torn by a power loss. And it does not notice when an older
log ends early while a newer one goes on. Both show in the files:

    log file: blocks of 32 KiB, of records: crc32c(4, masked) length(2) type(1) payload;  type FULL | FIRST MIDDLE* LAST
    payload:  a write batch: sequence number(8) of its first operation, count of operations(4), operations
    MANIFEST: the same record format, of edits; among them the number of the oldest log that is still needed

Sequence numbers of batches are contiguous across files. Numbers here are little-endian, as LevelDB's.

See: LevelDB doc/log_format.md, doc/impl.md, db/version_edit.cc, db/write_batch.cc.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google_crc32c import value as crc32c

from raftkv.storage.watermark import sync_directory

_BLOCK_BYTES = 32768
_HEADER = struct.Struct("<IHB")
_BATCH_HEADER = struct.Struct("<QI")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_DELETE, _PUT = 0, 1
_EDIT_LOG_NUMBER = 2


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record of a log file and where it ends."""

    start: int
    end: int
    payload: bytes

    @property
    def sequences(self) -> tuple[int, int]:
        """Of a batch: sequence number of its first operation, and of the first one after it."""
        first, count = _BATCH_HEADER.unpack_from(self.payload)
        return first, first + count


@dataclass(frozen=True, slots=True)
class LogContent:
    """What of a log file can be read.

    Attributes:
        records: the sound records from the beginning on.
        fault: what ends them, where the file does not just end there or within a record.
        end: where the last of them ends.
        sound_after: whether there is a whole record somewhere behind the fault.
    """

    records: list[LogRecord]
    fault: str | None
    end: int
    sound_after: bool


def log_files(path: Path) -> list[Path]:
    """LevelDB's log files in the directory, oldest first."""
    found = [file for file in path.iterdir() if re.fullmatch(r"\d+\.log", file.name)]
    return sorted(found, key=lambda file: int(file.stem))


def read_log(path: Path) -> LogContent:
    """Read a log file up to the first record that is not sound."""
    data = path.read_bytes()
    records: list[LogRecord] = []
    parts: list[bytes] = []
    start = end = offset = 0
    fault = None
    while True:
        offset = _skip_trailer(offset)
        fragment = _read_fragment(data, offset)
        if fragment is None:  # the end, perhaps within a record: LevelDB takes that for the end, too
            return LogContent(records, None, end, sound_after=False)
        if isinstance(fragment, str):
            fault = fragment
            break
        kind, payload = fragment
        if kind in (_MIDDLE, _LAST) and not parts:
            fault = "the middle of a record without its beginning"
            break
        if kind in (_FULL, _FIRST) and parts:
            fault = "a record within another"
            break
        if not parts:
            start = offset
        offset += _HEADER.size + len(payload)
        parts.append(payload)
        if kind in (_FULL, _LAST):
            end = offset
            records.append(LogRecord(start, end, b"".join(parts)))
            parts = []
    sound_after = _any_sound_fragment(data, offset + 1)
    if not sound_after and not any(data[offset:]):
        fault = None  # nothing but zeros: space that was given to the file and never written
    return LogContent(records, f"{fault} at offset {offset}" if fault else None, end, sound_after)


def _skip_trailer(offset: int) -> int:
    left = _BLOCK_BYTES - offset % _BLOCK_BYTES
    return offset + left if left < _HEADER.size else offset


def _read_fragment(data: bytes, offset: int) -> tuple[int, bytes] | str | None:
    """Type and payload of the fragment at `offset`; None at the end of the file; text for what is wrong with it."""
    if offset + _HEADER.size > len(data):
        return None
    checksum, length, kind = _HEADER.unpack_from(data, offset)
    end = offset + _HEADER.size + length
    if end > (offset // _BLOCK_BYTES + 1) * _BLOCK_BYTES:
        return "a length that does not fit its block"
    if end > len(data):
        return None
    if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
        return f"an unknown record type {kind}"
    if _unmask(checksum) != crc32c(data[offset + 6 : end]):
        return "a checksum that does not match"
    return kind, data[offset + _HEADER.size : end]


def _unmask(masked: int) -> int:
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def _any_sound_fragment(data: bytes, offset: int) -> bool:
    """Whether a sound fragment begins anywhere from `offset` on."""
    # The fault may have hit a length, so every offset is a candidate; the type byte rules out most at no cost.
    for place in range(offset + 6, len(data)):
        if data[place] in (_FULL, _FIRST, _MIDDLE, _LAST) and isinstance(_read_fragment(data, place - 6), tuple):
            return True
    return False


# Batches and manifests.


def last_put(content: LogContent, wanted: Callable[[bytes], bool]) -> tuple[bytes, bytes] | None:
    """Key and value of the newest sound put in a log file to a key that is `wanted`; None where there is none."""
    for record in reversed(content.records):
        found = None
        for key, value in _operations(record.payload):
            if value is not None and wanted(key):
                found = key, value
        if found is not None:
            return found
    return None


def _operations(payload: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    offset = _BATCH_HEADER.size
    while offset < len(payload):
        kind = payload[offset]
        key, offset = _read_string(payload, offset + 1)
        value = None
        if kind == _PUT:
            value, offset = _read_string(payload, offset)
        yield key, value


def oldest_needed_log(path: Path) -> int | None:
    """Number of the oldest log file that LevelDB would replay; None where CURRENT or the manifest cannot be read."""
    try:
        manifest = path / (path / "CURRENT").read_text().strip()
        content = read_log(manifest)
        number = 0
        for record in content.records:
            number = _log_number(record.payload) or number
    except (OSError, ValueError, IndexError):
        return None  # LevelDB will say what is wrong
    return number


def _log_number(edit: bytes) -> int | None:
    """The log number an edit sets. It stands before everything whose length takes knowledge to skip, but one name."""
    offset = 0
    while offset < len(edit):
        tag, offset = _read_varint(edit, offset)
        if tag == _EDIT_LOG_NUMBER:
            return _read_varint(edit, offset)[0]
        if tag != 1:  # 1 is the comparator's name, the only thing written before the log number
            return None
        _, offset = _read_string(edit, offset)
    return None


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, offset
        shift += 7


def _read_string(data: bytes, offset: int) -> tuple[bytes, int]:
    length, offset = _read_varint(data, offset)
    return data[offset : offset + length], offset + length


# Repairs. Both run before LevelDB opens the directory, and only under its lock's absence: see the callers.


def repair_unsynced_tail(path: Path) -> str | None:
    """Cut a database that is synced oldest log first (`StateStore`) back to the writes before its first hole.

    Returns:
        What was cut, or None.
    """
    needed = oldest_needed_log(path)
    if needed is None:
        return None
    files = [file for file in log_files(path) if int(file.stem) >= needed]
    if needed and (not files or int(files[0].stem) != needed):
        return _cut(files, 0, 0, "the log before it is missing")
    expected: int | None = None
    for number, file in enumerate(files):
        content = read_log(file)
        for record in content.records:
            first, after = record.sequences
            if expected is not None and first != expected:
                return _cut(files, number, record.start, f"writes {expected} to {first - 1} are missing before it")
            expected = after
        if content.fault is not None:
            return _cut(files, number, content.end, content.fault)
        # A log is left for a newer one only when it is full: an empty one has lost its content.
        if not content.records and number + 1 < len(files):
            return _cut(files, number + 1, 0, f"{file.name} before it is empty")
    return None


def repair_torn_tail(path: Path, is_whole: Callable[[LogContent], bool]) -> str | None:
    """Cut a torn last write off a database whose writes are all synced (`LogStore`).

    A write begins only after the one before it is durable, so only the last can be torn: whatever has a sound record
    behind it is damage, and is left for LevelDB to refuse.

    Args:
        path: the database.
        is_whole: whether the sound records hold everything that was acknowledged.
    Returns:
        What was cut, or None.
    """
    needed = oldest_needed_log(path)
    files = log_files(path)
    if needed is None or not files or int(files[-1].stem) < needed:
        return None
    content = read_log(files[-1])
    if content.fault is None or content.sound_after or not is_whole(content):
        return None
    return _cut(files, len(files) - 1, content.end, content.fault)


def _cut(files: list[Path], number: int, offset: int, reason: str) -> str | None:
    if number >= len(files) or (number == len(files) - 1 and files[number].stat().st_size == 0):
        return None
    # Newest first: were this to stop half-way, what is left is still a beginning of the history.
    for file in reversed(files[number + 1 :]):
        file.unlink()
        sync_directory(file.parent)
    with files[number].open("r+b") as file_object:
        file_object.truncate(offset)
        file_object.flush()
        os.fsync(file_object.fileno())
    return f"{files[number]}: cut at offset {offset}: {reason}"
