"""What is in directories that were listed lately: their live keys and versions, kept in memory as they change.

Whoever takes a lock makes a key below its name, lists what is there, and deletes it in the end. LevelDB keeps what was
deleted until it compacts, and a listing steps over all of it, that of other names behind it too, until it meets a key
that lives: on a cluster that hands out locks all day this is more than all else that a lock costs. A directory is a
prefix that ends in "/"; a listing is remembered while it is small. Where a directory is new its parent is listed, if
that is small: then the next new name beside it is known to be free.

A cache and nothing else: what it answers is what the store, with the changes that are not yet written, would.
"""

from __future__ import annotations

DIRECTORIES_MAX = 256
KEYS_MAX = 128
"""In one directory; a larger one is read from the store."""

_SLASH = b"/"


class Directories:
    """See the module. `put` and `delete` have to be told of every change of a live key."""

    __slots__ = ("_large", "_listed")

    def __init__(self) -> None:
        self._listed: dict[bytes, dict[bytes, bytes]] = {}  # directory -> key -> version; the oldest first
        self._large: dict[bytes, None] = {}  # directories with more than KEYS_MAX keys; the oldest first

    @property
    def remembers_any(self) -> bool:
        """Whether any listing is remembered: while none is, `put` and `delete` need not be told of anything."""
        return bool(self._listed)

    def listing(self, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes]] | None:
        """The pairs of key and version in [start, stop), in key order; None where that is not known."""
        if stop != _end(start):
            return None
        place = start
        while place:
            found = self._listed.get(place)
            if found is not None:
                return sorted([pair for pair in found.items() if pair[0].startswith(start)])
            place = _parent(place)
        return None

    def parent_to_list(self, start: bytes, stop: bytes | None) -> tuple[bytes, bytes] | None:
        """The parent of the directory [start, stop) as an interval, if listing it may spare later ones."""
        if not start.endswith(_SLASH) or stop != _end(start):
            return None
        parent = _parent(start)
        return (parent, _end(parent)) if parent and parent not in self._large else None

    def found_large(self, directory: bytes) -> None:
        """It has too many keys to be remembered: do not list it for others' sake again."""
        if len(self._large) >= DIRECTORIES_MAX:
            del self._large[next(iter(self._large))]
        self._large[directory] = None

    def remember(self, start: bytes, stop: bytes | None, pairs: list[tuple[bytes, bytes]]) -> None:
        """Keep a complete listing of [start, stop), if that is a small directory and not known already."""
        if stop != _end(start):
            return
        if len(pairs) > KEYS_MAX or not start.endswith(_SLASH) or self.listing(start, stop) is not None:
            return
        if len(self._listed) >= DIRECTORIES_MAX:
            del self._listed[next(iter(self._listed))]
        self._listed[start] = dict(pairs)

    def put(self, key: bytes, version: bytes) -> None:
        """A key has a new version."""
        listed = self._listed
        if not listed:
            return
        place = key.find(_SLASH) + 1
        while place:
            found = listed.get(key[:place])
            if found is not None:
                found[key] = version
                if len(found) > KEYS_MAX:
                    del listed[key[:place]]
                    self.found_large(key[:place])
            place = key.find(_SLASH, place) + 1

    def delete(self, key: bytes) -> None:
        """A key is gone."""
        listed = self._listed
        if not listed:
            return
        place = key.find(_SLASH) + 1
        while place:
            found = listed.get(key[:place])
            if found is not None:
                found.pop(key, None)
            place = key.find(_SLASH, place) + 1

    def forget(self) -> None:
        """Something was undone: nothing is known."""
        self._listed.clear()


def _end(directory: bytes) -> bytes:
    """Where the keys below a directory end: "/" is followed by "0"."""
    return directory[:-1] + b"0"


def _parent(directory: bytes) -> bytes:
    """The directory in which it lies; empty at the top."""
    return directory[: directory.rfind(_SLASH, 0, -1) + 1]
