"""Leases and locks for threads: right even while raftkv's own thread is held up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from raftkv.client import BlockingLease, BlockingLock, Client, LeaseLost, LockLost, LockState, LockTimeout
from raftkv.client.blocking import loop_thread
from raftkv.client.loss import LossEvent
from tests.unit.client.leasing import Clock, LeasingNode, started


@pytest.fixture
def node() -> Iterator[LeasingNode]:
    """In a thread of its own."""
    ready = threading.Event()
    found: list[tuple[LeasingNode, Callable[[], object]]] = []

    async def serve() -> None:
        node, stop, loop = await started(), asyncio.Event(), asyncio.get_running_loop()
        found.append((node, lambda: loop.call_soon_threadsafe(stop.set)))
        ready.set()
        await stop.wait()
        await node.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    node, stop = found[0]
    yield node
    stop()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def client(node: LeasingNode) -> Iterator[Client]:
    with Client(node.endpoint) as client:
        yield client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@contextmanager
def held_up() -> Iterator[None]:
    """Nothing runs in raftkv's own thread."""
    begun, gate = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        gate.wait(30)

    loop_thread().loop.call_soon_threadsafe(block)
    assert begun.wait(10)
    try:
        yield
    finally:
        gate.set()


def lock_of(client: Client) -> BlockingLock:
    return client.lock("x", ttl=9).acquire()


def leadership_of(client: Client) -> BlockingLock:
    return client.election("x", ttl=9).campaign("me").acquire()


@pytest.mark.parametrize("make", [lock_of, leadership_of])
def test_a_thread_sees_the_loss_though_raftkvs_own_is_held_up(
    make: Callable[[Client], BlockingLock], client: Client, clock: Clock
) -> None:
    lock = make(client)
    told = threading.Event()
    lock.when_lost(told.set)
    with held_up():
        assert not lock.lost.is_set()
        assert not lock.lost.wait(0.01)
        clock.advance(9)
        assert lock.state is LockState.LOST
        assert lock.lost.is_set()
        assert lock.lost.wait()
        with pytest.raises(LockLost):
            lock.check()
        assert not told.is_set()
    assert told.wait(10)
    with pytest.raises(LockLost):
        lock.release()


def test_a_thread_sees_the_end_of_a_lease_though_raftkvs_own_is_held_up(client: Client, clock: Clock) -> None:
    lease = client.lease(9)
    assert not lease.lost.is_set()
    lease.grant()
    told = threading.Event()
    forgotten = threading.Event()
    lease.on_lost(told.set)
    lease.on_lost(forgotten.set)()
    assert lease.deadline == clock.moment + 9 * 0.99 - 0.45
    assert lease.why_lost == ""
    with held_up():
        clock.advance(9)
        assert lease.lost.is_set()
        assert lease.why_lost == "no renewal was confirmed within 9 s"
        with pytest.raises(LeaseLost):
            lease.check()
    assert told.wait(10)
    assert not forgotten.is_set()


@pytest.mark.parametrize("give_up", [BlockingLease.abandon, BlockingLease.revoke, BlockingLease.let_run_out])
def test_a_lease_that_is_given_up_is_lost(give_up: Callable[[BlockingLease], None], client: Client) -> None:
    lease = client.lease(9).grant()
    give_up(lease)
    assert lease.lost.wait(10)


def test_giving_back_is_no_loss(client: Client, node: LeasingNode) -> None:
    with client.lock("x", lock_delay=5) as lock:
        lost = lock.lost
        with pytest.raises(LockTimeout):
            client.lock("x").acquire(timeout=0)
    assert not lost.is_set()
    assert lock.state is LockState.IDLE
    assert node.cluster.keys(b"x/") == []


def test_who_waits_looks_at_the_clock_again_when_it_may_be_lost() -> None:
    looks: list[bool] = [False, False, True]
    event = LossEvent(lambda: looks.pop(0), lambda: 0.001)
    assert event.wait()
    assert looks == []
    assert event.is_set()
