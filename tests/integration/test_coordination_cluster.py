"""Exactly-once writes, leases, watches, locks and elections of the SDK on real nodes that are killed and frozen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from raftkv.client import (
    AsyncClient,
    Client,
    Compacted,
    Key,
    LeaseState,
    LockLost,
    LockTimeout,
    Put,
    Timeout,
    clock,
)
from raftkv.local import LocalCluster

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(raftkv_fresh_cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(raftkv_fresh_cluster.endpoints, timeout=20) as client:
        await client.put("ready", "yes")
        yield client


@pytest.fixture
async def other(raftkv_fresh_cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(raftkv_fresh_cluster.endpoints, timeout=20) as client:
        yield client


async def kill_each(cluster: LocalCluster) -> None:
    for name in cluster.names:
        await asyncio.to_thread(cluster.kill, name)
        await asyncio.sleep(0.7)
        await asyncio.to_thread(cluster.restart, name)
        await asyncio.sleep(0.5)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what others do; pytest's own limit ends what never comes."""
    while not condition():  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.02)


async def test_writes_are_done_exactly_once_while_every_node_dies(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    """A key's version counts its puts: one for each that was acknowledged, and none besides."""
    stop = asyncio.Event()
    done = [0] * 20

    async def write(number: int) -> None:
        while not stop.is_set():
            await client.put(f"count/{number}", "x")
            done[number] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(len(done)):
            group.create_task(write(number))
        await kill_each(raftkv_fresh_cluster)
        await until(lambda: min(done) > 10)
        stop.set()
    versions = {item.key.decode(): item.version async for item in client.scan("count/")}
    assert versions == {f"count/{number}": count for number, count in enumerate(done)}
    assert client.stats().outcomes_unknown == 0


async def test_a_watch_loses_nothing_while_every_node_dies(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    stop = asyncio.Event()
    written: list[tuple[int, bytes]] = []
    seen: list[tuple[int, bytes]] = []

    async def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            result = await client.put(f"w/{number % 7}", str(number))
            written.append((result.revision, str(number).encode()))
        await client.put("w/end", "")

    async def look() -> None:
        async for event in watch:
            if event.key == b"w/end":
                return
            seen.append((event.revision, event.value))

    async with client.watch("w/", prefix=True) as watch, asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(write())
        group.create_task(look())
        await kill_each(raftkv_fresh_cluster)
        stop.set()
    assert seen == written


async def test_a_watch_leaves_a_frozen_node(client: AsyncClient, raftkv_fresh_cluster: LocalCluster) -> None:
    cluster = raftkv_fresh_cluster
    async with client.watch("frozen") as watch:
        name = next(name for name in cluster.names if cluster.endpoint(name) == watch.endpoint)
        await asyncio.to_thread(cluster.pause, name)
        try:
            await client.put("frozen", "1")
            async with asyncio.timeout(15):
                assert (await anext(watch)).value == b"1"
        finally:
            await asyncio.to_thread(cluster.resume, name)


async def test_compacted_history_is_said(client: AsyncClient) -> None:
    first = (await client.put("c", "1")).revision
    last = (await client.put("c", "2")).revision
    await client.compact(last)
    for endpoint in client.endpoints:  # whichever serves the watch has compacted, then
        async with AsyncClient(endpoint) as one:
            await one.get("c")
    async with client.watch("c", start_revision=first) as watch:
        with pytest.raises(Compacted) as caught:
            await anext(watch)
    assert caught.value.compact_revision == last


async def test_a_lease_lives_through_the_death_of_every_node(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    began = clock.now()
    async with client.lease(10) as lease:
        await client.put("leased", "1", lease=lease.id)
        for name in raftkv_fresh_cluster.names:
            await asyncio.to_thread(raftkv_fresh_cluster.kill, name)
            killed = clock.now()
            await until(lambda since=killed: lease.confirmed > since or lease.lost.is_set())  # type: ignore[misc]
            await asyncio.to_thread(raftkv_fresh_cluster.restart, name)
        await until(lambda: clock.now() > began + 10 or lease.lost.is_set())  # longer than its time
        lease.check()
        assert await client.get("leased") is not None
    assert await client.get("leased") is None


async def test_a_lease_whose_grant_took_longer_than_it_lasts_is_held_all_the_same(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    """The time runs from when it was asked for, but nothing was held by it yet: its first renewal decides."""
    cluster = raftkv_fresh_cluster
    for name in cluster.names:
        cluster.pause(name)
    granting = [asyncio.create_task(client.lease(4.0).grant()) for _ in range(2)]
    await asyncio.sleep(5)
    for name in cluster.names:
        cluster.resume(name)
    for lease in await asyncio.gather(*granting):
        lease.check()
        await client.put(f"held/{lease.id}", "x", lease=lease.id)
    await asyncio.sleep(4.5)
    for task in granting:
        task.result().check()


async def test_an_abandoned_lease_runs_out_and_the_event_says_so(client: AsyncClient) -> None:
    async with client.watch("left") as watch:
        lease = await client.lease(6, keep_alive=False)
        await client.put("left", "1", lease=lease.id)
        async with asyncio.timeout(20):
            assert (await anext(watch)).kind == "put"
            event = await anext(watch)
    assert (event.kind, event.expired) == ("delete", True)
    assert lease.state is LeaseState.LOST


async def test_locks_exclude_while_leaders_die(
    client: AsyncClient, other: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    """A counter that is read, then written under the guard: it counts every turn if turns never overlap."""
    stop = asyncio.Event()
    turns = 0
    fences: list[int] = []

    async def work(mine: AsyncClient) -> None:
        nonlocal turns
        while not stop.is_set():
            async with mine.lock("turns", ttl=30) as lock:  # nobody is lost here: nobody waits for it to run out
                fences.append(lock.fence)
                old = await mine.get("turns-count")
                await mine.put("turns-count", str(int(old.text) + 1 if old else 1), guards=[lock.guard()])
                turns += 1

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(work(client if number % 2 else other))
        await kill_each(raftkv_fresh_cluster)
        await until(lambda: turns > 20)
        stop.set()
    assert fences == sorted(set(fences))
    item = await client.get("turns-count")
    assert item is not None
    assert item.text == str(turns)


async def test_a_lock_is_tried_and_its_delay_is_the_clusters(client: AsyncClient, other: AsyncClient) -> None:
    async with client.lock("try", ttl=5, timeout=0, lock_delay=20) as lock:
        item = await client.get(lock.key)
        assert item is not None
        assert (await client.lease_info(item.lease)).granted_s == 25
        assert lock.remaining() < 5
        with pytest.raises(LockTimeout):
            await other.lock("try", timeout=0).acquire()
        assert len(await client.range("try/", prefix=True)) == 1
    async with other.lock("try", timeout=0):
        pass


async def test_guards_are_refused_by_the_nodes_once_the_lock_is_gone(client: AsyncClient, other: AsyncClient) -> None:
    async with client.lock("g") as lock:
        guards = [lock.guard()]
        put = await client.put("g-data", "1", guards=guards)
        await client.put("g-data", "2", if_revision=put.revision, guards=guards)
        assert (
            await client.txn(guards=guards).when(Key("g-data").value == b"2").then(Put("x", "1")).commit()
        ).succeeded
        assert (await client.delete("g-data", guards=guards)).deleted == 1
        with pytest.raises(LockTimeout):
            await other.lock("g", timeout=0.3).acquire()
    for attempt in (
        other.put("g-data", "3", guards=guards),
        other.delete("x", guards=guards),
        other.txn(guards=guards).then(Put("g-data", "3")).commit(),
    ):
        with pytest.raises(LockLost) as caught:
            await attempt
        assert caught.value.code == "LOCK_LOST"
    assert await client.get("g-data") is None
    assert await client.get("x") is not None


HOLDER = """
import sys, time
import raftkv
with raftkv.Client(sys.argv[1], timeout=10) as client:
    lock = client.lock("paused", ttl=2).acquire()
    guard = lock.guard()
    print("held", flush=True)
    sys.stdin.readline()          # stopped and continued meanwhile
    try:
        lock.check()
        print("check: held", flush=True)
    except raftkv.LockLost:
        print("check: lost", flush=True)
    for guards in ([guard], []):
        try:
            client.put("paused-data", "old holder", guards=guards)
            print("written", flush=True)
        except raftkv.LockLost:
            print("refused", flush=True)
"""


async def test_a_holder_paused_beyond_its_time_neither_believes_nor_writes(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    """The same write without a guard goes through: it is the guard that keeps it out, not chance."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, ",".join(raftkv_fresh_cluster.endpoints),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"held\n"
        os.kill(process.pid, signal.SIGSTOP)
        async with asyncio.timeout(60), client.lock("paused", ttl=30) as lock:
            await client.put("paused-data", "new holder", guards=[lock.guard()])
            os.kill(process.pid, signal.SIGCONT)
            process.stdin.write(b"\n")
            lines = [await process.stdout.readline() for _ in range(3)]
            lock.check()
        assert lines == [b"check: lost\n", b"refused\n", b"written\n"]
    finally:
        process.kill()
        await process.wait()


async def test_leadership_passes_on_when_its_holder_goes(client: AsyncClient, other: AsyncClient) -> None:
    values: list[bytes] = []

    async def observe() -> None:
        async for leader in client.election("boss").observe():
            values.append(leader.value)
            if leader.value == b"two":
                return

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(observe())
        first = await client.election("boss", ttl=30).campaign("one").acquire()
        second = other.election("boss", ttl=30).campaign("two")
        candidate = group.create_task(second.acquire())
        await first.proclaim("one, still")  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)
        assert not candidate.done()
        await first.release()
        await candidate
    await second.resign()
    assert values[-1] == b"two"


def test_the_blocking_twin_does_all_of_it(raftkv_fresh_cluster: LocalCluster) -> None:
    with Client(raftkv_fresh_cluster.endpoints, timeout=Timeout(total=20)) as client:
        with client.lease(30) as lease, client.watch("b/", prefix=True) as watch:
            client.put("b/1", "x", lease=lease.id)
            event = watch.get(10)
            assert event is not None
            assert event.value == b"x"
            assert watch.get(0.1) is None
            assert lease.remaining() > 0
            assert client.lease_info(lease.id, keys=True).keys == (b"b/1",)
            assert client.leases() == (lease.id,)
        order: list[int] = []

        def work() -> None:
            with client.lock("shared", ttl=30) as lock:
                order.append(lock.fence)
                client.put("shared-data", "x", guards=[lock.guard()])

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert order == sorted(set(order))
        assert len(order) == 8
        lock = client.lock("gone", ttl=6).acquire()
        client.delete(lock.key)
        assert lock.lost.wait(30)
        with pytest.raises(LockLost):
            lock.check()
        with client.election("e").campaign("me") as leadership:
            leadership.proclaim("still me")  # type: ignore[attr-defined]
            leader = client.election("e").leader()
            assert leader is not None
            assert leader.value == b"still me"
