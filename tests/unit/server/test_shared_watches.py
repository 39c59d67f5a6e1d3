"""Many equal watches of one client, which begin, stop, dawdle and lose their streams: each misses and repeats nothing.

The SDK against the real services over a real state machine. A mutant is our own code with a bug put in; the check must
find it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from fake_node import Served

from raftkv._pb.kv_pb2 import PutRequest
from raftkv.client import AsyncClient, Watch
from raftkv.client.feed import Feed, Inbox
from raftkv.client.results import WatchBatch
from raftkv.state.commands import CommandKind

Patch = Callable[[pytest.MonkeyPatch], None]
WRITES = 400
END = b"end"


async def put(served: Served, value: bytes) -> None:
    await served.node.propose(CommandKind.PUT, PutRequest(key=b"k", value=value).SerializeToString(), None)


async def each_has_all_from_its_start_on(served: Served, seed: int) -> None:
    rng = random.Random(seed)
    before = served.node.machine.revision
    written: list[tuple[int, bytes]] = []
    looks: list[asyncio.Task[None]] = []

    async def look(watch: Watch, start: int, pause_s: float) -> None:
        seen: list[tuple[int, bytes]] = []
        async with watch:
            first = start or watch.revision + 1
            async for event in watch:
                if event.value == END:
                    break
                seen.append((event.revision, event.value))
                if pause_s and rng.random() < 0.3:
                    await asyncio.sleep(pause_s)
        assert seen == [each for each in written if first <= each[0]]

    async with (
        AsyncClient([served.address], timeout=60) as client,
        asyncio.timeout(40),
        asyncio.TaskGroup() as tasks,
    ):

        def begin() -> None:
            now = served.node.machine.revision
            start = rng.choice([0, now + 1, rng.randint(before + 1, now + 1), now + rng.randint(1, 30)])
            pause_s = rng.choice([0.0, 0.0, 0.001, 0.01])
            looks.append(tasks.create_task(look(client.watch("k", start_revision=start), start, pause_s)))

        for number in range(WRITES):
            if number % 20 == 0:
                begin()
            await put(served, b"%d" % number)
            written.append((served.node.machine.revision, b"%d" % number))
            if rng.random() < 0.02:
                for connection in client._context.pool.connections:
                    connection.abandon_streams()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.004)
        while not all(each.done() for each in looks):  # who has missed something still comes to an end
            await put(served, END)
            await asyncio.wait(looks, timeout=0.02)


def tells_what_was_before(patch: pytest.MonkeyPatch) -> None:
    """Who moves to a shared feed gets what that one has not told yet, and itself has."""

    def take(self: Inbox, batch: WatchBatch) -> None:
        self.next_revision = batch.revision + 1
        self._queue.put_nowait(batch)

    patch.setattr(Inbox, "take", take)


def moves_too_early(patch: pytest.MonkeyPatch) -> None:
    """Who is not as far as the shared feed moves over to it."""
    patch.setattr(Feed, "serves_from", lambda self, revision: self.endpoint != "")


def leaves_out_what_has_no_room(patch: pytest.MonkeyPatch) -> None:
    """Whose inbox is full stays, and misses it."""
    original = Inbox.take

    def take(self: Inbox, batch: WatchBatch) -> None:
        if not self._queue.full():
            original(self, batch)

    patch.setattr(Inbox, "take", take)
    patch.setattr(Inbox, "full", False)


def goes_on_from_now(patch: pytest.MonkeyPatch) -> None:
    """Who was left behind begins anew."""
    original = Feed.another
    patch.setattr(Feed, "another", lambda self, next_revision: original(self, 0))


MUTANTS: list[Patch] = [tells_what_was_before, moves_too_early, leaves_out_what_has_no_room, goes_on_from_now]


@pytest.mark.parametrize("seed", range(5))
async def test_sound(seed: int, served: Served) -> None:
    await each_has_all_from_its_start_on(served, seed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.__name__)
async def test_mutant_is_found(mutant: Patch, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        for seed in range(5):
            await each_has_all_from_its_start_on(served, seed)

    mutant(monkeypatch)
    with pytest.raises(BaseExceptionGroup) as caught:
        await check()
    assert caught.group_contains(AssertionError)
