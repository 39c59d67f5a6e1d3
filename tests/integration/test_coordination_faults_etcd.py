"""The SDK on a real etcd while its members die: locks, elections and guards hold; and the blocking twins, there too."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftkv.client import (
    AsyncClient,
    Client,
    ConditionFailed,
    ConfigError,
    Guard,
    InvalidRequest,
    LeaseNotFound,
    LockLost,
    Put,
)
from tests.integration.test_coordination_etcd import Etcd

pytestmark = [pytest.mark.system, pytest.mark.integration]

WORKER = Path(__file__).with_name("fencing_worker.py")


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
async def client(etcd: Etcd) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(etcd.endpoints, timeout=20) as client:
        yield client


@pytest.fixture
async def other(etcd: Etcd) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(etcd.endpoints, timeout=20) as client:
        yield client


async def kill_the_leader(etcd: Etcd, client: AsyncClient) -> None:
    """And start it again when there is another."""
    number = await asyncio.to_thread(etcd.leader)
    await asyncio.to_thread(etcd.kill, number)
    try:
        await client.get("ready", timeout=30)  # linearizable: there is a leader
    finally:
        etcd.restart(number)
    async with asyncio.timeout(30):
        while any(each.status is None for each in await client.cluster.status()):  # noqa: ASYNC110 - it is starting
            await asyncio.sleep(0.1)


async def test_a_lock_is_held_on_while_leaders_die(etcd: Etcd, client: AsyncClient, other: AsyncClient) -> None:
    entered = asyncio.Event()

    async def wait() -> int:
        async with other.lock("kept", ttl=30) as lock:
            entered.set()
            await other.put("kept-data", "second", guards=[lock.guard()])
            return lock.fence

    async with client.lock("kept", ttl=30) as lock:
        waiting = asyncio.create_task(wait())
        for _ in range(2):
            await kill_the_leader(etcd, client)
            lock.check()
            assert not entered.is_set()
        first = lock.fence
    async with asyncio.timeout(30):
        assert await waiting > first


async def test_leadership_outlives_leaders_of_etcd_and_is_observed(
    etcd: Etcd, client: AsyncClient, other: AsyncClient
) -> None:
    seen: list[bytes] = []

    async def observe() -> None:
        async for leader in other.election("lasting").observe():
            seen.append(leader.value)
            if leader.value == b"two":
                return

    observing = asyncio.create_task(observe())
    candidate = other.election("lasting", ttl=15).campaign("two")
    async with client.election("lasting", ttl=15).campaign("one") as leadership:
        campaigning = asyncio.create_task(candidate.acquire())
        await kill_the_leader(etcd, client)
        await leadership.proclaim("one, still")
        assert not campaigning.done()
        leader = await other.election("lasting").leader()
        assert leader is not None
        assert leader.value == b"one, still"
    async with asyncio.timeout(30):
        await campaigning
        await observing
    await candidate.resign()
    assert seen[-1] == b"two"
    # What came and went between two looks is left out.
    assert seen == [each for each in (b"one", b"one, still", b"two") if each in seen]


@pytest.mark.slow
async def test_a_holder_that_was_stopped_beyond_its_time_writes_nothing(etcd: Etcd, client: AsyncClient) -> None:
    """A process, stopped by SIGSTOP between looking and writing; on etcd its guard is a transaction."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(WORKER), ",".join(etcd.endpoints), "guarded", "6", "once"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(90):
            while not told or told[-1]["event"] != "checked":
                told.append(json.loads(await process.stdout.readline()))
            process.send_signal(signal.SIGSTOP)
            async with client.lock("turns", ttl=10) as lock:  # when the lease of the stopped one has run out
                assert lock.fence > told[0]["fence"]
                put = await client.put("stock", '{"count": 100}', guards=[lock.guard()])
            process.send_signal(signal.SIGCONT)
            process.stdin.write(b"\n")
            process.stdin.close()
            told += [json.loads(line) for line in (await process.stdout.read()).splitlines()]
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    events = [each["event"] for each in told]
    assert "check says lost" in events
    assert "refused" in events
    assert "written" not in events
    item = await client.get("stock")
    assert item is not None
    assert item.mod_revision == put.revision


async def test_what_a_guard_refuses_changes_nothing(client: AsyncClient) -> None:
    async with client.lock("guarding") as lock:
        guard = lock.guard()
        await client.put("guarded", "1", guards=[guard])
    before = await client.put("marker", "")
    for attempt in (
        client.put("guarded", "2", guards=[guard]),
        client.put("guarded", "2", if_absent=True, guards=[guard]),
        client.delete("guarded", guards=[guard]),
        client.delete("", prefix=True, guards=[guard]),
        client.txn(guards=[guard]).then(Put("guarded", "2")).otherwise(Put("guarded", "3")).commit(),
        client.put("guarded", "2", guards=[Guard(b"no such key", 1)]),
    ):
        with pytest.raises(LockLost):
            await attempt
    assert (await client.put("marker", "")).revision == before.revision + 1
    async with client.lock("guarding") as lock:
        with pytest.raises(LockLost):  # the key of an earlier holder, or its token, is not this one's
            await client.put("guarded", "2", guards=[lock.guard(), guard])
        with pytest.raises(ConditionFailed):  # the lock is held, and the condition is what does not hold
            await client.put("guarded", "2", if_absent=True, guards=[lock.guard()])
        with pytest.raises(InvalidRequest, match="too many operations"):
            await client.txn(guards=[lock.guard()]).then(*(Put(f"m{n}", "") for n in range(200))).commit()


async def test_leases_chosen_by_the_caller_and_bad_ones(client: AsyncClient) -> None:
    granted = await client.grant_lease(60, id=864_209)
    assert (granted.id, granted.ttl_s) == (864_209, 60)
    with pytest.raises(ConditionFailed, match="lease already exists"):
        await client.grant_lease(60, id=864_209)
    assert (await client.grant_lease(0.5)).ttl_s >= 1
    with pytest.raises(ConfigError, match="more than 9000000000 s"):
        await client.grant_lease(9_000_000_001)
    await client.put("chosen", "1", lease=864_209)
    info = await client.lease_info(864_209, keys=True)
    assert info.keys == (b"chosen",)
    await client.revoke_lease(864_209)
    for attempt in (client.revoke_lease(864_209), client.lease_info(864_209), client.put("chosen", "2", lease=864_209)):
        with pytest.raises(LeaseNotFound):
            await attempt


async def test_a_deletion_by_a_lease_is_told_as_a_deletion(client: AsyncClient) -> None:
    """etcd does not say that a lease did it: nor do we then."""
    lease = await client.lease(6, keep_alive=False)
    put = await client.put("leased", "1", lease=lease.id)
    async with client.watch("leased", prev=True, start_revision=put.revision + 1) as watch, asyncio.timeout(30):
        event = await anext(watch)
    assert (event.kind, event.expired) == ("delete", False)
    assert event.previous is not None
    assert event.previous.lease == lease.id


async def test_progress_of_an_idle_watch_moves_on(client: AsyncClient) -> None:
    async with client.watch("idle", start_revision=1) as watch:
        await client.put("idle", "1")
        batch = await anext(aiter(watch.batches()))
        assert [event.value for event in batch.events] == [b"1"]
        assert watch.revision >= batch.revision


def test_the_blocking_twins(etcd: Etcd) -> None:
    with Client(etcd.endpoints, timeout=20) as client:
        with client.lease(30) as lease, client.watch("twin", prefix=True) as watch:
            client.put("twin/a", "1", lease=lease.id)
            event = watch.get(10)
            assert event is not None
            assert event.value == b"1"
        assert client.get("twin/a") is None
        with client.lock("twin-lock", ttl=30) as lock:
            lock.check()
            client.put("twin-data", "1", guards=[lock.guard()])
            guard = lock.guard()
        with pytest.raises(LockLost):
            client.put("twin-data", "2", guards=[guard])
        with client.election("twin-boss").campaign("me") as leadership:
            leadership.proclaim("me, still")
            leader = client.election("twin-boss").leader()
            assert leader is not None
            assert leader.value == b"me, still"
        assert client.election("twin-boss").leader() is None
