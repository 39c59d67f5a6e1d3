"""Fencing across processes: who was stopped beyond its time neither believes to hold the lock nor writes under it.

Five nodes, and holders that are programs of their own, stopped by SIGSTOP between looking and writing. The same
program without guards does corrupt the data, which shows that it is the guards that keep it whole, and that these
tests would see it if they did not.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from raftkv.client import AsyncClient, Event, KeyValue
from raftkv.local import AsyncLocalCluster

pytestmark = pytest.mark.integration

WORKER = Path(__file__).with_name("fencing_worker.py")
TTL_S = 2.0  # the least that nodes grant
LASTING_TTL_S = 6.0  # where it must not be lost but by the stop


class Worker:
    """One process of the program, and what it told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.told: list[dict[str, Any]] = []
        self._heard = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def running(cls, cluster: AsyncLocalCluster, *arguments: str) -> AsyncIterator[Worker]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(WORKER), ",".join(cluster.endpoints), *arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        worker = cls(process)
        listening = asyncio.create_task(worker._listen())
        try:
            yield worker
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await listening

    async def _listen(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.told.append(json.loads(line))
            self._heard.set()

    async def tells(self, *events: str) -> str:
        """Wait until one of these was told."""
        async with asyncio.timeout(60):
            while True:
                for each in self.told:
                    if each["event"] in events:
                        return str(each["event"])
                self._heard.clear()
                await self._heard.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)

    async def finish(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        async with asyncio.timeout(60):
            assert await self.process.wait() == 0


def violations(written: list[Event], told: list[dict[str, Any]]) -> list[str]:
    """What was wrong with the writes of `stock` and with what holders believed.

    Args:
        written: all changes of the key, in order.
        told: by all processes.
    """
    found = []
    count = fence = 0
    for event in written:
        value = json.loads(event.value)
        if value["count"] != count + 1:
            found.append(f"revision {event.revision}: {value['count']} was written over {count}")
        if value["fence"] <= fence:  # each holder writes once
            found.append(f"revision {event.revision}: holder {value['fence']} wrote after {fence}")
        count, fence = value["count"], value["fence"]
    acknowledged = [each["revision"] for each in told if each["event"] == "written"]
    if sorted(acknowledged) != [event.revision for event in written]:
        found.append("what was acknowledged is not what was written")
    acquired = {each["fence"]: each["at"] for each in told if each["event"] == "acquired"}
    for check in (each for each in told if each["event"] == "check"):
        # A later holder had the lock before the question was even asked.
        found += [
            f"holder {check['fence']} believed to hold it at {check['began']}, {later} had it since {since}"
            for later, since in acquired.items()
            if later > check["fence"] and since < check["began"]
        ]
    if sorted(acquired, key=acquired.__getitem__) != sorted(acquired):
        found.append("fences do not rise in the order of acquisition")
    return found


async def all_changes(client: AsyncClient) -> list[Event]:
    """All changes of `stock` so far."""
    await client.put("stock-end", "")
    changes: list[Event] = []
    async with client.watch("stock", prefix=True, start_revision=1) as watch, asyncio.timeout(30):
        async for event in watch:
            if event.key != b"stock":
                break
            changes.append(event)
    return changes


async def stop_one_between_looking_and_writing(cluster: AsyncLocalCluster, mode: str) -> tuple[Worker, list[str]]:
    """The old holder looks and is stopped; a new one writes; the old one goes on. Returns it and what was wrong."""
    async with (
        AsyncClient(cluster.endpoints, timeout=30) as client,
        Worker.running(cluster, mode, str(LASTING_TTL_S), "once") as old,
    ):
        await old.tells("checked")
        old.stop()
        async with Worker.running(cluster, mode, str(LASTING_TTL_S), "once") as new:
            new.say(b"write\n")
            assert await new.tells("written", "refused") == "written"
            await new.finish()
        old.say(b"write\n")
        old.go_on()
        await old.finish()
        return old, violations(await all_changes(client), old.told + new.told)


async def test_who_was_stopped_beyond_its_time_neither_believes_nor_writes() -> None:
    async with AsyncLocalCluster(5) as cluster:
        old, wrong = await stop_one_between_looking_and_writing(cluster, "guarded")
    assert wrong == []
    told = [each["event"] for each in old.told]
    assert told == ["acquired", "check", "checked", "check says lost", "refused", "lost", "ended"]


async def test_without_guards_the_same_program_does_corrupt() -> None:
    """The lock tells it that it is lost, but code that looked before and does not look again writes all the same."""
    async with AsyncLocalCluster(5) as cluster:
        old, wrong = await stop_one_between_looking_and_writing(cluster, "unguarded")
    assert "check says lost" in [each["event"] for each in old.told]
    assert any("was written over" in each for each in wrong), wrong
    assert any("wrote after" in each for each in wrong), wrong
    assert not any("believed" in each for each in wrong), wrong


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_holders_stopped_at_random_while_leaders_die() -> None:
    rng = random.Random(7)
    async with AsyncLocalCluster(5) as cluster, AsyncClient(cluster.endpoints, timeout=30) as client:
        async with (
            Worker.running(cluster, "guarded", str(TTL_S)) as one,
            Worker.running(cluster, "guarded", str(TTL_S)) as two,
            Worker.running(cluster, "guarded", str(TTL_S)) as three,
        ):
            workers = [one, two, three]
            for worker in workers:
                await worker.tells("written")
            for number in range(6):
                await asyncio.sleep(rng.random())
                worker = rng.choice(workers)
                worker.stop()
                if number % 3 == 1:
                    (killed,) = await cluster.kill("leader")
                    await cluster.wait_leader(other_than=killed)
                    await asyncio.sleep(rng.uniform(2.5, 4.0))
                    await cluster.restart(killed)
                else:
                    await asyncio.sleep(rng.uniform(2.5, 4.0))
                worker.go_on()
            while sum(each["event"] == "written" for one in workers for each in one.told) <= 30:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            await asyncio.sleep(1)
            for worker in workers:
                await worker.finish()
        told = [each for worker in workers for each in worker.told]
        assert violations(await all_changes(client), told) == []
        assert sum(each["event"] == "lost" for each in told) >= 1, "nobody was stopped while holding the lock"


def test_the_checker_finds_what_it_is_for() -> None:
    def change(revision: int, count: int, fence: int) -> Event:
        value = json.dumps({"count": count, "fence": fence}).encode()
        return Event("put", KeyValue(b"stock", value, 2, revision, 1))

    good = [
        {"event": "acquired", "fence": 2, "at": 1.0},
        {"event": "check", "fence": 2, "began": 2.0},
        {"event": "written", "fence": 2, "revision": 3},
        {"event": "acquired", "fence": 4, "at": 3.0},
        {"event": "written", "fence": 4, "revision": 5},
    ]
    writes = [change(3, 1, 2), change(5, 2, 4)]
    assert violations(writes, good) == []
    assert len(violations([change(3, 1, 2), change(5, 1, 4)], good)) == 1
    assert len(violations([change(3, 1, 4), change(5, 2, 2)], good)) == 1
    assert len(violations(writes[:1], good)) == 1
    assert len(violations(writes, [*good, {"event": "check", "fence": 2, "began": 3.1}])) == 1
    assert len(violations(writes, [*good, {"event": "acquired", "fence": 1, "at": 9.0}])) >= 1
