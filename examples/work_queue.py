"""A work queue: a job that fails is done again, and each result is written exactly once.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient, LockTimeout, Put
from raftkv.recipes import Queue

failed: set[str] = set()


async def worker(client: AsyncClient) -> int:
    queue = Queue(client, "examples/pictures")
    done = 0
    while True:
        try:
            async with queue.take(timeout=1) as job:
                name = job.item.text
                if name.endswith("3") and name not in failed:
                    failed.add(name)
                    raise RuntimeError(f"{name} fails the first time")
                # The job goes and its result comes in one transaction: neither is ever there without the other.
                await job.done(Put(f"examples/pictures/{name}", "resized"))
                done += 1
        except RuntimeError as error:
            print(f"{error}: it is back in the queue")
        except LockTimeout:
            if not await queue.size():  # else somebody works on the last ones still, and may fail
                return done


async def main() -> None:
    async with AsyncClient() as client:
        await client.delete("examples/pictures/", prefix=True)
        queue = Queue(client, "examples/pictures")
        for number in range(12):
            await queue.put(f"picture-{number}")
        counts = await asyncio.gather(*(worker(client) for _ in range(3)))
        results = await client.range("examples/pictures/picture-", prefix=True)
        print(f"{sum(counts)} jobs done, {len(results)} results, {await queue.size()} left")
        assert sum(counts) == len(results) == 12
        assert all(item.version == 1 for item in results)


asyncio.run(main())
