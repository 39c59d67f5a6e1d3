"""What applying a command gives: the reply, or a refusal, which is a value like any other.

A refusal is part of the replicated history: every replica comes to the same one, and nothing else has changed.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from raftkv._pb.kv_pb2 import CompactionResponse, DeleteRangeResponse, PutResponse, TxnResponse
from raftkv._pb.lease_pb2 import LeaseGrantResponse, LeaseRevokeResponse
from raftkv._pb.state_pb2 import SessionOpened


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
    LEASE_EXISTS = 10
    """A lease with the id that was asked for is there already."""
    STALE_TERM = 11
    """The command was proposed by a leader of a term that is not its entry's: what it believed may be wrong."""
    GUARD_FAILED = 12
    """A guard of the request does not hold: its lock has moved on."""
    SESSION_EXPIRED = 13
    """There is no such session (any more). Nothing was executed."""
    TOO_MANY_SESSIONS = 14
    STALE_SEQUENCE = 15
    """The client itself has said that it has the answer of this number. Nothing was executed this time."""
    SESSION_FULL = 16
    """The session holds as many answers, or bytes of them, as it may. Nothing was executed."""
    RESULT_NOT_KEPT = 17
    """It was executed before, once, at `revision`; its answer was too large to be kept for repeating."""


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
    """A command that has nothing to reply (MEMBER_ATTR, LEASE_EXPIRE) was applied."""

    revision: int


@dataclass(slots=True)
class PutDone:
    """A put that has nothing to reply but its revision was applied: every put without `prev_kv`.

    Every node makes one for each such put and one node answers, so it is no PutResponse yet. It is not frozen because
    that would double what making one costs.
    """

    revision: int


@dataclass(frozen=True, slots=True)
class HashKVResult:
    """Answer to HashKV."""

    hash: int  # 32 bits
    compact_revision: int  # -1 when never compacted, as etcd has it
    hash_revision: int  # the revision that was hashed


Result = (
    PutDone
    | PutResponse
    | DeleteRangeResponse
    | TxnResponse
    | CompactionResponse
    | LeaseGrantResponse
    | LeaseRevokeResponse
    | SessionOpened
    | Done
    | Refusal
)
"""Headers of the messages carry `revision` only; the node that answers fills in the rest. A PutResponse has more to say
than a `PutDone` has: the value before."""

_MESSAGES: Final = (
    PutResponse,
    DeleteRangeResponse,
    TxnResponse,
    CompactionResponse,
    LeaseGrantResponse,
    LeaseRevokeResponse,
    SessionOpened,
)
"""By the byte that a stored result of this type begins with; so nothing is ever moved or taken out here."""
_TAGS: Final = {message: bytes((tag,)) for tag, message in enumerate(_MESSAGES)}
PUT_DONE: Final = 253
_REFUSAL: Final = 254
_DONE: Final = 255
_REFUSAL_FIELDS = struct.Struct(">BBqq")
_DONE_FIELDS = struct.Struct(">Bq")
PUT_DONE_BYTES: Final = _DONE_FIELDS.size


def encode_result(result: Result) -> bytes:
    """The bytes under which a result is kept; `decode_result` gives an equal one back."""
    tag = _TAGS.get(type(result))
    if tag is not None:
        return tag + result.SerializeToString()  # type: ignore[union-attr]  # those with a tag are messages
    if isinstance(result, Refusal):
        return _REFUSAL_FIELDS.pack(_REFUSAL, result.code, result.revision, result.compact_revision)
    if isinstance(result, PutDone):
        return _DONE_FIELDS.pack(PUT_DONE, result.revision)
    assert isinstance(result, Done), "a result of no command"
    return _DONE_FIELDS.pack(_DONE, result.revision)


def decode_result(data: bytes) -> Result:
    """What `encode_result` was given."""
    tag = data[0]
    if tag == _REFUSAL:
        _, code, revision, compact_revision = _REFUSAL_FIELDS.unpack(data)
        return Refusal(RefusalCode(code), revision, compact_revision)
    if tag == PUT_DONE:
        return PutDone(_DONE_FIELDS.unpack(data)[1])
    if tag == _DONE:
        return Done(_DONE_FIELDS.unpack(data)[1])
    return _MESSAGES[tag].FromString(data[1:])
