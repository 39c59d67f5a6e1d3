"""Commands, and the bytes of a log entry that carries a batch of them.

All commands that a node received in one turn of its loop, and those that other nodes forwarded to it, go into one
entry: a batch of groups, one group a node of origin. The payload of a command is the protobuf message as the client
sent it; it is parsed once, when it is applied. Layout, little-endian:

    batch    version u8 (1), number of groups u32, then each group:
    group    origin u64, incarnation u64, number of commands u32, header of each command, payload of each command
    header   seq u64, kind u8, payload length u32

Headers lie together because one `iter_unpack` over them costs half of unpacking them one by one.

A command within a session is the payload of another, behind the numbers of the call. Every node takes that apart for
every call, so it is no protobuf message: that would cost four times as much.

    call     session u64, seq u64, first incomplete u64, kind u8, payload
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

NodeId = int

_VERSION = 1
_BATCH = struct.Struct("<BI")
_GROUP = struct.Struct("<QQI")
_HEADER = struct.Struct("<QBI")
CALL_LAYOUT = "<QQQB"
"""Session, seq, first incomplete and kind, in the terms of `struct`; the payload follows."""
_CALL = struct.Struct(CALL_LAYOUT)
_CALL_BYTES = _CALL.size


class CommandKind(enum.IntEnum):
    """What a command does; the number is on disk and on the wire, so it never changes.

    8 to 15 are for leases, 16 to 23 for sessions, 24 to 31 are kept for authentication.
    """

    PUT = 1
    DELETE_RANGE = 2
    TXN = 3
    COMPACT = 4
    ALARM = 5
    """Arm or disarm an alarm: an `AlarmRequest`."""
    LEASE_GRANT = 8
    """A `LeaseGrantRequest` whose ID the proposing node has filled in."""
    LEASE_REVOKE = 9
    LEASE_EXPIRE = 10
    """By the leader: a `LeaseExpire`."""
    LEASE_CHECKPOINT = 11
    """By the leader: a `LeaseCheckpoints`."""
    SESSION_OPEN = 16
    SESSION_EXPIRE = 17
    """By the leader, or by a client that ends its own: a `SessionExpire`."""
    SESSION_CALL = 19  # 18 was the same in another encoding, before the first release
    """A command within a session, done once however often it comes: see `encode_session_call`."""
    MEMBER_ATTR = 32
    """Name and client URLs of a member, published by itself when it starts."""


class Command(NamedTuple):
    """One operation. `kind` is an int so that an unknown one is refused by the state machine, not by the decoder."""

    seq: int  # the origin's own number of this command, to find the caller again
    kind: int
    payload: bytes


CommandFields = tuple[int, int, bytes]
"""A `Command`, or a plain tuple of what it has: what comes from the log is that, because making each of its commands a
named one would cost more than all else that is done to take an entry apart."""


class Group(NamedTuple):
    """The commands of one node. `incarnation` tells apart the lives of that node."""

    origin: NodeId
    incarnation: int
    commands: tuple[CommandFields, ...]


class MalformedBatch(ValueError):
    """The bytes are not a batch. Every replica says so of the same bytes."""


class MalformedCall(ValueError):
    """The payload is not a call of a session. Every replica says so of the same bytes."""


def encode_batch(groups: Sequence[Group]) -> bytes:
    """The bytes of an entry. `decode_batch` gives the same groups back."""
    parts = [_BATCH.pack(_VERSION, len(groups))]
    for origin, incarnation, commands in groups:
        parts.append(_GROUP.pack(origin, incarnation, len(commands)))
        parts.extend([_HEADER.pack(seq, kind, len(payload)) for seq, kind, payload in commands])
        parts.extend([payload for _, _, payload in commands])
    return b"".join(parts)


def decode_batch(data: bytes) -> list[Group]:
    """The groups of an entry; an empty entry (a new leader's first) has none.

    Raises:
        MalformedBatch: truncated, trailing bytes, or a version this code does not know.
    """
    if not data:
        return []
    try:
        version, count = _BATCH.unpack_from(data)
        if version != _VERSION:
            raise MalformedBatch(f"batch of version {version}; this node knows {_VERSION}")
        groups = []
        offset = _BATCH.size
        for _ in range(count):
            origin, incarnation, commands_count = _GROUP.unpack_from(data, offset)
            offset += _GROUP.size
            headers = data[offset : offset + commands_count * _HEADER.size]
            offset += commands_count * _HEADER.size
            if offset > len(data):
                raise MalformedBatch("batch is cut off inside the headers of a group")
            commands = []
            for seq, kind, length in _HEADER.iter_unpack(headers):
                end = offset + length
                commands.append((seq, kind, data[offset:end]))
                offset = end
            if offset > len(data):
                raise MalformedBatch("batch is cut off inside the payloads of a group")
            groups.append(Group(origin, incarnation, tuple(commands)))
    except struct.error as error:
        raise MalformedBatch(f"batch is cut off: {error}") from error
    if offset != len(data):
        raise MalformedBatch(f"{len(data) - offset} bytes after the end of the batch")
    return groups


def encode_session_call(session: int, seq: int, first_incomplete: int, kind: int, payload: bytes) -> bytes:
    """The payload of a SESSION_CALL: one mutation, done once however often it comes.

    Args:
        session: the id of the session.
        seq: from 1, rising; a number stands for one mutation for ever.
        first_incomplete: the client has every answer below this.
        kind: what `payload` is, as in a command of its own.
    """
    return _CALL.pack(session, seq, first_incomplete, kind) + payload


def decode_session_call(data: bytes) -> tuple[int, int, int, int, bytes]:
    """Session, seq, first incomplete, kind and payload, as `encode_session_call` was given them.

    Raises:
        MalformedCall: it is cut off before the payload. Whether the payload is whole is for its kind to say.
    """
    try:
        session, seq, first_incomplete, kind = _CALL.unpack_from(data)
    except struct.error as error:
        raise MalformedCall(f"a call of a session in {len(data)} bytes") from error
    return session, seq, first_incomplete, kind, data[_CALL_BYTES:]
