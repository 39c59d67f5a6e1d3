"""Locks that tell when they are lost, and whose writes the cluster refuses once they are.

    async with client.lock("reports", ttl=10) as lock:
        await client.put("report", text, guards=[lock.guard()])

A lock is held by a key bound to a lease. When it is lost (the lease ran out in a pause or a partition, somebody
deleted the key) the body of the `async with` is cancelled, and the block is left with LockLost. Code that has checked
and then sleeps may still act too late: what must not happen twice carries `guard()`, or the `fence` to elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from raftkv.client.contender import Contender, LockState
from raftkv.client.errors import ConfigError, LockLost, RaftkvError
from raftkv.client.keys import Text, to_bytes
from raftkv.client.lease import check_ttl
from raftkv.client.options import DEFAULT, Default, TimeoutArg, timeout_from
from raftkv.client.txn import Guard

if TYPE_CHECKING:
    from raftkv.client.kv import Context


class LockCalls:
    """The lock half of `AsyncClient`."""

    _context: Context

    def lock(self, name: Text, ttl: float = 10.0, *, owner: Text = b"", timeout: TimeoutArg = None) -> Lock:
        """A lock: `async with client.lock("name") as lock: ...`.

        Args:
            name: the key's prefix; `etcdctl lock NAME` takes the same lock.
            ttl: seconds after which a holder that is not heard of any more has lost it.
            owner: stored as the key's value, for people to see.
            timeout: for entering the `async with`; None waits for ever.
        """
        return Lock(self._context, name, ttl, owner, timeout)


class Lock:
    """A lock; made by `client.lock`. May be acquired again after it was released or lost, with a new fence."""

    def __init__(self, context: Context, name: Text, ttl_s: float, owner: Text, timeout: TimeoutArg) -> None:
        check_ttl(ttl_s)
        if not to_bytes(name, "name").strip(b"/"):
            raise ConfigError("name", "must not be empty")
        self._context = context
        self._name = name
        self._ttl_s = ttl_s
        self._owner = to_bytes(owner, "owner")
        self._timeout = timeout
        self._contender: Contender | None = None
        self._body: asyncio.Task[object] | None = None
        self._cancelled_body = False

    @property
    def state(self) -> LockState:
        """How it stands now. Reads the clock; never waits."""
        return self._contender.state if self._contender is not None else LockState.IDLE

    @property
    def held(self) -> bool:
        """Whether it is certainly held now. Reads the clock; never waits."""
        return self.state in (LockState.HELD, LockState.AT_RISK)

    @property
    def fence(self) -> int:
        """The fencing token: larger for each later holder of this name. Raises LockLost where it was never held."""
        return self._present().fence

    @property
    def key(self) -> bytes:
        """The key that stands for it, as on the wire."""
        return self._present().key

    @property
    def lost(self) -> asyncio.Event:
        """Set when it is lost."""
        return self._present().lost

    def remaining(self) -> float:
        """Seconds for which it is certainly still held; 0.0 when it is lost. Reads the clock; never waits."""
        return self._contender.lease.remaining() if self.held and self._contender is not None else 0.0

    def check(self) -> None:
        """Raise LockLost unless it is certainly held. Reads the clock; never waits."""
        self._present().check()

    def guard(self) -> Guard:
        """For `guards=[...]` of a write, which then does nothing once this lock is lost. Raises LockLost if it is."""
        return self._present().guard()

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop when this acquisition is lost; at once where it is lost already."""
        self._present().when_lost(callback)

    def _present(self) -> Contender:
        if self._contender is None:
            raise LockLost(f"lock {self._name!r} is not held", code="LOCK_LOST")
        return self._contender

    async def acquire(self, *, timeout: TimeoutArg | Default = DEFAULT) -> Self:
        """Wait for it and hold it until `release`.

        Args:
            timeout: seconds; None waits for ever; left out it is that of `client.lock`.
        Raises:
            LockTimeout: it was not free in time.
            LockLost: its lease ran out while it waited.
            Unavailable: the cluster could not be asked.
        """
        if self._contender is not None and self._contender.state is not LockState.LOST:
            raise ConfigError("lock", f"{self._name!r} is being held or waited for by this very object")
        self._context.pool.enter()
        given = self._timeout if timeout is DEFAULT else timeout
        contender = Contender(self._context, self._name, self._ttl_s, self._owner)
        self._contender = contender
        try:
            await contender.enter(timeout_from(given, self._context.timeout).total)
        except BaseException:
            self._contender = None
            raise
        return self

    async def release(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Give it back.

        Raises:
            LockLost: it was lost before.
            Unavailable, OutcomeUnknown: the cluster could not be told; it runs out by itself.
        """
        contender = self._present()
        self._contender = None
        was_lost = contender.state is LockState.LOST
        error = contender.error() if was_lost else None
        if was_lost:
            contender.lease.abandon()
        else:
            await contender.leave(timeout)
        if error is not None:
            raise error

    async def __aenter__(self) -> Self:
        await self.acquire()
        self._body = asyncio.current_task()
        self._cancelled_body = False
        contender = self._present()

        def cancel_body() -> None:
            # Only while this very acquisition is inside its block.
            if self._body is not None and self._contender is contender and not self._cancelled_body:
                self._cancelled_body = True
                self._body.cancel("the lock was lost")

        contender.when_lost(cancel_body)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        contender = self._contender
        self._contender = None
        if contender is None:
            return  # released in the body
        contender.when_lost(_nothing)
        lost = contender.error() if contender.state is LockState.LOST else None
        if lost is None:
            if isinstance(error, asyncio.CancelledError):
                contender.lease.abandon()
                return
            try:
                await contender.leave()
            except RaftkvError:
                if error is None:
                    raise
            return
        contender.lease.abandon()
        cancelled = isinstance(error, asyncio.CancelledError)
        if self._cancelled_body and body is not None and body.uncancel() > 0 and cancelled:
            return  # somebody else cancelled this task too, and that goes first
        raise lost from (None if cancelled else error)

    def __repr__(self) -> str:
        return f"<Lock {self._name!r} {self.state.value}>"


def _nothing() -> None:
    return
