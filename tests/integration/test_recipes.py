"""The recipes on real nodes, while every leader dies and holders are lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from raftkv.client import AsyncClient, Client, ConditionFailed, Leadership, LockLost, LockTimeout, Put
from raftkv.local import LocalCluster
from raftkv.recipes import (
    Barrier,
    Counter,
    DoubleBarrier,
    Instance,
    LeaderTask,
    PriorityQueue,
    Queue,
    ReadWriteLock,
    Registry,
    Semaphore,
    blocking,
)

pytestmark = pytest.mark.integration

TTL_S = 9.0  # nobody waits for its end: it only must outlast an election and a machine that stands still


@pytest.fixture
async def client(raftkv_cluster: LocalCluster, raftkv_namespace: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(raftkv_cluster.endpoints, timeout=20, namespace=raftkv_namespace) as client:
        await client.put("ready", "yes")
        yield client


@pytest.fixture
async def other(raftkv_cluster: LocalCluster, raftkv_namespace: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(raftkv_cluster.endpoints, timeout=20, namespace=raftkv_namespace) as client:
        yield client


async def kill_leader(cluster: LocalCluster, times: int = 1) -> None:
    for _ in range(times):
        (name,) = await asyncio.to_thread(cluster.kill, "leader")
        await asyncio.sleep(0.7)
        await asyncio.to_thread(cluster.restart, name)
        await asyncio.sleep(0.3)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what others do; whoever calls limits the time."""
    while not condition():  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.02)


async def expire(client: AsyncClient, key: bytes) -> None:
    """End the lease that this key is bound to, as if it had run out."""
    item = await client.get(key)
    assert item is not None
    await client.revoke_lease(item.lease)


async def test_a_semaphore_never_has_too_many_while_leaders_die(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    inside, most, turns = 0, 0, 0
    stop = asyncio.Event()

    async def work(mine: AsyncClient) -> None:
        nonlocal inside, most, turns
        semaphore = Semaphore(mine, "s", 3, TTL_S)
        while not stop.is_set():
            async with semaphore.permit() as permit:
                inside += 1
                most = max(most, inside)
                await mine.put(f"work/{permit.fence}", "x", guards=[permit.guard()])
                permit.check()
                inside -= 1
                turns += 1

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(work(client if number % 2 else other))
        await kill_leader(raftkv_cluster, 2)
        await until(lambda: most == 3 and turns > 8)
        stop.set()
    assert most == 3
    assert len(await client.range("work/", prefix=True)) == turns  # every fence once
    assert (await client.range("s/.semaphore/place/", prefix=True)).count == 0


async def test_writers_exclude_while_leaders_die(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    """Two keys that a writer changes one after the other; no reader sees them differ."""
    stop = asyncio.Event()
    written = seen = 0

    async def write(mine: AsyncClient) -> None:
        nonlocal written
        while not stop.is_set():
            async with ReadWriteLock(mine, "rw", TTL_S).write() as held:
                for key in ("left", "right"):
                    await mine.put(key, str(held.fence), guards=[held.guard()])
                written += 1

    async def read(mine: AsyncClient) -> None:
        nonlocal seen
        while not stop.is_set():
            async with ReadWriteLock(mine, "rw", TTL_S).read():
                left = await mine.get("left")
                await asyncio.sleep(0.005)
                right = await mine.get("right")
                assert (left and left.value) == (right and right.value)
                seen += 1

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(6):
            mine = client if number % 2 else other
            group.create_task(read(mine) if number % 3 else write(mine))
        await kill_leader(raftkv_cluster, 2)
        await until(lambda: written > 3 and seen > 3)
        stop.set()


async def test_a_lost_permit_cancels_the_body_and_its_guard_is_refused(client: AsyncClient, other: AsyncClient) -> None:
    guards = []

    async def hold() -> None:
        async with Semaphore(client, "s", 1, TTL_S).permit() as permit:
            guards.append(permit.guard())
            await expire(other, permit.key)
            await asyncio.sleep(60)

    async with asyncio.timeout(30):
        with pytest.raises(LockLost):
            await hold()
    with pytest.raises(LockLost):
        await other.put("x", "1", guards=guards)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_queue_hands_out_each_item_once_while_leaders_die(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    """What was acknowledged was put; each item's result is written once, in the order of its producer."""
    stop = asyncio.Event()
    put: list[list[str]] = [[] for _ in range(2)]
    done: list[str] = []

    async def produce(number: int, mine: AsyncClient) -> None:
        queue = Queue(mine, "q")
        while not stop.is_set():
            text = f"{number}/{len(put[number])}"
            await queue.put(text)
            put[number].append(text)
            await asyncio.sleep(0.02)

    async def consume(mine: AsyncClient) -> None:
        queue = Queue(mine, "q")
        while True:
            async with queue.take(ttl=TTL_S) as job:
                text = job.item.text
                if text == "end":
                    return
                await job.done(Put(f"done/{text}", "x"))
                done.append(text)

    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        consumers = [group.create_task(consume(client if n % 2 else other)) for n in range(4)]
        producers = [group.create_task(produce(n, client if n else other)) for n in range(2)]
        await kill_leader(raftkv_cluster, 2)
        await until(lambda: len(done) > 10)
        stop.set()
        await asyncio.wait(producers)
        for _ in consumers:
            await Queue(client, "q").put("end")
    assert sorted(done) == sorted(put[0] + put[1])
    results = [item async for item in client.scan("done/")]
    assert len(results) == len(done)
    assert {item.version for item in results} == {1}
    assert await Queue(client, "q").size() == 0


async def test_an_item_whose_consumer_is_lost_is_handed_out_again(client: AsyncClient, other: AsyncClient) -> None:
    queue, theirs = Queue(client, "q"), Queue(other, "q")
    await queue.put("job")

    async def work() -> None:
        async with queue.take(ttl=TTL_S) as job:
            fences.append(job.fence)
            guards.append(job.guard())
            await expire(other, job.key)
            await asyncio.sleep(60)

    fences: list[int] = []
    guards: list[object] = []
    async with asyncio.timeout(30):
        with pytest.raises(LockLost):
            await work()
        async with theirs.take(ttl=TTL_S) as job:
            assert job.value == b"job"
            assert job.fence > fences[0]
    with pytest.raises(LockLost):
        await client.put("x", "1", guards=guards)  # type: ignore[arg-type]
    assert await queue.size() == 0


async def test_a_queue_is_first_in_first_out_and_priorities_go_first(client: AsyncClient, other: AsyncClient) -> None:
    queue = Queue(client, "q")
    for number in range(10):
        await Queue(client if number % 2 else other, "q").put(str(number))
    assert [(await queue.get()).text for _ in range(10)] == [str(number) for number in range(10)]
    urgent = PriorityQueue(client, "q")
    for priority in (5, 1, 65_535, 1, 0):
        await urgent.put(str(priority), priority=priority)
    assert [(await urgent.get(timeout=5)).text for _ in range(5)] == ["0", "1", "1", "5", "65535"]
    with pytest.raises(TimeoutError):
        await urgent.get(timeout=0.2)


async def test_a_counter_counts_every_change_while_leaders_die(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    stop = asyncio.Event()
    added = 0

    async def add(mine: AsyncClient) -> None:
        nonlocal added
        counter = Counter(mine, "c")
        while not stop.is_set():
            await counter.add(2)
            added += 2

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(add(client if number % 2 else other))
        await kill_leader(raftkv_cluster, 2)
        await until(lambda: added > 20)
        stop.set()
    assert await Counter(client, "c").value() == added
    with pytest.raises(ConditionFailed) as caught:
        await Counter(client, "c").add(-added - 1, at_least=0)
    assert caught.value.code == "OUT_OF_BOUNDS"


async def test_a_barrier_lets_all_go_through_the_death_of_a_leader(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    barrier = Barrier(client, "b")
    assert await barrier.close()
    assert not await Barrier(other, "b").close()
    with pytest.raises(TimeoutError):
        await barrier.wait(timeout=0.2)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        waiting = [group.create_task(Barrier(client if n % 2 else other, "b").wait()) for n in range(6)]
        await kill_leader(raftkv_cluster)
        assert not any(task.done() for task in waiting)
        assert await barrier.open()
    await barrier.wait()
    async with client.lease(TTL_S) as lease:
        await barrier.close(lease=lease.id)
        waiter = asyncio.create_task(barrier.wait(timeout=20))
        await asyncio.sleep(0.1)
    await waiter  # who closed it is gone


async def test_parties_meet_and_part_through_the_death_of_a_leader(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    parties = 5
    stages: list[int] = []  # even: outside, odd: inside

    async def take_part(number: int) -> None:
        for turn in range(4):
            stages.append(2 * turn)
            async with DoubleBarrier(client if number % 2 else other, "d", parties, TTL_S):
                stages.append(2 * turn + 1)
                await asyncio.sleep(0.05 * number)
                stages.append(2 * turn + 1)
            stages.append(2 * turn + 2)

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(parties):
            group.create_task(take_part(number))
        await kill_leader(raftkv_cluster)
    assert stages == sorted(stages)  # nobody is inside before all have come, nobody outside before all are done
    assert len(stages) == parties * 16


async def test_one_leads_at_a_time_and_work_goes_on_when_it_is_lost(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    steps: list[tuple[int, int]] = []  # who led, under which fence

    def work_of(number: int, mine: AsyncClient) -> LeaderTask[None]:
        async def work(leadership: Leadership) -> None:
            while len(steps) < 60:
                await mine.put("step", str(number), guards=[leadership.guard()])
                steps.append((leadership.fence, number))
                if len(steps) in (20, 40):
                    await expire_wire(mine, leadership.key)
                await asyncio.sleep(0.03)

        return LeaderTask(mine, "boss", work, value=str(number), ttl=TTL_S)

    async def expire_wire(mine: AsyncClient, key: bytes) -> None:
        await expire(mine, key.removeprefix(mine.namespace))

    tasks = [work_of(number, client if number % 2 else other) for number in range(3)]
    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for task in tasks:
            group.create_task(task.run())
        await kill_leader(raftkv_cluster)
    assert [fence for fence, _ in steps] == sorted(fence for fence, _ in steps)
    assert len({fence for fence, _ in steps}) >= 3
    assert not any(task.leading for task in tasks)


async def test_an_instance_comes_back_by_itself_and_followers_see_it(
    client: AsyncClient, other: AsyncClient, raftkv_cluster: LocalCluster
) -> None:
    seen: list[tuple[Instance, ...]] = []
    registry = Registry(client)

    async def follow() -> None:
        async for instances in Registry(other).follow("billing"):
            seen.append(instances)
            if len(seen) > 1 and not instances and "zone" in str(seen[-2]):
                return

    async def told_of(metadata: dict[str, str]) -> None:
        # Not of each state between: what came and went between two looks may be left out.
        await until(lambda: bool(seen and seen[-1] and seen[-1][0].metadata == metadata))

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await until(lambda: seen == [()])
        async with registry.register("billing", "10.0.0.7:80", id="one", ttl=TTL_S) as registration:
            with pytest.raises(ConditionFailed) as caught:
                async with Registry(other).register("billing", "10.0.0.8:80", id="one"):
                    raise AssertionError("must not be entered")
            assert caught.value.code == "INSTANCE_TAKEN"
            await told_of({})
            await kill_leader(raftkv_cluster)
            assert registration.registered.is_set()
            await expire(other, b"services/.registry/billing/one")
            await registration.lost.wait()
            await registration.registered.wait()
            assert registration.losses == 1
            await registration.update(metadata={"zone": "b"})
            assert await Registry(other).instances("billing") == (
                Instance("billing", "one", "10.0.0.7:80", {"zone": "b"}),
            )
            assert await registry.services() == ("billing",)
            await told_of({"zone": "b"})
    assert await registry.instances("billing") == ()


def test_the_blocking_twins_do_all_of_it(raftkv_client: Client) -> None:
    client = raftkv_client
    inside, most = 0, 0
    guard = threading.Lock()
    semaphore = blocking.Semaphore(client, "s", 2)
    two = threading.Barrier(2, timeout=60)

    def work() -> None:
        nonlocal inside, most
        with semaphore.permit():
            with guard:
                inside += 1
                most = max(most, inside)
            client.put("x", "1")
            two.wait()
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 2
    assert semaphore.holders() == ()

    lock = blocking.ReadWriteLock(client, "rw")
    with lock.read() as first, lock.read() as second:
        assert first.fence != second.fence
        with pytest.raises(LockTimeout):
            lock.write(timeout=0.2).acquire()
    with lock.write() as held:
        client.put("x", "2", guards=[held.guard()])
        client.delete(held.key)
        assert held.lost.wait(20)
        with pytest.raises(LockLost):
            held.check()
        with pytest.raises(LockLost):
            held.release()

    barrier = blocking.Barrier(client, "b")
    assert barrier.close()
    assert barrier.is_closed()
    assert barrier.open()
    barrier.wait(timeout=5)
    with blocking.DoubleBarrier(client, "d", 1) as party:
        party.check()

    queue = blocking.Queue(client, "q")
    queue.put("a")
    queue.put("b")
    assert queue.get().value == b"a"
    with queue.take() as job:
        job.done(Put("result", job.value))
    assert queue.size() == 0
    urgent = blocking.PriorityQueue(client, "p")
    urgent.put("later")
    urgent.put("now", priority=0)
    assert urgent.get().value == b"now"

    counter = blocking.Counter(client, "c")
    counter.set(5)
    assert counter.add(-2, at_least=0) == 3
    assert counter.value() == 3

    assert blocking.LeaderTask(client, "boss", lambda leadership: leadership.fence).run() > 0

    registry = blocking.Registry(client)
    with registry.register("billing", "here", id="1") as registration:
        assert registration.registered
        assert [instance.address for instance in registry.instances("billing")] == ["here"]
        registration.update(address="there")
        follower = registry.follow("billing")
        assert next(follower)[0].address == "there"
        assert registry.services() == ("billing",)
