"""Where everything lies in the store: keys and the bytes of their values.

Values of users lie in the store only, and there is no index in memory, so a node with a million keys starts at once.

    c <key>                        version: what is current of a live key
    e/i<id>                        session (exactly once): its time in ms
    e/a<id>                        what the session has acknowledged, and the answers it keeps; see `sessions`
    e/r<id><seq>                   a large one of these answers
    h <escaped key> 00 01 <place>  version: what the change at `place` replaced or deleted, for reads of the past
    l/i<id>                        lease: its time and what was left of it at the last checkpoint, in ms
    l/k<id><key>                   this key is attached to this lease; no value
    m/state                        applied index and term, revision, compact revision, rolling hash
    m/sweep                        place up to which compacted changes are gone; absent when the sweep has ended
    m/conf                         the membership as of the applied index, in the driver's encoding
    m/member/<id>                  what a member published about itself
    m/alarm/<id><type>             this alarm of this member is on; no value
    r <place>                      record: one change, with the whole key and value

A *place* is a change's revision and its number in that revision, 12 bytes, big-endian: places sort in the order of
changes. A *version* is the place of the change that made it, create revision, version number and lease, 36 bytes; the
value is in the record at that place.

What key K was at revision R: look at the first entry of `h` for K that is later than R. If there is one, it names what
was there until then: visible if it is itself not later than R, else K did not exist. If there is none, nothing
happened to K after R, and `c` tells. So each change writes one record and at most one entry of `h`, a fresh key none.

Nothing sorts after records, which are nearly all of the bytes and come in the order of their keys: so LevelDB moves
tables of them to the next level as they are, where a key behind them, written now and then, would make it merge them.

Keys of users are escaped in `h` (00 becomes 00 ff) because something follows them there; order is kept.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from raftkv.state.store import StoreDamaged

CURRENT = b"c"
CURRENT_END = b"d"
HISTORY = b"h"
HISTORY_END = b"i"
RECORD = b"r"
STATE_KEY = b"m/state"
SWEEP_KEY = b"m/sweep"
CONF_KEY = b"m/conf"
MEMBER = b"m/member/"
MEMBER_END = b"m/member0"
ALARM = b"m/alarm/"
ALARM_END = b"m/alarm0"
LEASE = b"l/i"
LEASE_END = b"l/j"
LEASE_KEY = b"l/k"
LEASES = b"l/"
LEASES_END = b"l0"
SESSION = b"e/i"
SESSION_END = b"e/j"
SESSION_RESULT = b"e/r"
SESSION_ANSWERS = b"e/a"
SESSIONS = b"e/"
SESSIONS_END = b"e0"

PLACE = struct.Struct(">QI")  # revision, number of the change in it
VERSION = struct.Struct(">QIQQq")  # place, create revision, version number, lease
VERSION_TAIL = struct.Struct(">QQq")  # the same without the place
RECORD_HEAD = struct.Struct(">B12sQQqII")
"""Flags, place replaced, create revision, version number, lease, key length, value length."""
RECORD_KEY_BYTES = struct.Struct(">I")
RECORD_KEY_BYTES_AT = 37
"""Where the head of a record has the key length, for those who want nothing else of it."""
STATE = struct.Struct(">BQQQqQ")  # format, applied index, applied term, revision, compact revision, rolling hash
MEMBER_ID = struct.Struct(">Q")
ALARM_ID = struct.Struct(">QB")  # member, type
LEASE_ID = struct.Struct(">q")  # above zero, so that ids sort as numbers
LEASE_RECORD = struct.Struct(">qq")  # time to live, remaining (0: the whole), milliseconds
SESSION_ID = struct.Struct(">Q")
SESSION_TTL = struct.Struct(">q")  # milliseconds
RESULT_ID = struct.Struct(">QQ")  # session, seq

STATE_FORMAT = 2
PLACE_BYTES = 12
VERSION_BYTES = 36
RECORD_HEAD_BYTES = RECORD_HEAD.size
TOMBSTONE = 1
"""Flag of a record: the key was deleted. Create revision, version and lease are then 0 and the value is empty."""
EXPIRED = 2
"""Flag of a record beside TOMBSTONE: it was deleted because its lease ran out."""
NO_LEASE = bytes(8)
"""The end of a version without lease."""
NO_PLACE = bytes(PLACE_BYTES)
"""The change replaced nothing."""

assert RECORD_HEAD_BYTES == 1 + PLACE_BYTES + 24 + 8
assert RECORD_KEY_BYTES_AT == RECORD_HEAD_BYTES - 8
assert VERSION.size == VERSION_BYTES

_END_OF_KEY = b"\0\1"
_AFTER_KEY = b"\0\2"


class Head(NamedTuple):
    """What `m/state` says: which state this is."""

    applied_index: int
    applied_term: int
    revision: int
    compact_revision: int
    rolling_hash: int

    def encode(self) -> bytes:
        """The record."""
        return STATE.pack(STATE_FORMAT, *self)

    @classmethod
    def decode(cls, stored: bytes) -> Head:
        """
        Raises:
            StoreDamaged: not a record that this code can read.
        """
        if len(stored) != STATE.size or stored[0] != STATE_FORMAT:
            raise StoreDamaged(f"the state's record {STATE_KEY!r} is not of format {STATE_FORMAT}: {stored[:16].hex()}")
        return cls(*STATE.unpack(stored)[1:])


def history_prefix(key: bytes) -> bytes:
    """What all entries of `h` for `key` begin with; a place follows."""
    if b"\0" in key:
        key = key.replace(b"\0", b"\0\xff")
    return b"h" + key + _END_OF_KEY


def history_bound(key: bytes | None) -> bytes:
    """The least entry of `h` that a key >= `key` can have; for None the end of `h`."""
    if key is None:
        return HISTORY_END
    return b"h" + key.replace(b"\0", b"\0\xff")


def after_prefix(prefix: bytes) -> bytes:
    """Behind all entries that begin with this `history_prefix`."""
    return prefix[:-2] + _AFTER_KEY


def history_key(prefix: bytes) -> bytes:
    """The user's key of a `history_prefix`."""
    return prefix[1:-2].replace(b"\0\xff", b"\0")


def current_bound(key: bytes | None) -> bytes:
    """The entry of `c` for `key`; for None the end of `c`."""
    return CURRENT_END if key is None else b"c" + key


def span(key: bytes, range_end: bytes) -> tuple[bytes, bytes | None]:
    """The half-open interval of keys that etcd means by (key, range_end); the end None is past every key.

    An empty range_end is the single key; "\\0" is everything from `key` on.
    """
    if not range_end:
        return key, key + b"\0"
    if range_end == b"\0":
        return key, None
    return key, range_end
