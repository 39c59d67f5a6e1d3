"""Which keys may be in a database: a Bloom filter over all of it, in memory.

Whoever creates a key asks first whether it is there, and LevelDB answers "no" only after a look at one table of each
level. It takes every such look for a sign that its tables lie badly, although its own filters make it cheap, and after
some four hundred of them merges the first of the tables into the next level ("seek compaction"; nothing turns it off).
With many new keys a second that is a merge for each memtable, of all the current keys there are. So the question is
not put to LevelDB where the answer is known.

    building --step ... step--> complete       while it is built every key may be there

A key is three bits in one word: the lower bits of its hash tell which word, others which bits. The table doubles as
keys come, by a copy of itself behind itself, so that what was found stays found. A filter never forgets: of a key that
was deleted it says "may be there".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

WORDS_MIN = 1 << 16
"""Half a MiB: enough for 130,000 keys."""
WORDS_MAX = 1 << 21
"""16 MiB. With more than four million keys it errs more often: in one of 20 with eight million."""
KEYS_A_WORD = 2
"""It errs in one of 500 keys when it is that full, in one of 80 after three doublings."""
_BITS_FROM = 40  # of the 64 of a hash, those that say which bits
_BITS = tuple(1 << a | 1 << b | 1 << (5 * a + 11 * b + 17) % 64 for a in range(64) for b in range(64))
_BITS_MASK = len(_BITS) - 1


class KeyFilter:
    """See the module."""

    __slots__ = ("_count", "_left", "_mask", "_room", "_words")

    def __init__(self, keys: Iterator[bytes]) -> None:
        """
        Args:
            keys: those that are there by now, for `step` to go through.
        """
        self._words = array("Q", bytes(8 * WORDS_MIN))
        self._mask = WORDS_MIN - 1
        self._room = WORDS_MIN * KEYS_A_WORD
        self._count = 0
        self._left: Iterator[bytes] | None = keys

    @property
    def complete(self) -> bool:
        """Whether it knows of all keys."""
        return self._left is None

    def step(self, budget: int) -> bool:
        """Take in the next `budget` of the keys that were there at first; whether there may be more."""
        if self._left is not None:
            keys = list(islice(self._left, budget))
            self.add_all(keys)
            if len(keys) < budget:
                self._left = None
        return self._left is not None

    def add_all(self, keys: Iterable[bytes]) -> None:
        """The keys are there from now on."""
        words, mask, count = self._words, self._mask, self._count
        for key in keys:
            place = hash(key)
            bits = _BITS[place >> _BITS_FROM & _BITS_MASK]
            place &= mask
            word = words[place]
            if word & bits != bits:
                words[place] = word | bits
                count += 1
                if count > self._room and mask < WORDS_MAX - 1:
                    self._words = words = words + words
                    self._mask = mask = 2 * mask + 1
                    self._room *= 2
        self._count = count

    def may_have(self, key: bytes) -> bool:
        """False only where the key is certainly not there."""
        if self._left is not None:
            return True
        place = hash(key)
        bits = _BITS[place >> _BITS_FROM & _BITS_MASK]
        return self._words[place & self._mask] & bits == bits
