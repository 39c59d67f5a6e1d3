"""Which keys may be in a database: a Bloom filter over all of it, in memory.

Whoever creates a key asks first whether it is there, and LevelDB answers "no" only after a look at one table of each
level. It takes every such look for a sign that its tables lie badly, although its own filters make it cheap, and after
some four hundred of them merges the first of the tables into the next level ("seek compaction"; nothing turns it off).
With many new keys a second that is a merge for each memtable, of all the current keys there are. So the question is
not put to LevelDB where the answer is known.

    building --step ... step--> complete       while it is built every key may be there

Two bits a key, of at least `BITS_A_KEY` for each; the table doubles as keys come, by a copy of itself behind itself: a
place is the lower bits of a hash, so that what was found stays found. A filter never forgets: of a key that was
deleted it says "may be there".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

BITS_MIN = 1 << 22
"""Half a MiB: enough for 130,000 keys."""
BITS_MAX = 1 << 27
"""16 MiB. With more than four million keys it errs more often: in one of 17 with eight million."""
BITS_A_KEY = 32
"""It errs in one of 270 keys when it is that full, in one of 50 after three doublings."""
_SECOND = 30  # where in the 64 bits of a hash the second place is


class KeyFilter:
    """See the module."""

    __slots__ = ("_bits", "_count", "_left", "_mask", "_room")

    def __init__(self, keys: Iterator[bytes]) -> None:
        """
        Args:
            keys: those that are there by now, for `step` to go through.
        """
        self._bits = bytearray(BITS_MIN >> 3)
        self._mask = BITS_MIN - 1
        self._room = BITS_MIN // BITS_A_KEY
        self._count = 0
        self._left: Iterator[bytes] | None = keys

    @property
    def complete(self) -> bool:
        """Whether it knows of all keys."""
        return self._left is None

    def step(self, budget: int) -> bool:
        """Take in the next `budget` of the keys that were there at first; whether there are more."""
        if self._left is not None:
            taken = self._count_of(islice(self._left, budget))
            if taken < budget:
                self._left = None
        return self._left is not None

    def _count_of(self, keys: Iterable[bytes]) -> int:
        count = 0
        for key in keys:
            self.add(key)
            count += 1
        return count

    def add(self, key: bytes) -> None:
        """The key is there from now on."""
        bits, mask, place = self._bits, self._mask, hash(key)
        other = place >> _SECOND & mask
        place &= mask
        if bits[place >> 3] >> (place & 7) & bits[other >> 3] >> (other & 7) & 1:
            return
        bits[place >> 3] |= 1 << (place & 7)
        bits[other >> 3] |= 1 << (other & 7)
        self._count += 1
        if self._count > self._room and mask < BITS_MAX - 1:
            self._bits = bits + bits
            self._mask = 2 * mask + 1
            self._room *= 2

    def may_have(self, key: bytes) -> bool:
        """False only where the key is certainly not there."""
        if self._left is not None:
            return True
        bits, mask, place = self._bits, self._mask, hash(key)
        other = place >> _SECOND & mask
        place &= mask
        return bits[place >> 3] >> (place & 7) & bits[other >> 3] >> (other & 7) & 1 == 1
