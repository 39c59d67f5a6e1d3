"""Virtual time: one queue of events, and for each node the rhythm of its ticks.

Time is an integer; a tick of a node whose clock is right is `TICK` units long. Events of one instant happen in the
order in which they were planned, so nothing depends on chance that was not drawn from the seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

TICK = 100
"""Units in a tick. With the 10 ms tick of a node a unit is 0.1 ms."""


class Scheduler:
    """What happens next."""

    def __init__(self) -> None:
        self.now = 0
        self.events = 0
        """How many have happened; it tells apart moments of equal time."""
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0

    def after(self, delay: int, call: Callable[[], None]) -> None:
        """Plan `call` in `delay` units, 0 or more."""
        self._order += 1
        heapq.heappush(self._queue, (self.now + max(0, delay), self._order, call))

    def step(self, until: int) -> bool:
        """Let the next event happen; False (and the time is `until`) when there is none up to then."""
        if not self._queue or self._queue[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, call = heapq.heappop(self._queue)
        self.events += 1
        call()
        return True


class NodeClock:
    """When one node's ticks come; `rate` 2.0 is a clock that runs twice as fast."""

    def __init__(self, scheduler: Scheduler, tick: Callable[[], None], rate: float) -> None:
        self._scheduler = scheduler
        self._tick = tick
        self._running = 0  # which start this is; ticks planned by an earlier one are void
        self.rate = rate

    def start(self) -> None:
        """Begin to tick."""
        self._running += 1
        self._plan(self._running)

    def stop(self) -> None:
        """Stop ticking, by a crash or a pause."""
        self._running += 1

    def _plan(self, running: int) -> None:
        self._scheduler.after(max(1, int(TICK / self.rate)), lambda: self._fire(running))

    def _fire(self, running: int) -> None:
        if running == self._running:
            self._plan(running)
            self._tick()
