"""Ten buyers and seven seats: a bound that is kept whoever is faster.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`).
"""

from __future__ import annotations

import asyncio

from raftkv import AsyncClient, ConditionFailed
from raftkv.recipes import Counter


async def buy(client: AsyncClient) -> bool:
    try:
        await Counter(client, "examples/seats").add(-1, at_least=0)
    except ConditionFailed:
        return False
    return True


async def main() -> None:
    async with AsyncClient() as client:
        seats = Counter(client, "examples/seats")
        await seats.set(7)
        got = await asyncio.gather(*(buy(client) for _ in range(10)))
        print(f"{sum(got)} of {len(got)} buyers got a seat, {await seats.value()} are left")
        assert sum(got) == 7
        assert await seats.value() == 0


asyncio.run(main())
