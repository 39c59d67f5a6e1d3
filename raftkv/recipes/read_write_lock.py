"""A lock for many readers or one writer, in the order in which they came: nobody starves.

    lock = ReadWriteLock(client, "catalogue")
    async with lock.read():
        ...
    async with lock.write() as held:
        await client.put("catalogue", text, guards=[held.guard()])

Keys are `<name>/.rwlock/read/<lease id in hex>` and `.../write/...`. A reader holds when no writer is older, and waits
for the youngest of them; a writer holds when nobody is older, and waits for the one before it. The readers
between two writers are woken together, because together they hold.
"""

from __future__ import annotations

from raftkv.client import AsyncClient
from raftkv.client.keys import Text
from raftkv.recipes.holding import Holding, Place
from raftkv.recipes.names import prefix_of


class ReadWriteLock:
    """A read-write lock on a name.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name share it.
        ttl: seconds after which a holder that is not heard of any more has lost it.
    """

    def __init__(self, client: AsyncClient, name: Text, ttl: float = 10.0) -> None:
        self._client = client
        self._name = name
        self._root = prefix_of(name, "rwlock")
        self._ttl_s = ttl

    def read(self, *, owner: Text = b"", timeout: float | None = None) -> ReadLock:
        """The reading side. Arguments as of `write`."""
        return ReadLock(self._client, self._root, self._name, self._ttl_s, owner, timeout)

    def write(self, *, owner: Text = b"", timeout: float | None = None) -> WriteLock:
        """The writing side: `async with lock.write() as held:`, or `await lock.write().acquire()`.

        Args:
            owner: stored as the key's value, for people to see.
            timeout: seconds, for entering; None waits for ever.
        """
        return WriteLock(self._client, self._root, self._name, self._ttl_s, owner, timeout)


class _Side(Holding):
    _what = "read-write lock"

    def __init__(
        self, client: AsyncClient, root: bytes, name: Text, ttl_s: float, owner: Text, timeout: float | None
    ) -> None:
        super().__init__(client, name, ttl_s, owner, timeout)
        self._root = root


class ReadLock(_Side):
    """Held together with other readers; made by `ReadWriteLock.read`."""

    async def _enter(self, place: Place) -> None:
        writers = self._root + b"write/"
        if await place.join(self._root + b"read/", writers) == 0:
            return
        while (found := await place.before(writers, 1)).items:
            await place.wait(found.items[0].key, found.revision)
        # No older writer can come any more. What is left to be seen is that our own key lived through it.
        await place.look()


class WriteLock(_Side):
    """Held alone; made by `ReadWriteLock.write`. Its fence is larger than those of all who held it before."""

    async def _enter(self, place: Place) -> None:
        if await place.join(self._root + b"write/", self._root) == 1:
            return
        while True:
            found = await place.before(self._root, 2)
            place.check_mine(found)
            if len(found) == 1:
                return
            await place.wait(found.items[1].key, found.revision)
