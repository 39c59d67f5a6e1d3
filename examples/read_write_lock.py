"""A catalogue of two keys that change together; readers never see half a change.

(For two keys one transaction would do: `client.txn()`. The lock is for what takes longer.)
Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient
from raftkv.recipes import ReadWriteLock

ROUNDS = 5


async def publish(client: AsyncClient) -> None:
    for _ in range(ROUNDS):
        async with ReadWriteLock(client, "examples/catalogue").write() as held:
            for part in ("titles", "prices"):
                # The guard: were the lock lost in a long pause, this would be refused instead of mixing editions.
                await client.put(f"examples/catalogue/{part}", f"edition {held.fence}", guards=[held.guard()])


async def read(client: AsyncClient) -> int:
    for _ in range(ROUNDS):
        async with ReadWriteLock(client, "examples/catalogue").read():
            titles = await client.get("examples/catalogue/titles")
            await asyncio.sleep(0.01)
            prices = await client.get("examples/catalogue/prices")
            assert (titles and titles.value) == (prices and prices.value), "half an edition"
    return ROUNDS


async def main() -> None:
    async with AsyncClient() as client:
        await client.delete("examples/catalogue/", prefix=True)
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read(client)) for _ in range(4)]
            group.create_task(publish(client))
    print(f"{sum(task.result() for task in readers)} reads, none of them saw half an edition")


asyncio.run(main())
