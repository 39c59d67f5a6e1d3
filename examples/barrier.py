"""Workers wait while a migration runs. If the migrating process dies, its lease ends and they go on.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient
from raftkv.recipes import Barrier


async def work(client: AsyncClient, number: int) -> str:
    await Barrier(client, "examples/migration").wait(timeout=30)
    schema = await client.get("examples/schema")
    return f"worker {number} found schema {schema.text if schema else 'missing'}"


async def main() -> None:
    async with AsyncClient() as client:
        async with client.lease(10) as lease:
            barrier = Barrier(client, "examples/migration")
            await barrier.close(owner="the migration", lease=lease.id)
            workers = [asyncio.create_task(work(client, number)) for number in range(3)]
            await client.put("examples/schema", "2")
            await barrier.open()
        for line in await asyncio.gather(*workers):
            print(line)
            assert line.endswith("schema 2")


asyncio.run(main())
