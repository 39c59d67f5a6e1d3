"""What can go wrong with a node's disk.

Two families, because they have two consequences:

`StoreUnusable`   found while opening: nothing has started, the command ends with the one line of text.
`NodeFatal`       found while running: the node must stop at once and answer nobody (reliability rule Z1).
                  It never crosses the wire; the process exits with code 70.

`SnapshotFailed` ends one transfer of a snapshot, not the node.
"""

from __future__ import annotations

from pathlib import Path

DAMAGED_WAY_OUT = (
    "nothing was changed; check the disk, then restore this directory from a backup, or remove this member from "
    "the cluster and add it again with an empty data directory"
)


class StoreUnusable(Exception):
    """A store that cannot be opened.

    Attributes:
        path: the file or directory the fault was found in.
        fault: what is wrong with it.
        way_out: what an operator can do.
    """

    def __init__(self, path: Path, fault: str, way_out: str) -> None:
        super().__init__(f"{path}: {fault}; {way_out}")
        self.path = path
        self.fault = fault
        self.way_out = way_out


class StoreMissing(StoreUnusable):
    """There is no store here, and the caller did not ask for a new one."""


class StoreLocked(StoreUnusable):
    """Another process has this store open."""


class StoreForeign(StoreUnusable):
    """The store belongs to another node, another cluster, or another program."""


class StoreOccupied(StoreUnusable):
    """There is something where a new store was to be made."""


class StoreFormatUnknown(StoreUnusable):
    """The store was written in a format this version does not know: by a later one, or one before the first release."""


class StoreDamaged(StoreUnusable):
    """The store is there and ours, but what it holds is not what was written to it."""


class NodeFatal(Exception):
    """The node must stop now: it cannot trust its own disk any more."""


class CorruptRecord(NodeFatal):
    """A record read back is not the one that was written.

    Attributes:
        path: the database.
        key: the record's key in it.
        index: the log index, where the record is a log entry.
        fault: what is wrong with it.
    """

    def __init__(self, path: Path, key: bytes, fault: str, *, index: int | None = None) -> None:
        where = f"record {key!r}" if index is None else f"log entry {index}"
        super().__init__(
            f"{path}: {where}: {fault}; this node's disk returned something else than was written to it: "
            "check the disk, then remove this member and add it again with an empty data directory"
        )
        self.path = path
        self.key = key
        self.index = index
        self.fault = fault


class WriteFailed(NodeFatal):
    """A write to disk failed, or an earlier one had failed: nothing more is written."""


class SyncFailed(WriteFailed):
    """A write that had to be durable failed: whether it is on disk is unknown, and asking again proves nothing."""


class SnapshotFailed(Exception):
    """This transfer of a snapshot cannot go on; the node can."""


class ChunkRefused(SnapshotFailed):
    """A chunk was damaged on its way or is not the next one.

    Attributes:
        expected_offset: where the transfer goes on.
    """

    def __init__(self, reason: str, expected_offset: int) -> None:
        super().__init__(f"{reason}; expected offset {expected_offset}")
        self.expected_offset = expected_offset
