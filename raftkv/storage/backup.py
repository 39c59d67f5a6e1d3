"""A backup file: a snapshot, then the SHA-256 of all of it. `snapshot save` writes that, ours and etcdctl's alike.

Read front to back, once, in bounded memory. Nothing of it counts before its end has been reached: only then the digests
are known to be right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raftkv.raft.types import SnapshotMeta
from raftkv.storage.errors import SnapshotFailed
from raftkv.storage.snapshot_format import DIGEST_BYTES, UNIT_BYTES, SnapshotParser


class _Payload:
    """All of a file but the digest at its end, hashed on its way."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = max(0, size - DIGEST_BYTES)
        self._digest = hashlib.sha256()

    def read(self, length: int, /) -> bytes:
        data = self._file.read(min(length, self._left))
        self._left -= len(data)
        self._digest.update(data)
        return data

    def digest(self) -> bytes:
        return self._digest.digest()


class Backup:
    """An open backup; iterating yields the records of its state, block by block, in the order of their keys."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.digest = b""
        """SHA-256 of the snapshot; known at the end."""
        self._file = file
        self._payload = _Payload(file, self.size)
        with self._named():
            self._parser = SnapshotParser(self._payload)
            if self.size % UNIT_BYTES != DIGEST_BYTES:
                raise SnapshotFailed(f"{self.size} bytes are not a whole backup: something is cut off or added")

    @property
    def meta(self) -> SnapshotMeta:
        """What the state is as of."""
        return self._parser.meta

    def __iter__(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """
        Raises:
            SnapshotFailed: the file is damaged; nothing that was read from it counts.
        """
        blocks = iter(self._parser)
        while True:
            with self._named():
                block = next(blocks, None)
                if block is None:
                    break
            yield block
        with self._named():
            if self._file.read(DIGEST_BYTES) != self._payload.digest():
                raise SnapshotFailed("the checksum at the end of the backup does not match its content")
        self.digest = self._payload.digest()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say which file it was."""
        try:
            yield
        except (SnapshotFailed, OSError) as error:
            raise SnapshotFailed(f"{self.path}: {error}") from error


@contextlib.contextmanager
def open_backup(path: Path) -> Iterator[Backup]:
    """Open a backup file.

    Raises:
        SnapshotFailed: it cannot be read, or is no backup.
    """
    try:
        file = path.open("rb", buffering=1 << 20)
    except OSError as error:
        raise SnapshotFailed(str(error)) from error
    with file:
        yield Backup(path, file)
