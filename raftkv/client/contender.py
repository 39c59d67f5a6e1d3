"""One place in a queue for a name: what locks and elections are made of.

Each contender has a lease of its own and, bound to it, a key `<name>/<lease id in hex>`; whose key was created first
holds the name, the others wait for the key before theirs to go. The format is that of etcd's recipes, so that
`etcdctl lock` and `elect` and the Lock and Election services take part in the same queue.

    IDLE --enter--> WAITING --own key is first, seen by one linearizable look--> HELD --> AT_RISK --> LOST
                                                                                 (as its lease; or its key is gone)

A name that is free costs one round trip: lease and key go out together, and the transaction looks. Who has to wait lets
a node do that, which answers when the turn has come, after a linearizable look; on etcd, whose nodes would take the key
of a broken call away, we wait by a watch.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
import grpc.aio

from raftkv._pb import kv_pb2, lock_pb2, watch_pb2
from raftkv.client import callbacks
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import Connection
from raftkv.client.errors import Closed, Compacted, LeaseNotFound, LockLost, LockTimeout, OutcomeUnknown, RaftkvError
from raftkv.client.faults import Fault, FaultKind, understand
from raftkv.client.feed import Feed
from raftkv.client.keys import Namespace, Text, prefix_end, to_bytes
from raftkv.client.lease import Lease, LeaseState
from raftkv.client.methods import LOCK, RANGE, TXN
from raftkv.client.options import DEFAULT, TimeoutArg
from raftkv.client.retry import Retry, backoff_s
from raftkv.client.routing import Purpose
from raftkv.client.txn import Guard
from raftkv.client.watch import Watch

if TYPE_CHECKING:
    from raftkv.client.kv import Context

T = TypeVar("T")
_Pb = kv_pb2.RangeRequest
BACKOFF: Final = Retry()
STEP_TRIES_MAX: Final = 20  # each step may be repeated: its key is ours alone
PAUSE_MAX_S: Final = 2.0  # between two attempts to watch a key that is held


class LockState(enum.Enum):
    """How a lock stands, as its holder may believe."""

    IDLE = "idle"
    """Not asked for, or given back."""
    WAITING = "waiting"
    HELD = "held"
    AT_RISK = "at risk"
    """No renewal was confirmed for half of the ttl; still certainly held."""
    LOST = "lost"
    """For this acquisition; acquiring again gives a new fence."""


class _Refused(Exception):
    """A node does not wait for us (any more)."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


class Contender:
    """One acquisition of a name: made, entered once, left once."""

    def __init__(
        self,
        context: Context,
        name: Text,
        ttl_s: float,
        value: bytes,
        *,
        lock_delay_s: float = 0.0,
        lost_error: type[LockLost] = LockLost,
    ) -> None:
        """
        Args:
            lock_delay_s: how long the name stays taken when this one, holding it, is not heard of any more: so much
                longer lives the lease at the cluster than the holder believes in it.
            lost_error: what is raised where it is not held.
        """
        self._context = context
        self._lock_delay_s = lock_delay_s
        self._lost_error = lost_error
        self.prefix: Final = context.namespace.prefix + to_bytes(name, "name") + b"/"
        self.lease: Final = Lease(context, ttl_s, True, DEFAULT, lock_delay_s)
        self.value = value
        self.key: Final = self.prefix + b"%x" % self.lease.chosen
        self.fence = 0  # the create revision of our key; 0 while there is none
        self.held = False
        self.lost: Final = asyncio.Event()
        self._gone = ""  # why it is lost although its lease may be alive
        self._when_lost: Final = callbacks.Callbacks()
        self._detach: Callable[[], None] = _nothing  # from the lease, whose end is no loss once it was given back
        self._end_minding: Callable[[], None] = _nothing

    @property
    def state(self) -> LockState:
        """How it stands now. Reads the clock; never waits."""
        if not self.held:
            return LockState.WAITING
        if self._gone:
            return LockState.LOST
        return {
            LeaseState.HELD: LockState.HELD,
            LeaseState.AT_RISK: LockState.AT_RISK,
            LeaseState.LOST: LockState.LOST,
        }[self.lease.state]

    @property
    def why_lost(self) -> str:
        """Why it is lost; "" while it is not."""
        return self._gone or self.lease.why_lost

    def check(self) -> None:
        """Raise LockLost unless it is certainly held. Reads the clock; never waits."""
        if self.state not in (LockState.HELD, LockState.AT_RISK):
            raise self.error()

    def error(self) -> LockLost:
        """That it is not held."""
        shown = self.key.decode("utf-8", "backslashreplace")
        error = self._lost_error(f"{shown} is not held: {self.why_lost or 'not acquired'}", code="LOCK_LOST")
        error.key = self.key
        return error

    def guard(self) -> Guard:
        """For writes under it."""
        self.check()
        return Guard(self.key, self.fence)

    # --- entering ---------------------------------------------------------------------------------------------------

    async def enter(self, timeout_s: float | None) -> None:
        """Wait for the name and hold it.

        Args:
            timeout_s: None waits for ever; 0 takes it if it is free, and else never stands in the queue.
        Raises:
            LockTimeout: it was not free in time; the place in the queue is given up.
            LockLost: the lease ran out while waiting.
            Unavailable: the cluster could not be asked.
        """
        shown = self.prefix[:-1].decode("utf-8", "backslashreplace")
        try:
            if timeout_s == 0:
                if not await self._unless_lost(self._arrive(if_free=True)):
                    raise LockTimeout(f"{shown} is not free", code="LOCK_TIMEOUT")
            else:
                async with asyncio.timeout(timeout_s):
                    await self._unless_lost(self._queue_up())
            if self.lease.state is LeaseState.LOST:
                raise self.error()
        except TimeoutError as error:
            self.lease.abandon()
            if isinstance(error, RaftkvError):
                raise
            raise LockTimeout(f"{shown} was not free within {timeout_s:g} s", code="LOCK_TIMEOUT") from None
        except BaseException:
            self.lease.abandon()
            raise
        self.held = True
        self._detach = self.lease.on_lost(lambda: self.lose(self.lease.why_lost))
        # Begun late, so that what is held briefly does not pay for it.
        later = asyncio.get_running_loop().call_later(self.lease.ttl_s / 3, self._begin_minding)
        self._end_minding = later.cancel

    async def _unless_lost(self, entering: Coroutine[Any, Any, T]) -> T:
        """What it returns. LockLost as soon as our lease is lost, whatever it waits for, be it any node to be there."""
        task = asyncio.ensure_future(entering)

        def end() -> None:
            task.cancel()

        forget = self.lease.on_lost(end)
        try:
            await asyncio.wait((task,))
        finally:
            forget()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled() and self.lease.lost.is_set():
            raise self.error()
        return task.result()

    async def _queue_up(self) -> None:
        first = await self._arrive()
        while not first:
            first = await self._wait_on_server() or await self._wait_by_watch()

    async def _arrive(self, *, if_free: bool = False) -> bool:
        """Have the lease granted and put our key, at the same time. Whether it is the first.

        Args:
            if_free: put it only where it is the first.
        """
        granting = asyncio.ensure_future(self.lease.grant())
        try:
            await asyncio.sleep(0)  # the grant goes ahead: on one stream they stay in this order
            try:
                first = await self._enqueue(if_free)
            except LeaseNotFound:  # on two ways, the key was faster; or the grant has failed
                await granting
                first = await self._enqueue(if_free)
            await granting
        finally:
            if not granting.done() or granting.cancelled() or granting.exception() is not None:
                granting.cancel()
                await asyncio.gather(granting, return_exceptions=True)
        return first

    async def _txn(self, request: kv_pb2.TxnRequest, purpose: Purpose) -> kv_pb2.TxnResponse:
        for _ in range(STEP_TRIES_MAX):
            try:
                return await self._context.call(TXN, request, purpose, DEFAULT)
            except OutcomeUnknown:
                continue  # what it says is about a key that nobody else writes: once or twice is the same
        raise self.error()

    def _first(self) -> kv_pb2.RequestOp:
        return kv_pb2.RequestOp(
            request_range=_Pb(
                key=self.prefix,
                range_end=prefix_end(self.prefix),
                sort_order=_Pb.ASCEND,
                sort_target=_Pb.CREATE,
                limit=1,
            )
        )

    async def _enqueue(self, if_free: bool) -> bool:
        """Put our key. Whether it is the first: the same transaction looks."""
        absent = kv_pb2.Compare(
            key=self.prefix if if_free else self.key,
            range_end=prefix_end(self.prefix) if if_free else b"",  # all keys there are: so that there is none
            target=kv_pb2.Compare.CREATE,
            result=kv_pb2.Compare.EQUAL,
            create_revision=0,
        )
        put = kv_pb2.PutRequest(key=self.key, value=self.value, lease=self.lease.chosen)
        request = kv_pb2.TxnRequest(
            compare=[absent],
            success=[kv_pb2.RequestOp(request_put=put), self._first()],
            failure=[kv_pb2.RequestOp(request_range=_Pb(key=self.key)), self._first()],
        )
        response = await self._txn(request, Purpose.WRITE)
        if response.succeeded:
            self.fence = response.header.revision
        elif own := response.responses[0].response_range.kvs:
            self.fence = own[0].create_revision  # from an attempt whose answer was lost
        return self._is_first(response.responses[1].response_range)

    def _is_first(self, answer: kv_pb2.RangeResponse) -> bool:
        return bool(answer.kvs) and answer.kvs[0].key == self.key and answer.kvs[0].create_revision == self.fence

    async def _look(self) -> tuple[bool, int]:
        """One linearizable look: our key as we made it (so its lease lives), and whether it is the first.

        Returns:
            That, and the revision of the look.
        """
        request = kv_pb2.TxnRequest(success=[kv_pb2.RequestOp(request_range=_Pb(key=self.key)), self._first()])
        response = await self._txn(request, Purpose.READ)
        own = response.responses[0].response_range.kvs
        if not own or own[0].create_revision != self.fence:
            self._gone = "its key is gone"
            raise self.error()
        return self._is_first(response.responses[1].response_range), response.header.revision

    async def _wait_on_server(self) -> bool:
        """Let a node wait for our turn. True when it has come, by a linearizable look; False where no node does that.

        Raises LockLost when our key is gone.
        """
        pool = self._context.pool
        name = self.prefix[:-1]
        request = lock_pb2.LockRequest(name=name, lease=self.lease.id, fence=self.fence)
        waits = 0
        while pool.is_raftkv:
            pool.enter()
            connection = pool.router.pick(Purpose.READ) or await pool.pick_for_stream()
            try:
                if await self._wait_at(connection, request):
                    return True
            except _Refused as refusal:
                fault = refusal.fault
                if fault.code == "LEASE_EXPIRED":
                    self._gone = "its key is gone"
                    raise self.error() from None
                if fault.kind.is_final or fault.kind is FaultKind.OTHER:
                    return False
                if not fault.kind.moves_on or waits:
                    await asyncio.sleep(max(backoff_s(BACKOFF, waits, pool.random.random()), fault.retry_after_s))
                waits += 1
        return False

    async def _wait_at(self, connection: Connection, request: lock_pb2.LockRequest) -> bool:
        """Wait at one node. False where it was left because it fell silent."""
        pool = self._context.pool
        epoch = connection.breaker.epoch
        call = connection.open_call(LOCK, request)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            fault = understand(error.code(), error.details() or "", error.trailing_metadata())
            if fault.kind.blames_endpoint:
                pool.unanswered(connection, epoch, silent=False)
            elif fault.kind is FaultKind.STOPPING:
                pool.stops(connection)
            elif fault.kind is FaultKind.LEARNER:
                connection.is_learner = True
                pool.router.forget_choices()
            raise _Refused(fault) from None
        except asyncio.CancelledError:
            if being_cancelled():  # and not: call.cancelled(), which a connection that breaks just then denies
                raise
            return False
        finally:
            connection.close_stream(call)
            connection.breaker.released(epoch)
        connection.answered(epoch)
        pool.observe(connection, response.header)
        return True

    async def _wait_by_watch(self) -> bool:
        """Wait until the key before ours is gone. Whether ours is the first then."""
        request = _Pb(
            key=self.prefix,
            range_end=prefix_end(self.prefix),
            sort_order=_Pb.DESCEND,
            sort_target=_Pb.CREATE,
            limit=1,
            max_create_revision=self.fence - 1,
            keys_only=True,
        )
        response = await self._context.call(RANGE, request, Purpose.READ, DEFAULT)
        if response.kvs:
            await self._is_deleted(response.kvs[0].key, response.header.revision + 1)
        first, _ = await self._look()
        return first

    async def _is_deleted(self, key: bytes, revision: int) -> bool:
        """Wait until `key` is deleted, from this revision on. False where that cannot be told: look again."""
        watch = self._watch_delete(key, revision)
        try:
            await anext(watch)
        except (StopAsyncIteration, Compacted):
            return False  # the client was closed; or nobody knows what happened since
        finally:
            watch.stop()
        return True

    def _watch_delete(self, key: bytes, revision: int) -> Watch:
        request = watch_pb2.WatchCreateRequest(
            key=key, start_revision=revision, filters=[watch_pb2.WatchCreateRequest.NOPUT], watch_id=1
        )
        pool = self._context.pool
        return Watch(pool, Feed(pool, Namespace(b""), request), None, False)

    # --- holding and leaving ----------------------------------------------------------------------------------------

    def _begin_minding(self) -> None:
        pool = self._context.pool
        if not pool.closed:
            self._end_minding = pool.spawn(self._mind_key(), f"lock {self.lease.id:x}")

    async def _mind_key(self) -> None:
        """Notice that somebody deletes our key."""
        revision = self.fence
        while not self.lost.is_set():
            try:
                if await self._is_deleted(self.key, revision + 1):
                    self.lose("its key is gone")
                    return
                _, revision = await self._look()
            except LockLost:
                self.lose(self.why_lost)
            except Closed:
                return  # the lease tells that, too
            except RaftkvError:
                # Nobody could be asked, or nobody wanted to answer. The lease still guards it.
                await asyncio.sleep(min(PAUSE_MAX_S, self.lease.ttl_s / 10))

    def lose(self, reason: str) -> None:
        """It is lost for this reason."""
        if self.lost.is_set():
            return
        if not self.lease.lost.is_set():
            self._gone = self._gone or reason
        self.lost.set()
        self._end_minding()
        self._when_lost.fire()
        if self._gone:
            self.lease.abandon()  # alive, and of no use to anybody

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop when it is lost; at once where it is lost already."""
        if self.lost.is_set():
            callbacks.call(callback)
        else:
            self._when_lost.add(callback)

    async def leave(self, timeout: TimeoutArg = DEFAULT) -> None:
        """Give it back: the key goes with its lease, which nobody else uses. No later holder's key can be meant."""
        self._let_go()
        await self.lease.revoke(timeout=timeout)

    def abandon(self) -> None:
        """The same for whoever has no time to wait: in the background. What is lost stays lost."""
        ran_out = self.state is LockState.LOST and not self._gone
        if self.state is not LockState.LOST:
            self._let_go()
        if ran_out and self._lock_delay_s:
            self.lease.let_run_out()  # or the next one would not have to wait
        else:
            self.lease.abandon()

    def _let_go(self) -> None:
        self.held = False  # not lost, given back
        self._when_lost.clear()
        self._detach()
        self._end_minding()


def _nothing() -> None:
    return
