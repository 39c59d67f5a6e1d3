"""Leases: keys attached to one vanish together when it is revoked or runs out.

What a lease is, is replicated; how much time it has left is not: deadlines live in the memory of the leader, which
proposes LEASE_EXPIRE. What it believed when it was deposed harms nobody, because such a command is of no effect unless
its entry is of the proposer's own term. Checkpoints tell the next leader what was left.

Both directions are stored: a version names its lease, and `l/k` lists the keys of a lease (written by the overlay with
the key itself). Invariants: they agree, and every lease that a key names exists.    See: reliability rule Z7, S6.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse
from raftkv._pb.state_pb2 import LeaseCheckpoints, LeaseExpire
from raftkv.state.attachments import Attachments
from raftkv.state.keys import EXPIRED, LEASE, LEASE_END, LEASE_ID, LEASE_KEY, LEASE_RECORD, TOMBSTONE
from raftkv.state.mvcc import Source
from raftkv.state.overlay import Overlay
from raftkv.state.results import RefusalCode
from raftkv.state.store import KeyValueStore

TTL_MS_MIN = 2_000
"""etcd's least at its default settings. A node with a longer election timeout asks for more before it proposes."""
TTL_S_MAX = 9_000_000_000
"""etcd's; beyond it a request is refused where it arrives."""
TTL_MS_MAX = TTL_S_MAX * 1000

_LEASE_KEY_HEAD = len(LEASE_KEY) + LEASE_ID.size


class LeaseRecord(NamedTuple):
    """One lease, as replicated."""

    ttl_ms: int
    remaining_ms: int
    """What was left at the last checkpoint; 0: the whole time, because it has been kept alive or never checkpointed."""


class LeaseChange(enum.Enum):
    """What happened to a lease."""

    GRANTED = enum.auto()
    REVOKED = enum.auto()
    EXPIRED = enum.auto()
    CHECKPOINTED = enum.auto()


LeaseEvent = tuple[LeaseChange, int]


def granted_ttl_ms(request: LeaseGrantRequest, ttl_ms_min: int = TTL_MS_MIN) -> int:
    """The time to live that a grant gives: what is asked for, within bounds. Zero and below get the least, as in etcd.

    Args:
        ttl_ms_min: of a node that wants more than the state's own bound.
    """
    asked = request.ttl_ms or request.TTL * 1000
    return min(max(asked, ttl_ms_min, TTL_MS_MIN), TTL_MS_MAX)


def keys_of(source: Source, lease: int) -> list[bytes]:
    """The keys attached to a lease, in order."""
    if lease <= 0:
        return []
    prefix = LEASE_KEY + LEASE_ID.pack(lease)
    end = LEASE_KEY + (lease + 1).to_bytes(LEASE_ID.size, "big")  # what follows the greatest id is no id any more
    return [stored[_LEASE_KEY_HEAD:] for stored, _ in source.iterate(prefix, end)]


class Leases:
    """All leases of one replica. A command that is refused gives the code of its refusal and has changed nothing."""

    def __init__(self, store: KeyValueStore, attachments: Attachments) -> None:
        self.records: dict[int, LeaseRecord] = {
            LEASE_ID.unpack_from(key, len(LEASE))[0]: LeaseRecord(*LEASE_RECORD.unpack(value))
            for key, value in store.iterate(LEASE, LEASE_END)
        }
        """By id, each as it is in the store with all that is applied."""
        self._attachments = attachments
        self._events: list[LeaseEvent] | None = None  # None: nobody has asked yet, so nothing is gathered

    def keys_of(self, source: Source, lease: int) -> list[bytes]:
        """As the function, from memory where that is known."""
        known = self._attachments.keys_of(lease)
        return keys_of(source, lease) if known is None else known

    def take_events(self) -> list[LeaseEvent]:
        """What happened since the last call, in order; gathered from the first call on."""
        events = self._events or []
        self._events = []
        return events

    def grant(self, overlay: Overlay, request: LeaseGrantRequest) -> LeaseGrantResponse | RefusalCode:
        """Create a lease under the id that the proposer chose."""
        lease = request.ID
        if lease <= 0:
            return RefusalCode.MALFORMED  # 0 should have been replaced, and a negative one refused, by the proposer
        if lease in self.records:
            return RefusalCode.LEASE_EXISTS
        ttl_ms = granted_ttl_ms(request)
        self._set(overlay, lease, LeaseRecord(ttl_ms, 0), LeaseChange.GRANTED)
        self._attachments.granted(lease)
        response = LeaseGrantResponse(ID=lease, TTL=ttl_ms // 1000, ttl_ms=ttl_ms)
        response.header.revision = overlay.revision
        return response

    def revoke(self, overlay: Overlay, request: LeaseRevokeRequest) -> LeaseRevokeResponse | RefusalCode:
        """Take a lease away and delete its keys, in one revision, which the caller commits."""
        if request.ID not in self.records:
            return RefusalCode.LEASE_NOT_FOUND
        self._remove(overlay, request.ID, LeaseChange.REVOKED)
        response = LeaseRevokeResponse()
        response.header.revision = overlay.revision + 1 if overlay.number else overlay.revision
        return response

    def expire(self, overlay: Overlay, request: LeaseExpire, entry_term: int) -> RefusalCode | None:
        """Take away leases that have run out. The keys of each are deleted in a revision of its own, as in etcd."""
        if request.proposer_term != entry_term:
            return RefusalCode.STALE_TERM
        for lease in request.ids:
            if lease in self.records:
                self._remove(overlay, lease, LeaseChange.EXPIRED)
                overlay.commit()
        return None

    def checkpoint(self, overlay: Overlay, request: LeaseCheckpoints, entry_term: int) -> RefusalCode | None:
        """Note what leases have left."""
        if request.proposer_term != entry_term:
            return RefusalCode.STALE_TERM
        for each in request.leases:
            record = self.records.get(each.id)
            if record is not None:
                # A whole time is stored as none: there is nothing to remember.
                left = each.remaining_ms if 0 < each.remaining_ms < record.ttl_ms else 0
                if left != record.remaining_ms:
                    self._set(overlay, each.id, LeaseRecord(record.ttl_ms, left), LeaseChange.CHECKPOINTED)
        return None

    def _set(self, overlay: Overlay, lease: int, record: LeaseRecord, change: LeaseChange) -> None:
        self.records[lease] = record
        key = LEASE + LEASE_ID.pack(lease)
        value = LEASE_RECORD.pack(*record)
        overlay.pending[key] = value
        overlay.effects.append(key + value)
        if self._events is not None:
            self._events.append((change, lease))

    def _remove(self, overlay: Overlay, lease: int, change: LeaseChange) -> None:
        del self.records[lease]
        flags = TOMBSTONE | EXPIRED if change is LeaseChange.EXPIRED else TOMBSTONE
        key = LEASE + LEASE_ID.pack(lease)
        overlay.pending[key] = None
        overlay.effects.append(key + bytes((flags,)))
        for attached in self.keys_of(overlay, lease):
            version = overlay.get(b"c" + attached)
            assert version is not None, f"key {attached!r} of lease {lease:x} is not there"
            overlay.delete(attached, version, flags)
        self._attachments.ended(lease)
        if self._events is not None:
            self._events.append((change, lease))
