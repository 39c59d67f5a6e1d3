"""What is in directories that were listed lately: their live keys and versions, kept in memory as they change.

Whoever takes a lock makes a key below its name, lists what is there, and deletes it in the end. LevelDB keeps what was
deleted until it compacts, and each listing steps over all of it, so a lock that changes hands often becomes slow.
A directory is a prefix that ends in "/"; a listing of it is remembered while it is small.

A cache and nothing else: what it answers is what the store, with the changes that are not yet written, would.
"""

from __future__ import annotations

DIRECTORIES_MAX = 256
KEYS_MAX = 128
"""In one directory; a larger one is read from the store."""

_SLASH = b"/"


class Directories:
    """See the module. `put` and `delete` have to be told of every change of a live key."""

    __slots__ = ("_listed",)

    def __init__(self) -> None:
        self._listed: dict[bytes, dict[bytes, bytes]] = {}  # directory -> key -> version; the oldest first

    def listing(self, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes]] | None:
        """The pairs of key and version in [start, stop), in key order; None where that is not known."""
        found = self._listed.get(start)
        if found is None or stop != _end(start):
            return None
        return sorted(found.items())

    def remember(self, start: bytes, stop: bytes | None, pairs: list[tuple[bytes, bytes]]) -> None:
        """Keep a complete listing of [start, stop), if that is a small directory."""
        if len(pairs) > KEYS_MAX or not start.endswith(_SLASH) or stop != _end(start):
            return
        if start not in self._listed and len(self._listed) >= DIRECTORIES_MAX:
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
