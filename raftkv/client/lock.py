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
from typing import TYPE_CHECKING, Final, Self

from raftkv.client.contender import Contender, LockState
from raftkv.client.errors import ConfigError, LockLost, RaftkvError
from raftkv.client.keys import Text, to_bytes
from raftkv.client.lease import check_ttl
from raftkv.client.options import DEFAULT, Default, TimeoutArg, timeout_from
from raftkv.client.txn import Guard

if TYPE_CHECKING:
    from raftkv.client.kv import Context


LOCK_DELAY_MAX_S: Final = 60


class LockCalls:
    """The lock half of `AsyncClient`."""

    _context: Context

    def lock(
        self,
        name: Text,
        ttl: float = 10.0,
        *,
        owner: Text = b"",
        timeout: TimeoutArg = None,
        lock_delay: float = 0.0,
    ) -> Lock:
        """A lock: `async with client.lock("name") as lock: ...`.

        Args:
            name: the key's prefix; `etcdctl lock NAME` takes the same lock.
            ttl: seconds after which a holder that is not heard of any more has lost it.
            owner: stored as the key's value, for people to see.
            timeout: for entering the `async with`; None waits for ever, 0 takes it if it is free and else raises
                LockTimeout at once.
            lock_delay: seconds, at most 60, for which nobody else gets it after a holder was not heard of any more:
                what that one had under way meanwhile may still arrive somewhere. Giving it back is without delay.
        Raises:
            ConfigError: `ttl`, `lock_delay` or `name` is none.
        """
        return Lock(self._context, name, ttl, owner, timeout, lock_delay)


class Lock:
    """A lock; made by `client.lock`. May be acquired again after it was released or lost, with a new fence."""

    _lost_error: type[LockLost] = LockLost
    _what = "lock"

    def __init__(
        self,
        context: Context,
        name: Text,
        ttl_s: float,
        owner: Text,
        timeout: TimeoutArg,
        lock_delay_s: float = 0.0,
    ) -> None:
        check_ttl(ttl_s)
        _check_lock_delay(lock_delay_s)
        if not to_bytes(name, "name").strip(b"/"):
            raise ConfigError("name", "must not be empty")
        self._context = context
        self._name = name
        self._ttl_s = ttl_s
        self._lock_delay_s = lock_delay_s
        self._owner = to_bytes(owner, "owner")
        self._timeout = timeout
        self._contender: Contender | None = None
        self._body: asyncio.Task[object] | None = None
        self._cancelled_body = False
        self._told = False  # by `release`, that what is in `_contender` is lost

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
        """Set when it is lost; giving it back is no loss."""
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
            raise self._lost_error(f"{self._what} {self._name!r} is not held", code="LOCK_LOST")
        return self._contender

    async def acquire(self, *, timeout: TimeoutArg | Default = DEFAULT) -> Self:
        """Wait for it and hold it until `release`.

        Args:
            timeout: seconds; None waits for ever; 0 takes it if it is free; left out it is that of `client.lock`.
        Raises:
            LockTimeout: it was not free in time; nobody waits in its queue for you.
            LockLost: its lease ran out while it waited.
            Unavailable: the cluster could not be asked.
        """
        old = self._contender
        if old is not None and old.state is not LockState.LOST:
            raise ConfigError("lock", f"{self._name!r} is being held or waited for by this very object")
        self._context.pool.enter()
        limit_s = self._limit_s(self._timeout if timeout is DEFAULT else timeout)
        if old is not None:
            old.abandon()
        self._contender = contender = Contender(
            self._context,
            self._name,
            self._ttl_s,
            self._owner,
            lock_delay_s=self._lock_delay_s,
            lost_error=self._lost_error,
        )
        self._told = False
        try:
            await contender.enter(limit_s)
        except BaseException:
            self._contender = None
            raise
        return self

    def _limit_s(self, timeout: TimeoutArg) -> float | None:
        if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout == 0:
            return 0.0
        return timeout_from(timeout, self._context.timeout).total

    async def release(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Give it back.

        Raises:
            LockLost: it was lost before.
            Unavailable, OutcomeUnknown: the cluster could not be told. That is tried a little longer in the background
                (also where this is cancelled), then it runs out by itself.
        """
        contender = self._present()
        if contender.state is LockState.LOST:
            contender.abandon()
            self._told = True
            raise contender.error()
        self._contender = None
        await contender.leave(timeout)

    async def __aenter__(self) -> Self:
        await self.acquire()
        self._body = asyncio.current_task()
        self._cancelled_body = False
        contender = self._present()

        def cancel_body() -> None:
            body = self._body
            if body is None or self._contender is not contender:
                return  # only while this very acquisition is inside its block
            if body is asyncio.current_task():
                # It found out itself, and what it called raises: that may leave the block, and a cancellation begun now
                # would then come out after it (before Python 3.13).
                asyncio.get_running_loop().call_soon(cancel_body)
                return
            self._cancelled_body = True
            body.cancel("the lock was lost")

        contender.when_lost(cancel_body)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        contender = self._contender
        if contender is None:
            return  # released in the body
        cancelled = isinstance(error, asyncio.CancelledError)
        if contender.state is LockState.LOST:
            contender.abandon()
            by_others = body is None or not self._cancelled_body or body.uncancel() > 0
            if cancelled and by_others:
                return  # somebody else cancelled this task, and that goes first
            if self._told and not cancelled:
                return  # released in the body, which was told
            raise contender.error() from (None if cancelled else error)
        self._contender = None
        if cancelled:
            contender.abandon()
            return
        try:
            await contender.leave()
        except RaftkvError:
            if error is None:
                raise

    def __repr__(self) -> str:
        return f"<Lock {self._name!r} {self.state.value}>"


def _check_lock_delay(seconds: object) -> None:
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds <= LOCK_DELAY_MAX_S:  # type: ignore[operator]
        raise ConfigError("lock_delay", f"{seconds!r} is not a number of seconds from 0 to {LOCK_DELAY_MAX_S}")
