"""Room for calls, and the one alarm for all their deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from raftkv.client import DeadlineExceeded, Retry
from raftkv.client.methods import PUT
from raftkv.client.waiting import Call, Waiting


def call(in_s: float | None = None) -> Call:
    loop = asyncio.get_running_loop()
    deadline = None if in_s is None else loop.time() + in_s
    return Call(PUT, b"", deadline, Retry(), loop.create_future())


def waiting(calls_max: int, time_is_up: Callable[[Call], None] = lambda _: None) -> Waiting:
    return Waiting(asyncio.get_running_loop(), calls_max, time_is_up)


async def test_callers_beyond_the_room_get_their_turn_in_order() -> None:
    calls = waiting(2)
    begun: list[int] = []
    first = [call(), call()]
    for each in first:
        await calls.enter(each)

    async def enter(number: int) -> None:
        await calls.enter(call())
        begun.append(number)

    tasks = [asyncio.create_task(enter(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert begun == []
    for each in first:
        calls.leave(each)
    await asyncio.gather(*tasks[:2])
    assert begun == [0, 1]
    calls.leave(call())
    await tasks[2]


async def test_who_goes_while_it_is_its_turn_passes_the_turn_on() -> None:
    calls = waiting(1)
    only = call()
    await calls.enter(only)
    tasks = [asyncio.create_task(calls.enter(call())) for _ in range(2)]
    await asyncio.sleep(0)
    calls.leave(only)  # it is the first one's turn, but before that runs
    tasks[0].cancel()
    await tasks[1]
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    calls.leave(call())
    await calls.enter(call())


async def test_no_room_in_time_is_a_deadline_that_passed_and_nothing_is_lost() -> None:
    calls = waiting(1)
    only = call()
    await calls.enter(only)
    with pytest.raises(DeadlineExceeded) as caught:
        await calls.enter(call(0.01))
    assert caught.value.code == "CLIENT_BUSY"
    calls.leave(only)
    await calls.enter(call())


async def test_each_deadline_is_told_once_and_never_early_whatever_their_order() -> None:
    loop = asyncio.get_running_loop()
    told: list[tuple[Call, float]] = []
    both = asyncio.Event()

    def tell(each: Call) -> None:
        told.append((each, loop.time()))
        if len(told) == 2:
            both.set()

    calls = waiting(100, tell)
    late, soon, left, never = call(0.06), call(0.02), call(0.03), call()
    for each in (late, soon, left, never):
        await calls.enter(each)
    calls.leave(left)
    async with asyncio.timeout(10):
        await both.wait()
    await asyncio.sleep(0.02)
    assert [each for each, _ in told] == [soon, late]
    assert all(each.deadline is not None and at >= each.deadline for each, at in told)
