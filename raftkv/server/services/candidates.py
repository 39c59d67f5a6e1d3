"""Who holds a name: keys `<name>/<lease in hex>`, each bound to its lease; the one created first holds.

    enter (one transaction) --first--> holds
        | somebody is before us                                      (our SDK enters by itself, and only waits here)
        v
    wait for the delete of the one just before us, or of our own key --> look again, linearizably

Each waits for one other only, so a release wakes one. A key goes with its lease, so nobody waits for the dead, and a
waiter whose own lease ends learns it at once. Locks and elections share this, and so do etcd's clients, which do the
same by themselves with Txn and Watch: the format of the keys is all they have to agree on.

Invariant: whoever is told that he holds was, at one revision after he asked, the first in creation, his key bound to
his lease.    See: reliability section 5.2, L6 to L9.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from raftkv._pb.common_pb2 import KeyValue
from raftkv._pb.kv_pb2 import (
    Compare,
    DeleteRangeRequest,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
    TxnResponse,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest
from raftkv.server.errors import NoLeader, RequestError, RequestTimeout, Stopping, TooManyRequests
from raftkv.server.limits import request_limits
from raftkv.server.services.contract import Node
from raftkv.server.services.quota import Quota
from raftkv.server.services.reads import LOOP_KEYS_MAX, Reads
from raftkv.server.watch import WatchHub, prefix_end
from raftkv.server.watch_stream import HistoryGone, Listener
from raftkv.state.commands import CommandKind
from raftkv.state.ranges import RangeTooLong
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.validate import check_txn

ORPHAN_TTL_S = 60
"""Of the lease that is granted where none was given; nobody keeps it alive. As etcd."""

WAITERS_MAX = 10_000
"""Calls of a node that may wait for their turn: for as long as it takes, so they do not count as in flight."""

RETRY_S = 0.05


class Held(NamedTuple):
    """A key that was first of its name at `revision`."""

    key: bytes
    create_revision: int
    lease: int
    revision: int


@dataclass(slots=True)
class _Callers:
    """The calls on this node that are about one key."""

    count: int = 0
    created: int = 0  # create revision of the key if one of them made it, and none has succeeded since
    entering: set[asyncio.Task[TxnResponse]] = field(default_factory=set)


class Gone(Exception):
    """Our key is not there any more, or not with our lease."""


class Candidates:
    """All names of one node's callers."""

    def __init__(self, node: Node, reads: Reads, quota: Quota, hub: WatchHub) -> None:
        self._node = node
        self._reads = reads
        self._quota = quota
        self._hub = hub
        self._limits = request_limits(node.config)
        self._callers: dict[bytes, _Callers] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False
        self.waiting = 0

    async def hold(self, name: bytes, lease: int, value: bytes | None, deadline: float | None) -> Held:
        """Enter a key for `lease` and wait until it is the first of `name`.

        A call that is cancelled takes back the key it made, unless another call waits for the same one.

        Args:
            lease: 0 has one granted.
            value: what the key is to have; None leaves an existing one as it is.
        Raises:
            Gone: the key vanished while we waited: its lease has ended.
            Refused: LEASE_NOT_FOUND and the like.
            RequestError: the node gave up; the key may have been made.
        """
        if self.waiting >= WAITERS_MAX:
            raise TooManyRequests("lock_waiters_max")
        await self._quota.check_space()
        lease = lease or await self._grant(deadline)
        key = b"%s/%x" % (name, lease)
        request = _entry(name, key, lease, value or b"")
        check_txn(request, self._limits)
        self.waiting += 1
        try:
            async with self._calling(key) as callers:
                response = await self._enter(callers, request, deadline)
                if response.succeeded:
                    callers.created = response.header.revision
                    own = KeyValue(key=key, create_revision=response.header.revision, lease=lease)
                else:
                    own = response.responses[0].response_range.kvs[0]
                    if value is not None and own.value != value:
                        await self.proclaim(key, own.create_revision, lease, value, deadline)
                first = response.responses[1].response_range.kvs[0]
                if first.create_revision == own.create_revision and own.lease == lease:
                    held = Held(key, own.create_revision, lease, response.header.revision)
                else:
                    held = await self._wait(name, key, own.create_revision, lease, deadline)
                callers.created = 0
                callers.entering.clear()  # whichever of them made the key, it is held now
                return held
        finally:
            self.waiting -= 1

    async def await_turn(self, name: bytes, lease: int, create_revision: int, deadline: float | None) -> Held:
        """Wait until a key that was entered before is the first of `name`. A call that is cancelled leaves it there.

        Raises:
            Gone: there is no such key, created then and bound to `lease`, or it vanished while we waited.
            RequestError: the node gave up.
        """
        if self.waiting >= WAITERS_MAX:
            raise TooManyRequests("lock_waiters_max")
        key = b"%s/%x" % (name, lease)
        self.waiting += 1
        try:
            return await self._wait(name, key, create_revision, lease, deadline)
        finally:
            self.waiting -= 1

    async def proclaim(self, key: bytes, create_revision: int, lease: int, value: bytes, deadline: float | None) -> int:
        """Give the key another value, if it is still the same one; the revision of that.

        Raises:
            Gone: it is not.
        """
        put = PutRequest(key=key, value=value, lease=lease, ignore_lease=not lease)
        request = TxnRequest(compare=[_created(key, create_revision)], success=[RequestOp(request_put=put)])
        check_txn(request, self._limits)
        await self._quota.check_space()
        response = await self._propose(request, deadline)
        if not response.succeeded:
            raise Gone
        return response.header.revision

    async def release(self, key: bytes, create_revision: int, deadline: float | None) -> int:
        """Delete the key if it is still the one created then (0: whichever it is); the store's revision after that."""
        delete = RequestOp(request_delete_range=DeleteRangeRequest(key=key))
        compare = [_created(key, create_revision)] if create_revision else []
        request = TxnRequest(compare=compare, success=[delete])
        check_txn(request, self._limits)
        self._quota.check_intact()
        return (await self._propose(request, deadline)).header.revision

    async def first(self, name: bytes, deadline: float | None) -> tuple[KeyValue | None, int]:
        """The first of `name`, linearizably, and the revision at which it was that."""
        response = await self._read(TxnRequest(success=[_first(name)]), deadline)
        kvs = response.responses[0].response_range.kvs
        return (kvs[0] if kvs else None), response.header.revision

    def listen(self) -> Listener:
        """To hear of changes inside this node."""
        return Listener(self._hub)

    def end(self) -> None:
        """The node stops: nobody begins to wait; those who do keep their keys, and so their places, elsewhere."""
        self._ending = True

    def close(self) -> None:
        """Keys that are still to be taken back go with their leases."""
        for task in self._tasks:
            task.cancel()

    async def _grant(self, deadline: float | None) -> int:
        while True:
            lease = secrets.randbelow((1 << 63) - 1) + 1
            payload = LeaseGrantRequest(ID=lease, TTL=ORPHAN_TTL_S).SerializeToString()
            result = await self._node.propose(CommandKind.LEASE_GRANT, payload, deadline)
            if not isinstance(result, Refusal):
                return lease
            if result.code is not RefusalCode.LEASE_EXISTS:
                raise Refused(result)

    @contextlib.asynccontextmanager
    async def _calling(self, key: bytes) -> AsyncIterator[_Callers]:
        callers = self._callers.setdefault(key, _Callers())
        callers.count += 1
        try:
            yield callers
        except asyncio.CancelledError:
            if callers.count == 1 and (callers.created or callers.entering):
                self._spawn_withdrawal(key, callers)
            raise
        finally:
            callers.count -= 1
            if not callers.count:
                del self._callers[key]

    async def _enter(self, callers: _Callers, request: TxnRequest, deadline: float | None) -> TxnResponse:
        # A task of its own, because a cancelled caller's command may be in the log already: then what it made has to
        # be known before it can be taken back.
        task = asyncio.ensure_future(self._propose(request, deadline))
        callers.entering.add(task)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
        try:
            response = await asyncio.shield(task)
        except Exception:
            callers.entering.discard(task)
            raise
        callers.entering.discard(task)
        return response

    def _spawn_withdrawal(self, key: bytes, callers: _Callers) -> None:
        task = asyncio.ensure_future(self._withdraw(key, callers.created, callers.entering))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _withdraw(self, key: bytes, created: int, entering: set[asyncio.Task[TxnResponse]]) -> None:
        for task in entering:
            with contextlib.suppress(RequestError, Refused):
                response = await task
                created = response.header.revision if response.succeeded else created
        if created:
            with contextlib.suppress(RequestError, Refused):  # then its lease ends it
                await self.release(key, created, None)

    async def _wait(self, name: bytes, key: bytes, created: int, lease: int, deadline: float | None) -> Held:
        look = TxnRequest(success=[RequestOp(request_range=RangeRequest(key=key)), _just_before(name, created)])
        linearizable = False  # whom to wait for is told by what this node has; only what we answer must be certain
        while True:
            if self._ending:
                raise Stopping
            response = await (self._read(look, deadline) if linearizable else self._look(look))
            own = response.responses[0].response_range.kvs
            before = response.responses[1].response_range.kvs
            is_there = bool(own) and own[0].create_revision == created and own[0].lease == lease
            if is_there and before:
                revision = response.header.revision
                with contextlib.suppress(HistoryGone), self.listen() as listener:
                    for each in (before[0].key, key):
                        listener.add(each, each + b"\0", revision + 1, no_put=True)
                    await listener.next()
            elif linearizable:
                if not is_there:
                    raise Gone
                return Held(key, created, lease, response.header.revision)
            linearizable = True

    async def _read(self, request: TxnRequest, deadline: float | None) -> TxnResponse:
        """Read at one revision, linearizably. While there is no leader, we wait: our place in the queue is kept."""
        loop = asyncio.get_running_loop()
        while True:
            self._quota.check_intact()
            if self._ending:
                raise Stopping
            try:
                await self._node.read_barrier(deadline)
                break
            except (RequestTimeout, NoLeader):
                if deadline is not None and loop.time() >= deadline:
                    raise
                await asyncio.sleep(RETRY_S)
        return await self._look(request)

    async def _look(self, request: TxnRequest) -> TxnResponse:
        """Read at one revision what this node has: ranges and nothing else, on the loop while they are short."""
        machine = self._node.machine
        response = TxnResponse()
        try:
            for op in request.success:
                response.responses.add(response_range=machine.range(op.request_range, LOOP_KEYS_MAX))
        except RangeTooLong:
            return TxnResponse.FromString(await self._reads.txn(request))
        response.header.revision = machine.revision
        return response

    async def _propose(self, request: TxnRequest, deadline: float | None) -> TxnResponse:
        result = await self._node.propose(CommandKind.TXN, request.SerializeToString(), deadline)
        if isinstance(result, Refusal):
            raise Refused(result)
        assert isinstance(result, TxnResponse)
        return result


def _created(key: bytes, revision: int) -> Compare:
    return Compare(target=Compare.CREATE, result=Compare.EQUAL, key=key, create_revision=revision)


def _first(name: bytes) -> RequestOp:
    return RequestOp(
        request_range=RangeRequest(
            key=name + b"/",
            range_end=prefix_end(name + b"/"),
            sort_target=RangeRequest.CREATE,
            sort_order=RangeRequest.ASCEND,
            limit=1,
        )
    )


def _just_before(name: bytes, created: int) -> RequestOp:
    op = _first(name)
    op.request_range.sort_order = RangeRequest.DESCEND
    op.request_range.max_create_revision = created - 1
    op.request_range.keys_only = True
    return op


def _entry(name: bytes, key: bytes, lease: int, value: bytes) -> TxnRequest:
    put = RequestOp(request_put=PutRequest(key=key, value=value, lease=lease))
    get = RequestOp(request_range=RangeRequest(key=key))
    return TxnRequest(compare=[_created(key, 0)], success=[put, _first(name)], failure=[get, _first(name)])
