"""Changes that are applied but not yet written: what a batch of entries has done so far, in front of the store.

Later commands of the batch see the changes of earlier ones through it, and in the end one write takes them all.

Between `commit` or `rollback` and the first change there is no open revision. The first change opens revision + 1; all
changes until `commit` belong to it and are numbered in order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from raftkv.state.attachments import Attachments
from raftkv.state.directories import Directories
from raftkv.state.keys import (
    LEASE_ID,
    LEASE_KEY,
    NO_LEASE,
    NO_PLACE,
    PLACE,
    PLACE_BYTES,
    RECORD_HEAD,
    TOMBSTONE,
    VERSION,
    VERSION_TAIL,
    history_prefix,
)
from raftkv.state.mvcc import Reader
from raftkv.state.store import KeyValueStore

ABSENT = b"\xff absent"
"""Stands for "not in the overlay": a dict cannot say None for that, because None means deleted."""


class Overlay:
    """A readable and writable layer over a store."""

    def __init__(self, store: KeyValueStore, revision: int, directories: Directories, attachments: Attachments) -> None:
        self.pending: dict[bytes, bytes | None] = {}
        """Keys of the store with their new values, None where deleted; keys are never taken out of it."""
        self.revision = revision
        """The last committed one."""
        self.number = 0
        """How many changes the open revision has; 0 when none is open."""
        self.effects: list[bytes] = []
        """The changes in canonical bytes, for the rolling hash. Whoever hashes them empties the list."""
        self._store = store
        self.directories = directories
        """To be told of every change of a live key."""
        self.stored = store.get
        """What the store has for a key, without the changes here."""
        self._attachments = attachments
        self._order: list[bytes] = []  # the keys of `pending`, sorted, as far as `_ordered` many of them
        self._ordered = 0

    def get(self, key: bytes) -> bytes | None:
        value = self.pending.get(key, ABSENT)
        return self.stored(key) if value is ABSENT else value

    def iterate(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        pending = self.pending
        order = self._sorted_keys()
        low = bisect_left(order, start)
        high = len(order) if stop is None else bisect_left(order, stop, low)
        if low == high:
            return self._store.iterate(start, stop)
        return self._merge(start, stop, [(key, pending[key]) for key in order[low:high]])

    def _merge(
        self, start: bytes, stop: bytes | None, changed: list[tuple[bytes, bytes | None]]
    ) -> Iterator[tuple[bytes, bytes]]:
        place = 0
        end = len(changed)
        for pair in self._store.iterate(start, stop):
            key = pair[0]
            while place < end and changed[place][0] < key:
                new_key, value = changed[place]
                place += 1
                if value is not None:
                    yield new_key, value
            if place < end and changed[place][0] == key:
                value = changed[place][1]
                place += 1
                if value is not None:
                    yield key, value
            else:
                yield pair
        for new_key, value in changed[place:]:
            if value is not None:
                yield new_key, value

    def _sorted_keys(self) -> list[bytes]:
        # Dicts keep the order of insertion and no key is ever taken out, so what is new is at the end.
        new = len(self.pending) - self._ordered
        if new > 8:
            self._order.extend(islice(self.pending, self._ordered, None))
            self._order.sort()  # two sorted runs, or nearly: linear
        elif new:
            for key in islice(reversed(self.pending), new):
                insort(self._order, key)
        self._ordered = len(self.pending)
        return self._order

    def reader(self, compact_revision: int) -> Reader:
        """The key space as the next operation sees it: with all changes so far, those of the open revision too."""
        revision = self.revision + 1 if self.number else self.revision
        return Reader(self, revision, compact_revision, directories=self.directories)

    def put(self, key: bytes, value: bytes, lease: int) -> None:
        """Set a key, in the open revision, and attach it to `lease` and to no other; 0 is none."""
        pending = self.pending
        current_key = b"c" + key
        old = pending.get(current_key, ABSENT)
        if old is ABSENT:
            old = self.stored(current_key)
        revision = self.revision + 1
        place = PLACE.pack(revision, self.number)
        self.number += 1
        if old is None:
            replaced = NO_PLACE
            create_revision = revision
            version = 1
            if lease:
                pending[LEASE_KEY + LEASE_ID.pack(lease) + key] = b""
                self._attachments.attach(lease, key)
        else:
            replaced = old[:PLACE_BYTES]
            _, _, create_revision, version, old_lease = VERSION.unpack(old)
            version += 1
            pending[history_prefix(key) + place] = old
            if lease != old_lease:
                self._move(key, old_lease, lease)
        pending[current_key] = now = place + VERSION_TAIL.pack(create_revision, version, lease)
        self.directories.put(key, now)
        record = RECORD_HEAD.pack(0, replaced, create_revision, version, lease, len(key), len(value)) + key + value
        pending[b"r" + place] = record
        self.effects.append(place)
        self.effects.append(record)

    def _move(self, key: bytes, old_lease: int, lease: int) -> None:
        if old_lease:
            self.pending[LEASE_KEY + LEASE_ID.pack(old_lease) + key] = None
            self._attachments.detach(old_lease, key)
        if lease:
            self.pending[LEASE_KEY + LEASE_ID.pack(lease) + key] = b""
            self._attachments.attach(lease, key)

    def delete(self, key: bytes, version: bytes, flags: int = TOMBSTONE) -> None:
        """Delete a key whose current version is given, in the open revision, and detach it from its lease.

        Args:
            flags: of the record: TOMBSTONE, with EXPIRED where that is why.
        """
        place = PLACE.pack(self.revision + 1, self.number)
        self.number += 1
        record = RECORD_HEAD.pack(flags, version[:PLACE_BYTES], 0, 0, 0, len(key), 0) + key
        self.pending[history_prefix(key) + place] = version
        self.pending[b"c" + key] = None
        self.directories.delete(key)
        self.pending[b"r" + place] = record
        if version[-8:] != NO_LEASE:
            self.pending[LEASE_KEY + version[-8:] + key] = None
            self._attachments.detach(LEASE_ID.unpack(version[-8:])[0], key)
        self.effects.append(place)
        self.effects.append(record)

    def commit(self) -> int:
        """End the open revision, if there is one, and return the latest."""
        if self.number:
            self.number = 0
            self.revision += 1
        return self.revision

    def savepoint(self) -> dict[bytes, bytes | None]:
        """What `rollback` goes back to. Taken while no revision is open. Costs a copy of `pending`."""
        assert self.number == 0, "a savepoint inside a revision"
        return dict(self.pending)

    def rollback(self, savepoint: dict[bytes, bytes | None]) -> None:
        """Forget the changes of the open revision."""
        if self.number:
            del self.effects[-2 * self.number :]
        self.number = 0
        self.directories.forget()
        self._attachments.forget()
        self.pending = savepoint
        self._order = []
        self._ordered = 0
