"""The data directory of a node that begins with a backup: all of it, durable, or none.

    backup --> <dir>.restoring-<pid>/state-1 --renew--> .../log --sync, rename--> <dir>

It is what a node has left that has just installed a snapshot and then ended: `LogStore.install` makes it, and the node
opens it as any other. Until the rename, which is the last step, nothing has the directory's name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from raftkv.raft.types import ConfState, HardState, Index, SnapshotMeta, Term
from raftkv.storage.backup import Backup
from raftkv.storage.errors import StoreOccupied
from raftkv.storage.keys import Identity
from raftkv.storage.log_opening import FIRST_STATE_NAME
from raftkv.storage.log_store import LogStore
from raftkv.storage.state_store import StateStore
from raftkv.storage.watermark import sync_directory

Renew = Callable[[StateStore], tuple[Index, Term]]
"""Makes the state of the backup that of the new cluster; says behind which index and term its log begins."""


def restore_data_dir(data_dir: Path, backup: Backup, identity: Identity, conf: ConfState, renew: Renew) -> None:
    """Make the data directory of one node of a new cluster.

    Args:
        data_dir: must not exist, or be empty.
        backup: of any cluster.
        identity: which node of which cluster will open it.
        conf: the members of the new cluster.
        renew: see `Renew`; what it raises ends this.
    Raises:
        StoreOccupied: there is something in the directory, or it cannot be renamed to.
        SnapshotFailed: the backup is damaged.
        OSError, NodeFatal: the disk is full or fails.
    Nothing is left behind by any of them.
    """
    with _new_directory(data_dir) as building:
        with closing(StateStore.open(building / FIRST_STATE_NAME, create=True)) as state:
            for records in backup:
                state.write(records, ())
            index, term = renew(state)
            state.sync()  # as before every log that stands behind a state
        with closing(LogStore.open(building / "log", identity, create=True)) as log:
            log.install(SnapshotMeta(index, term, conf), HardState(term, 0, index), FIRST_STATE_NAME)


@contextlib.contextmanager
def _new_directory(wanted: Path) -> Iterator[Path]:
    """A directory beside `wanted` that gets its name, durably, if all goes well, and else vanishes."""
    wanted = wanted.resolve()
    _check_vacant(wanted)
    parents = [parent for parent in wanted.parents if not parent.exists()]  # the deepest first
    building = wanted.with_name(f"{wanted.name}.restoring-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        _sync_all(building)
        building.rename(wanted)
        for each in (wanted, *parents):
            sync_directory(each.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        for parent in parents:
            with contextlib.suppress(OSError):  # not made yet, or somebody else has put something there
                parent.rmdir()
        raise


def _check_vacant(wanted: Path) -> None:
    way_out = "name a directory that is empty or does not exist yet"
    if not wanted.exists():
        return
    if not wanted.is_dir():
        raise StoreOccupied(wanted, "is not a directory", way_out)
    if found := sorted(path.name for path in wanted.iterdir()):
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise StoreOccupied(wanted, f"is not empty ({shown}); nothing was changed", way_out)
    if wanted.is_mount():  # only within a file system a directory can be given another name
        raise StoreOccupied(wanted, "is a mount point", "name a directory in it that does not exist yet")


def _sync_all(directory: Path) -> None:
    """Make a directory durable with all that is in it; nothing of it is open. LevelDB by itself leaves some out."""
    for path in directory.iterdir():
        if path.is_dir():
            _sync_all(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
