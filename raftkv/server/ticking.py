"""Time for one node: so many ticks a second, whatever else the loop has to do.

A timer of the loop and no task: a node that has nothing to do does little else than this, a hundred times a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICKS_AT_ONCE_MAX = 5
"""A loop that was held up catches up by so many ticks at most: after a pause of the whole process, the messages that
waited in the sockets are to be heard before time is."""


class Ticker:
    """Calls `tick` with the number of ticks that have passed: one, or more when the loop was held up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tick_s: float, tick: Callable[[int], None]) -> None:
        self._loop = loop
        self._tick_s = tick_s
        self._tick = tick
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; the first tick passes now."""
        self._due = self._loop.time() + self._tick_s
        self._timer = self._loop.call_at(self._due, self._ring)

    def stop(self) -> None:
        """Let time stand still. Harmless when repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        passed = int((self._loop.time() - self._due) / self._tick_s) + 1
        self._due += passed * self._tick_s
        self._timer = self._loop.call_at(self._due, self._ring)
        self._tick(min(passed, TICKS_AT_ONCE_MAX))
