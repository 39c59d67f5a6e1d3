"""Exactly-once: what was done for a session is remembered with its answer, until the client has said it has it.

    SESSION_CALL(session, seq, first_incomplete, command)
      no such session       -> SESSION_EXPIRED       nothing executed
      answered before       -> the same answer       nothing executed again
      seq < acknowledged    -> STALE_SEQUENCE        nothing executed; the client has the answer, or gave it up
      too much is kept      -> SESSION_FULL          nothing executed; it may come again under the same number, and
                                                     the lowest not acknowledged is always executed
      else                  -> the command is applied; its answer, a refusal too, is kept under (session, seq)

Small answers of a session lie together in one value with the number below which all is acknowledged, written once
for all calls of a write batch: a client with many calls under way costs a write a batch, not two a call. Large answers
have keys of their own.

In memory is the time to live of each session, and what sessions keep that were used lately; both are taken from the
store, where everything is. Invariants: every kept number >= acknowledged; an answer is kept from the very write that
has its effects.    See: Ongaro 6.3; reliability rules X1 to X4, Z4, Z7.
"""

from __future__ import annotations

import enum
import struct

from raftkv._pb.state_pb2 import SessionExpire, SessionOpen, SessionOpened
from raftkv.state.commands import CommandKind
from raftkv.state.keys import (
    RESULT_ID,
    SESSION,
    SESSION_ANSWERS,
    SESSION_END,
    SESSION_ID,
    SESSION_RESULT,
    SESSION_TTL,
)
from raftkv.state.overlay import Overlay
from raftkv.state.results import (
    PUT_DONE,
    PUT_DONE_BYTES,
    PutDone,
    Refusal,
    RefusalCode,
    Result,
    decode_result,
    encode_result,
)
from raftkv.state.store import KeyValueStore

SESSIONS_MAX = 100_000
ANSWERS_MAX = 64
"""Answers that a session may keep; so many calls of one client can be under way."""
ANSWERS_BYTES_MAX = 1 << 20
"""A session that keeps this much takes no more, but for the lowest number not acknowledged; one answer larger than that
is not kept but for the fact."""
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
_ACKNOWLEDGED = struct.Struct(">QQ")  # session, the lowest number that is not
_ANSWER = struct.Struct(">QI")  # seq, bytes of the answer; then the answer, if it is small
_ANSWER_BYTES = _ANSWER.size
PUT_ANSWER = struct.Struct(">QIBq")
"""Seq, size and answer for a `PutDone`, packed at once because nearly all answers are that."""
_SMALL_BYTES_MAX = 256
"""An answer is written anew as long as it is kept and calls come, so a large one lies apart. It says how the bytes on
disk are to be read, so it never changes."""
_LOADED_MAX = 10_000
"""So many sessions are kept in memory between two writes."""
_OPENED_BITS = 20  # of an id: the number of the session among those of one entry; the others are the entry's index
ENTRY_INDEX_MAX = (1 << 64 - _OPENED_BITS) - 1
"""The last entry whose sessions have an id."""


class SessionChange(enum.Enum):
    """What happened to a session."""

    OPENED = enum.auto()
    USED = enum.auto()
    """Calls came, whatever became of them; those in a row are one event."""
    EXPIRED = enum.auto()


SessionEvent = tuple[SessionChange, int]


def granted_ttl_ms(request: SessionOpen) -> int:
    """The time to live that a session gets: what is asked for, within bounds; 0 is the default."""
    return min(max(request.ttl_ms or TTL_MS_DEFAULT, TTL_MS_MIN), TTL_MS_MAX)


class Kept:
    """What one session keeps."""

    __slots__ = ("acknowledged", "bytes", "id", "large", "records")

    def __init__(self, session: int) -> None:
        self.id = SESSION_ID.pack(session)
        self.acknowledged = 0  # every number below it
        self.records: dict[int, bytes] = {}  # of all answers, by number: what `encode` has of each
        self.large: dict[int, int] = {}  # the size in bytes of those that lie apart
        self.bytes = 0  # of all answers

    @classmethod
    def decode(cls, session: int, data: bytes) -> Kept:
        """From what `encode` gave."""
        kept = cls(session)
        (kept.acknowledged,) = _SEQ.unpack_from(data)
        offset = _SEQ.size
        while offset < len(data):
            start = offset
            seq, size = _ANSWER.unpack_from(data, offset)
            offset += _ANSWER_BYTES
            if size <= _SMALL_BYTES_MAX:
                offset += size
            else:
                kept.large[seq] = size
            kept.records[seq] = data[start:offset]
            kept.bytes += size
        return kept

    def encode(self) -> bytes:
        """In the order of numbers, so that how the calls came makes no difference."""
        records = self.records
        return _SEQ.pack(self.acknowledged) + b"".join([records[seq] for seq in sorted(records)])

    def keep(self, seq: int, encoded: bytes) -> bytes:
        """Keep an answer; gives the record of it, which is all but the answer itself where that is large."""
        size = len(encoded)
        record = _ANSWER.pack(seq, size)
        if size <= _SMALL_BYTES_MAX:
            record += encoded
        else:
            self.large[seq] = size
        self.records[seq] = record
        self.bytes += size
        return record

    def forget(self, first_incomplete: int) -> list[int]:
        """Move the acknowledged up; gives the numbers whose large answers are no longer needed."""
        records, large = self.records, self.large
        if first_incomplete - self.acknowledged <= len(records):
            gone = [seq for seq in range(self.acknowledged, first_incomplete) if seq in records]
        else:
            gone = sorted(seq for seq in records if seq < first_incomplete)
        self.acknowledged = first_incomplete
        taken = [records.pop(seq) for seq in gone]
        self.bytes -= sum(map(len, taken)) - _ANSWER_BYTES * len(taken)
        apart = [seq for seq in gone if seq in large] if large else []
        self.bytes -= sum([large.pop(seq) for seq in apart])
        return apart


class Sessions:
    """All sessions of one replica. A command that is refused gives the code of its refusal."""

    def __init__(self, store: KeyValueStore) -> None:
        self.ttls: dict[int, int] = {
            SESSION_ID.unpack_from(key, len(SESSION))[0]: SESSION_TTL.unpack(value)[0]
            for key, value in store.iterate(SESSION, SESSION_END)
        }
        """The time to live by id, in milliseconds."""
        self.changed: dict[int, Kept] = {}
        """What `flush` will write, by session: whoever changes one puts it here."""
        self._kept: dict[int, Kept] = {}  # a cache, but for those that are in `changed`
        self._events: list[SessionEvent] | None = None  # None: nobody has asked yet, so nothing is gathered
        self._used = 0  # what the last of these events tells of, if it is of use
        self._entry_index = 0
        self._opened = 0  # by the entry of that index

    def take_events(self) -> list[SessionEvent]:
        """What happened since the last call, in order; gathered from the first call on."""
        events = self._events or []
        self._events = []
        self._used = 0
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
        self._kept[session] = Kept(session)
        key, value = SESSION + SESSION_ID.pack(session), SESSION_TTL.pack(ttl_ms)
        overlay.pending[key] = value
        overlay.effects.append(key + value)
        if self._events is not None:
            self._events.append((SessionChange.OPENED, session))
            self._used = 0
        return SessionOpened(session=session, ttl_ms=ttl_ms)

    def expire(self, overlay: Overlay, request: SessionExpire, entry_term: int) -> RefusalCode | None:
        """End sessions, with all they keep: by the leader of the entry's term, or (term 0) by who opened them."""
        if request.proposer_term not in (0, entry_term):
            return RefusalCode.STALE_TERM
        for session in request.sessions:
            if session not in self.ttls:
                continue
            kept = self._kept_of(overlay, session)
            packed = kept.id
            for seq in kept.large:
                overlay.pending[SESSION_RESULT + packed + _SEQ.pack(seq)] = None
            overlay.pending[SESSION + packed] = None
            overlay.pending[SESSION_ANSWERS + packed] = None
            overlay.effects.append(b"session ended" + packed)
            del self.ttls[session]
            del self._kept[session]
            self.changed.pop(session, None)
            if self._events is not None:
                self._events.append((SessionChange.EXPIRED, session))
                self._used = 0
        return None

    def admit(
        self, overlay: Overlay, session: int, seq: int, first_incomplete: int, kind: int
    ) -> Result | RefusalCode | None:
        """Whether a call is to be executed.

        Returns:
            None: execute it, then `keep` what came of it. Else the answer: nothing is to be executed.
        """
        kept = self._kept.get(session)
        if kept is None:  # not in memory, or no session (any more)
            if session not in self.ttls:
                return RefusalCode.SESSION_EXPIRED
            kept = self._kept_of(overlay, session)
        if not seq or kind not in CALLABLE:
            return RefusalCode.MALFORMED
        if session != self._used:
            self._note_use(session)
        records = kept.records
        if seq in records:
            return self._answer_again(overlay, kept, session, seq)
        acknowledged = kept.acknowledged
        if seq < acknowledged or seq < first_incomplete:
            return RefusalCode.STALE_SEQUENCE
        if first_incomplete > acknowledged:
            acknowledged = first_incomplete
            self.acknowledge(overlay, session, kept, first_incomplete)
        # The one call that all others wait for: refused while they fill the session, it could never make them room.
        # There is one such number at a time, so that the bounds are exceeded by one answer.
        if seq != acknowledged and (len(records) >= ANSWERS_MAX or kept.bytes >= ANSWERS_BYTES_MAX):
            return RefusalCode.SESSION_FULL
        return None

    def use(self, session: int) -> Kept | None:
        """For those who do what `admit` and `keep` do themselves: a call has come that has a number and may be called.

        Returns:
            What the session keeps. None where that is not in memory, or there is no such session: nothing was done.
        """
        kept = self._kept.get(session)
        if kept is not None and session != self._used:
            self._note_use(session)
        return kept

    def acknowledge(self, overlay: Overlay, session: int, kept: Kept, first_incomplete: int) -> None:
        """Forget what is below the first incomplete number, which is higher than what was acknowledged before."""
        self.changed[session] = kept
        overlay.effects.append(_ACKNOWLEDGED.pack(session, first_incomplete))
        for gone in kept.forget(first_incomplete):
            overlay.pending[SESSION_RESULT + RESULT_ID.pack(session, gone)] = None

    def keep(self, overlay: Overlay, session: int, seq: int, result: Result, compact_revision: int) -> None:
        """Keep what came of a call that was admitted; the revision it made may be open still."""
        kept = self.changed[session] = self._kept[session]
        if type(result) is PutDone:
            record = kept.records[seq] = PUT_ANSWER.pack(seq, PUT_DONE_BYTES, PUT_DONE, result.revision)
            kept.bytes += PUT_DONE_BYTES
            overlay.effects += (kept.id, record)
            return
        encoded = encode_result(result)
        if len(encoded) > ANSWERS_BYTES_MAX:
            encoded = encode_result(Refusal(RefusalCode.RESULT_NOT_KEPT, overlay.commit(), compact_revision))
        record = kept.keep(seq, encoded)
        overlay.effects += (kept.id, record)
        if seq in kept.large:
            overlay.pending[SESSION_RESULT + RESULT_ID.pack(session, seq)] = encoded
            overlay.effects.append(encoded)

    def flush(self, overlay: Overlay) -> None:
        """Put what has changed since the last time into the write batch."""
        for kept in self.changed.values():
            overlay.pending[SESSION_ANSWERS + kept.id] = kept.encode()
        self.changed.clear()
        if len(self._kept) > _LOADED_MAX:
            self._kept.clear()

    def _note_use(self, session: int) -> None:
        self._used = session
        if self._events is not None:
            self._events.append((SessionChange.USED, session))

    def _kept_of(self, overlay: Overlay, session: int) -> Kept:
        """What a session keeps, from the store where it is not in memory."""
        kept = self._kept.get(session)
        if kept is None:
            stored = overlay.get(SESSION_ANSWERS + SESSION_ID.pack(session))
            kept = self._kept[session] = Kept(session) if stored is None else Kept.decode(session, stored)
        return kept

    def _answer_again(self, overlay: Overlay, kept: Kept, session: int, seq: int) -> Result:
        if seq not in kept.large:
            return decode_result(kept.records[seq][_ANSWER_BYTES:])
        stored = overlay.get(SESSION_RESULT + RESULT_ID.pack(session, seq))
        assert stored is not None, f"answer {seq} of session {session:x} is not there"
        return decode_result(stored)
