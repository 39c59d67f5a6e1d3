"""Whose turn it is among the streams that have something to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from raftkv.server.services import watch as service
from raftkv.server.watch_stream import WAKES_AT_ONCE, StreamBuffer, Wakes


class Rounds:
    """The rounds of a loop, one by one."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def run(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_some_wake_in_each_round_in_the_order_in_which_they_asked() -> None:
    rounds = Rounds()
    wakes = Wakes(rounds.call_soon)
    sleepers = [asyncio.Event() for _ in range(2 * WAKES_AT_ONCE + 1)]
    for sleeper in sleepers * 2:  # to ask twice changes nothing
        wakes.wake(sleeper)
    for round_ in (1, 2, 3):
        rounds.run()
        assert [each.is_set() for each in sleepers] == [n < round_ * WAKES_AT_ONCE for n in range(len(sleepers))]
    assert not rounds.calls


def test_who_is_awake_has_no_turn() -> None:
    rounds = Rounds()
    awake = asyncio.Event()
    awake.set()
    Wakes(rounds.call_soon).wake(awake)
    assert not rounds.calls


class Hub:
    """As much of a hub as a buffer needs to be filled."""

    revision = 1
    buffered_bytes = 0

    def drained(self, sink: object) -> None: ...


class Writer:
    """A client that takes everything at once."""

    def __init__(self) -> None:
        self.written: list[int] = []

    async def write(self, *responses: bytes) -> None:
        self.written.append(sum(map(len, responses)))


async def test_a_stream_that_has_much_to_send_lets_others_have_their_turn() -> None:
    loop = asyncio.get_running_loop()
    rounds = Rounds()
    hub: Any = Hub()
    buffer = StreamBuffer(hub, Wakes(rounds.call_soon), lambda revision: b"", bytes_max=1 << 30)
    for _ in range(10):
        buffer.tell(1, watch_id=1, cancel_reason="x" * 30_000)
    writer: Any = Writer()
    task = loop.create_task(service._write(writer, buffer))
    written = []
    for _ in range(6):
        for _ in range(5):
            await asyncio.sleep(0)
        written.append(sum(writer.written))
        rounds.run()
    bound = service.AT_ONCE_BYTES + 31_000
    assert all(0 <= b - a <= bound for a, b in zip([0, *written], written, strict=False))
    assert written[0] < written[1] < 300_000 < written[-1]
    buffer.end()
    await asyncio.wait_for(task, 10)
