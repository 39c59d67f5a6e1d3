"""Which keys are attached to leases that were granted lately, kept in memory as they change.

When a lease ends its keys are deleted. To find them in the store means to step over all that was deleted there and is
not yet compacted, which on a cluster that hands out locks all day is more than all else that ends a lease.

A cache and nothing else: it says what the store, with the changes that are not yet written, has.
"""

from __future__ import annotations

LEASES_MAX = 10_000
KEYS_MAX = 64
"""Of one lease; of one with more the keys are read from the store."""


class Attachments:
    """See the module. `attach` and `detach` have to be told of every change."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: dict[int, dict[bytes, None]] = {}  # by lease, the oldest first

    def granted(self, lease: int) -> None:
        """A lease begins; it has no keys."""
        if len(self._keys) >= LEASES_MAX:
            del self._keys[next(iter(self._keys))]
        self._keys[lease] = {}

    def ended(self, lease: int) -> None:
        """A lease is no more."""
        self._keys.pop(lease, None)

    def attach(self, lease: int, key: bytes) -> None:
        """A key is attached to the lease."""
        found = self._keys.get(lease)
        if found is not None:
            found[key] = None
            if len(found) > KEYS_MAX:
                del self._keys[lease]

    def detach(self, lease: int, key: bytes) -> None:
        """A key is not attached to the lease any more."""
        found = self._keys.get(lease)
        if found is not None:
            found.pop(key, None)

    def keys_of(self, lease: int) -> list[bytes] | None:
        """The keys of the lease, in order; None where that is not known."""
        found = self._keys.get(lease)
        return None if found is None else sorted(found)

    def forget(self) -> None:
        """Something was undone: nothing is known."""
        self._keys.clear()
