"""What calls give back: frozen, typed, free of protobuf."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key with its value, as of some revision."""

    key: bytes
    value: bytes
    create_revision: int
    """The revision in which the key came into being (since its last deletion)."""
    mod_revision: int
    """The revision of its last change: what `if_revision` compares with."""
    version: int
    """How often it was put since it came into being; the first put makes 1."""
    lease: int = 0
    """The lease it is bound to, 0 for none."""

    @property
    def text(self) -> str:
        """The value as UTF-8 text. Raises UnicodeDecodeError where it is none."""
        return self.value.decode()

    def json(self) -> Any:
        """The value read as JSON. Raises json.JSONDecodeError where it is none."""
        return json.loads(self.value)


@dataclass(frozen=True, slots=True)
class RangeResult:
    """The answer to a range; iterate it for its items."""

    items: tuple[KeyValue, ...]
    count: int
    """Keys in the range, whatever `limit` was."""
    more: bool
    """`limit` cut something off."""
    revision: int
    """The store's revision when this was read."""

    def __iter__(self) -> Iterator[KeyValue]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __bool__(self) -> bool:
        return bool(self.items)


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one key."""

    kind: Literal["put", "delete"]
    item: KeyValue
    """The key as it is after a put; of a deleted one only `key` and `mod_revision` mean anything."""
    previous: KeyValue | None = None
    """What it held before, if asked for (`prev=True`), if it existed and history still had it."""
    expired: bool = False
    """A delete because the key's lease ran out (raftkv only; etcd does not tell)."""

    @property
    def key(self) -> bytes:
        """The key that changed."""
        return self.item.key

    @property
    def value(self) -> bytes:
        """Its new value; b"" when it was deleted."""
        return self.item.value

    @property
    def revision(self) -> int:
        """The revision of the change."""
        return self.item.mod_revision


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Events that arrived together, whole revisions only; without any it is a sign of progress."""

    events: tuple[Event, ...]
    revision: int
    """Every event up to this revision has been delivered."""

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)


@dataclass(frozen=True, slots=True)
class PutResult:
    """The answer to a put."""

    revision: int
    """The revision this put made: the key's new `mod_revision`."""
    previous: KeyValue | None = None
    """What the key held before, if asked for (`prev=True`) and if there was anything."""


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """The answer to a delete."""

    deleted: int
    """How many keys were deleted."""
    revision: int
    """The store's revision afterwards; a delete that found nothing makes none."""
    previous: tuple[KeyValue, ...] = ()
    """What they held, if asked for (`prev=True`)."""


@dataclass(frozen=True, slots=True)
class TxnResult:
    """The answer to a transaction."""

    succeeded: bool
    """Whether all comparisons held: which branch was carried out."""
    revision: int
    """The store's revision afterwards: that of the transaction if it changed anything."""
    results: tuple[OpResult, ...] = ()
    """One for each operation of the branch, in order."""

    def __bool__(self) -> bool:
        return self.succeeded


OpResult: TypeAlias = RangeResult | PutResult | DeleteResult | TxnResult


@dataclass(frozen=True, slots=True)
class CompactResult:
    """The answer to a compaction."""

    revision: int
    """The store's revision at that time."""


@dataclass(frozen=True, slots=True)
class Member:
    """One line of the cluster's configuration."""

    id: int
    name: str
    """Empty until the member has started for the first time."""
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """What one node says of itself; served without quorum."""

    member_id: int
    cluster_id: int
    version: str
    """The etcd version whose behaviour the node shows."""
    leader: int
    """The member that leads, as this node knows; 0 for none."""
    raft_term: int
    raft_index: int
    raft_applied_index: int
    revision: int
    db_size: int
    db_size_in_use: int
    is_learner: bool
    errors: tuple[str, ...] = ()

    @property
    def is_leader(self) -> bool:
        """Whether this node leads."""
        return self.leader != 0 and self.leader == self.member_id


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint's status, or why there is none."""

    endpoint: str
    status: Status | None
    error: str = ""
    """Why `status` is None."""


@dataclass(frozen=True, slots=True)
class HashKV:
    """The hash of one node's store as of a revision; equal on all nodes that agree."""

    endpoint: str
    hash: int
    hash_revision: int
    """The revision it was taken at; 0 where the server does not say (etcd before 3.6)."""
    compact_revision: int


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm that is on."""

    member_id: int
    name: str
    """`NOSPACE` or `CORRUPT`."""


@dataclass(frozen=True, slots=True)
class SavedSnapshot:
    """A snapshot file that was written and whose checksum was compared."""

    path: str
    size_bytes: int
    sha256: str
