"""Physical compaction: taking out what no read can reach any more, in small steps.

A compaction to C forbids reads below C at once, by moving the compact revision; that is part of the replicated state.
The sweep afterwards is not: it changes no answer, each replica does it when it is idle, and it goes on after a restart
from the place stored under `SWEEP_KEY`. It walks the changes from the revision of the compaction before to C only:

- what a change up to C replaced is out of reach, except what was made at C itself (a watch may start at C);
- so is the entry of `h` about it, which answers reads before the change;
- and so is a tombstone before C.

What is left at C is the business of the next sweep, which therefore begins with it.
"""

from __future__ import annotations

from raftkv.state.keys import (
    NO_PLACE,
    PLACE,
    PLACE_BYTES,
    RECORD,
    RECORD_HEAD,
    RECORD_HEAD_BYTES,
    SWEEP_KEY,
    TOMBSTONE,
    history_prefix,
)
from raftkv.state.store import KeyValueStore

_STEP_BYTES_MAX = 1 << 20
"""A step also ends after having read this many bytes of records, so that large values do not make it long."""


def sweep_start(previous: bytes | None, compact_revision: int) -> bytes:
    """Where the sweep of a new compaction begins.

    Args:
        previous: where a sweep that has not ended is, None if none.
        compact_revision: of the compaction before; -1 for none.
    """
    place = PLACE.pack(max(compact_revision, 0), 0)
    return place if previous is None else min(previous, place)


def sweep_step(store: KeyValueStore, place: bytes, compact_revision: int, budget: int) -> bytes | None:
    """Take out what is out of reach among the next `budget` changes, and remember how far that went, in one write.

    Returns:
        Where to go on; None when done.
    """
    compacted = PLACE.pack(compact_revision, 0)
    deletes: list[bytes] = []
    read_bytes = 0
    following: bytes | None = None
    for stored, record in store.iterate(RECORD + place, RECORD + PLACE.pack(compact_revision + 1, 0)):
        if budget <= 0 or read_bytes > _STEP_BYTES_MAX:
            following = stored[1:]
            break
        budget -= 1
        read_bytes += len(record)
        flags, replaced, _, _, _, key_bytes, _ = RECORD_HEAD.unpack_from(record)
        if replaced != NO_PLACE:
            if replaced < compacted:
                deletes.append(RECORD + replaced)
            key = record[RECORD_HEAD_BYTES : RECORD_HEAD_BYTES + key_bytes]
            deletes.append(history_prefix(key) + stored[-PLACE_BYTES:])
        if flags & TOMBSTONE and stored[1:] < compacted:
            deletes.append(stored)
    if following is None:
        store.write((), [*deletes, SWEEP_KEY])
    else:
        store.write(((SWEEP_KEY, following),), deletes)
    return following
