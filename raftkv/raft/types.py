"""What consensus is about: entries, the hard state, the conf state, and where they are read from.

Indexes and terms start at 1; 0 means "none". Every value here is immutable and shared, never copied.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Protocol

NodeId = int
"""1 .. 2^64-1; 0 stands for "nobody"."""

Index = int
Term = int

NODE_ID_MAX = (1 << 64) - 1

TERM_MAX = (1 << 62) - 1
"""No cluster gets here by elections; a message that claims more is ignored, so that term + 1 always fits uint64."""

INDEX_MAX = (1 << 62) - 1


class EntryKind(enum.IntEnum):
    """What an entry carries."""

    NORMAL = 0
    """Commands for the state machine; empty, it is the no-op of a new leader."""
    CONF_CHANGE = 1
    """An encoded `ConfChange`; takes effect when it is applied."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log. (index, term) names its content for ever: log matching, Ongaro 3.5."""

    index: Index
    term: Term
    kind: EntryKind
    data: bytes


@dataclass(frozen=True, slots=True)
class HardState:
    """What must be durable before a message that rests on it leaves.

    Invariant: term never falls; within a term vote changes once at most, from 0. `commit` is a help after a
    restart only: it may be older than what was committed.
    """

    term: Term
    vote: NodeId
    commit: Index


@dataclass(frozen=True, slots=True)
class ConfState:
    """Who votes and who only listens; `outgoing` are the old voters while the change is joint.

    Invariant: tuples are sorted and free of duplicates; a learner is in neither set of voters;
    `learners_next` (voters that become learners when the joint change ends) is a part of `outgoing`.
    """

    voters: tuple[NodeId, ...]
    outgoing: tuple[NodeId, ...] = ()
    learners: tuple[NodeId, ...] = ()
    learners_next: tuple[NodeId, ...] = ()
    auto_leave: bool = False

    @property
    def joint(self) -> bool:
        """Whether two sets of voters must agree."""
        return bool(self.outgoing)

    def is_voter(self, node: NodeId) -> bool:
        """Whether `node` votes, in either set."""
        return node in self.voters or node in self.outgoing

    def members(self) -> tuple[NodeId, ...]:
        """Everybody who gets the log, sorted."""
        return tuple(sorted({*self.voters, *self.outgoing, *self.learners, *self.learners_next}))


@dataclass(frozen=True, slots=True)
class SnapshotMeta:
    """Which prefix of the log a snapshot stands for, and the conf state as of its last entry."""

    index: Index
    term: Term
    conf: ConfState


class Role(enum.Enum):
    """What a node is in its term."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    """Asks whether it would be elected, without raising its term (Ongaro 9.6)."""
    CANDIDATE = "candidate"
    LEADER = "leader"


class ConfChangeKind(enum.IntEnum):
    """What a change does with one node."""

    ADD_VOTER = 0
    """Also promotes a learner."""
    ADD_LEARNER = 1
    """Also demotes a voter."""
    REMOVE = 2


_CHANGE_COUNT = struct.Struct(">H")
_CHANGE = struct.Struct(">BQ")
CHANGES_MAX = 64


@dataclass(frozen=True, slots=True)
class ConfChange:
    """One change of the conf state.

    With several changes the cluster passes through a joint conf state and leaves it by itself; with one it goes
    directly; with none it leaves a joint conf state. `context` is the proposer's, and is not looked at.
    """

    changes: tuple[tuple[ConfChangeKind, NodeId], ...] = ()
    context: bytes = b""

    def encode(self) -> bytes:
        """The data of a CONF_CHANGE entry."""
        parts = [_CHANGE_COUNT.pack(len(self.changes))]
        parts.extend(_CHANGE.pack(kind, node) for kind, node in self.changes)
        parts.append(self.context)
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> ConfChange:
        """
        Raises:
            ValueError: not an encoded change.
        """
        try:
            (count,) = _CHANGE_COUNT.unpack_from(data)
            if count > CHANGES_MAX:
                raise ValueError(f"{count} changes in one entry, at most {CHANGES_MAX}")
            changes = []
            offset = _CHANGE_COUNT.size
            for _ in range(count):
                kind, node = _CHANGE.unpack_from(data, offset)
                changes.append((ConfChangeKind(kind), node))
                offset += _CHANGE.size
        except struct.error as error:
            raise ValueError(f"not a conf change: {error}") from error
        return cls(tuple(changes), data[offset:])


class Compacted(LookupError):
    """The log no longer has the entry asked for: a snapshot stands in its place."""


class LogReader(Protocol):
    """What consensus reads back from durable storage.

    It asks only for entries of which it was told that they are durable (`Raft.persisted`) and not overwritten
    since, so the answers may come from a snapshot of the store while a write is under way.
    """

    def initial_state(self) -> tuple[HardState, ConfState]:
        """The hard state, and the conf state as of `snapshot().index`."""

    def first_index(self) -> Index:
        """The index after the compacted prefix; 1 when nothing was compacted."""

    def last_index(self) -> Index:
        """The last entry's index, or that of the compacted prefix when there is none."""

    def term(self, index: Index) -> Term:
        """Term of an entry, also of the last compacted one.

        Raises:
            LookupError: the log does not have it (`Compacted` or not yet there).
        """

    def entries(self, low: Index, high: Index, bytes_max: int) -> list[Entry]:
        """The entries of [low, high), cut at `bytes_max` but at least one.

        Raises:
            LookupError: the log does not have `low`.
        """

    def snapshot(self) -> SnapshotMeta:
        """The compacted prefix; index 0 and the first conf state when nothing was compacted."""
