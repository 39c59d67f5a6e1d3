"""Backup files as `snapshot save` writes them, without a cluster."""

from __future__ import annotations

import hashlib
from pathlib import Path

from raftkv.raft.types import SnapshotMeta
from raftkv.storage.snapshot_format import Records, write_snapshot


def write_backup(path: Path, records: Records, meta: SnapshotMeta) -> Path:
    """A snapshot of `records`, and its SHA-256 behind it."""
    with path.open("w+b") as file:
        write_snapshot(file, records, meta)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.write(digest)
    return path


def sealed(content: bytes) -> bytes:
    """With a right checksum at the end, whatever it is: then only what is inside can show that it is damaged."""
    return content + hashlib.sha256(content).digest()
