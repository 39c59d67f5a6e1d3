"""A backup's state becomes the first state of a new cluster.

What the old cluster did after the backup was taken is lost, but not forgotten: clients, and what they wrote to, have
seen revisions, fencing tokens (create revisions), session ids (log indexes) and terms that this state knows nothing of.
None of them may be given out again with another meaning. So all three numbers jump ahead, by more than the old cluster
can have counted since:

    old cluster   ... backup ........ its end            |
    new cluster      keys as of then                     | backup + bump: first revision, index and term

- Everything below the new revision counts as compacted: a watch that wants to go on from an old one is told so, for
  the changes in between never come.
- Keys keep their revisions, so a lock that is held in the backup is held by the same token, and every later one is
  greater than any ever seen.
- Leases stay, with their whole time: what was left at the backup says nothing about renewals after it.
- Sessions go: which of their calls were done is known only up to the backup. What they send is refused, not executed.
- Members and the membership are those of the new cluster. Alarms stay until somebody switches them off.

The same backup and the same bump give the same state, byte for byte, on every node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from raftkv.state import hashing
from raftkv.state.compaction import sweep_start
from raftkv.state.keys import (
    CONF_KEY,
    CURRENT,
    LEASE,
    LEASE_END,
    LEASE_RECORD,
    MEMBER,
    MEMBER_END,
    SESSIONS,
    SESSIONS_END,
    STATE_KEY,
    SWEEP_KEY,
    Head,
)
from raftkv.state.sessions import ENTRY_INDEX_MAX
from raftkv.state.store import KeyValueStore, StoreDamaged

BUMP_MIN = 1_000_000_000
"""More than any cluster counts between a backup and its end: a month at 385 changes a second."""
BUMP_MAX = 1_000_000_000_000
_NUMBER_MAX = 1 << 62  # of revisions and terms; on the wire they have 63 bits


class NoRoom(Exception):
    """The numbers of this state are so high already that they cannot be raised by so much."""


def head_of(store: KeyValueStore) -> Head:
    """Which state this is.

    Raises:
        StoreDamaged: it does not say so, or in a format that this code cannot read.
    """
    stored = store.get(STATE_KEY)
    if stored is None:
        raise StoreDamaged(f"the state has no record {STATE_KEY!r}")
    return Head.decode(stored)


def renew(store: KeyValueStore, bump: int) -> Head:
    """Make the state of a backup the first one of a new cluster, in one write.

    Args:
        store: all that the backup holds.
        bump: how far revision, index and term jump ahead.
    Returns:
        Which state it is now; the new log begins behind its index and term.
    Raises:
        StoreDamaged: see `head_of`.
        NoRoom: nothing has changed.
    """
    old = head_of(store)
    index, term, revision = old.applied_index + bump, old.applied_term + bump, old.revision + bump
    if index > ENTRY_INDEX_MAX // 2 or max(revision, term) > _NUMBER_MAX:
        raise NoRoom(f"revision {old.revision}, index {old.applied_index} and term {old.applied_term} are too high")
    effect = b"restored" + revision.to_bytes(8, "big")
    new = Head(index, term, revision, revision, hashing.chain(old.rolling_hash, index, term, [effect]))
    puts = [(STATE_KEY, new.encode()), (SWEEP_KEY, sweep_start(store.get(SWEEP_KEY), old.compact_revision))]
    for key, value in store.iterate(LEASE, LEASE_END):
        puts.append((key, LEASE_RECORD.pack(LEASE_RECORD.unpack(value)[0], 0)))
    deletes = [CONF_KEY]  # absent: that with which the log begins
    for start, stop in ((SESSIONS, SESSIONS_END), (MEMBER, MEMBER_END)):
        deletes += [key for key, _ in store.iterate(start, stop)]
    store.write(puts, deletes)
    return new


@dataclass(frozen=True, slots=True)
class Summary:
    """What a state holds, as far as its records tell one after the other."""

    head: Head
    keys: int
    """Keys that have a value."""


def summarize(records: Iterable[tuple[bytes, bytes]]) -> Summary:
    """Look at every record once.

    Raises:
        StoreDamaged: see `head_of`.
    """
    keys = 0
    head: bytes | None = None
    for key, value in records:
        if key.startswith(CURRENT):
            keys += 1
        elif key == STATE_KEY:
            head = value
    if head is None:
        raise StoreDamaged(f"the state has no record {STATE_KEY!r}")
    return Summary(Head.decode(head), keys)
