"""Work that one process at a time does, as long as anybody is there to do it.

    async def schedule(leadership: Leadership) -> None:
        while True:
            await client.put("tick", now(), guards=[leadership.guard()])
            await asyncio.sleep(1)

    await LeaderTask(client, "scheduler", schedule, value="host-1").run()

Each process runs the same; one of them leads. When it loses leadership its work is cancelled, and it stands again. The
election is `client.election(name)`: `etcdctl elect NAME` takes part, `election.observe()` shows who leads.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from raftkv.client import AsyncClient, Leadership, LockLost, Unavailable
from raftkv.client.keys import Text

T = TypeVar("T")
PAUSE_MIN_S: Final = 0.1
PAUSE_MAX_S: Final = 5.0
STEADY_S: Final = 10.0  # who led that long is not in a loop of failures


class LeaderTask(Generic[T]):
    """Work for a leader.

    Args:
        client: of raftkv or etcd.
        name: of the election.
        work: called with the `Leadership` each time this process has become leader; cancelled when it is lost. It
            should write with `leadership.guard()`: who was paused too long may learn of its loss only afterwards.
        value: what the others see of the leader.
        ttl: seconds after which a leader that is not heard of any more has lost it.
    """

    def __init__(
        self,
        client: AsyncClient,
        name: Text,
        work: Callable[[Leadership], Awaitable[T]],
        *,
        value: Text = b"",
        ttl: float = 10.0,
    ) -> None:
        self._election = client.election(name, ttl)
        self._work = work
        self._value = value
        self._leadership: Leadership | None = None
        self._times_led = 0

    @property
    def leading(self) -> bool:
        """Whether this process certainly leads now. Reads the clock; never waits."""
        return self._leadership is not None and self._leadership.held

    @property
    def times_led(self) -> int:
        """How often it has become leader."""
        return self._times_led

    async def run(self) -> T:
        """Stand until the work has ended well once, in this process; resign then, and return what it gave.

        Work that ends with LockLost (or NotLeading) is begun again with the next leadership, and so is the wait where
        the cluster cannot be asked. Cancelling this cancels the work and gives leadership up.

        Raises:
            Exception: whatever else the work raises; leadership is given up first.
            Closed: the client was closed.
        """
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            began: float | None = None
            results: list[T] = []
            try:
                async with self._election.campaign(self._value) as leadership:
                    began = clock()
                    self._leadership = leadership
                    self._times_led += 1
                    results.append(await self._work(leadership))
            except LockLost:
                if not results and began is not None and clock() - began > STEADY_S:
                    failures = 0
            except Unavailable:
                if began is not None and not results:
                    raise  # of the work
            finally:
                self._leadership = None
            if results:
                return results[0]  # even if resigning failed: leadership then runs out
            pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** min(failures, 10))
            failures += 1
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s))
