"""What is held under a lease of one's own: the part that permits, read and write locks, claims and parties share.

    IDLE --acquire--> WAITING --own key holds, seen by one linearizable look--> HELD --> AT_RISK --> LOST
                                                                               (as its lease; or its key is gone)

A `Place` is one acquisition: a lease, and a key bound to it whose create revision is the fencing token. A `Holding` is
what the user has in hand; it behaves as `raftkv.Lock` does, down to the body that is cancelled on loss. Everything
here is done with the public client, and nothing in it needs more than etcd has.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from raftkv.client import (
    DEFAULT,
    AsyncClient,
    Closed,
    ConfigError,
    Event,
    Get,
    Guard,
    Key,
    LeaseNotFound,
    LeaseState,
    LockLost,
    LockState,
    LockTimeout,
    OutcomeUnknown,
    Put,
    RaftkvError,
    RangeResult,
    TxnResult,
    Watch,
    callbacks,
)
from raftkv.client.keys import Text, to_bytes
from raftkv.client.lease import check_ttl
from raftkv.client.options import Default, TimeoutArg, check_seconds
from raftkv.client.txn import Branches
from raftkv.recipes.names import TRIES_MAX
from raftkv.recipes.waiting import changed, is_delete, limited

PAUSE_MAX_S: Final = 2.0  # between two attempts to watch a key that is held


class Place:
    """One acquisition: opened once, left once."""

    def __init__(self, client: AsyncClient, ttl_s: float, value: bytes) -> None:
        self._client = client
        self.lease: Final = client.lease(ttl_s)
        self.value = value
        self.key = b""  # within the client's namespace
        self.fence = 0  # the create revision of our key; 0 while there is none
        self.held = False
        self.lost: Final = asyncio.Event()
        self._gone = ""  # why it is lost although its lease may be alive
        self._when_lost: Final = callbacks.Callbacks()
        self._minder: asyncio.Task[None] | None = None
        self._watches: Final[set[Watch]] = set()  # whoever waits at them is woken when it is lost

    @property
    def state(self) -> LockState:
        """How it stands now. Reads the clock; never waits."""
        if not self.held:
            return LockState.WAITING
        if self._gone or self.lease.state is LeaseState.LOST:
            return LockState.LOST
        return LockState.HELD if self.lease.state is LeaseState.HELD else LockState.AT_RISK

    def error(self) -> LockLost:
        """That it is not held."""
        why = self._gone or self.lease.why_lost or "not acquired"
        error = LockLost(f"{self.key!r} is not held: {why}", code="LOCK_LOST")
        error.key = self.key
        return error

    def check(self) -> None:
        """Raise LockLost unless it is certainly held. Reads the clock; never waits."""
        if self.state not in (LockState.HELD, LockState.AT_RISK):
            raise self.error()

    def check_lease(self) -> None:
        """Raise LockLost when the lease is lost, held or not."""
        if self._gone or self.lease.state is LeaseState.LOST:
            raise self.error()

    def guard(self) -> Guard:
        """For writes under it."""
        self.check()
        return Guard(self._client.namespace + self.key, self.fence)

    # --- entering ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Have the lease."""
        await self.lease.grant()
        self.lease.on_lost(self._lease_lost)

    async def join(self, prefix: bytes, counted: bytes) -> int:
        """Put our key: `prefix` and the lease's id. How many keys begin with `counted`: the same transaction looks."""
        self.key = prefix + b"%x" % self.lease.id
        own, count = Get(self.key, keys_only=True), Get(counted, prefix=True, count_only=True)
        put = Put(self.key, self.value, lease=self.lease.id)
        result = await self.commit(Branches((Key(self.key).create_revision == 0,), (put, own, count), (own, count)))
        found, counts = result.results[-2:]
        assert isinstance(found, RangeResult), "a transaction answers each operation in its kind"
        assert isinstance(counts, RangeResult), "a transaction answers each operation in its kind"
        self.took(found)
        return counts.count

    def took(self, found: RangeResult) -> None:
        """Our key is this one from now on."""
        if not found.items:
            self._gone = "its key is gone"
            raise self.error()
        self.fence = found.items[0].create_revision

    async def commit(self, branches: Branches) -> TxnResult:
        """A transaction about a key that is ours alone, so that once or twice is the same."""
        attempt = 0
        while True:
            try:
                return await self._client.commit(branches)
            except OutcomeUnknown:
                self.check_lease()
                attempt += 1
                if attempt == TRIES_MAX:
                    raise
            except LeaseNotFound:
                self._gone = "its lease is gone"
                raise self.error() from None

    async def before(self, prefix: bytes, limit: int) -> RangeResult:
        """The keys up to ours, the youngest first, ours included where `prefix` covers it. One linearizable look."""
        return await self._client.range(
            prefix,
            prefix=True,
            max_create_revision=self.fence,
            sort="-create",
            limit=limit,
            keys_only=True,
            serializable=False,
        )

    def is_mine(self, found: RangeResult) -> bool:
        """Whether the first key is ours, as we made it: then our lease lived when this was read."""
        return bool(found.items) and found.items[0].key == self.key and found.items[0].create_revision == self.fence

    def check_mine(self, found: RangeResult) -> None:
        """Raise LockLost unless the first key is ours."""
        if not self.is_mine(found):
            self._gone = self._gone or "its key is gone"
            raise self.error()

    async def look(self) -> int:
        """One linearizable look that our key is there as we made it; the revision of the look."""
        found = await self._client.range(self.key, keys_only=True, serializable=False)
        self.check_mine(found)
        return found.revision

    async def wait(
        self, key: bytes, revision: int, *, prefix: bool = False, wanted: Callable[[Event], bool] = is_delete
    ) -> None:
        """Return when there may have been a wanted event after `revision`. LockLost when what we have is lost."""
        self.check_lease()
        watch = self._client.watch(key, prefix=prefix, start_revision=revision + 1)
        self._watches.add(watch)
        try:
            await changed(watch, wanted)
        finally:
            self._watches.discard(watch)
        self.check_lease()

    def hold(self) -> None:
        """It is held from now on. Raises LockLost where it is lost already."""
        self.check_lease()
        self.held = True
        self._minder = asyncio.create_task(self._mind_key(), name=f"raftkv holding {self.lease.id:x}")

    # --- holding and leaving ----------------------------------------------------------------------------------------

    async def _mind_key(self) -> None:
        """Notice that somebody deletes our key. Begun late, so that what is held briefly does not pay for it."""
        await asyncio.sleep(self.lease.ttl_s / 3)
        while not self.lost.is_set():
            try:
                await self.wait(self.key, await self.look())
            except LockLost:
                self.lose("its key is gone")
            except Closed:
                return  # the lease tells that, too
            except RaftkvError:
                # Nobody could be asked, or nobody wanted to answer. The lease still guards it.
                await asyncio.sleep(min(PAUSE_MAX_S, self.lease.ttl_s / 10))

    def _lease_lost(self) -> None:
        if self.held:
            self.lose(self.lease.why_lost)
        self._wake()

    def _wake(self) -> None:
        for watch in tuple(self._watches):
            watch.stop()

    def lose(self, reason: str) -> None:
        """It is lost for this reason."""
        self._gone = self._gone or reason
        if not self.lost.is_set():
            self.lost.set()
            self._wake()
            self._when_lost.fire()
            if self.lease.state is not LeaseState.LOST:
                self.lease.abandon()  # alive, and of no use to anybody

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop when it is lost; at once where it is lost already."""
        if self.lost.is_set():
            callbacks.call(callback)
        else:
            self._when_lost.add(callback)

    async def leave(self, timeout: TimeoutArg = DEFAULT) -> None:
        """Give it back: the key goes with its lease, which nobody else uses. No later holder's key can be meant."""
        self._quiet()
        await self.lease.revoke(timeout=timeout)

    def abandon(self) -> None:
        """The same for whoever has no time to wait: in the background. What is lost stays lost."""
        if self.state is not LockState.LOST:
            self._quiet()
        self.lease.abandon()

    def _quiet(self) -> None:
        self.held = False  # not lost, given back
        self._when_lost.clear()
        if self._minder is not None:
            self._minder.cancel()


class Holding(abc.ABC):
    """What is held: `async with ... as held:`, or `acquire` and `release`. May be acquired again, with a new fence.

    When it is lost (its lease ran out in a pause or a partition, somebody deleted its key) the body of the `async with`
    is cancelled, and the block is left with LockLost.
    """

    _what = "holding"

    def __init__(self, client: AsyncClient, name: Text, ttl_s: float, owner: Text, timeout: float | None) -> None:
        check_ttl(ttl_s)
        if timeout is not None:
            check_seconds("timeout", timeout)
        self._client = client
        self._name = name
        self._ttl_s = ttl_s
        self._owner = to_bytes(owner, "owner")
        self._timeout_s = timeout
        self._place: Place | None = None
        self._body: asyncio.Task[object] | None = None
        self._cancelled_body = False
        self._told = False  # by `release` and the like, that what is in `_place` is lost

    @abc.abstractmethod
    async def _enter(self, place: Place) -> None:
        """Return when `place`, whose lease is granted, holds; raise LockLost when its lease is lost."""

    async def _leave(self, place: Place) -> None:
        """What leaving the block without an error does."""
        await place.leave()

    @property
    def state(self) -> LockState:
        """How it stands now. Reads the clock; never waits."""
        return self._place.state if self._place is not None else LockState.IDLE

    @property
    def held(self) -> bool:
        """Whether it is certainly held now. Reads the clock; never waits."""
        return self.state in (LockState.HELD, LockState.AT_RISK)

    @property
    def fence(self) -> int:
        """The fencing token: larger for each later holder. Raises LockLost where it is not held."""
        return self._present().fence

    @property
    def key(self) -> bytes:
        """The key that stands for it, within the client's namespace."""
        return self._present().key

    @property
    def lost(self) -> asyncio.Event:
        """Set when it is lost; giving it back is no loss."""
        return self._present().lost

    def remaining(self) -> float:
        """Seconds for which it is certainly still held; 0.0 when it is lost. Reads the clock; never waits."""
        return self._place.lease.remaining() if self.held and self._place is not None else 0.0

    def check(self) -> None:
        """Raise LockLost unless it is certainly held. Reads the clock; never waits."""
        self._present().check()

    def guard(self) -> Guard:
        """For `guards=[...]` of a write, which then does nothing once this is lost. Raises LockLost if it is."""
        return self._present().guard()

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop when this acquisition is lost; at once where it is lost already."""
        self._present().when_lost(callback)

    def _present(self) -> Place:
        if self._place is None:
            raise LockLost(f"{self._what} {self._name!r} is not held", code="LOCK_LOST")
        return self._place

    async def acquire(self, *, timeout: float | Default | None = DEFAULT) -> Self:
        """Wait for it and hold it until `release`.

        Args:
            timeout: seconds; None waits for ever; left out it is what this was made with.
        Raises:
            LockTimeout: it was not free in time; nobody waits in its queue for you.
            LockLost: its lease ran out while it waited.
            Unavailable: the cluster could not be asked.
        """
        old = self._place
        if old is not None and old.state is not LockState.LOST:
            raise ConfigError(self._what, f"{self._name!r} is being held or waited for by this very object")
        limit_s = self._timeout_s if isinstance(timeout, Default) else timeout
        if limit_s is not None:
            check_seconds("timeout", limit_s)
        if old is not None:
            old.abandon()
        self._place = place = Place(self._client, self._ttl_s, self._owner)
        self._told = False
        try:
            async with limited(limit_s, LockTimeout, f"{self._what} {self._name!r} was not free", "LOCK_TIMEOUT"):
                await place.open()
                await self._enter(place)
            place.hold()
        except BaseException:
            self._place = None
            place.abandon()
            raise
        return self

    async def release(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Give it back.

        Raises:
            LockLost: it was lost before.
            Unavailable, OutcomeUnknown: the cluster could not be told. That is tried a little longer in the background
                (also where this is cancelled), then it runs out by itself.
        """
        place = self._present()
        self._place = None
        if place.state is LockState.LOST:
            self._failed_to_leave(place)
            raise place.error()
        await place.leave(timeout)

    async def __aenter__(self) -> Self:
        await self.acquire()
        self._body = asyncio.current_task()
        self._cancelled_body = False
        place = self._present()

        def cancel_body() -> None:
            body = self._body
            if body is None or self._place is not place:
                return  # only while this very acquisition is inside its block
            if body is asyncio.current_task():
                # It found out itself, and what it called raises: that may leave the block, and a cancellation begun now
                # would then come out after it (before Python 3.13).
                asyncio.get_running_loop().call_soon(cancel_body)
                return
            self._cancelled_body = True
            body.cancel("what it held was lost")

        place.when_lost(cancel_body)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        place = self._place
        if place is None:
            return  # released in the body
        if place.state is not LockState.LOST:
            self._place = None
            await self._leave_block(place, error)
            return
        place.abandon()
        cancelled = isinstance(error, asyncio.CancelledError)
        by_others = body is None or not self._cancelled_body or body.uncancel() > 0
        if cancelled and by_others:
            return  # somebody else cancelled this task, and that goes first
        if self._told and not cancelled:
            return  # released in the body, which was told
        raise place.error() from (None if cancelled else error)

    async def _leave_block(self, place: Place, error: BaseException | None) -> None:
        if error is None:
            try:
                await self._leave(place)
            except BaseException:
                self._failed_to_leave(place)
                raise
        elif isinstance(error, Exception):
            try:
                await place.leave()
            except RaftkvError:
                return  # the body's own error says more; the lease runs out by itself
        else:
            place.abandon()

    def _failed_to_leave(self, place: Place) -> None:
        place.abandon()
        if place.state is LockState.LOST:
            self._place, self._told = place, True  # lost for good, until it is acquired anew

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name!r} {self.state.value}>"
