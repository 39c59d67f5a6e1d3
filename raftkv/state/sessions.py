"""Exactly-once: what was done for a session is remembered with its answer, until the client has said it has it.

    SESSION_CALL(session, seq, first_incomplete, command)
      no such session       -> SESSION_EXPIRED       nothing executed
      answered before       -> the same answer       nothing executed again
      seq < acknowledged    -> STALE_SEQUENCE        nothing executed; the client has the answer, or gave it up
      too much is kept      -> SESSION_FULL          nothing executed; it may come again under the same number
      else                  -> the command is applied; its answer, a refusal too, is kept under (session, seq)

A kept answer carries the `first_incomplete` of its call, so what a session has acknowledged is the greatest one among
its answers, and a call costs one write. Only a call that acknowledges and is then refused as SESSION_FULL leaves no
answer; what it acknowledged gets an entry of its own.

In memory is the time to live of each session, and of those that were used since the start the numbers of their kept
answers; both are taken from the store, where everything is. Invariants: every kept number >= acknowledged; an answer is
kept from the very write that has its effects.    See: Ongaro 6.3; reliability rules X1 to X4, Z4, Z7.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from raftkv._pb.state_pb2 import SessionCall, SessionExpire, SessionOpen, SessionOpened
from raftkv.state.commands import CommandKind
from raftkv.state.keys import (
    RESULT_ID,
    SESSION,
    SESSION_ACKNOWLEDGED,
    SESSION_END,
    SESSION_ID,
    SESSION_RESULT,
    SESSION_TTL,
)
from raftkv.state.overlay import Overlay
from raftkv.state.results import Refusal, RefusalCode, Result, decode_result, encode_result
from raftkv.state.store import KeyValueStore

SESSIONS_MAX = 100_000
ANSWERS_MAX = 64
"""Answers that a session may keep; so many calls of one client can be under way."""
ANSWERS_BYTES_MAX = 1 << 20
"""A session that keeps this much takes no more; one answer larger than it is not kept but for the fact."""
TTL_MS_DEFAULT = 60 * 60 * 1000
TTL_MS_MIN = 10_000
TTL_MS_MAX = 24 * 60 * 60 * 1000

CALLABLE = frozenset(
    int(kind)
    for kind in (
        CommandKind.PUT,
        CommandKind.DELETE_RANGE,
        CommandKind.TXN,
        CommandKind.COMPACT,
        CommandKind.LEASE_GRANT,
        CommandKind.LEASE_REVOKE,
    )
)
"""What may be done within a session."""

_SEQ = struct.Struct(">Q")
_OPENED_BITS = 20  # of an id: the number of the session among those of one entry; the others are the entry's index
_RESULT_HEAD = len(SESSION_RESULT) + SESSION_ID.size


class SessionChange(enum.Enum):
    """What happened to a session."""

    OPENED = enum.auto()
    USED = enum.auto()
    """A call came, whatever became of it."""
    EXPIRED = enum.auto()


SessionEvent = tuple[SessionChange, int]


def granted_ttl_ms(request: SessionOpen) -> int:
    """The time to live that a session gets: what is asked for, within bounds; 0 is the default."""
    return min(max(request.ttl_ms or TTL_MS_DEFAULT, TTL_MS_MIN), TTL_MS_MAX)


class _Kept:
    """What one session keeps."""

    __slots__ = ("acknowledged", "bytes", "sizes")

    def __init__(self) -> None:
        self.acknowledged = 0  # every number below it
        self.sizes: dict[int, int] = {}  # by number, in bytes
        self.bytes = 0  # their sum

    def forget(self, first_incomplete: int) -> list[int]:
        """Move the acknowledged up, and give the numbers whose answers are no longer needed."""
        before = self.acknowledged
        if first_incomplete <= before:
            return []
        self.acknowledged = first_incomplete
        sizes = self.sizes
        if first_incomplete - before <= len(sizes):
            gone = [seq for seq in range(before, first_incomplete) if seq in sizes]
        else:
            gone = sorted(seq for seq in sizes if seq < first_incomplete)
        for seq in gone:
            self.bytes -= sizes.pop(seq)
        return gone


class Sessions:
    """All sessions of one replica. A command that is refused gives the code of its refusal."""

    def __init__(self, store: KeyValueStore) -> None:
        self.ttls: dict[int, int] = {
            SESSION_ID.unpack_from(key, len(SESSION))[0]: SESSION_TTL.unpack(value)[0]
            for key, value in store.iterate(SESSION, SESSION_END)
        }
        """The time to live by id, in milliseconds."""
        self._kept: dict[int, _Kept] = {}
        self._events: list[SessionEvent] | None = None  # None: nobody has asked yet, so nothing is gathered
        self._entry_index = 0
        self._opened = 0  # by the entry of that index

    def take_events(self) -> list[SessionEvent]:
        """What happened since the last call, in order; gathered from the first call on."""
        events = self._events or []
        self._events = []
        return events

    def open(self, overlay: Overlay, request: SessionOpen, entry_index: int) -> SessionOpened | RefusalCode:
        """Begin a session. Its id is made of the entry and of its number among the sessions of the entry."""
        if self._entry_index != entry_index:
            self._entry_index = entry_index
            self._opened = 0
        if len(self.ttls) >= SESSIONS_MAX or self._opened >> _OPENED_BITS:
            return RefusalCode.TOO_MANY_SESSIONS
        session = entry_index << _OPENED_BITS | self._opened
        self._opened += 1
        ttl_ms = granted_ttl_ms(request)
        self.ttls[session] = ttl_ms
        self._kept[session] = _Kept()
        _write(overlay, SESSION + SESSION_ID.pack(session), SESSION_TTL.pack(ttl_ms))
        if self._events is not None:
            self._events.append((SessionChange.OPENED, session))
        return SessionOpened(session=session, ttl_ms=ttl_ms)

    def expire(self, overlay: Overlay, request: SessionExpire, entry_term: int) -> RefusalCode | None:
        """End sessions, with all they keep: by the leader of the entry's term, or (term 0) by who opened them."""
        if request.proposer_term not in (0, entry_term):
            return RefusalCode.STALE_TERM
        for session in request.sessions:
            if session not in self.ttls:
                continue
            kept = self._kept_of(overlay, session)
            packed = SESSION_ID.pack(session)
            for seq in kept.sizes:
                overlay.pending[SESSION_RESULT + packed + _SEQ.pack(seq)] = None
            overlay.pending[SESSION + packed] = None
            overlay.pending[SESSION_ACKNOWLEDGED + packed] = None
            overlay.effects.append(b"session ended" + packed)
            del self.ttls[session]
            del self._kept[session]
            if self._events is not None:
                self._events.append((SessionChange.EXPIRED, session))
        return None

    def admit(self, overlay: Overlay, call: SessionCall) -> Result | RefusalCode | None:
        """Whether a call is to be executed.

        Returns:
            None: execute it, then `keep` what came of it. Else the answer: nothing is to be executed.
        """
        session, seq = call.session, call.seq
        if session not in self.ttls:
            return RefusalCode.SESSION_EXPIRED
        if not seq or call.kind not in CALLABLE:
            return RefusalCode.MALFORMED
        if self._events is not None:
            self._events.append((SessionChange.USED, session))
        kept = self._kept.get(session) or self._kept_of(overlay, session)
        if seq in kept.sizes:
            stored = overlay.get(SESSION_RESULT + RESULT_ID.pack(session, seq))
            assert stored is not None, f"answer {seq} of session {session:x} is not there"
            return decode_result(stored[_SEQ.size :])
        if seq < kept.acknowledged or seq < call.first_incomplete:
            return RefusalCode.STALE_SEQUENCE
        acknowledged = kept.acknowledged
        for gone in kept.forget(call.first_incomplete):
            overlay.pending[SESSION_RESULT + RESULT_ID.pack(session, gone)] = None
        if len(kept.sizes) >= ANSWERS_MAX or kept.bytes >= ANSWERS_BYTES_MAX:
            if kept.acknowledged != acknowledged:
                _write(overlay, SESSION_ACKNOWLEDGED + SESSION_ID.pack(session), _SEQ.pack(kept.acknowledged))
            return RefusalCode.SESSION_FULL
        return None

    def keep(self, overlay: Overlay, call: SessionCall, result: Result, compact_revision: int) -> None:
        """Keep what came of a call that was admitted. The revision it made is committed."""
        session, seq = call.session, call.seq
        encoded = encode_result(result)
        if len(encoded) > ANSWERS_BYTES_MAX:
            encoded = encode_result(Refusal(RefusalCode.RESULT_NOT_KEPT, overlay.revision, compact_revision))
        kept = self._kept[session]
        kept.sizes[seq] = len(encoded)
        kept.bytes += len(encoded)
        _write(overlay, SESSION_RESULT + RESULT_ID.pack(session, seq), _SEQ.pack(kept.acknowledged) + encoded)

    def _kept_of(self, overlay: Overlay, session: int) -> _Kept:
        """What a session keeps, from the store where it was not used since the start."""
        kept = self._kept.get(session)
        if kept is not None:
            return kept
        kept = self._kept[session] = _Kept()
        packed = SESSION_ID.pack(session)
        stored = overlay.get(SESSION_ACKNOWLEDGED + packed)
        if stored is not None:
            (kept.acknowledged,) = _SEQ.unpack(stored)
        for seq, acknowledged, size in _answers(overlay, packed):
            kept.sizes[seq] = size
            kept.bytes += size
            kept.acknowledged = max(kept.acknowledged, acknowledged)
        return kept


def _answers(overlay: Overlay, packed: bytes) -> Iterator[tuple[int, int, int]]:
    """Number, acknowledged and size of the stored answers of a session."""
    prefix = SESSION_RESULT + packed
    for key, value in overlay.iterate(prefix + bytes(_SEQ.size), prefix + b"\xff" * (_SEQ.size + 1)):
        yield _SEQ.unpack_from(key, _RESULT_HEAD)[0], _SEQ.unpack_from(value)[0], len(value) - _SEQ.size


def _write(overlay: Overlay, key: bytes, value: bytes) -> None:
    overlay.pending[key] = value
    overlay.effects.append(key)
    overlay.effects.append(value)
