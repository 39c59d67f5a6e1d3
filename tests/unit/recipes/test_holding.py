"""What is held: in order, without a herd, through cancellation at every moment, lost answers and lost leases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.client import (
    AsyncClient,
    ConditionFailed,
    ConfigError,
    InvalidRequest,
    LockLost,
    LockState,
    LockTimeout,
    Put,
    RaftkvError,
    RangeResult,
    Unavailable,
)
from raftkv.recipes import DoubleBarrier, Queue, ReadWriteLock, Semaphore
from raftkv.recipes.holding import Holding
from tests.unit.recipes.conftest import quiet
from tests.unit.recipes.store import FakeClient, FakeLease, Store

Make = Callable[[], FakeClient]
KINDS: dict[str, Callable[[AsyncClient], Holding]] = {
    "permit": lambda client: Semaphore(client, "x", 1).permit(),
    "read": lambda client: ReadWriteLock(client, "x").read(),
    "write": lambda client: ReadWriteLock(client, "x").write(),
    "claim": lambda client: Queue(client, "x").take(),
}
EXCLUSIVE = [name for name in KINDS if name != "read"]


async def prepare(client: FakeClient, kind: str) -> None:
    if kind == "claim":
        await Queue(client, "x").put("job")


def lease_of(holding: Holding, store: Store) -> FakeLease:
    return store.leases[store.items[holding.key].lease]


def leftovers(store: Store) -> list[bytes]:
    """Keys bound to leases: places, claims and the like."""
    return [item.key for item in store.items.values() if item.lease]


# --- order, and who wakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXCLUSIVE)
async def test_they_hold_in_the_order_in_which_they_came(kind: str, make: Make) -> None:
    await prepare(make(), kind)
    if kind == "claim":
        for _ in range(4):
            await Queue(make(), "x").put("job")
    order: list[int] = []

    async def work(number: int) -> None:
        async with KINDS[kind](make()):
            order.append(number)
            await quiet(5)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(work(number))
            await quiet()
    assert order == list(range(5))


@pytest.mark.parametrize("waiters", [3, 30])
async def test_a_permit_that_comes_free_wakes_two_however_many_wait(waiters: int, make: Make) -> None:
    holders = [await Semaphore(make(), "x", 2).permit().acquire() for _ in range(2)]
    clients = [make() for _ in range(waiters)]
    tasks = []
    for client in clients:
        tasks.append(asyncio.create_task(Semaphore(client, "x", 2).permit().acquire()))
        await quiet(20)
    before = [client.reads for client in clients]
    await holders[0].release()
    await quiet()
    asked = [client.reads - old for client, old in zip(clients, before, strict=True)]
    assert tasks[0].done()
    assert [number for number, count in enumerate(asked) if count] == [0, 1]
    assert sum(asked) <= 4
    await cancel(tasks)


@pytest.mark.parametrize("kind", ["write", "claim"])
async def test_what_comes_free_wakes_one_however_many_wait(kind: str, make: Make) -> None:
    await prepare(make(), kind)
    holder = await KINDS[kind](make()).acquire()
    clients = [make() for _ in range(20)]
    tasks = []
    for client in clients:
        tasks.append(asyncio.create_task(KINDS[kind](client).acquire()))
        await quiet(30)
    before = [client.reads for client in clients]
    await holder.release()
    await quiet()
    asked = [client.reads - old for client, old in zip(clients, before, strict=True)]
    assert tasks[0].done()
    # The second in a queue's line becomes the first, and looks.
    assert [number for number, count in enumerate(asked) if count] == ([0] if kind == "write" else [0, 1])
    await cancel(tasks)


async def test_a_waiter_that_goes_is_passed_over(make: Make, store: Store) -> None:
    holder = await Semaphore(make(), "x", 1).permit().acquire()
    tasks = []
    for _ in range(4):
        tasks.append(asyncio.create_task(Semaphore(make(), "x", 1).permit().acquire()))
        await quiet(20)
    await cancel(tasks[:2])
    await quiet()
    await holder.release()
    await quiet()
    assert [task.done() for task in tasks] == [True, True, True, False]
    await (await tasks[2]).release()
    await (await tasks[3]).release()
    assert leftovers(store) == []


async def test_readers_hold_together_and_do_not_overtake_a_writer(make: Make) -> None:
    first = await ReadWriteLock(make(), "x").read().acquire()
    await ReadWriteLock(make(), "x").read().acquire(timeout=20)
    writer = asyncio.create_task(ReadWriteLock(make(), "x").write().acquire())
    await quiet()
    late = asyncio.create_task(ReadWriteLock(make(), "x").read().acquire())
    await quiet()
    await first.release()
    await quiet()
    assert not writer.done()
    assert not late.done()
    await cancel([writer])
    await quiet()
    assert late.done()  # the writer that went stands in nobody's way


async def cancel(tasks: list[asyncio.Task[Holding]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


# --- cancellation, lost answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("contended", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_at_any_moment_it_leaves_nothing_behind(
    kind: str, contended: bool, make: Make, store: Store
) -> None:
    await prepare(make(), kind)
    for moment in range(60):
        holder = await KINDS["write" if kind == "read" else kind](make()).acquire() if contended else None
        task = asyncio.create_task(KINDS[kind](make()).acquire())
        await quiet_exactly(moment)
        if holder is not None:
            await holder.release()
            await quiet_exactly(moment // 2)
        task.cancel()
        try:
            held = await task
        except asyncio.CancelledError:
            pass
        else:
            await held.release()
        await quiet()
        assert leftovers(store) == []
        assert store.leases == {}
    async with KINDS[kind](make()) as held:
        held.check()


async def quiet_exactly(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
async def test_answers_that_are_lost_change_nothing(kind: str, lost: int, make: Make, store: Store) -> None:
    await prepare(make(), kind)
    store.lose = lost
    held = await KINDS[kind](make()).acquire()
    assert store.lose == 0
    assert store.items[held.key].create_revision == held.fence
    await make().put("data", "1", guards=[held.guard()])
    await held.release()
    assert leftovers(store) == []


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_job_is_done_once_though_answers_are_lost(lost: int, make: Make, store: Store) -> None:
    queue = Queue(make(), "x")
    await queue.put("job")
    async with queue.take() as job:
        store.lose = lost
        await job.done(Put("result", job.value))
    assert store.items[b"result"].version == 1
    assert await queue.size() == 0
    await quiet()
    assert leftovers(store) == []


async def test_a_job_whose_claim_is_lost_is_not_done(make: Make, store: Store) -> None:
    queue = Queue(make(), "x")
    await queue.put("job")
    job = await queue.take().acquire()
    await make().delete(job.key)  # nobody was told yet
    with pytest.raises(LockLost):
        await job.done(Put("result", "1"))
    assert b"result" not in store.items
    assert await queue.size() == 1


async def test_a_job_whose_body_fails_is_there_again(make: Make) -> None:
    queue = Queue(make(), "x")
    await queue.put("job")
    with pytest.raises(ZeroDivisionError):
        async with queue.take():
            raise ZeroDivisionError
    assert (await queue.get(timeout=20)).value == b"job"


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_losing_it_cancels_the_body_and_is_told(kind: str, make: Make, store: Store) -> None:
    await prepare(make(), kind)
    held = KINDS[kind](make())
    guards = []
    reached: list[str] = []

    async def hold() -> None:
        async with held:
            guards.append(held.guard())
            await lease_of(held, store).expire()
            reached.append("lost")
            assert held.state is LockState.LOST
            assert held.remaining() == 0
            assert held.lost.is_set()
            await asyncio.sleep(60)
            reached.append("too far")

    with pytest.raises(LockLost):
        await hold()
    assert reached == ["lost"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(LockLost):
        await make().put("data", "1", guards=guards)
    assert held.state is LockState.LOST  # until it is acquired anew
    with pytest.raises(LockLost):
        await held.release()
    async with asyncio.timeout(10), held:
        assert held.fence > guards[0].token
    assert held.state is LockState.IDLE


async def test_who_was_told_of_the_loss_when_giving_it_back_is_not_told_again(make: Make, store: Store) -> None:
    async with Semaphore(make(), "x", 1).permit() as held:
        lease_of(held, store).why_lost = "its deadline has passed, which nobody noticed yet"
        with pytest.raises(LockLost):
            await held.release()
    assert held.state is LockState.LOST


async def test_who_finds_out_by_itself_is_not_cancelled_besides(make: Make) -> None:
    """The cancellation of its own task would come out later, where nobody expects it."""
    await Queue(make(), "x").put("job")

    async def work() -> None:
        async with Queue(make(), "x").take() as job:
            await make().delete(job.key)
            await job.done()

    with pytest.raises(LockLost):
        await work()
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


class Blind(FakeClient):
    """Cannot look when it holds, until it is told that it can."""

    failure: RaftkvError | None = None

    async def range(self, *arguments: Any, **more: Any) -> RangeResult:
        found = await super().range(*arguments, **more)
        if self.failure is not None:
            raise self.failure
        return found


@pytest.mark.parametrize("failure", [Unavailable("nobody is there"), InvalidRequest("permission denied")])
async def test_a_deleted_key_is_noticed_though_nobody_could_be_asked_at_first(
    failure: RaftkvError, store: Store
) -> None:
    client = Blind(store)
    held = await Semaphore(client, "x", 1, ttl=0.1).permit().acquire()
    client.failure = failure
    before = client.reads
    async with asyncio.timeout(10):
        while client.reads == before:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)
        client.failure = None
        await client.delete(held.key)
        await held.lost.wait()
    await quiet()
    assert store.leases == {}  # it is not kept alive for nothing


async def test_all_are_told_of_a_loss_and_nobody_of_giving_back(make: Make, store: Store) -> None:
    told: list[int] = []
    held = await Semaphore(make(), "x", 1).permit().acquire()
    held.when_lost(lambda: told.append(0))
    await held.release()
    assert told == []
    await held.acquire()
    for number in (1, 2):
        held.when_lost(lambda number=number: told.append(number))  # type: ignore[misc]
    await lease_of(held, store).expire()
    assert told == [1, 2]


async def test_who_was_cancelled_by_others_is_cancelled_though_it_is_lost(make: Make, store: Store) -> None:
    held = Semaphore(make(), "x", 1).permit()

    async def hold() -> None:
        async with held:
            await asyncio.sleep(60)

    task = asyncio.create_task(hold())
    await quiet()
    lease_of(held, store).why_lost = "its deadline has passed, which nobody noticed yet"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", KINDS)
async def test_giving_back_that_is_cancelled_is_done_all_the_same(kind: str, make: Make, store: Store) -> None:
    await prepare(make(), kind)
    for moment in range(6):
        held = await KINDS[kind](make()).acquire()
        task = asyncio.create_task(held.release())
        await quiet_exactly(moment + 1)
        task.cancel()
        await asyncio.wait([task])
        await quiet()
        assert store.leases == {}


async def test_who_is_cancelled_too_is_cancelled(make: Make, store: Store) -> None:
    held = Semaphore(make(), "x", 1).permit()

    async def hold() -> None:
        async with held:
            await asyncio.sleep(60)

    task = asyncio.create_task(hold())
    await quiet()
    task.cancel()
    await lease_of(held, store).expire()
    with pytest.raises(asyncio.CancelledError):
        await task
    await quiet()
    assert leftovers(store) == []


@pytest.mark.parametrize("kind", EXCLUSIVE)
async def test_a_waiter_whose_lease_dies_fails_and_the_queue_moves_on(kind: str, make: Make, store: Store) -> None:
    await prepare(make(), kind)
    holder = await KINDS[kind](make()).acquire()
    before = set(store.leases)
    waiter = asyncio.create_task(KINDS[kind](make()).acquire())
    await quiet()
    for id in sorted(set(store.leases) - before):
        await store.leases[id].expire()
    with pytest.raises(LockLost):
        async with asyncio.timeout(10):
            await waiter
    after = asyncio.create_task(KINDS[kind](make()).acquire())
    await quiet()
    await holder.release()
    async with asyncio.timeout(10):
        await after


async def test_a_lease_that_dies_between_two_steps_is_no_permit(make: Make, store: Store) -> None:
    """Whenever it dies while entering, either LockLost, or what was entered is lost."""
    for moment in range(30):
        held = Semaphore(make(), "x", 1).permit()
        task = asyncio.create_task(held.acquire())
        await quiet_exactly(moment)
        for lease in list(store.leases.values()):
            await lease.expire()
        try:
            await task
        except LockLost:
            continue
        assert moment < 2 or held.state is LockState.LOST  # before the grant there was nothing to die
        if held.state is LockState.HELD:
            await held.release()


@pytest.mark.parametrize("kind", ["permit", "read", "write"])
async def test_a_waiter_that_does_not_know_of_its_death_does_not_enter(kind: str, make: Make, store: Store) -> None:
    """etcd's recipes once did: the lease had ended while they waited, and nobody had told."""
    holder = await KINDS["permit" if kind == "permit" else "write"](make()).acquire()
    before = set(store.leases)
    waiter = asyncio.create_task(KINDS[kind](make()).acquire())
    await quiet()
    for id in sorted(set(store.leases) - before):
        await store.end_lease(id)
    await quiet()
    await holder.release()
    with pytest.raises(LockLost):
        async with asyncio.timeout(10):
            await waiter


# --- time, and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXCLUSIVE)
async def test_what_is_not_free_in_time_raises_and_leaves_the_queue(kind: str, make: Make, store: Store) -> None:
    await prepare(make(), kind)
    async with KINDS[kind](make()) as held:
        with pytest.raises(LockTimeout):
            await KINDS[kind](make()).acquire(timeout=0.05)
        await quiet()
        assert leftovers(store) == [held.key]


async def test_one_object_is_held_once_at_a_time(make: Make) -> None:
    permit = await Semaphore(make(), "x", 2).permit().acquire()
    with pytest.raises(ConfigError):
        await permit.acquire()
    await permit.release()
    with pytest.raises(LockLost):
        await permit.release()


@pytest.mark.parametrize("name", ["", "/", "a/", ".hidden", "a/.semaphore/place"])
async def test_names_that_could_meet_others_are_refused(name: str, make: Make) -> None:
    for recipe in (
        lambda: Semaphore(make(), name, 1),
        lambda: ReadWriteLock(make(), name),
        lambda: Queue(make(), name),
    ):
        with pytest.raises(ConfigError):
            recipe()


@pytest.mark.parametrize("permits", [0, -1, 10_001, True, 2.0, "3"])
async def test_numbers_of_permits_that_are_none(permits: int, make: Make) -> None:
    with pytest.raises(ConfigError):
        Semaphore(make(), "x", permits)
    with pytest.raises(ConfigError):
        DoubleBarrier(make(), "x", permits)


async def test_who_comes_with_another_number_is_told(make: Make) -> None:
    await (await Semaphore(make(), "x", 3).permit().acquire()).release()
    with pytest.raises(ConfigError, match="others use b'3'"):
        await Semaphore(make(), "x", 4).permit().acquire()
    assert await Semaphore(make(), "x", 3).holders() == ()


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), 1e12])
async def test_times_to_live_and_time_outs_that_are_none(bad: float, make: Make) -> None:
    with pytest.raises(ConfigError):
        Semaphore(make(), "x", 1, bad).permit()
    with pytest.raises(ConfigError):
        Semaphore(make(), "x", 1).permit(timeout=bad if bad != 1e12 else -1)


# --- parties ----------------------------------------------------------------------------------------------------------


async def test_parties_come_and_go_together_with_few_looks(make: Make) -> None:
    parties = 20
    clients = [make() for _ in range(parties)]
    inside = 0

    async def take_part(client: FakeClient) -> None:
        nonlocal inside
        async with DoubleBarrier(client, "x", parties):
            inside += 1
            await quiet(10)
            assert inside == parties
        assert inside == parties

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(take_part(client))
    assert sum(client.reads for client in clients) < 20 * parties  # not their square


async def test_a_party_too_many_is_told_and_one_that_died_can_be_replaced(make: Make, store: Store) -> None:
    both = await asyncio.gather(*(DoubleBarrier(make(), "x", 2).acquire() for _ in range(2)))
    with pytest.raises(ConditionFailed) as caught:
        await DoubleBarrier(make(), "x", 2).acquire()
    assert caught.value.code == "BARRIER_FULL"
    await quiet()
    await lease_of(both[0], store).expire()
    third = await DoubleBarrier(make(), "x", 2).acquire(timeout=20)
    async with asyncio.timeout(10):
        await asyncio.gather(third.leave(), both[1].leave())


async def test_a_party_that_is_lost_while_it_leaves_is_lost(make: Make, store: Store) -> None:
    parties = await asyncio.gather(*(DoubleBarrier(make(), "x", 2).acquire() for _ in range(2)))
    oldest = min(parties, key=lambda party: party.fence)
    lease = lease_of(oldest, store)
    leaving = asyncio.create_task(oldest.leave())
    await quiet()
    await lease.expire()
    with pytest.raises(LockLost):
        await leaving
    assert oldest.state is LockState.LOST


async def test_a_party_that_dies_inside_does_not_keep_the_others(make: Make, store: Store) -> None:
    parties = await asyncio.gather(*(DoubleBarrier(make(), "x", 3).acquire() for _ in range(3)))
    for dying in parties:
        if dying.held:
            others = [asyncio.create_task(party.leave()) for party in parties if party is not dying]
            await quiet()
            assert not any(task.done() for task in others)
            await lease_of(dying, store).expire()
            async with asyncio.timeout(10):
                await asyncio.gather(*others)
            break
    async with asyncio.timeout(10):  # the next round is not the last one
        early = asyncio.create_task(DoubleBarrier(make(), "x", 3).acquire())
        await quiet()
        assert not early.done()
        rest = [DoubleBarrier(make(), "x", 3).acquire() for _ in range(2)]
        await asyncio.gather(early, *rest)


async def test_leaving_one_by_one_wakes_each_party_once(make: Make) -> None:
    clients = [make() for _ in range(20)]
    parties = await asyncio.gather(*(DoubleBarrier(client, "x", 20).acquire() for client in clients))
    before = sum(client.reads for client in clients)
    leaving = []
    for party in sorted(parties, key=lambda party: party.fence):
        leaving.append(asyncio.create_task(party.leave()))
        await quiet(20)
    async with asyncio.timeout(10):
        await asyncio.gather(*leaving)
    assert sum(client.reads for client in clients) - before < 6 * len(parties)


async def test_who_is_slow_to_leave_does_not_wait_for_the_next_round(make: Make, store: Store) -> None:
    class Slow(FakeClient):
        gate = asyncio.Event()

        async def range(self, *arguments: Any, **more: Any) -> RangeResult:
            await self.gate.wait()
            return await super().range(*arguments, **more)

    slow = Slow(store)
    slow.gate.set()
    oldest = asyncio.create_task(DoubleBarrier(make(), "x", 2).acquire())
    await quiet(20)
    late = await DoubleBarrier(slow, "x", 2).acquire()
    leaving = asyncio.create_task(late.leave())
    await quiet()
    slow.gate.clear()
    await (await oldest).leave()
    await asyncio.gather(*(DoubleBarrier(make(), "x", 2).acquire() for _ in range(2)))
    slow.gate.set()
    async with asyncio.timeout(10):
        await leaving
