"""Services come and go, and whoever follows them knows.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient
from raftkv.recipes import Registry


async def follow(client: AsyncClient, ready: asyncio.Event) -> None:
    most = 0
    async for instances in Registry(client, "examples").follow("billing"):
        ready.set()
        print("billing:", ", ".join(instance.address for instance in instances) or "nobody")
        if most == 2 and not instances:
            return
        most = max(most, len(instances))


async def main() -> None:
    async with AsyncClient() as client, asyncio.timeout(30):
        registry = Registry(client, "examples")
        ready = asyncio.Event()
        follower = asyncio.create_task(follow(client, ready))
        await ready.wait()
        async with (
            registry.register("billing", "10.0.0.7:8080", metadata={"zone": "a"}),
            registry.register("billing", "10.0.0.8:8080", metadata={"zone": "b"}),
        ):
            zones = {instance.metadata["zone"] for instance in await registry.instances("billing")}
            assert zones == {"a", "b"}
        await follower


asyncio.run(main())
