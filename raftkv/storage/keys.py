"""What the records of the log database look like, byte for byte.

    key                       value
    "i"                       identity: format version, cluster id, node id, created, name
    "b"                       how often this store was opened
    "m"                       the compacted prefix: index, term, conf state
    "s"                       name of the directory with the current state
    "x" index(8, big-endian)  entry: term of the entry before it, its own term, kind, data
    "x" last index(8) "t"     tail of a batch: its number, term, vote, commit, last index and term; the last one counts

Every value ends with the CRC32C of key and value, so a record that turns up under another key is found too. Appended
in little-endian order, the checksum of a whole and sound record is always the same number (`RESIDUE`), so checking
takes one pass and no copy.

An entry names the term of its predecessor: with the index in the key this makes the log a chain in which a missing,
doubled or foreign link shows.

A tail lies behind the entry that was the last when it was written, the older ones stay until their entry goes, and no
key comes after entries. So tables of a log that only grows at its end never overlap, and LevelDB leaves them as they
are. A single key for all tails would be in every table, a key behind the entries in one of each level: both were, and
each entry was merged twice.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

from raftkv.raft.types import ConfState, Entry, EntryKind, NodeId, SnapshotMeta

FORMAT_VERSION = 2

KEY_IDENTITY = b"i"
KEY_BOOTS = b"b"
KEY_META = b"m"
KEY_STATE_NAME = b"s"
KEY_ENTRY = b"x"
KEY_ENTRY_END = b"y"  # after every entry's key
_TAIL_MARK = b"t"

RESIDUE = 0x48674BC7
"""CRC32C of anything followed by its own CRC32C in little-endian order."""

CHECKSUM_BYTES = 4
_pack_checksum = struct.Struct("<I").pack
_U64 = struct.Struct(">Q")

_ENTRY_KEY = struct.Struct(">cQ")
_ENTRY_PREFIX = struct.Struct(">cQQQB")  # key, then previous term, term, kind
_ENTRY_HEADER = struct.Struct(">QQB")
_ENTRY_KEY_BYTES = _ENTRY_KEY.size
_ENTRY_HEADER_BYTES = _ENTRY_HEADER.size
ENTRY_OVERHEAD_BYTES = _ENTRY_HEADER.size + CHECKSUM_BYTES
"""An entry's value is its data and so many bytes more."""
_unpack_entry_header = _ENTRY_HEADER.unpack_from
_pack_entry_prefix = _ENTRY_PREFIX.pack
_KINDS = {int(kind): kind for kind in EntryKind}

_IDENTITY = struct.Struct(">IQQQ")
_TAIL = struct.Struct(">QQQQQQ")
_META = struct.Struct(">QQ?HHHH")


class BadRecord(ValueError):
    """A record that is not what was written under its key. The text says in what respect."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose log this is. A store opened under another identity is refused."""

    cluster_id: int
    node_id: NodeId
    name: str
    created_unix_s: int = 0  # told, never compared
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Tail:
    """The record that is in every batch: the hard state, and where the log ends.

    Invariants: `batch` counts the batches ever written, so an older tail means lost batches; the entry chain ends
    exactly at (last_index, last_term); commit <= last_index.
    """

    batch: int
    term: int
    vote: NodeId
    commit: int
    last_index: int
    last_term: int


def seal(key: bytes, body: bytes) -> bytes:
    """`body` with the checksum over key and body behind it."""
    return body + _pack_checksum(crc32c_extend(crc32c(key), body))


def unseal(key: bytes, value: bytes) -> bytes:
    """The body of a sealed value.

    Raises:
        BadRecord: the checksum does not match.
    """
    if len(value) < CHECKSUM_BYTES or crc32c_extend(crc32c(key), value) != RESIDUE:
        raise BadRecord("checksum does not match")
    return value[:-CHECKSUM_BYTES]


def entry_key(index: int) -> bytes:
    """Where the entry of that index is kept; keys sort as indexes do."""
    return _ENTRY_KEY.pack(KEY_ENTRY, index)


def entry_index(key: bytes) -> int:
    """The index in an entry's key."""
    if len(key) != _ENTRY_KEY_BYTES:
        raise BadRecord(f"an entry's key has {_ENTRY_KEY_BYTES} bytes, this one {len(key)}")
    index: int = _ENTRY_KEY.unpack(key)[1]
    return index


def tail_key(last_index: int) -> bytes:
    """Where the tail of a batch is kept that leaves the log ending at that index: just behind the entry."""
    return _ENTRY_KEY.pack(KEY_ENTRY, last_index) + _TAIL_MARK


def is_tail_key(key: bytes) -> bool:
    """Whether it is one of `tail_key`."""
    return len(key) == _ENTRY_KEY_BYTES + 1 and key.startswith(KEY_ENTRY) and key.endswith(_TAIL_MARK)


def encode_entry(entry: Entry, prev_term: int) -> tuple[bytes, bytes]:
    """Key and value of an entry."""
    data = entry.data
    prefix = _pack_entry_prefix(KEY_ENTRY, entry.index, prev_term, entry.term, entry.kind)
    checksum = crc32c_extend(crc32c(prefix), data)
    return prefix[:_ENTRY_KEY_BYTES], b"".join((prefix[_ENTRY_KEY_BYTES:], data, _pack_checksum(checksum)))


def decode_entry(index: int, key: bytes, value: bytes) -> tuple[int, Entry]:
    """The term of the entry before it, and the entry.

    Raises:
        BadRecord: checksum or kind are wrong.
    """
    if len(value) < _ENTRY_HEADER_BYTES + CHECKSUM_BYTES or crc32c_extend(crc32c(key), value) != RESIDUE:
        raise BadRecord("checksum does not match")
    prev_term, term, kind = _unpack_entry_header(value)
    if kind not in _KINDS:
        raise BadRecord(f"unknown kind {kind}")
    return prev_term, Entry(index, term, _KINDS[kind], value[_ENTRY_HEADER_BYTES:-CHECKSUM_BYTES])


def encode_tail(tail: Tail) -> tuple[bytes, bytes]:
    """Key and value of a tail."""
    key = tail_key(tail.last_index)
    body = _TAIL.pack(tail.batch, tail.term, tail.vote, tail.commit, tail.last_index, tail.last_term)
    return key, seal(key, body)


def decode_tail(key: bytes, value: bytes) -> Tail:
    """
    Raises:
        BadRecord: not what `encode_tail` gave.
    """
    return Tail(*_unpack(_TAIL, unseal(key, value)))


def encode_meta(meta: SnapshotMeta) -> bytes:
    return seal(KEY_META, pack_meta(meta))


def decode_meta(value: bytes) -> SnapshotMeta:
    return unpack_meta(unseal(KEY_META, value))


def pack_meta(meta: SnapshotMeta) -> bytes:
    """A snapshot's index, term and conf state, without a checksum; snapshot files carry it too."""
    conf = meta.conf
    groups = (conf.voters, conf.outgoing, conf.learners, conf.learners_next)
    head = _META.pack(meta.index, meta.term, conf.auto_leave, *map(len, groups))
    return head + b"".join(_U64.pack(node) for group in groups for node in group)


def unpack_meta(body: bytes) -> SnapshotMeta:
    """
    Raises:
        BadRecord: not a packed `SnapshotMeta`.
    """
    if len(body) < _META.size:
        raise BadRecord("too short")
    index, term, auto_leave, *counts = _META.unpack_from(body)
    if len(body) != _META.size + _U64.size * sum(counts):
        raise BadRecord("length does not fit its counts")
    nodes = iter([node for (node,) in _U64.iter_unpack(body[_META.size :])])
    voters, outgoing, learners, learners_next = (tuple(next(nodes) for _ in range(count)) for count in counts)
    return SnapshotMeta(index, term, ConfState(voters, outgoing, learners, learners_next, auto_leave))


def encode_identity(identity: Identity) -> bytes:
    head = _IDENTITY.pack(identity.format_version, identity.cluster_id, identity.node_id, identity.created_unix_s)
    return seal(KEY_IDENTITY, head + identity.name.encode())


def identity_version(value: bytes) -> int:
    """The format version alone: it stands first in every format there will be, so that it can always be told."""
    if len(value) < 4:
        raise BadRecord("too short")
    return int.from_bytes(value[:4], "big")


def decode_identity(value: bytes) -> Identity:
    body = unseal(KEY_IDENTITY, value)
    if len(body) < _IDENTITY.size:
        raise BadRecord("too short")
    version, cluster_id, node_id, created = _IDENTITY.unpack_from(body)
    return Identity(cluster_id, node_id, body[_IDENTITY.size :].decode(), created, version)


def encode_number(key: bytes, number: int) -> bytes:
    return seal(key, _U64.pack(number))


def decode_number(key: bytes, value: bytes) -> int:
    number: int = _unpack(_U64, unseal(key, value))[0]
    return number


def _unpack(layout: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != layout.size:
        raise BadRecord(f"has {len(body)} bytes, {layout.size} expected")
    return layout.unpack(body)
