"""From a backup to the data directory of one node of a new cluster; and what a backup holds.

Joins the two halves: `storage.restoring` makes the directory, `state.restoring` what is in its state. Run once for each
node, with the same file, members and bump: then all begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from raftkv.raft.types import ConfState, Index, Term
from raftkv.server.config import closest, cluster_id, member_id
from raftkv.server.errors import ConfigError
from raftkv.state.keys import Head
from raftkv.state.restoring import BUMP_MAX, BUMP_MIN, NoRoom, head_of, renew, summarize
from raftkv.state.store import StoreDamaged
from raftkv.storage.backup import open_backup
from raftkv.storage.engine import error_text
from raftkv.storage.errors import NodeFatal, SnapshotFailed, StoreUnusable
from raftkv.storage.keys import Identity
from raftkv.storage.restoring import restore_data_dir
from raftkv.storage.state_store import StateStore


class RestoreFailed(Exception):
    """Nothing was restored, and nothing is left behind. The text says what was wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreConfig:
    """Which node is to begin with the backup. Wrong fields raise `ConfigError`."""

    name: str
    data_dir: Path
    initial_cluster: Mapping[str, str]
    """Name to peer address of all nodes of the new cluster, as `parse_initial_cluster` gives them."""
    initial_cluster_token: str
    bump_revision: int = BUMP_MIN

    def __post_init__(self) -> None:
        members = self.initial_cluster
        if not members:
            raise ConfigError("initial_cluster", "names no member; all nodes of the new cluster belong into it")
        if self.name not in members:
            hint = closest(self.name, members)
            raise ConfigError("name", f"{self.name!r} is not in --initial-cluster: {', '.join(members)}{hint}")
        if not self.initial_cluster_token or len(self.initial_cluster_token) > 256:
            raise ConfigError("initial_cluster_token", "must have 1 to 256 characters")
        if not BUMP_MIN <= self.bump_revision <= BUMP_MAX:
            raise ConfigError("bump_revision", f"{self.bump_revision} must be from {BUMP_MIN} to {BUMP_MAX}")

    @property
    def identity(self) -> Identity:
        """As the node that will be started on it has it."""
        return Identity(
            cluster_id=cluster_id(self.initial_cluster, self.initial_cluster_token),
            node_id=self._member_id(self.name),
            name=self.name,
        )

    @property
    def conf(self) -> ConfState:
        """All members vote."""
        return ConfState(voters=tuple(sorted(self._member_id(name) for name in self.initial_cluster)))

    def _member_id(self, name: str) -> int:
        return member_id(name, self.initial_cluster[name], self.initial_cluster_token)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a node will begin with."""

    cluster_id: int
    node_id: int
    revision: int
    backup_revision: int


@dataclass(frozen=True, slots=True)
class BackupStatus:
    """What a backup holds; the fields of etcd's `snapshot status`."""

    hash: int
    """The first 32 bits of the SHA-256 of all of it."""
    revision: int
    keys: int
    """That have a value as of the revision."""
    size: int
    """Bytes of the file."""


def restore(file: Path, config: RestoreConfig) -> Restored:
    """Make the data directory of one node; durable on return.

    Raises:
        RestoreFailed: the file is no backup or damaged, the directory is not empty, the disk is full or fails.
    """
    heads: list[Head] = []

    def begin(state: StateStore) -> tuple[Index, Term]:
        old = head_of(state)
        if old.applied_index != backup.meta.index:
            raise SnapshotFailed(
                f"{file}: is said to be as of index {backup.meta.index}, but is of {old.applied_index}"
            )
        new = renew(state, config.bump_revision)
        heads.extend((old, new))
        return new.applied_index, new.applied_term

    try:
        with open_backup(file) as backup:
            restore_data_dir(config.data_dir, backup, config.identity, config.conf, begin)
    except (NoRoom, StoreDamaged) as error:
        raise RestoreFailed(f"{file}: {error}") from error
    except NodeFatal as error:
        reason = error_text(error.__cause__ or error)
        raise RestoreFailed(f"{config.data_dir}: cannot be written: {reason}") from error
    except (SnapshotFailed, StoreUnusable, OSError) as error:
        raise RestoreFailed(str(error)) from error
    old, new = heads
    return Restored(config.identity.cluster_id, config.identity.node_id, new.revision, old.revision)


def inspect(file: Path) -> BackupStatus:
    """Read all of a backup and verify it.

    Raises:
        RestoreFailed: it cannot be read, is no backup, or damaged.
    """
    try:
        with open_backup(file) as backup:
            summary = summarize(chain.from_iterable(backup))
            number = int.from_bytes(backup.digest[:4], "big")
            return BackupStatus(number, summary.head.revision, summary.keys, backup.size)
    except SnapshotFailed as error:
        raise RestoreFailed(str(error)) from error
    except StoreDamaged as error:
        raise RestoreFailed(f"{file}: {error}") from error
