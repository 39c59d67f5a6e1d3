"""Which watches a key belongs to, found without looking at each: by the key, by prefixes, by ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftkv.server.watch import Watch


class Matcher:
    """Finds the watches of a key without looking at each: by the key, by each length of prefix in use, by ranges."""

    __slots__ = ("_exact", "_lengths", "_prefixes", "_ranges", "_sizes")

    def __init__(self, watches: Iterable[Watch] = ()) -> None:
        self._exact: dict[bytes, dict[Watch, None]] = {}
        self._prefixes: dict[bytes, dict[Watch, None]] = {}
        self._sizes: Counter[int] = Counter()  # of the prefixes in use
        self._lengths: tuple[int, ...] = ()
        self._ranges: dict[tuple[bytes, bytes | None], dict[Watch, None]] = {}
        for watch in watches:
            self.add(watch)

    def add(self, watch: Watch) -> None:
        """Find this one too."""
        key, stop = watch.key, watch.stop
        if stop == key + b"\0":
            self._exact.setdefault(key, {})[watch] = None
        elif (prefix := prefix_of(key, stop)) is not None:
            found = self._prefixes.setdefault(prefix, {})
            if not found:
                self._sizes[len(prefix)] += 1
                self._lengths = tuple(self._sizes)
            found[watch] = None
        else:
            self._ranges.setdefault((key, stop), {})[watch] = None

    def discard(self, watch: Watch) -> None:
        """Find it no more."""
        key, stop = watch.key, watch.stop
        if stop == key + b"\0":
            drop(self._exact, key, watch)
        elif (prefix := prefix_of(key, stop)) is not None:
            if drop(self._prefixes, prefix, watch):
                self._sizes[len(prefix)] -= 1
                if not self._sizes[len(prefix)]:
                    del self._sizes[len(prefix)]
                    self._lengths = tuple(self._sizes)
        else:
            drop(self._ranges, (key, stop), watch)

    def touches(self) -> Callable[[bytes], bool]:
        """What says whether a key belongs to any watch, as cheaply as can be: it is asked for each change."""
        exact, prefixes, lengths, ranges = self._exact, self._prefixes, self._lengths, self._ranges
        if not lengths and not ranges:
            return exact.__contains__
        if len(lengths) == 1 and not ranges:
            (length,) = lengths
            return lambda key: key[:length] in prefixes or key in exact

        def touches(key: bytes) -> bool:
            if key in exact or any(key[:length] in prefixes for length in lengths):
                return True
            return any(start <= key and (stop is None or key < stop) for start, stop in ranges)

        return touches

    def match(self, key: bytes) -> Sequence[Watch]:
        """All watches that `key` belongs to."""
        found = list(self._exact.get(key, ()))
        for length in self._lengths:
            if len(key) >= length and (watches := self._prefixes.get(key[:length])):
                found.extend(watches)
        for (start, stop), watches in self._ranges.items():
            if start <= key and (stop is None or key < stop):
                found.extend(watches)
        return found


def prefix_of(key: bytes, stop: bytes | None) -> bytes | None:
    """The prefix that exactly the keys in [key, stop) have; None where there is none."""
    if stop is None:
        return b"" if key in (b"", b"\0") else None
    stem = key.rstrip(b"\xff")
    if stem and stop == stem[:-1] + bytes((stem[-1] + 1,)):
        return key
    return None


def prefix_end(prefix: bytes) -> bytes:
    """The `range_end` that makes a range of all keys with this prefix."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"


def drop(places: dict[Any, dict[Watch, None]], place: object, watch: Watch) -> bool:
    """Take a watch out of its place; whether that was its last one."""
    watches = places[place]
    del watches[watch]
    if watches:
        return False
    del places[place]
    return True
