"""Three processes could do it, one at a time does; when it is gone, the next goes on where it stopped.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient, Leadership
from raftkv.recipes import LeaderTask

LAST = 9


async def process(name: str) -> None:
    async with AsyncClient() as client:  # each has a connection of its own, as in a process of its own

        async def count(leadership: Leadership) -> None:
            for _ in range(4):
                item = await client.get("examples/ticks")
                tick = int(item.text) + 1 if item else 1
                if tick > LAST:
                    return
                await client.put("examples/ticks", str(tick), guards=[leadership.guard()])
                print(f"tick {tick} by {name}, fence {leadership.fence}")

        await LeaderTask(client, "examples/ticker", count, value=name).run()  # leads once, then leaves it to others


async def main() -> None:
    async with AsyncClient() as client:
        await client.delete("examples/ticks")
        await asyncio.gather(*(process(name) for name in ("ann", "bob", "cyd")))
        item = await client.get("examples/ticks")
        assert item is not None
        assert item.text == str(LAST)
        assert item.version == LAST  # each tick once
        print(f"{item.text} ticks, each once")


asyncio.run(main())
