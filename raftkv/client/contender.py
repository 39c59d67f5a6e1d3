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
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from raftkv._pb import kv_pb2, lock_pb2, watch_pb2
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import Connection
from raftkv.client.errors import Compacted, LeaseNotFound, LockLost, LockTimeout, OutcomeUnknown, RaftkvError
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

_Pb = kv_pb2.RangeRequest
BACKOFF: Final = Retry()
STEP_TRIES_MAX: Final = 20  # each step may be repeated: its key is ours alone


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

    def __init__(self, context: Context, name: Text, ttl_s: float, value: bytes) -> None:
        self._context = context
        self.prefix: Final = context.namespace.prefix + to_bytes(name, "name") + b"/"
        self.lease: Final = Lease(context, ttl_s, True, DEFAULT)
        self.value = value
        self.key: Final = self.prefix + b"%x" % self.lease.chosen
        self.fence = 0  # the create revision of our key; 0 while there is none
        self.held = False
        self.lost: Final = asyncio.Event()
        self._gone = ""  # why it is lost although its lease may be alive
        self._when_lost: Callable[[], None] | None = None

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
        error = LockLost(f"{shown} is not held: {self.why_lost or 'not acquired'}", code="LOCK_LOST")
        error.key = self.key
        return error

    def guard(self) -> Guard:
        """For writes under it."""
        self.check()
        return Guard(self.key, self.fence)

    # --- entering ---------------------------------------------------------------------------------------------------

    async def enter(self, timeout_s: float | None) -> None:
        """Wait for the name and hold it.

        Raises:
            LockTimeout: it was not free in time; the place in the queue is given up.
            LockLost: the lease ran out while waiting.
            Unavailable: the cluster could not be asked.
        """
        try:
            async with asyncio.timeout(timeout_s):
                first = await self._arrive()
                while not first:
                    first = await self._wait_on_server() or await self._wait_by_watch()
        except TimeoutError as error:
            self.lease.abandon()
            if isinstance(error, RaftkvError):
                raise
            shown = self.prefix[:-1].decode("utf-8", "backslashreplace")
            text = f"{shown} was not free within {timeout_s:g} s"
            raise LockTimeout(text, code="LOCK_TIMEOUT") from None
        except BaseException:
            self.lease.abandon()
            raise
        if self.lease.state is LeaseState.LOST:
            raise self.error()
        self.held = True
        self.lease.on_lost(lambda: self.lose(self.lease.why_lost))
        self._context.pool.spawn(self._watch_key(), f"lock {self.lease.id:x}")

    async def _arrive(self) -> bool:
        """Have the lease granted and put our key, at the same time. Whether it is the first."""
        granting = asyncio.ensure_future(self.lease.grant())
        try:
            await asyncio.sleep(0)  # the grant goes ahead: on one stream they stay in this order
            try:
                first = await self._enqueue()
            except LeaseNotFound:  # on two ways, the key was faster; or the grant has failed
                await granting
                first = await self._enqueue()
            await granting
        finally:
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

    async def _enqueue(self) -> bool:
        """Put our key. Whether it is the first: the same transaction looks."""
        absent = kv_pb2.Compare(
            key=self.key, target=kv_pb2.Compare.CREATE, result=kv_pb2.Compare.EQUAL, create_revision=0
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
        else:
            self.fence = response.responses[0].response_range.kvs[0].create_revision
        return self._is_first(response.responses[1].response_range)

    def _is_first(self, answer: kv_pb2.RangeResponse) -> bool:
        return bool(answer.kvs) and answer.kvs[0].key == self.key and answer.kvs[0].create_revision == self.fence

    async def _look(self) -> bool:
        """One linearizable look: our key as we made it (so its lease lives), and whether it is the first."""
        request = kv_pb2.TxnRequest(success=[kv_pb2.RequestOp(request_range=_Pb(key=self.key)), self._first()])
        response = await self._txn(request, Purpose.READ)
        own = response.responses[0].response_range.kvs
        if not own or own[0].create_revision != self.fence:
            self._gone = "its key is gone"
            raise self.error()
        return self._is_first(response.responses[1].response_range)

    async def _wait_on_server(self) -> bool:
        """Let a node wait for our turn. True when it has come, by a linearizable look; False where no node does that.

        Raises LockLost when our lease, or our key, is gone.
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

        def end() -> None:
            call.cancel()

        self.lease.on_lost(end)
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
            if not call.cancelled() or being_cancelled():
                raise
            if self.lease.state is LeaseState.LOST:
                raise self.error() from None
            return False
        finally:
            connection.close_stream(call)
            connection.breaker.released(epoch)
        connection.answered(epoch)
        pool.observe(connection, response.header)
        return True

    async def _wait_by_watch(self) -> bool:
        """Wait until the key before ours is gone. Whether ours is the first then. Raises LockLost when our lease is."""
        await self._wait_for_predecessor()
        return await self._look()

    async def _wait_for_predecessor(self) -> None:
        """Return when the key before ours is gone. Raises LockLost when our lease is."""
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
        if not response.kvs:
            return
        await self._unless_lost(self._watch_delete(response.kvs[0].key, response.header.revision + 1))

    def _watch_delete(self, key: bytes, revision: int) -> Watch:
        request = watch_pb2.WatchCreateRequest(
            key=key, start_revision=revision, filters=[watch_pb2.WatchCreateRequest.NOPUT], watch_id=1
        )
        pool = self._context.pool
        return Watch(pool, Feed(pool, Namespace(b""), request), None, False)

    async def _unless_lost(self, watch: Watch) -> None:
        """Return with the first event, or when history was compacted; raise LockLost when our lease is lost."""
        self.lease.on_lost(watch.stop)
        try:
            await anext(watch)
        except (StopAsyncIteration, Compacted):
            pass
        finally:
            watch.stop()
        if self.lease.state is LeaseState.LOST:
            raise self.error()

    # --- holding and leaving ----------------------------------------------------------------------------------------

    async def _watch_key(self) -> None:
        """Notice that somebody deletes our key. Begun late, so that what is held briefly does not pay for it."""
        await asyncio.sleep(self.lease.ttl_s / 3)
        if self.lost.is_set():
            return
        try:
            while True:
                await self._unless_lost(self._watch_delete(self.key, self.fence + 1))
                await self._look()
        except LockLost:
            self.lose(self.why_lost)
        except RaftkvError:
            return  # the client was closed; the lease still guards it

    def lose(self, reason: str) -> None:
        """It is lost for this reason."""
        if not self._gone and not self.lease.lost.is_set():
            self._gone = reason
        if not self.lost.is_set():
            self.lost.set()
            if self._when_lost is not None:
                self._when_lost()

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop when it is lost; at once where it is lost already."""
        self._when_lost = callback
        if self.lost.is_set():
            callback()

    async def leave(self, timeout: TimeoutArg = DEFAULT) -> None:
        """Give it back: the key goes with its lease, which nobody else uses. No later holder's key can be meant."""
        self._when_lost = None  # not lost, given back
        await self.lease.revoke(timeout=timeout)
