"""Seven workers, one database, and never more than three of them at it.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient
from raftkv.recipes import Semaphore

inside = 0
most = 0


async def work(client: AsyncClient, number: int) -> None:
    global inside, most
    async with Semaphore(client, "examples/database", permits=3).permit(owner=f"worker {number}") as permit:
        inside += 1
        most = max(most, inside)
        await client.put("examples/database/log", f"worker {number}", guards=[permit.guard()])
        await asyncio.sleep(0.05)
        inside -= 1


async def main() -> None:
    async with AsyncClient() as client, asyncio.TaskGroup() as group:
        for number in range(7):
            group.create_task(work(client, number))
    assert most <= 3
    print("7 workers are done; at most 3 were inside at a time")


asyncio.run(main())
