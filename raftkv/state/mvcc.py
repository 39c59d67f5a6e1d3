"""Reading the key space, now or at a revision of the past.

A `Reader` is bound to a view of the store and to the revisions that belong to it, so the same code serves the live
store, a consistent view in another thread, and the inside of a transaction (`overlay.Overlay`).

Invariant: compact_revision <= revision; every read is at a revision in between, ends included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from raftkv._pb.common_pb2 import Event, KeyValue
from raftkv.state.directories import KEYS_MAX, Directories
from raftkv.state.keys import (
    EXPIRED,
    NO_PLACE,
    PLACE,
    PLACE_BYTES,
    RECORD,
    RECORD_HEAD,
    RECORD_HEAD_BYTES,
    RECORD_KEY_BYTES,
    RECORD_KEY_BYTES_AT,
    TOMBSTONE,
    VERSION,
    after_prefix,
    current_bound,
    history_bound,
    history_key,
    history_prefix,
)
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.store import StoreDamaged

_SEEK_AFTER = 8
"""So many entries of a key are stepped over before seeking behind them; a seek costs about as much as eight steps."""


class Source(Protocol):
    """What a reader reads: a store, a view of one, or an overlay."""

    def get(self, key: bytes) -> bytes | None: ...

    def iterate(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]: ...


class Reader:
    """The key space as of one moment."""

    __slots__ = ("_directories", "compact_revision", "get", "iterate", "revision", "swept")

    def __init__(
        self,
        source: Source,
        revision: int,
        compact_revision: int,
        *,
        swept: bool = False,
        directories: Directories | None = None,
    ) -> None:
        self.get = source.get
        self.iterate = source.iterate
        self.revision = revision
        self.compact_revision = compact_revision
        self.swept = swept
        """Whether it is certain that nothing out of reach is left; False costs time where all records are read."""
        self._directories = directories  # of a source that moves on with the machine; None for a view

    def refusal(self, code: RefusalCode) -> Refusal:
        """A refusal of this moment."""
        return Refusal(code, self.revision, self.compact_revision)

    def check_revision(self, revision: int) -> int:
        """The revision to read at.

        Args:
            revision: as in a request: 0 and below is the latest.
        Raises:
            Refused: FUTURE_REVISION or COMPACTED. The compact revision itself can still be read.
        """
        if revision <= 0:
            return self.revision
        if revision > self.revision:
            raise Refused(self.refusal(RefusalCode.FUTURE_REVISION))
        if revision < self.compact_revision:
            raise Refused(self.refusal(RefusalCode.COMPACTED))
        return revision

    def find(self, key: bytes, revision: int) -> bytes | None:
        """The version of `key` that was visible at `revision` (checked before), or None."""
        current = self.get(b"c" + key)
        if revision == self.revision:
            return current
        after = PLACE.pack(revision + 1, 0)
        if current is not None and current[:PLACE_BYTES] < after:
            return current
        prefix = history_prefix(key)
        for _, version in self.iterate(prefix + after, after_prefix(prefix)):
            return version if version[:PLACE_BYTES] < after else None
        return None

    def walk(self, start: bytes, stop: bytes | None, revision: int) -> Iterator[tuple[bytes, bytes]]:
        """Key and version of all keys visible at `revision` (checked before) in [start, stop), in key order."""
        if stop is not None and start >= stop:
            return iter(())
        if revision == self.revision:
            if self._directories is not None and (known := self._known(self._directories, start, stop)) is not None:
                return iter(known)
            return ((key[1:], version) for key, version in self.iterate(b"c" + start, current_bound(stop)))
        return self._walk_at(start, stop, PLACE.pack(revision + 1, 0))

    def _known(self, directories: Directories, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes]] | None:
        """A listing from memory, or from that of the parent, which is made now if it is small."""
        known = directories.listing(start, stop)
        if known is None and (parent := directories.parent_to_list(start, stop)) is not None:
            found = self.iterate(b"c" + parent[0], b"c" + parent[1])
            pairs = [(key[1:], version) for key, version in islice(found, KEYS_MAX + 1)]
            if len(pairs) > KEYS_MAX:
                directories.found_large(parent[0])
            else:
                directories.remember(*parent, pairs)
                known = directories.listing(start, stop)
        return known

    def walked(self, start: bytes, stop: bytes | None, revision: int, pairs: list[tuple[bytes, bytes]]) -> None:
        """`walk` went to its end and gave `pairs`: the next may be spared it."""
        if self._directories is not None and revision == self.revision:
            self._directories.remember(start, stop, pairs)

    def _walk_at(self, start: bytes, stop: bytes | None, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        # Two ordered streams: keys of which something later is known decide for themselves, the others are as they are.
        past = self._history(start, stop, after)
        decided = next(past, None)
        for stored, current in self.iterate(b"c" + start, current_bound(stop)):
            key = stored[1:]
            while decided is not None and decided[0] < key:
                if decided[1] is not None:
                    yield decided[0], decided[1]
                decided = next(past, None)
            if decided is not None and decided[0] == key:
                if decided[1] is not None:
                    yield key, decided[1]
                decided = next(past, None)
            elif current[:PLACE_BYTES] < after:
                yield key, current
        while decided is not None:
            if decided[1] is not None:
                yield decided[0], decided[1]
            decided = next(past, None)

    def _history(self, start: bytes, stop: bytes | None, after: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        """Each key to which something happened at or after the place `after`, with its version before it, or None."""
        end = history_bound(stop)
        entries = self.iterate(history_bound(start), end)
        prefix = b""
        decided = False
        skipped = 0
        while (entry := next(entries, None)) is not None:
            stored, version = entry
            if stored[:-PLACE_BYTES] != prefix:
                prefix = stored[:-PLACE_BYTES]
                decided = False
                skipped = 0
            if not decided and stored[-PLACE_BYTES:] >= after:
                decided = True
                skipped = 0
                yield history_key(prefix), version if version[:PLACE_BYTES] < after else None
                continue
            skipped += 1
            if skipped == _SEEK_AFTER:
                entries = self.iterate(after_prefix(prefix) if decided else prefix + after, end)
                skipped = 0

    def record(self, place: bytes) -> bytes:
        """The record of a change that must be there.

        Raises:
            StoreDamaged: it is not.
        """
        record = self.get(b"r" + place)
        if record is None:
            revision, number = PLACE.unpack(place)
            raise StoreDamaged(f"the state has no record of change {number} of revision {revision}, but refers to it")
        return record

    def value(self, key: bytes, version: bytes) -> bytes:
        """The value of a version of `key`."""
        return self.record(version[:PLACE_BYTES])[RECORD_HEAD_BYTES + len(key) :]

    def values(self, pairs: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The values of pairs of key and version, in their order.

        Records are read in the order they were written: neighbours share a block, and in a store larger than its cache
        that is ten times as fast as the order of keys.
        """
        values = [b""] * len(pairs)
        for place in sorted(range(len(pairs)), key=lambda place: pairs[place][1]):
            key, version = pairs[place]
            values[place] = self.value(key, version)
        return values

    def fill(self, kv: KeyValue, key: bytes, version: bytes, value: bytes) -> None:
        """Set all fields of `kv` from a version of `key` and its value."""
        kv.key = key
        kv.mod_revision, _, kv.create_revision, kv.version, lease = VERSION.unpack(version)
        if lease:
            kv.lease = lease
        kv.value = value

    def records(self, revision: int) -> Iterator[tuple[bytes, bytes]]:
        """Place and record of what is within reach at the compact revision or changed since, up to `revision`.

        In order of place. The same on all replicas with equal compact revision, however far their sweeps are.
        """
        stored = self.iterate(RECORD, RECORD + PLACE.pack(revision + 1, 0))
        pairs = ((key[1:], record) for key, record in stored)
        return pairs if self.swept else self._within_reach(pairs)

    def _within_reach(self, pairs: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        compacted = PLACE.pack(max(self.compact_revision, 0), 0)
        for place, record in pairs:
            if place < compacted:
                flags, _, _, _, _, key_bytes, _ = RECORD_HEAD.unpack_from(record)
                key = record[RECORD_HEAD_BYTES : RECORD_HEAD_BYTES + key_bytes]
                version = None if flags & TOMBSTONE else self.find(key, self.compact_revision)
                if version is None or version[:PLACE_BYTES] != place:
                    continue
            yield place, record

    def changes(
        self,
        from_revision: int,
        limit: int,
        *,
        prev_kv: bool = False,
        wanted: Callable[[bytes], object] | None = None,
    ) -> Iterator[tuple[int, list[Event]]]:
        """What happened from a revision on, in order: each revision with its events, all of one revision together.

        Args:
            from_revision: 1 or more; the compact revision itself is still complete.
            limit: revisions at most.
            prev_kv: with the value just before, where it is not compacted.
            wanted: only events of keys for which this is true; a revision without any is given too, with none.
        Raises:
            Refused: COMPACTED, at once. A future revision is not refused: there is nothing to tell yet.
        """
        if from_revision < self.compact_revision:
            raise Refused(self.refusal(RefusalCode.COMPACTED))
        return self._changes(from_revision, limit, prev_kv, wanted)

    def _changes(
        self, from_revision: int, limit: int, prev_kv: bool, wanted: Callable[[bytes], object] | None
    ) -> Iterator[tuple[int, list[Event]]]:
        events: list[Event] = []
        revision = 0
        for stored, record in self.iterate(
            RECORD + PLACE.pack(from_revision, 0), RECORD + PLACE.pack(self.revision + 1, 0)
        ):
            mod_revision, number = PLACE.unpack_from(stored, 1)
            if mod_revision != revision:
                if revision:
                    yield revision, events
                    limit -= 1
                if limit <= 0:
                    return
                revision, events = mod_revision, []
            (key_bytes,) = RECORD_KEY_BYTES.unpack_from(record, RECORD_KEY_BYTES_AT)
            key = record[RECORD_HEAD_BYTES : RECORD_HEAD_BYTES + key_bytes]
            if wanted is None or wanted(key):
                events.append(self._event(mod_revision, number, record, key, prev_kv))
        if revision:
            yield revision, events

    def _event(self, mod_revision: int, number: int, record: bytes, key: bytes, prev_kv: bool) -> Event:
        flags, replaced, create_revision, version_number, lease, key_bytes, _ = RECORD_HEAD.unpack_from(record)
        event = Event()
        event.kv.key = key
        event.kv.mod_revision = mod_revision
        if flags & TOMBSTONE:
            event.type = Event.DELETE
            if flags & EXPIRED:
                event.expired = True
        else:
            event.kv.create_revision = create_revision
            event.kv.version = version_number
            event.kv.lease = lease
            event.kv.value = record[RECORD_HEAD_BYTES + key_bytes :]
        # Before the event means at revision mod_revision - 1, which a compaction may have taken. A first change that
        # replaced nothing had nothing before; a later one may follow a delete in the same revision.
        if prev_kv and (replaced != NO_PLACE or number) and mod_revision - 1 >= self.compact_revision:
            version = self.find(key, mod_revision - 1)
            if version is not None:
                self.fill(event.prev_kv, key, version, self.value(key, version))
        return event
