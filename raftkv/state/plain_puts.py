"""The commonest command in one straight loop: a put of nothing but a key and a value, within a session or not.

    commands --taken here, one after the other--> Overlay, Sessions, results
        |
        +--the first that is not plain--> the machine's general path, which then comes back for those behind it

Nothing is decided here that the general path would decide otherwise: pending writes, effects in their order, results,
sessions and their events are the same to the byte, and tests/unit/state/test_state_plain_puts.py holds the two against
each other. What is plain may therefore change with any version. Here lives that loop and nothing else: everything is
in locals, and what is called besides the packing of bytes is the store, where a key is not in the overlay; `Sessions`,
once for the calls of a session in a row; `Directories`, while one is listed; and `history_prefix`, for a key that is
there. A command that would need more is not plain.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from raftkv.state.commands import CALL_LAYOUT, CommandFields, CommandKind
from raftkv.state.keys import NO_PLACE, PLACE_BYTES, RECORD_HEAD, VERSION, history_prefix
from raftkv.state.overlay import ABSENT, Overlay
from raftkv.state.results import PUT_DONE, PUT_DONE_BYTES, PutDone, Result
from raftkv.state.sessions import ANSWERS_BYTES_MAX, ANSWERS_MAX, PUT_ANSWER, Kept, Sessions

_PUT = int(CommandKind.PUT)
_SESSION_CALL = int(CommandKind.SESSION_CALL)
_CALL = struct.Struct(CALL_LAYOUT + "BB")  # and how a PutRequest begins
_CALL_BYTES = _CALL.size
# A PutRequest as every protobuf writes it: this byte, the key's length, the key; this byte, the value's length in one
# byte or two, the value. Whatever looks otherwise has other fields, or is for the parser to judge.
_KEY_TAG = 0x0A
_VALUE_TAG = 0x12
_unpack_call = _CALL.unpack_from
_unpack_version = VERSION.unpack
_pack_version = VERSION.pack
_pack_record = RECORD_HEAD.pack
_pack_answer = PUT_ANSWER.pack


def apply_plain_puts(
    commands: Iterator[CommandFields], overlay: Overlay, sessions: Sessions, results: list[Result]
) -> CommandFields | None:
    """Apply commands as long as they are plain puts; the results go to the end of `results`.

    To be called while no alarm is on and no revision is open.

    Returns:
        The first command that is not plain: taken from `commands`, and nothing of it done that is not done the same
        when it is done again. None where all were plain.
    """
    pending = overlay.pending
    effects = overlay.effects
    stored = overlay.stored
    listed = overlay.directories.put if overlay.directories.remembers_any else None
    changed = sessions.changed
    revision = overlay.revision + 1  # of the next put
    current = -1  # the session of the call before, which is no session's id at first
    kept: Kept
    command: CommandFields | None
    for command in commands:
        _, kind, data = command
        size = len(data)
        if kind == _SESSION_CALL and size > _CALL_BYTES:
            # The questions of `Sessions.admit`, in its order: nothing changes before a repeated number is asked for.
            session, seq, first_incomplete, called, tag, key_bytes = _unpack_call(data)
            if called != _PUT or not seq:
                break
            if session != current:
                found = sessions.use(session)
                if found is None:
                    break
                kept, current = found, session
                records, acknowledged = kept.records, kept.acknowledged
            if seq in records or seq < acknowledged or seq < first_incomplete:
                break
            if first_incomplete > acknowledged:
                sessions.acknowledge(overlay, session, kept, first_incomplete)
                acknowledged = first_incomplete
            if len(records) >= ANSWERS_MAX or kept.bytes >= ANSWERS_BYTES_MAX:
                break
            key_at = _CALL_BYTES
        elif kind == _PUT and size > 2:
            tag, key_bytes = data[0], data[1]
            key_at = 2
            seq = 0  # in no session
        else:
            break

        key_end = key_at + key_bytes
        value_at = key_end + 2
        if tag != _KEY_TAG or key_bytes > 127 or value_at >= size or data[key_end] != _VALUE_TAG:
            break
        value_bytes = data[key_end + 1]
        if value_bytes > 127:  # the lower seven bits of two bytes each
            value_bytes += data[value_at] - 1 << 7
            value_at += 1
            if not 127 < value_bytes < 1 << 14:
                break
        if value_at + value_bytes != size:
            break

        # As `Overlay.put`.
        key = data[key_at:key_end]
        current_key = b"c" + key
        old = pending.get(current_key, ABSENT)
        if old is ABSENT:
            old = stored(current_key)
        if old is None:
            replaced, create_revision, version = NO_PLACE, revision, 1
        else:
            _, _, create_revision, version, lease = _unpack_version(old)
            if lease:
                break
            replaced = old[:PLACE_BYTES]
            version += 1
        now = _pack_version(revision, 0, create_revision, version, 0)
        place = now[:PLACE_BYTES]
        if old is not None:
            pending[history_prefix(key) + place] = old
        pending[current_key] = now
        record = _pack_record(0, replaced, create_revision, version, 0, key_bytes, value_bytes) + key + data[value_at:]
        pending[b"r" + place] = record
        if listed is not None:
            listed(key, now)

        if seq:  # as `Sessions.keep`
            changed[current] = kept
            records[seq] = answer = _pack_answer(seq, PUT_DONE_BYTES, PUT_DONE, revision)
            kept.bytes += PUT_DONE_BYTES
            effects += (place, record, kept.id, answer)
        else:
            effects += (place, record)
        results.append(PutDone(revision))
        revision += 1
    else:
        command = None
    overlay.revision = revision - 1
    return command
