"""Leases, watches, locks and elections for `Client`: blocking twins of lease.py, watch.py, lock.py and election.py.

A thread cannot be cancelled: where the asynchronous `async with` cancels its body when a lock is lost, here the body
goes on until it looks (`check()`, `remaining()`, `lost`, a guarded write) or ends, and is then left with LockLost.
What it looks at reads the clock, so that it is right even while raftkv's own thread is held up; only callbacks are
called by that one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from raftkv.client.client import AsyncClient
from raftkv.client.contender import LockState
from raftkv.client.election import Election, Leadership
from raftkv.client.keys import Text
from raftkv.client.lease import Lease, LeaseGrant, LeaseInfo, LeaseState
from raftkv.client.lock import Lock
from raftkv.client.loss import LossEvent, loss_of
from raftkv.client.options import DEFAULT, Default, TimeoutArg
from raftkv.client.results import Event, KeyValue, WatchBatch
from raftkv.client.txn import Guard
from raftkv.client.watch import Filter, Watch

T = TypeVar("T")


class Handover(Protocol):
    """Runs a coroutine in the loop thread and waits for its result."""

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result."""


class BlockingLease:
    """As `Lease`: `with client.lease(10) as lease:`, or `client.lease(10).grant()`."""

    def __init__(self, twin: Lease, call: Handover) -> None:
        self._twin = twin
        self._call = call
        self.lost: Final = LossEvent(lambda: bool(twin.id) and twin.state is LeaseState.LOST, twin.remaining)
        """Set when it is lost; revoking it yourself sets it too."""

    def grant(self) -> Self:
        """As `Lease.grant`."""
        self._call(self._grant())
        return self

    async def _grant(self) -> None:
        await self._twin.grant()
        self._twin.on_lost(self.lost.set)

    @property
    def id(self) -> int:
        """The lease's id; 0 before it was granted."""
        return self._twin.id

    @property
    def ttl_s(self) -> float:
        """As granted."""
        return self._twin.ttl_s

    @property
    def state(self) -> LeaseState:
        """As `Lease.state`."""
        return self._twin.state

    @property
    def deadline(self) -> float:
        """As `Lease.deadline`."""
        return self._twin.deadline

    @property
    def why_lost(self) -> str:
        """As `Lease.why_lost`."""
        return self._twin.why_lost

    def on_lost(self, callback: Callable[[], None]) -> Callable[[], None]:
        """As `Lease.on_lost`. `callback` is called in raftkv's own thread, and must not block."""
        forget = self._call(in_loop(lambda: self._twin.on_lost(callback)))
        return lambda: self._call(in_loop(forget))

    def remaining(self) -> float:
        """As `Lease.remaining`."""
        return self._twin.remaining()

    def check(self) -> None:
        """As `Lease.check`."""
        self._twin.check()

    def revoke(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `Lease.revoke`."""
        self._call(self._twin.revoke(timeout=timeout))

    def abandon(self) -> None:
        """As `Lease.abandon`."""
        self._call(in_loop(self._twin.abandon))

    def let_run_out(self) -> None:
        """As `Lease.let_run_out`."""
        self._call(in_loop(self._twin.let_run_out))

    def __enter__(self) -> Self:
        return self if self.id else self.grant()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._twin.__aexit__(kind, error, traceback))


class BlockingWatch:
    """As `Watch`: `with client.watch("config/", prefix=True) as watch: for event in watch: ...`."""

    def __init__(self, twin: Watch, call: Handover) -> None:
        self._twin = twin
        self._call = call

    @property
    def revision(self) -> int:
        """As `Watch.revision`."""
        return self._twin.revision

    @property
    def endpoint(self) -> str:
        """As `Watch.endpoint`."""
        return self._twin.endpoint

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None when there was none within `timeout` seconds, or the watch was closed."""
        return self._call(self._get(timeout))

    async def _get(self, timeout_s: float | None) -> Event | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(self._twin)
        except (TimeoutError, StopAsyncIteration):
            return None

    def batches(self) -> Iterator[WatchBatch]:
        """As `Watch.batches`."""
        source = self._twin.batches()
        while (batch := self._call(_next(source))) is not None:
            yield batch

    def close(self) -> None:
        """As `Watch.aclose`; may be called from another thread, whose iteration then ends."""
        self._call(self._twin.aclose())

    def __iter__(self) -> Iterator[Event]:
        while (event := self._call(_next(self._twin))) is not None:
            yield event

    def __enter__(self) -> Self:
        self._call(self._twin.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def in_loop(function: Callable[[], T]) -> T:
    """Call it in the loop's thread, whose state it changes."""
    return function()


async def _next(source: Any) -> Any:
    try:
        return await source.__anext__()
    except StopAsyncIteration:
        return None


class BlockingLock:
    """As `Lock`: `with client.lock("name") as lock:`."""

    def __init__(self, twin: Lock, call: Handover) -> None:
        self._twin = twin
        self._call = call
        self.lost: threading.Event = threading.Event()
        """Set when it is lost; a new one for each acquisition."""

    @property
    def state(self) -> LockState:
        """As `Lock.state`."""
        return self._twin.state

    @property
    def held(self) -> bool:
        """As `Lock.held`."""
        return self._twin.held

    @property
    def fence(self) -> int:
        """As `Lock.fence`."""
        return self._twin.fence

    @property
    def key(self) -> bytes:
        """As `Lock.key`."""
        return self._twin.key

    def remaining(self) -> float:
        """As `Lock.remaining`."""
        return self._twin.remaining()

    def check(self) -> None:
        """As `Lock.check`."""
        self._twin.check()

    def guard(self) -> Guard:
        """As `Lock.guard`."""
        return self._twin.guard()

    def when_lost(self, callback: Callable[[], None]) -> None:
        """As `Lock.when_lost`. `callback` is called in raftkv's own thread, and must not block."""
        self._call(in_loop(lambda: self._twin.when_lost(callback)))

    def acquire(self, *, timeout: TimeoutArg | Default = DEFAULT) -> Self:
        """As `Lock.acquire`."""
        self._call(self._acquire(timeout))
        return self

    async def _acquire(self, timeout: TimeoutArg | Default) -> None:
        await self._twin.acquire(timeout=timeout)
        self.lost = lost = loss_of(self._twin._present())
        self._twin.when_lost(lost.set)

    def release(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `Lock.release`."""
        self._call(self._twin.release(timeout=timeout))

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._twin.__aexit__(kind, error, traceback))


class BlockingLeadership(BlockingLock):
    """As `Leadership`."""

    def __init__(self, twin: Leadership, call: Handover) -> None:
        super().__init__(twin, call)
        self._leadership = twin

    def proclaim(self, value: Text, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `Leadership.proclaim`."""
        self._call(self._leadership.proclaim(value, timeout=timeout))

    def resign(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `Leadership.resign`."""
        self._call(self._leadership.resign(timeout=timeout))


class BlockingElection:
    """As `Election`."""

    def __init__(self, twin: Election, call: Handover) -> None:
        self._twin = twin
        self._call = call

    def campaign(self, value: Text = b"", *, timeout: TimeoutArg = None) -> BlockingLeadership:
        """As `Election.campaign`."""
        return BlockingLeadership(self._twin.campaign(value, timeout=timeout), self._call)

    def leader(self, *, timeout: TimeoutArg = DEFAULT) -> KeyValue | None:
        """As `Election.leader`."""
        return self._call(self._twin.leader(timeout=timeout))

    def observe(self) -> Iterator[KeyValue]:
        """As `Election.observe`."""
        source = self._twin.observe()
        try:
            while (leader := self._call(_next(source))) is not None:
                yield leader
        finally:
            self._call(_end(source))


async def _end(source: Any) -> None:
    await source.aclose()


class BlockingCoordination:
    """The half of `Client` that this module is about."""

    _twin: AsyncClient
    _call: Handover

    def lease(self, ttl: float, *, keep_alive: bool = True, timeout: TimeoutArg = DEFAULT) -> BlockingLease:
        """As `AsyncClient.lease`."""
        return BlockingLease(self._twin.lease(ttl, keep_alive=keep_alive, timeout=timeout), self._call)

    def grant_lease(self, ttl: float, *, id: int = 0, timeout: TimeoutArg = DEFAULT) -> LeaseGrant:
        """As `AsyncClient.grant_lease`."""
        return self._call(self._twin.grant_lease(ttl, id=id, timeout=timeout))

    def revoke_lease(self, id: int, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `AsyncClient.revoke_lease`."""
        self._call(self._twin.revoke_lease(id, timeout=timeout))

    def lease_info(self, id: int, *, keys: bool = False, timeout: TimeoutArg = DEFAULT) -> LeaseInfo:
        """As `AsyncClient.lease_info`."""
        return self._call(self._twin.lease_info(id, keys=keys, timeout=timeout))

    def leases(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[int, ...]:
        """As `AsyncClient.leases`."""
        return self._call(self._twin.leases(timeout=timeout))

    def watch(
        self,
        key: Text,
        end: Text | None = None,
        *,
        prefix: bool = False,
        start_revision: int = 0,
        prev: bool = False,
        progress: bool = False,
        filters: Collection[Filter] = (),
        timeout: TimeoutArg = DEFAULT,
    ) -> BlockingWatch:
        """As `AsyncClient.watch`."""
        twin = self._twin.watch(
            key,
            end,
            prefix=prefix,
            start_revision=start_revision,
            prev=prev,
            progress=progress,
            filters=filters,
            timeout=timeout,
        )
        return BlockingWatch(twin, self._call)

    def lock(
        self,
        name: Text,
        ttl: float = 10.0,
        *,
        owner: Text = b"",
        timeout: TimeoutArg = None,
        lock_delay: float = 0.0,
    ) -> BlockingLock:
        """As `AsyncClient.lock`, but a body is not cancelled when the lock is lost."""
        twin = self._twin.lock(name, ttl, owner=owner, timeout=timeout, lock_delay=lock_delay)
        return BlockingLock(twin, self._call)

    def election(self, name: Text, ttl: float = 10.0) -> BlockingElection:
        """As `AsyncClient.election`."""
        return BlockingElection(self._twin.election(name, ttl), self._call)
