"""Three parts of a computation that begin each round together and end it together.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient
from raftkv.recipes import DoubleBarrier

PARTIES = 3
inside = 0


async def compute(client: AsyncClient, number: int) -> None:
    global inside
    for turn in (1, 2):
        async with DoubleBarrier(client, "examples/rounds", PARTIES, owner=f"part {number}", timeout=30):
            inside += 1
            await asyncio.sleep(0.05 * number)
        assert inside >= turn * PARTIES  # outside again: so all have been inside


async def main() -> None:
    async with AsyncClient() as client, asyncio.TaskGroup() as group:
        for number in range(PARTIES):
            group.create_task(compute(client, number))
    print(f"{PARTIES} parties, 2 rounds: {inside} turns")
    assert inside == 2 * PARTIES


asyncio.run(main())
