"""What the state machine needs from storage, and the in-memory form of it.

A store is an ordered map of bytes to bytes whose only change is one atomic batch. `raftkv.storage.StateStore` is the
LevelDB form; `MemoryStore` is the one of the simulator and of the tests. The contracts in tests/unit/storage run
against both, so that the fake can be trusted.

Durability is no part of the interface: `write` is not synced. After a crash a store holds the effects of some prefix of
its writes, each of them whole, and the applied index inside tells which. The simulator plays that with `copy()`: it
keeps a copy from when it pretended to sync and goes back to it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Protocol


class StoreDamaged(Exception):
    """The store contradicts itself: something that must be there is not, or cannot be decoded.

    The node cannot trust its state any more and must stop. Never a consequence of a request.
    """


class KeyValueView(Protocol):
    """A consistent read view: it does not see writes made after it was taken."""

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        ...

    def iterate(self, start: bytes, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Pairs with start <= key < stop in key order (`stop` None: to the end), or from the end if `reverse`."""
        ...

    def close(self) -> None:
        """Give back what the view holds. Using it afterwards is an error."""
        ...


class KeyValueStore(Protocol):
    """An ordered map of bytes to bytes, changed by atomic batches."""

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        ...

    def iterate(self, start: bytes, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """As `KeyValueView.iterate`; nothing is written while such an iteration is going on."""
        ...

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes]) -> None:
        """All puts and deletes as one atomic batch, not synced. No key is in both. Deleting what is not there is fine.

        Raises:
            An exception of the storage package that means the node must stop.
        """
        ...

    def view(self) -> KeyValueView:
        """A consistent view of now, that may be read in another thread while writes go on."""
        ...


class MemoryStore:
    """A `KeyValueStore` in memory: a dict and the sorted list of its keys, copied on the first write after sharing."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []
        self._shared = False  # a view or a copy refers to _values and _keys: copy them before changing them
        self._writes = 0

    def get(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def iterate(self, start: bytes, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        writes = self._writes
        for pair in _iterate(self._values, self._keys, start, stop, reverse):
            # LevelDB would go on with what it saw at first; nobody may build on that, so the fake is strict.
            assert writes == self._writes, "the store was written during an iteration; take a view"
            yield pair

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes]) -> None:
        if self._shared:
            self._values = dict(self._values)
            self._keys = list(self._keys)
            self._shared = False
        self._writes += 1
        values, keys = self._values, self._keys
        for key, value in puts:
            if key not in values:
                insort(keys, key)
            values[key] = value
        for key in deletes:
            if values.pop(key, None) is not None:
                del keys[bisect_left(keys, key)]

    def view(self) -> MemoryView:
        self._shared = True
        return MemoryView(self._values, self._keys)

    def copy(self) -> MemoryStore:
        """An independent store with the same content. Cheap: the content is shared until either is written."""
        other = MemoryStore()
        other._values, other._keys = self._values, self._keys
        self._shared = other._shared = True
        return other

    def __len__(self) -> int:
        return len(self._keys)


class MemoryView:
    """What a `MemoryStore` held when the view was taken."""

    def __init__(self, values: dict[bytes, bytes], keys: list[bytes]) -> None:
        self._values = values
        self._keys = keys

    def get(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def iterate(self, start: bytes, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        return _iterate(self._values, self._keys, start, stop, reverse)

    def close(self) -> None:
        self._values, self._keys = {}, []


def _iterate(
    values: dict[bytes, bytes], keys: list[bytes], start: bytes, stop: bytes | None, reverse: bool
) -> Iterator[tuple[bytes, bytes]]:
    low = bisect_left(keys, start)
    high = len(keys) if stop is None else bisect_left(keys, stop)
    places = range(high - 1, low - 1, -1) if reverse else range(low, high)
    for place in places:
        key = keys[place]
        yield key, values[key]
