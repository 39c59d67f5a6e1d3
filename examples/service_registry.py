"""Services come and go, and whoever follows them knows.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient
from raftkv.recipes import Registry


async def follow(client: AsyncClient, seen: asyncio.Queue[int]) -> None:
    async for instances in Registry(client, "examples").follow("billing"):
        print("billing:", ", ".join(instance.address for instance in instances) or "nobody")
        seen.put_nowait(len(instances))


async def until(number: int, seen: asyncio.Queue[int]) -> None:
    # Not each number between: who follows is told the latest, and what came and went meanwhile may be left out.
    while await seen.get() != number:
        pass


async def main() -> None:
    async with AsyncClient() as client, asyncio.timeout(30):
        registry = Registry(client, "examples")
        seen: asyncio.Queue[int] = asyncio.Queue()
        follower = asyncio.create_task(follow(client, seen))
        await until(0, seen)
        async with (
            registry.register("billing", "10.0.0.7:8080", metadata={"zone": "a"}),
            registry.register("billing", "10.0.0.8:8080", metadata={"zone": "b"}),
        ):
            zones = {instance.metadata["zone"] for instance in await registry.instances("billing")}
            assert zones == {"a", "b"}
            await until(2, seen)
        await until(0, seen)
        follower.cancel()


asyncio.run(main())
