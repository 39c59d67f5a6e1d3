"""What applying a command gives: the reply, or a refusal, which is a value like any other.

A refusal is part of the replicated history: every replica comes to the same one, and nothing else has changed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from raftkv._pb.kv_pb2 import CompactionResponse, DeleteRangeResponse, PutResponse, TxnResponse


class RefusalCode(enum.IntEnum):
    """Why a command or a read was refused. The numbers enter the rolling hash, so they never change."""

    KEY_NOT_FOUND = 1
    """`ignore_value` or `ignore_lease` on a key that does not exist."""
    COMPACTED = 2
    """The revision is before the compact revision, or, for a compaction, not after it."""
    FUTURE_REVISION = 3
    LEASE_NOT_FOUND = 4
    DUPLICATE_KEY = 5
    """A key is written twice in one transaction."""
    MALFORMED = 6
    """The payload of a committed command is not the message its kind asks for. Only a faulty node proposes such."""
    UNKNOWN_COMMAND = 7
    """A kind this code does not know."""
    NO_SPACE = 8
    """The alarm NOSPACE is on and the command needs space."""
    CORRUPT = 9
    """The alarm CORRUPT is on: nothing is changed but alarms."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command or a read that the state machine says no to, with what the caller needs to go on."""

    code: RefusalCode
    revision: int  # of the store when it was refused
    compact_revision: int  # likewise; -1 when never compacted

    def __str__(self) -> str:
        return f"{self.code.name} at revision {self.revision}, compact revision {self.compact_revision}"


class Refused(Exception):
    """A read that was refused. Commands are not refused by exception: see `Refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has nothing to reply (MEMBER_ATTR) was applied."""

    revision: int


@dataclass(frozen=True, slots=True)
class HashKVResult:
    """Answer to HashKV."""

    hash: int  # 32 bits
    compact_revision: int  # -1 when never compacted, as etcd has it
    hash_revision: int  # the revision that was hashed


Result = PutResponse | DeleteRangeResponse | TxnResponse | CompactionResponse | Done | Refusal
"""Headers of the messages carry `revision` only; the node that answers fills in the rest."""
