"""Locks: how they are lost, waited for and given back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from raftkv._pb import kv_pb2
from raftkv.client import AsyncClient, ConfigError, Lock, LockLost, LockState, LockTimeout, OutcomeUnknown
from tests.unit.client.conftest import Tools
from tests.unit.client.leasing import Clock, LeasingNode, MakeClient, started

SHORT_S = 0.3  # a ttl by which keys are watched soon; what is tested with a clock that stands still never runs out


@pytest.fixture
async def node() -> AsyncIterator[LeasingNode]:
    node = await started()
    yield node
    await node.stop()


@pytest.fixture
def client(node: LeasingNode, make_client: MakeClient) -> AsyncClient:
    return make_client(node, timeout=3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def delete(node: LeasingNode, key: bytes) -> None:
    node.cluster.delete(kv_pb2.DeleteRangeRequest(key=key))


async def happens(lock: Lock) -> None:
    async with asyncio.timeout(10):
        await lock.lost.wait()


# --- states -----------------------------------------------------------------------------------------------------------


async def test_it_is_at_risk_after_half_its_time_without_a_renewal_and_held_again_after_one(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    node.renewing.clear()
    lock = await client.lock("x", ttl=9).acquire()
    clock.advance(4.4)
    assert lock.state is LockState.HELD
    await tools.until(lambda: node.count("KeepAlive") == 1)
    clock.advance(0.2)
    assert lock.state is LockState.AT_RISK
    lock.check()
    node.renewing.set()
    await tools.until(lambda: lock.state is LockState.HELD)
    assert lock.remaining() > 4
    assert not lock.lost.is_set()


async def test_it_is_lost_at_its_deadline_for_good(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    lock = await client.lock("x", ttl=9).acquire()
    clock.advance(9 * 0.99 - 0.46)
    assert lock.state is LockState.AT_RISK
    clock.advance(0.02)
    assert lock.state is LockState.LOST
    assert lock.remaining() == 0
    for refused in (lock.check, lock.guard):
        with pytest.raises(LockLost):
            refused()
    await happens(lock)
    clock.advance(-5)
    assert lock.state is LockState.LOST


async def test_what_was_lost_stays_lost_until_it_is_acquired_anew(
    client: AsyncClient, node: LeasingNode, clock: Clock
) -> None:
    lock = client.lock("x", ttl=SHORT_S)

    async def hold() -> None:
        async with lock:
            delete(node, lock.key)
            await asyncio.sleep(10)

    with pytest.raises(LockLost):
        await hold()
    old = lock.fence
    assert lock.state is LockState.LOST
    assert lock.lost.is_set()
    with pytest.raises(LockLost):
        await lock.release()
    assert lock.state is LockState.LOST
    async with lock:
        assert lock.state is LockState.HELD
        assert lock.fence > old
    assert lock.state is LockState.IDLE


async def test_who_was_told_of_the_loss_when_giving_it_back_is_not_told_again(
    client: AsyncClient, clock: Clock
) -> None:
    async with client.lock("x", ttl=9) as lock:
        clock.advance(9)
        with pytest.raises(LockLost):
            await lock.release()
    assert lock.state is LockState.LOST


async def test_a_body_that_gives_it_back_in_the_end_leaves_with_the_loss(client: AsyncClient, clock: Clock) -> None:
    lock = client.lock("x", ttl=9)

    async def hold() -> None:
        async with lock:
            try:
                clock.advance(9)
                await asyncio.sleep(60)
            finally:
                with contextlib.suppress(LockLost):
                    await lock.release()

    with pytest.raises(LockLost):
        await hold()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_giving_it_back_is_no_loss(client: AsyncClient) -> None:
    told: list[str] = []
    lock = await client.lock("x").acquire()
    lost = lock.lost
    lock.when_lost(lambda: told.append("lost"))
    await lock.release()
    assert not lost.is_set()
    assert lock.state is LockState.IDLE
    assert told == []


async def test_all_are_told_of_a_loss_whatever_one_of_them_raises(
    client: AsyncClient, node: LeasingNode, clock: Clock
) -> None:
    told: list[int] = []

    async def hold() -> None:
        async with client.lock("x", ttl=SHORT_S) as lock:
            lock.when_lost(lambda: told.append(1 // len(told)))
            lock.when_lost(lambda: told.append(2))
            delete(node, lock.key)
            await asyncio.sleep(10)  # the body is told, too

    with pytest.raises(LockLost):
        await hold()
    assert told == [2]
    await client.put("k", "the client is none the worse")


# --- loss -------------------------------------------------------------------------------------------------------------


async def test_a_deleted_key_is_lost_though_nobody_can_be_asked_about_it(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    lock = await client.lock("x", ttl=SHORT_S).acquire()
    await tools.until(lambda: node.watches == 1)
    node.script = tools.failing(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")
    delete(node, lock.key)
    await happens(lock)


async def test_its_key_is_minded_on_after_nobody_could_be_asked(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    asked = asyncio.Event()

    async def silent(name: str, request: Any, context: Any) -> None:
        if name == "Txn":
            asked.set()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")

    lock = await client.lock("x", ttl=SHORT_S).acquire()
    node.cluster.compacted = node.cluster.revision + 2  # so that the watch cannot tell, and it has to ask
    node.script = silent
    async with asyncio.timeout(10):
        await asked.wait()
    before = client.stats().failures
    await tools.until(lambda: client.stats().failures > before)
    node.cluster.compacted = 0
    node.script = None
    await tools.until(lambda: node.watches == 1)
    assert not lock.lost.is_set()
    delete(node, lock.key)
    await happens(lock)


async def test_after_compaction_it_is_asked_once_and_watched_from_there(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    lock = await client.lock("x", ttl=SHORT_S).acquire()
    await client.put("k", "1")
    node.cluster.compacted = node.cluster.revision + 1
    await tools.until(lambda: node.watches == 1 and node.count("Watch") == 2)
    assert node.count("Txn") == 2
    delete(node, lock.key)
    await happens(lock)


async def test_the_lease_of_a_lost_lock_is_not_kept_alive(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    lock = await client.lock("x", ttl=SHORT_S).acquire()
    delete(node, lock.key)
    await happens(lock)
    await tools.until(lambda: node.cluster.leases == {})
    await lock.acquire()
    assert len(node.cluster.leases) == 1


async def test_acquiring_anew_gives_the_old_lease_back(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    lock = await client.lock("x", ttl=9).acquire()
    clock.advance(9)
    async with asyncio.timeout(10):
        await lock.acquire()  # at the cluster the old one had not run out yet
    lock.check()
    await tools.until(lambda: len(node.cluster.leases) == 1)


async def test_who_was_cancelled_by_others_is_cancelled_though_the_lock_is_lost(
    client: AsyncClient, clock: Clock
) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with client.lock("x"):
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await inside.wait()
    clock.advance(60)
    task.cancel()  # before anybody noticed
    with pytest.raises(asyncio.CancelledError):
        await task


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serves_locks", [True, False])
async def test_a_waiter_whose_lease_runs_out_is_told_though_no_node_can_be_reached(
    serves_locks: bool, client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    node.serves_locks = serves_locks
    await client.lock("x", ttl=60).acquire()
    waiter = asyncio.create_task(client.lock("x", ttl=9).acquire())
    await tools.until(lambda: node.count("Lock" if serves_locks else "Watch") == 1)
    await node.stop()
    await tools.until(lambda: not client._context.pool.connections[0].is_ready())
    clock.advance(10)
    with pytest.raises(LockLost):
        async with asyncio.timeout(10):
            await waiter


@pytest.mark.parametrize("serves_locks", [True, False])
async def test_a_waiter_gets_it_when_it_is_its_turn(
    serves_locks: bool, client: AsyncClient, node: LeasingNode, tools: type[Tools]
) -> None:
    node.serves_locks = serves_locks
    holder = await client.lock("x").acquire()
    waiter = asyncio.create_task(client.lock("x").acquire())
    await tools.until(lambda: node.count("Lock" if serves_locks else "Watch") == 1)
    await holder.release()
    async with asyncio.timeout(10):
        lock = await waiter
    assert lock.fence > 0
    lock.check()


async def test_a_try_takes_what_is_free_and_never_stands_in_the_queue(
    client: AsyncClient, node: LeasingNode, tools: type[Tools]
) -> None:
    async with client.lock("x", timeout=0) as lock:
        seen: list[bytes] = []

        async def look(name: str, request: Any, context: Any) -> None:
            seen.extend(node.cluster.keys(b"x/"))

        node.script = look
        for attempt in (client.lock("x", timeout=0).acquire(), client.lock("x").acquire(timeout=0)):
            with pytest.raises(LockTimeout, match="x is not free"):
                await attempt
        await tools.until(lambda: len(node.cluster.leases) == 1)
        assert set(seen) == {lock.key}
    assert node.cluster.keys(b"x/") == []
    assert node.cluster.leases == {}


async def test_a_try_whose_answer_was_lost_has_what_it_took(
    client: AsyncClient, node: LeasingNode, tools: type[Tools]
) -> None:
    lost = False

    async def lose(name: str, request: Any, context: Any) -> None:
        nonlocal lost
        if name == "Txn" and not lost:
            lost = True
            await tools.until(lambda: node.cluster.leases != {})
            node.cluster.txn(request)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")

    node.script = lose
    lock = await client.lock("x").acquire(timeout=0)
    assert node.cluster.data[lock.key].create_revision == lock.fence
    await lock.release()


@pytest.mark.parametrize("bad", [-1, False, float("nan"), "0"])
async def test_times_to_wait_that_are_none(bad: Any, client: AsyncClient, node: LeasingNode) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        await client.lock("x").acquire(timeout=bad)
    assert node.cluster.granted == {}


# --- giving it back ---------------------------------------------------------------------------------------------------


async def leave_block(client: AsyncClient) -> None:
    async with client.lock("x"):
        pass


async def release(client: AsyncClient) -> None:
    await (await client.lock("x").acquire()).release()


async def resign(client: AsyncClient) -> None:
    await (await client.election("x").campaign().acquire()).resign()


async def leave_lease(client: AsyncClient) -> None:
    async with client.lease(10):
        pass


@pytest.mark.parametrize("leaving", [leave_block, release, resign, leave_lease])
async def test_giving_back_that_is_cancelled_is_done_all_the_same(
    leaving: Any, client: AsyncClient, node: LeasingNode, tools: type[Tools]
) -> None:
    node.script = tools.holding(never := asyncio.Event(), "LeaseRevoke")
    task = asyncio.create_task(leaving(client))
    await tools.until(lambda: node.count("LeaseRevoke") == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not never.is_set()
    node.script = None
    await tools.until(lambda: node.cluster.leases == {})


async def test_giving_back_that_ran_out_of_time_is_tried_on(
    client: AsyncClient, node: LeasingNode, tools: type[Tools]
) -> None:
    lock = await client.lock("x").acquire()
    node.script = tools.holding(asyncio.Event(), "LeaseRevoke")
    with pytest.raises(OutcomeUnknown):
        await lock.release(timeout=1)
    node.script = None
    await tools.until(lambda: node.cluster.leases == {})


async def test_nothing_runs_on_for_what_was_given_back(client: AsyncClient, tools: type[Tools]) -> None:
    def minding() -> int:
        return sum("raftkv-client lock" in task.get_name() for task in asyncio.all_tasks())

    for ttl in (3600, 3, 3600, 3):
        async with client.lock("x", ttl=ttl):
            if ttl == 3:  # begun after a third of it; what is held briefly does not pay for it
                await tools.until(lambda: minding() == 1)
            else:
                assert minding() == 0
        await tools.until(lambda: minding() == 0)


# --- lock delay -------------------------------------------------------------------------------------------------------


async def test_a_lock_delay_outlasts_the_holder_not_the_release(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    lock = client.lock("x", ttl=9, lock_delay=20)
    async with lock:
        assert list(node.cluster.leases.values()) == [29_000]
        assert lock.remaining() < 9
        clock.advance(4)
        await tools.until(lambda: lock.remaining() > 8)
        clock.advance(4)  # by the renewal, too, what counts is the time to live
        assert lock.state is LockState.HELD
        clock.advance(0.6)
        assert lock.state is LockState.AT_RISK
    assert node.cluster.leases == {}


async def test_a_holder_that_lost_it_does_not_shorten_the_delay(
    client: AsyncClient, node: LeasingNode, clock: Clock
) -> None:
    lock = client.lock("x", ttl=9, lock_delay=20)

    async def hold() -> None:
        async with lock:
            clock.advance(9)
            await asyncio.sleep(60)

    for leaving in (hold, lock.release):
        with pytest.raises(LockLost):
            await leaving()
    with pytest.raises(LockTimeout):
        await client.lock("x").acquire(timeout=0)
    await client.close()  # which waits for what is being revoked
    assert node.cluster.keys(b"x/") == [lock.key]


@pytest.mark.parametrize("bad", [-1, 60.1, float("nan"), float("inf"), True, "5"])
async def test_lock_delays_that_are_none(bad: Any, client: AsyncClient) -> None:
    with pytest.raises(ConfigError, match=r"lock_delay: .* is not a number of seconds from 0 to 60"):
        client.lock("x", lock_delay=bad)
