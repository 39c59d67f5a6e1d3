"""A semaphore: at most so many hold it at a time, in the order in which they came.

    async with Semaphore(client, "database", 5).permit() as permit:
        ...                                       # cancelled, and left with LockLost, when the permit is lost

Keys are `<name>/.semaphore/place/<lease id in hex>`; the oldest `permits` of them hold. Waking is a chain:

    a holder goes --> the first waiter, who alone watches all places, looks, holds, and marks its key
                  --> the second, who watched that key, looks and is the first waiter now

So each permit that comes free wakes two, however many wait; a waiter that dies is passed over with its key.
"""

from __future__ import annotations

from typing import Final

from raftkv.client import AsyncClient, Key, KeyValue, Put
from raftkv.client.keys import Text
from raftkv.client.txn import Branches
from raftkv.recipes.holding import Holding, Place
from raftkv.recipes.names import agree, check_count, prefix_of
from raftkv.recipes.waiting import is_any

PERMITS_MAX: Final = 10_000  # a look reads that many keys


class Semaphore:
    """A semaphore on a name.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name share it.
        permits: how many may hold it, 1 to 10,000; the same for all. Who comes with another number gets ConfigError.
        ttl: seconds after which a holder that is not heard of any more has lost its permit.
    """

    def __init__(self, client: AsyncClient, name: Text, permits: int, ttl: float = 10.0) -> None:
        self._client = client
        self._name = name
        self._root = prefix_of(name, "semaphore")
        self._permits = check_count("permits", permits, PERMITS_MAX)
        self._ttl_s = ttl
        self._agreed = False

    def permit(self, *, owner: Text = b"", timeout: float | None = None) -> Permit:
        """One permit: `async with semaphore.permit() as permit:`, or `await semaphore.permit().acquire()`.

        Args:
            owner: stored as the key's value, for people to see.
            timeout: seconds, for entering; None waits for ever.
        """
        return Permit(self._client, self, self._name, self._ttl_s, owner, timeout)

    @property
    def permits(self) -> int:
        """How many may hold it."""
        return self._permits

    @property
    def places(self) -> bytes:
        """What the keys of holders and waiters begin with."""
        return self._root + b"place/"

    async def agree(self) -> None:
        """See that all use the same number of permits. Raises ConfigError where they do not."""
        if not self._agreed:
            await agree(self._client, self._root + b"permits", self._permits, "permits")
            self._agreed = True

    async def holders(self) -> tuple[KeyValue, ...]:
        """Who holds it now, the oldest first; the values are their `owner`."""
        found = await self._client.range(
            self.places, prefix=True, sort="create", limit=self._permits, serializable=False
        )
        return found.items


class Permit(Holding):
    """One permit of a semaphore; made by `Semaphore.permit`. Its fence is larger than those of all who came before."""

    _what = "semaphore"

    def __init__(
        self,
        client: AsyncClient,
        semaphore: Semaphore,
        name: Text,
        ttl_s: float,
        owner: Text,
        timeout: float | None,
    ) -> None:
        super().__init__(client, name, ttl_s, owner, timeout)
        self._semaphore = semaphore

    async def _enter(self, place: Place) -> None:
        semaphore = self._semaphore
        await semaphore.agree()
        places, permits = semaphore.places, semaphore.permits
        if await place.join(places, places) <= permits:
            return
        while True:
            found = await place.before(places, permits + 2)
            place.check_mine(found)
            if len(found) <= permits:
                break
            if len(found) == permits + 1:
                # The first waiter: whichever holder goes, it is our turn.
                await place.wait(places, found.revision, prefix=True)
            else:
                # The one before us goes, or marks its key because it holds now.
                await place.wait(found.items[1].key, found.revision, wanted=is_any)
        mine = Key(place.key).create_revision == place.fence
        marked = await place.commit(Branches((mine,), (Put(place.key, place.value, ignore_lease=True),)))
        if not marked.succeeded:
            raise place.error()
