"""Bugs of others' locks, rows 70 to 72 of the catalogue: ours must not have them, and the checks must see them.

The real services over a real state machine, asked by the Lock service's RPCs and by our SDK, whose lock does the same
by its own transactions. A mutant is our own code with the bug put in; it must fail the check named for the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest
from fake_node import Served, failure, until

from raftkv._pb import common_pb2, kv_pb2, lease_pb2, lock_pb2, lock_pb2_grpc
from raftkv.client import AsyncClient, LockLost
from raftkv.client.contender import Contender
from raftkv.client.lease import Lease
from raftkv.server.services.candidates import Candidates, Gone, Held
from raftkv.server.watch_stream import Listener
from raftkv.state import txn as state_txn
from raftkv.state.commands import CommandKind

Check = Callable[[Served], Awaitable[None]]
Patch = Callable[[pytest.MonkeyPatch], None]


def locks(served: Served) -> lock_pb2_grpc.LockAsyncStub:
    return lock_pb2_grpc.LockStub(served.channel)


async def grant(served: Served, lease: int) -> int:
    request = lease_pb2.LeaseGrantRequest(ID=lease, TTL=60)
    await served.node.propose(CommandKind.LEASE_GRANT, request.SerializeToString(), None)
    return lease


async def revoke(served: Served, lease: int) -> None:
    request = lease_pb2.LeaseRevokeRequest(ID=lease)
    await served.node.propose(CommandKind.LEASE_REVOKE, request.SerializeToString(), None)


async def lock(served: Served, lease: int) -> lock_pb2.LockResponse:
    return await locks(served).Lock(lock_pb2.LockRequest(name=b"l", lease=lease), timeout=10)


async def unlock(served: Served, held: lock_pb2.LockResponse) -> None:
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=held.key, fence=held.fence))


def queue(served: Served) -> list[common_pb2.KeyValue]:
    """The keys of those who hold or wait, in their order."""
    found = served.node.machine.range(kv_pb2.RangeRequest(key=b"l/", range_end=b"l0"))
    return sorted(found.kvs, key=lambda kv: kv.create_revision)


async def waiting(served: Served, count: int) -> None:
    """Until so many are in the queue, and all but the first wait for something."""
    await until(lambda: len(queue(served)) == count and len(served.services.watches) >= count - 1)
    await asyncio.sleep(0.05)


async def left_to_itself(check: Check, served: Served) -> None:
    """With an SDK that waits by watches, as it must where the server is etcd."""

    async def no(self: Contender) -> bool:
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Contender, "_wait_on_server", no)
        await check(served)


# Row 70, L6.


async def a_waiter_whose_lease_has_ended_gets_nothing(served: Served) -> None:
    """Its own end and that of the holder come together, so it wakes with nobody before it."""
    for order in ("own first", "holder first"):
        await grant(served, 1)
        await grant(served, 2)
        held = await lock(served, 1)
        waiter = asyncio.ensure_future(lock(served, 2))
        await waiting(served, 2)
        # Neither of these waits, so that nobody runs in between.
        for lease in (2, 1) if order == "own first" else (1, 2):
            await revoke(served, lease)
        error = await failure(waiter)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error
        assert queue(served) == []
        await unlock(served, held)  # of what has gone


async def an_sdk_waiter_whose_lease_has_ended_gets_nothing(served: Served) -> None:
    await grant(served, 1)
    async with AsyncClient([served.address], timeout=10) as client:
        await lock(served, 1)
        waiter = client.lock("l", ttl=30)
        acquiring = asyncio.ensure_future(waiter.acquire(timeout=10))
        await waiting(served, 2)
        own = queue(served)[1].lease
        await revoke(served, own)
        await revoke(served, 1)
        with pytest.raises(LockLost):
            await acquiring
        assert not waiter.held


async def the_same_by_watches(served: Served) -> None:
    await left_to_itself(an_sdk_waiter_whose_lease_has_ended_gets_nothing, served)


# Row 71, L8.


async def a_repeated_unlock_does_not_touch_a_later_turn(served: Served) -> None:
    """The same session has taken the same lock again when an unlock of before arrives once more."""
    await grant(served, 1)
    first = await lock(served, 1)
    await unlock(served, first)
    second = await lock(served, 1)
    assert second.key == first.key
    assert second.fence > first.fence
    await unlock(served, first)
    assert [kv.create_revision for kv in queue(served)] == [second.fence]
    await unlock(served, second)
    assert queue(served) == []


# Row 72, L9.


async def a_waiter_whose_lease_ends_is_told_at_once(served: Served) -> None:
    """The holder stays where it is, and those behind move up."""
    for lease in (1, 2, 3):
        await grant(served, lease)
    held = await lock(served, 1)
    second = asyncio.ensure_future(lock(served, 2))
    await waiting(served, 2)
    third = asyncio.ensure_future(lock(served, 3))
    await waiting(served, 3)
    await revoke(served, 2)
    try:
        async with asyncio.timeout(10):
            error = await failure(asyncio.shield(second))
    except TimeoutError:
        pytest.fail("it waits on")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not third.done()
    await unlock(served, held)
    await unlock(served, await third)


async def an_sdk_waiter_whose_lease_ends_is_told_before_the_holder_leaves(served: Served) -> None:
    """By the next renewal of its lease: a third of its time."""
    await grant(served, 1)
    await lock(served, 1)
    async with AsyncClient([served.address], timeout=10) as client:
        waiter = client.lock("l", ttl=2)
        acquiring = asyncio.ensure_future(waiter.acquire(timeout=30))
        await waiting(served, 2)
        await revoke(served, queue(served)[1].lease)
        try:
            async with asyncio.timeout(5):
                with pytest.raises(LockLost):
                    await asyncio.shield(acquiring)
        except TimeoutError:
            pytest.fail("it waits on")


async def an_sdk_waiter_by_watches_whose_lease_ends_is_told(served: Served) -> None:
    await left_to_itself(an_sdk_waiter_whose_lease_ends_is_told_before_the_holder_leaves, served)


# L7: fencing by the state machine.


async def a_guarded_write_of_a_former_holder_is_refused(served: Served) -> None:
    async with AsyncClient([served.address], timeout=10) as client:
        async with client.lock("l") as held:
            guard = held.guard()
            await client.put("data", "1", guards=[guard])
        async with client.lock("l") as held:
            assert held.fence > guard.token
            await client.put("data", "2", guards=[held.guard()])
            with pytest.raises(LockLost):
                await client.put("data", "late", guards=[guard])
        item = await client.get("data")
        assert item is not None
        assert item.text == "2"


def does_not_look_at_its_own_key(patch: pytest.MonkeyPatch) -> None:
    """M-70: with nobody before it, a waiter believes that it holds the lock."""
    original = Candidates._wait

    async def wait(self: Candidates, name: bytes, key: bytes, created: int, lease: int, deadline: float | None) -> Held:
        try:
            return await original(self, name, key, created, lease, deadline)
        except Gone:
            return Held(key, created, lease, created, created)

    patch.setattr(Candidates, "_wait", wait)


def the_sdk_does_not_look_at_its_own_key(patch: pytest.MonkeyPatch) -> None:
    """M-70, in the SDK."""

    async def look(self: Contender) -> tuple[bool, int]:
        return True, 0

    patch.setattr(Contender, "_look", look)


def unlocks_whoever_holds(patch: pytest.MonkeyPatch) -> None:
    """M-71: as etcd, which deletes the key, whoever has made it."""
    original = Candidates.release

    async def release(self: Candidates, key: bytes, create_revision: int, deadline: float | None) -> tuple[bool, int]:
        return await original(self, key, 0, deadline)

    patch.setattr(Candidates, "release", release)


def waits_only_for_the_one_before(patch: pytest.MonkeyPatch) -> None:
    """Row 72: the own key is not watched."""
    original = Listener.add

    def add(self: Listener, key: bytes, stop: bytes | None, start_revision: int, *, no_put: bool = False) -> None:
        if not self._watches:
            original(self, key, stop, start_revision, no_put=no_put)

    patch.setattr(Listener, "add", add)


def the_sdk_waits_only_for_the_one_before(patch: pytest.MonkeyPatch) -> None:
    """Row 72: the loss of the lease wakes nobody."""
    patch.setattr(Lease, "on_lost", lambda self, callback: None)


def guards_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """The server takes every write."""
    patch.setattr(state_txn, "guards_hold", lambda *arguments: True)


CHECKS: list[Check] = [
    a_waiter_whose_lease_has_ended_gets_nothing,
    an_sdk_waiter_whose_lease_has_ended_gets_nothing,
    the_same_by_watches,
    a_repeated_unlock_does_not_touch_a_later_turn,
    a_waiter_whose_lease_ends_is_told_at_once,
    an_sdk_waiter_whose_lease_ends_is_told_before_the_holder_leaves,
    an_sdk_waiter_by_watches_whose_lease_ends_is_told,
    a_guarded_write_of_a_former_holder_is_refused,
]
MUTANTS: list[tuple[Patch, Check]] = [
    (does_not_look_at_its_own_key, a_waiter_whose_lease_has_ended_gets_nothing),
    (does_not_look_at_its_own_key, an_sdk_waiter_whose_lease_has_ended_gets_nothing),
    (the_sdk_does_not_look_at_its_own_key, the_same_by_watches),
    (unlocks_whoever_holds, a_repeated_unlock_does_not_touch_a_later_turn),
    (waits_only_for_the_one_before, a_waiter_whose_lease_ends_is_told_at_once),
    (the_sdk_waits_only_for_the_one_before, an_sdk_waiter_by_watches_whose_lease_ends_is_told),
    (guards_are_not_looked_at, a_guarded_write_of_a_former_holder_is_refused),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_sound(check: Check, served: Served) -> None:
    await check(served)


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda each: each.__name__)
async def test_mutant_is_found(mutant: Patch, check: Check, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await check(served)
