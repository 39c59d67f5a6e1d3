"""Opening, damaging and copying stores, for the tests of this package."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from raftkv.raft.types import Entry, HardState
from raftkv.storage.keys import Identity
from raftkv.storage.log_store import LogStore
from tests.unit.storage.contracts import CONF, entry

IDENTITY = Identity(cluster_id=0xC1, node_id=0x2, name="n2", created_unix_s=1_700_000_000)


def open_log(data_dir: Path, identity: Identity = IDENTITY, *, create: bool = False) -> LogStore:
    return LogStore.open(data_dir / "log", identity, create=create)


def new_log(data_dir: Path) -> LogStore:
    log = open_log(data_dir, create=True)
    log.bootstrap(CONF)
    return log


def fill(log: LogStore, count: int, data_bytes: int = 300, term: int = 1) -> list[Entry]:
    """Append `count` entries one batch each, commit following one behind."""
    written = []
    for index in range(log.last_index() + 1, log.last_index() + 1 + count):
        written.append(entry(index, term, b"%d" % index + bytes(data_bytes)))
        log.append(HardState(term, 0, index - 1), written[-1:])
    return written


def image(source: Path, target: Path) -> Path:
    """What a process leaves that is killed now: the files as they are, nothing closed, no lock held."""
    while True:
        with contextlib.suppress(shutil.Error, FileNotFoundError):
            before = _files(source)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("LOCK"))
            if _files(source) == before:  # else LevelDB's own thread was at work, and this is a mix of two moments
                return target
        shutil.rmtree(target, ignore_errors=True)


def _files(directory: Path) -> dict[Path, int]:
    return {file: file.stat().st_size for file in directory.rglob("*")}


def newest_log_file(directory: Path) -> Path:
    return max(directory.glob("*.log"), key=lambda file: int(file.stem))


def flip(file: Path, offset: int) -> None:
    """Turn one bit of a file over, at `offset` from its begin or, negative, from its end."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(bytes(content))


def cut(file: Path, bytes_off: int) -> None:
    """Take the last bytes off a file."""
    with file.open("r+b") as opened:
        opened.truncate(max(0, file.stat().st_size - bytes_off))


def place(file: Path, wanted: bytes) -> int:
    """Where in the file some bytes are."""
    offset = file.read_bytes().find(wanted)
    assert offset >= 0, f"{wanted!r} is not in {file}"
    return offset
