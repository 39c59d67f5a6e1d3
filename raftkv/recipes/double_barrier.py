"""A double barrier: so many parties begin together, and leave together.

    async with DoubleBarrier(client, "round-1", parties=3) as party:
        ...                            # begins when all three are there; is left when all three are done

Keys are `<name>/.double-barrier/party/<lease id in hex>`. Whoever makes them `parties` puts `.../ready`, which all
others watch. On leaving, the oldest party stays until the last, and waits for the youngest; the others delete their
keys and wait for the oldest's: as many wake-ups as there are parties, not their square. The first party of the next
round removes `.../ready` in the transaction in which it comes.

A party that dies leaves with its lease. A party that comes when all are there, but one of them died, takes its place.
"""

from __future__ import annotations

from typing import Final, Literal

from raftkv.client import AsyncClient, ConditionFailed, Delete, Get, Key, Put, RangeResult
from raftkv.client.keys import Text
from raftkv.client.txn import Branches
from raftkv.recipes.holding import Holding, Place
from raftkv.recipes.names import agree, check_count, prefix_of
from raftkv.recipes.waiting import changed, is_delete, is_put

PARTIES_MAX: Final = 10_000


class DoubleBarrier(Holding):
    """One party at a double barrier; `async with`, or `acquire` and `leave`.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name meet.
        parties: how many meet, 1 to 10,000; the same for all. Who comes with another number gets ConfigError.
        ttl: seconds after which a party that is not heard of any more has left.
        owner: stored as the key's value, for people to see.
        timeout: seconds, for entering; None waits for ever.

    When the lease is lost inside, the body is cancelled and left with LockLost; LockTimeout when the others did not
    come in time; ConditionFailed (code BARRIER_FULL) when there are enough already. A body that raises leaves at once,
    without waiting for the others.
    """

    _what = "double barrier"

    def __init__(
        self,
        client: AsyncClient,
        name: Text,
        parties: int,
        ttl: float = 10.0,
        *,
        owner: Text = b"",
        timeout: float | None = None,
    ) -> None:
        super().__init__(client, name, ttl, owner, timeout)
        root = prefix_of(name, "double-barrier")
        self._parties = check_count("parties", parties, PARTIES_MAX)
        self._number = root + b"parties"
        self._ready = root + b"ready"
        self._prefix = root + b"party/"
        self._round = 0  # the create revision of what said that all are there

    async def _enter(self, place: Place) -> None:
        await agree(self._client, self._number, self._parties, "parties")
        count = await self._come(place)
        if count > self._parties:
            error = ConditionFailed(
                f"double barrier {self._name!r} has its {self._parties} parties already", code="BARRIER_FULL"
            )
            error.key = place.key
            raise error
        if count == self._parties:
            mine = Key(place.key).create_revision == place.fence  # so that it cannot be of the next round
            await place.commit(Branches((mine,), (Put(self._ready, place.key),)))
        found = await self._client.range(self._ready, keys_only=True, serializable=False)
        while not found.items:
            await place.wait(self._ready, found.revision, wanted=is_put)
            found = await self._client.range(self._ready, keys_only=True, serializable=False)
        self._round = found.items[0].create_revision
        await place.look()

    async def _come(self, place: Place) -> int:
        """Put our key, and remove what an earlier round left; how many are there."""
        place.key = self._prefix + b"%x" % place.lease.id
        put = Put(place.key, place.value, lease=place.lease.id)
        looks = (Get(place.key, keys_only=True), Get(self._prefix, prefix=True, count_only=True))
        nobody = Key(self._prefix, prefix=True).create_revision == 0
        result = await place.commit(Branches((nobody,), (Delete(self._ready), put, *looks), (put, *looks)))
        found, counts = result.results[-2:]
        assert isinstance(found, RangeResult), "a transaction answers each operation in its kind"
        assert isinstance(counts, RangeResult), "a transaction answers each operation in its kind"
        place.took(found)
        return counts.count

    async def leave(self) -> None:
        """Leave, and wait until all others have left.

        Raises:
            LockLost: the lease was lost before or while waiting.
            Unavailable: the cluster could not be asked.
        """
        place = self._present()
        self._place = None
        try:
            place.check()
            await self._leave(place)
        except BaseException:
            self._failed_to_leave(place)
            raise

    async def _leave(self, place: Place) -> None:
        while True:
            oldest, youngest = await self._party("create"), await self._party("-create")
            if not oldest.items or not youngest.items:
                break  # our own key is gone
            if oldest.items[0].key != place.key or youngest.items[0].key == place.key:
                break
            await place.wait(youngest.items[0].key, youngest.revision)
        place.check()
        await place.leave()
        while (oldest := await self._party("create")).items:
            # Read after it: if our round is still on, that party was of our round.
            ready = await self._client.get(self._ready, serializable=False)
            if ready is None or ready.create_revision != self._round:
                return
            await changed(self._client.watch(oldest.items[0].key, start_revision=oldest.revision + 1), is_delete)

    async def _party(self, sort: Literal["create", "-create"]) -> RangeResult:
        """The oldest or the youngest party, at most one."""
        return await self._client.range(
            self._prefix, prefix=True, sort=sort, limit=1, keys_only=True, serializable=False
        )
