"""The clock of a node, on a loop whose time the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from raftkv.server.ticking import TICKS_AT_ONCE_MAX, Ticker


class FakeLoop:
    """A loop with one timer at most."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timer: tuple[float, Callable[[], None]] | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> FakeLoop:
        self.timer = (when, call)
        return self

    def cancel(self) -> None:
        self.timer = None

    def move(self, to: float) -> None:
        """Time passes while nothing runs; then what is due does."""
        self.now = to
        if self.timer is not None and self.timer[0] <= to:
            _, call = self.timer
            self.timer = None
            call()


def begun() -> tuple[FakeLoop, Ticker, list[int]]:
    ticks: list[int] = []
    loop = FakeLoop()
    ticker = Ticker(cast(asyncio.AbstractEventLoop, cast(Any, loop)), 0.5, ticks.append)
    ticker.start()
    return loop, ticker, ticks


def test_ticks_come_at_their_times_and_do_not_drift() -> None:
    loop, _, ticks = begun()
    loop.move(100.25)
    assert ticks == []
    loop.move(100.6)  # a little late
    assert ticks == [1]
    assert loop.timer is not None
    assert loop.timer[0] == 101.0
    loop.move(101.0)
    assert ticks == [1, 1]


def test_a_loop_that_was_held_up_catches_up_within_bounds() -> None:
    loop, _, ticks = begun()
    loop.move(101.7)
    assert ticks == [3]
    loop.move(200.0)
    assert ticks == [3, TICKS_AT_ONCE_MAX]
    assert loop.timer is not None
    assert 200.0 < loop.timer[0] <= 200.5


def test_a_stopped_clock_stands_still() -> None:
    loop, ticker, ticks = begun()
    ticker.stop()
    ticker.stop()
    loop.move(200.0)
    assert ticks == []
