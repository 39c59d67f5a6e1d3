"""The recipes against a real etcd, whose members are killed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from raftkv.client import AsyncClient, Client, ConditionFailed, Leadership, LockLost, OutcomeUnknown, Put, Unavailable
from raftkv.recipes import (
    Barrier,
    Counter,
    DoubleBarrier,
    LeaderTask,
    PriorityQueue,
    Queue,
    ReadWriteLock,
    Registry,
    Semaphore,
)
from tests.integration.test_coordination_etcd import Etcd, until

pytestmark = [pytest.mark.system, pytest.mark.integration]

TTL_S = 9.0  # nobody waits for its end: it only must outlast an election and a machine that stands still


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path_factory.mktemp("etcd"), 3)
    try:
        with Client(etcd.endpoints, timeout=30) as client:
            client.put("ready", "yes")
        yield etcd
    finally:
        etcd.stop()


@pytest.fixture
async def client(etcd: Etcd, request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(etcd.endpoints, timeout=20, namespace=f"{request.node.name}/") as client:
        yield client


@pytest.fixture
async def other(etcd: Etcd, request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(etcd.endpoints, timeout=20, namespace=f"{request.node.name}/") as client:
        yield client


async def kill_one(etcd: Etcd, number: int) -> None:
    etcd.kill(number)
    await asyncio.sleep(2)
    etcd.restart(number)
    await asyncio.sleep(2)


async def expire(client: AsyncClient, key: bytes) -> None:
    item = await client.get(key)
    assert item is not None
    await client.revoke_lease(item.lease)


async def test_permits_and_writers_exclude_while_members_die(
    etcd: Etcd, client: AsyncClient, other: AsyncClient
) -> None:
    inside = writing = most = turns = 0
    stop = asyncio.Event()

    async def work(mine: AsyncClient) -> None:
        nonlocal inside, most, turns
        while not stop.is_set():
            async with Semaphore(mine, "s", 2, TTL_S).permit():
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.01)
                inside -= 1
                turns += 1

    async def write(mine: AsyncClient) -> None:
        nonlocal writing, turns
        while not stop.is_set():
            async with ReadWriteLock(mine, "rw", TTL_S).write():
                writing += 1
                assert writing == 1
                await asyncio.sleep(0.01)
                writing -= 1
                turns += 1

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(work(client if number % 2 else other))
            group.create_task(write(client if number % 2 else other))
        for number in range(3):
            await kill_one(etcd, number)
        await until(lambda: most == 2 and turns > 10)
        stop.set()
    assert most == 2


async def test_jobs_are_done_once_while_a_member_dies(etcd: Etcd, client: AsyncClient, other: AsyncClient) -> None:
    queue = Queue(client, "q")
    jobs = [str(number) for number in range(60)]
    for job in jobs:
        await queue.put(job)

    async def consume(mine: AsyncClient) -> None:
        while await Queue(mine, "q").size():
            try:
                async with Queue(mine, "q").take(ttl=TTL_S, timeout=2) as job:
                    await asyncio.sleep(0.1)
                    await job.done(Put(f"done/{job.item.text}", "x"))
            except (OutcomeUnknown, Unavailable, LockLost):
                continue  # LockTimeout is of these; whatever it was, a job is there until it is done

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(consume(client if number % 2 else other))
        await kill_one(etcd, 0)
    results = [item async for item in client.scan("done/")]
    assert sorted(item.key.decode().removeprefix("done/") for item in results) == sorted(jobs)
    assert {item.version for item in results} == {1}


async def test_loss_cancels_and_guards_are_refused(client: AsyncClient, other: AsyncClient) -> None:
    guards = []

    async def hold() -> None:
        async with ReadWriteLock(client, "rw", TTL_S).write() as held:
            guards.append(held.guard())
            await client.put("data", "1", guards=guards)
            await expire(other, held.key)
            await asyncio.sleep(60)

    async with asyncio.timeout(30):
        with pytest.raises(LockLost):
            await hold()
    with pytest.raises(LockLost):
        await other.put("data", "2", guards=guards)


async def test_the_others(client: AsyncClient, other: AsyncClient) -> None:
    queue = PriorityQueue(client, "p")
    for priority in (3, 1, 2):
        await queue.put(str(priority), priority=priority)
    assert [(await queue.get(timeout=5)).text for _ in range(3)] == ["1", "2", "3"]

    waiter = asyncio.create_task(queue.get(timeout=20))
    await asyncio.sleep(0.3)
    await PriorityQueue(other, "p").put("late")
    assert (await waiter).text == "late"

    await asyncio.gather(*(Counter(mine, "c").add(2) for mine in (client, other) for _ in range(10)))
    assert await Counter(client, "c").value() == 40
    with pytest.raises(ConditionFailed):
        await Counter(client, "c").add(-41, at_least=0)

    barrier = Barrier(client, "b")
    await barrier.close()
    waiting = asyncio.create_task(Barrier(other, "b").wait(timeout=20))
    await asyncio.sleep(0.2)
    await barrier.open()
    await waiting

    stages: list[int] = []

    async def take_part(mine: AsyncClient) -> None:
        for turn in range(3):
            stages.append(2 * turn)
            async with DoubleBarrier(mine, "d", 3, TTL_S):
                stages.append(2 * turn + 1)
            stages.append(2 * turn + 2)

    async with asyncio.timeout(30):
        await asyncio.gather(*(take_part(mine) for mine in (client, other, client)))
    assert stages == sorted(stages)

    fences: list[int] = []

    async def lead(leadership: Leadership) -> None:
        fences.append(leadership.fence)
        if len(fences) == 1:
            await expire(client, leadership.key.removeprefix(client.namespace))
            await asyncio.sleep(60)

    async with asyncio.timeout(30):
        await LeaderTask(client, "boss", lead, ttl=TTL_S).run()
    assert len(fences) == 2
    assert fences[0] < fences[1]

    async with asyncio.timeout(30), Registry(client).register("billing", "here", id="1", ttl=TTL_S) as registration:
        await expire(other, b"services/.registry/billing/1")
        await registration.lost.wait()
        await registration.registered.wait()
        async for instances in Registry(other).follow("billing"):
            assert [instance.address for instance in instances] == ["here"]
            break
