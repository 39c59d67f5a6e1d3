"""Counters, barriers, registries and leader tasks, with lost answers, wrong data and lost leases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.client import (
    ConditionFailed,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    LockLost,
    OutcomeUnknown,
    TxnResult,
    Unavailable,
)
from raftkv.client.txn import Branches
from raftkv.recipes import Barrier, Counter, Instance, LeaderTask, PriorityQueue, Queue, Registry, Semaphore
from tests.unit.recipes.conftest import quiet
from tests.unit.recipes.store import FakeClient, Store

Make = Callable[[], FakeClient]
KEY = b"services/.registry/billing/1"


# --- counters ---------------------------------------------------------------------------------------------------------


async def test_every_change_counts(make: Make) -> None:
    async def add() -> None:
        counter = Counter(make(), "c")
        for _ in range(5):
            await counter.add(3)

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(add())
    assert await Counter(make(), "c").value() == 90


async def test_an_object_does_not_compete_with_itself(make: Make) -> None:
    client = make()
    counter = Counter(client, "c")
    await asyncio.gather(*(counter.add() for _ in range(20)))
    assert client.reads == 40  # a look and a change each


async def test_bounds_are_kept(make: Make) -> None:
    counter = Counter(make(), "c")
    await counter.set(2)
    assert await counter.add(-2, at_least=0) == 0
    for change in (counter.add(-1, at_least=0), counter.add(2, at_most=1)):
        with pytest.raises(ConditionFailed) as caught:
            await change
        assert caught.value.code == "OUT_OF_BOUNDS"
    assert await counter.value() == 0


async def test_a_lost_answer_is_not_guessed(make: Make, store: Store) -> None:
    store.lose = 1
    with pytest.raises(OutcomeUnknown):
        await Counter(make(), "c").add()


async def test_what_is_no_number_is_left_alone(make: Make, store: Store) -> None:
    await make().put("c/.counter/value", "many")
    for attempt in (Counter(make(), "c").add(), Counter(make(), "c").value()):
        with pytest.raises(ConditionFailed) as caught:
            await attempt
        assert caught.value.code == "NOT_A_NUMBER"
    assert store.items[b"c/.counter/value"].value == b"many"


async def test_who_is_always_too_late_is_told(make: Make, store: Store) -> None:
    class Overtaken(FakeClient):
        async def commit(self, *arguments: object, **more: object) -> object:  # type: ignore[override]
            await make().put("c/.counter/value", "1")
            return await super().commit(*arguments, **more)  # type: ignore[arg-type]

    with pytest.raises(DeadlineExceeded):
        await Counter(Overtaken(store), "c").add(timeout=0.1)


# --- barriers ---------------------------------------------------------------------------------------------------------


async def test_a_barrier_that_was_open_for_a_moment_lets_go(make: Make) -> None:
    barrier = Barrier(make(), "b")
    assert await barrier.close()
    waiters = [asyncio.create_task(Barrier(make(), "b").wait()) for _ in range(5)]
    await quiet()
    assert not any(task.done() for task in waiters)
    assert await barrier.open()
    assert not await barrier.open()
    assert await barrier.close()
    async with asyncio.timeout(10):
        await asyncio.gather(*waiters)
    with pytest.raises(DeadlineExceeded):
        await barrier.wait(timeout=0.02)


async def test_a_barrier_opens_when_its_lease_ends(make: Make, store: Store) -> None:
    lease = await make().lease(10).grant()
    await Barrier(make(), "b").close(lease=lease.id)
    waiter = asyncio.create_task(Barrier(make(), "b").wait())
    await quiet()
    await lease.expire()
    async with asyncio.timeout(10):
        await waiter


# --- queues -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [-1, 65_536, True, 1.5, "1"])
async def test_priorities_that_are_none(priority: int, make: Make) -> None:
    with pytest.raises(ConfigError):
        await PriorityQueue(make(), "q").put("x", priority=priority)


async def test_claimed_items_are_passed_over_however_many(make: Make) -> None:
    queue = Queue(make(), "q")
    for number in range(80):
        await queue.put(str(number))
    jobs = [await queue.take().acquire() for _ in range(70)]
    assert [job.item.text for job in jobs] == [str(number) for number in range(70)]
    assert (await queue.get(timeout=20)).text == "70"
    await jobs[3].release()
    assert (await queue.get(timeout=20)).text == "3"


async def test_an_item_claimed_between_look_and_removal_is_not_removed(make: Make, store: Store) -> None:
    class Overtaken(FakeClient):
        jobs: list[object] = []  # noqa: RUF012

        async def commit(self, branches: Branches, **more: object) -> TxnResult:  # type: ignore[override]
            if branches.writes() and not self.jobs:
                self.jobs.append(await Queue(make(), "q").take().acquire())
            return await super().commit(branches, **more)  # type: ignore[arg-type]

    for text in ("first", "second"):
        await Queue(make(), "q").put(text)
    assert (await Queue(Overtaken(store), "q").get(timeout=20)).text == "second"


async def test_a_removal_whose_answer_is_lost_is_told(make: Make, store: Store) -> None:
    queue = Queue(make(), "q")
    await queue.put("x")
    store.lose = 1
    with pytest.raises(OutcomeUnknown):
        await queue.get()


# --- registries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["expiry", "delete"])
async def test_an_instance_that_was_lost_comes_back(how: str, make: Make, store: Store) -> None:
    registry = Registry(make())
    async with registry.register("billing", "here", id="1", ttl=0.3) as registration:
        assert registration.registered.is_set()
        if how == "expiry":
            await store.leases[store.items[KEY].lease].expire()
        else:
            for lease in store.leases.values():
                lease.ttl_s = 0.03  # when it begins to mind its key
            await make().delete(KEY)
            registration._place.lose("told")  # type: ignore[union-attr]
        async with asyncio.timeout(10):
            await registration.lost.wait()
            await registration.registered.wait()
        assert registration.losses == 1
        assert await registry.instances("billing") == (Instance("billing", "1", "here", {}),)
    assert store.items == {}
    await quiet()
    assert store.leases == {}


async def test_it_takes_back_the_key_of_its_own_lost_lease_but_no_other(make: Make, store: Store) -> None:
    """The lease is lost by our clock; the cluster has not ended it yet."""
    registry = Registry(make())
    async with registry.register("billing", "here", id="1") as registration:
        old = store.items[KEY].lease
        lease = store.leases[old]
        lease.abandon = lambda: None  # type: ignore[method-assign]
        lease.end("no renewal was confirmed")
        async with asyncio.timeout(10):
            await registration.lost.wait()
            await registration.registered.wait()
        assert store.items[KEY].lease != old
        await store.end_lease(old)
        assert KEY in store.items
        with pytest.raises(ConditionFailed) as caught:
            await Registry(make()).register("billing", "there", id="1").__aenter__()
        assert caught.value.code == "INSTANCE_TAKEN"


class Refusing(FakeClient):
    """Refuses writes for good, while it does."""

    refusing = False

    async def commit(self, branches: Branches, **more: Any) -> TxnResult:
        if self.refusing and branches.writes():
            raise InvalidRequest("permission denied", code="PERMISSION_DENIED")
        return await super().commit(branches, **more)


async def test_what_is_refused_for_good_is_told_and_tried_on(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    client = Refusing(store)
    async with Registry(client).register("billing", "here", id="1") as registration:
        client.refusing = True
        await store.leases[store.items[KEY].lease].expire()
        async with asyncio.timeout(10):
            while registration.failure is None:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
            before = client.reads
            assert isinstance(registration.failure, InvalidRequest)
            assert registration.lost.is_set()
            client.refusing = False
            await registration.registered.wait()
        assert client.reads > before
        assert registration.failure is None
    assert caplog.text.count("instance '1' of 'billing' cannot come back yet: permission denied") == 1


async def test_an_update_that_is_refused_does_not_stay(store: Store) -> None:
    client = Refusing(store)
    async with Registry(client).register("billing", "here", id="1") as registration:
        client.refusing = True
        with pytest.raises(InvalidRequest):
            await registration.update(address="there")
        client.refusing = False
        assert registration.instance.address == "here"
        await registration.update(metadata={"zone": "b"})
        assert json.loads(store.items[KEY].value) == {"address": "here", "metadata": {"zone": "b"}}


@pytest.mark.parametrize("lost", [1, 2])
async def test_registering_through_lost_answers(lost: int, make: Make, store: Store) -> None:
    store.lose = lost
    async with Registry(make()).register("billing", "here", id="1") as registration:
        assert store.lose == 0
        store.lose = lost
        await registration.update(metadata={"zone": "b"})
        assert json.loads(store.items[KEY].value) == {"address": "here", "metadata": {"zone": "b"}}


async def test_what_is_no_instance_is_not_shown(make: Make) -> None:
    for number, value in enumerate(("", "[]", "{}", '{"address": 1, "metadata": []}', "\xff")):
        await make().put(f"services/.registry/billing/{number}", value)
    assert await Registry(make()).instances("billing") == ()


@pytest.mark.parametrize("bad", ["", "a/b"])
async def test_names_of_services_that_are_none(bad: str, make: Make) -> None:
    with pytest.raises(ConfigError):
        Registry(make()).register(bad, "here")
    with pytest.raises(ConfigError):
        Registry(make()).register("billing", "here", id=bad)


# --- leader tasks -----------------------------------------------------------------------------------------------------


class FakeElection:
    """Whoever holds the one permit leads."""

    def __init__(self, client: FakeClient) -> None:
        self.client = client
        self.refusals = 0

    def campaign(self, value: object) -> object:
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("nobody there")
        return Semaphore(self.client, "boss", 1).permit()


def task_of(client: FakeClient, work: Callable[..., object]) -> tuple[LeaderTask[object], FakeElection]:
    election = FakeElection(client)
    client.election = lambda name, ttl: election  # type: ignore[assignment, method-assign, misc]
    return LeaderTask(client, "boss", work), election  # type: ignore[arg-type]


async def test_work_is_begun_again_when_leadership_is_lost(make: Make, store: Store) -> None:
    fences: list[int] = []

    async def work(leadership: object) -> str:
        fences.append(leadership.fence)  # type: ignore[attr-defined]
        if len(fences) == 1:
            await store.leases[store.items[leadership.key].lease].expire()  # type: ignore[attr-defined]
            await asyncio.sleep(60)
        if len(fences) == 2:
            raise LockLost("a guarded write was refused")
        assert task.leading
        return "done"

    task, election = task_of(make(), work)
    election.refusals = 2
    async with asyncio.timeout(10):
        assert await task.run() == "done"
    assert len(fences) == 3 == task.times_led
    assert fences == sorted(set(fences))
    assert not task.leading


@pytest.mark.parametrize("error", [ZeroDivisionError(), Unavailable("a write of the work")])
async def test_what_the_work_raises_is_raised_and_leadership_given_up(error: Exception, make: Make) -> None:
    async def work(leadership: object) -> None:
        raise error

    task, _ = task_of(make(), work)
    with pytest.raises(type(error)):
        await task.run()
    await Semaphore(make(), "boss", 1).permit().acquire(timeout=20)


async def test_cancelling_it_cancels_the_work(make: Make) -> None:
    ended: list[bool] = []

    async def work(leadership: object) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    task, _ = task_of(make(), work)
    running = asyncio.create_task(task.run())
    await quiet()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended == [True]
    await Semaphore(make(), "boss", 1).permit().acquire(timeout=20)
