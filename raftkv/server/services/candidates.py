"""Who holds a name: keys `<name>/<lease in hex>`, each bound to its lease; the one created first holds.

    enter (one transaction) --first--> holds
        | somebody is before us                                      (our SDK enters by itself, and only waits here)
        v
    wait for the delete of the one just before us, or of our own key --> look again, linearizably --> holds

Each waits for one other only, so a release wakes one. A key goes with its lease, so nobody waits for the dead, and a
waiter whose own lease ends learns it at once. Locks and elections share this, and so do etcd's clients, which do the
same by themselves with Txn and Watch: the format of the keys is all they have to agree on.

A call that ends unheard takes its key back. But a client asks again, here or at another node, and finds the key there:
that call *adopts* it by writing it once more as it is, which moves its mod revision. So a key is taken back only if it
has not been written since, and whoever is told that he holds has written it last, if need be by a claim.

Invariants: whoever is told that he holds was, at one revision after he asked, the first in creation, his key bound to
his lease. No call that has ended deletes a key that another was told it holds.    See: reliability 5.2, L6 to L9.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from raftkv._pb.common_pb2 import KeyValue
from raftkv._pb.kv_pb2 import TxnRequest, TxnResponse
from raftkv._pb.lease_pb2 import LeaseGrantRequest
from raftkv.server.errors import NoLeader, RequestError, RequestTimeout, Stopping
from raftkv.server.limits import Inflight, request_limits
from raftkv.server.services import lock_requests as requests
from raftkv.server.services.contract import Node
from raftkv.server.services.quota import Quota
from raftkv.server.services.reads import LOOP_KEYS_MAX, Reads
from raftkv.server.watch import WatchHub
from raftkv.server.watch_stream import HistoryGone, Listener
from raftkv.state.commands import CommandKind
from raftkv.state.ranges import RangeTooLong
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.validate import check_txn

ORPHAN_TTL_S = 60
"""Of the lease that is granted where none was given; nobody keeps it alive. As etcd."""

WAITERS_MAX = 10_000
"""Calls of a node that may wait for their turn: for as long as it takes, so they do not count as in flight."""
WAITER_BYTES_MAX = 16 * 1024 * 1024
"""Of the requests of those: gRPC keeps each for as long as its call lasts."""

RETRY_S = 0.05


class Held(NamedTuple):
    """A key that was first of its name at `revision`."""

    key: bytes
    create_revision: int
    lease: int
    revision: int
    mod_revision: int


@dataclass(slots=True)
class _Callers:
    """The calls on this node that are about one key, those included that have ended and still take it back."""

    calls: int = 0
    withdrawals: int = 0
    written: int = 0  # our last write of the key, if nobody can have been told since that he holds it; else 0
    entering: set[asyncio.Task[TxnResponse]] = field(default_factory=set)

    def entered(self, response: TxnResponse, lease: int) -> None:
        """One of the calls has made the key, or adopted it."""
        revision = response.header.revision
        if response.succeeded:
            self.written = revision
            return
        own = response.responses[0].response_range.kvs[0]
        first = response.responses[-1].response_range.kvs[0]
        # The first one may be held. But not if its last write before this one was ours, and nobody was told since.
        if own.lease == lease and (first.key != own.key or own.mod_revision == self.written):
            self.written = revision


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
        self.waiters = Inflight(WAITERS_MAX, WAITER_BYTES_MAX, "lock_waiters")
        """Who waits for his turn; the services count them in."""

    async def hold(self, name: bytes, lease: int, value: bytes | None, deadline: float | None) -> Held:
        """Enter a key for `lease` and wait until it is the first of `name`.

        A call that is cancelled or fails takes back the key it made, unless another call waits for the same one; only
        when the node stops it stays, and with it the place in the queue, for the next try at another node.

        Args:
            lease: 0 has one granted.
            value: what the key is to have; None leaves an existing one as it is.
        Raises:
            Gone: the key vanished while we waited: its lease has ended.
            Refused: LEASE_NOT_FOUND and the like.
            RequestError: the node gave up; `executed` says whether lease or key may have been made.
        """
        # Before anything is done for it, so with the widest of leases where it is not known yet.
        check_txn(requests.entry(name, lease or requests.LEASE_MAX, value), self._limits)
        await self._quota.check_space()
        done = False
        try:
            if not lease:
                lease = await self._grant(deadline)
                done = True
            key = requests.key_of(name, lease)
            async with self._calling(key) as callers:
                response = await self._enter(callers, requests.entry(name, lease, value), lease, deadline)
                done = True
                held = await self._turn(name, key, lease, response, callers, deadline)
                callers.written = 0  # it is held: nobody takes it back
                return held
        except RequestError as fault:
            if done:
                fault.executed = "unknown"
            raise

    async def _turn(
        self, name: bytes, key: bytes, lease: int, response: TxnResponse, callers: _Callers, deadline: float | None
    ) -> Held:
        """The key was entered with that response: wait until it holds."""
        revision = response.header.revision
        if response.succeeded:
            own = KeyValue(key=key, create_revision=revision, lease=lease)
        else:
            own = response.responses[0].response_range.kvs[0]
        first = response.responses[-1].response_range.kvs[0]
        if first.create_revision == own.create_revision and own.lease == lease:
            return Held(key, own.create_revision, lease, revision, revision)
        held = await self._wait(name, key, own.create_revision, lease, deadline)
        if held.mod_revision != callers.written:
            held = await self._claim(held, deadline)
        return held

    async def await_turn(self, name: bytes, lease: int, create_revision: int, deadline: float | None) -> Held:
        """Wait until a key that was entered before is the first of `name`. A call that is cancelled leaves it there.

        Raises:
            Gone: there is no such key, created then and bound to `lease`, or it vanished while we waited.
            RequestError: the node gave up.
        """
        held = await self._wait(name, requests.key_of(name, lease), create_revision, lease, deadline)
        # Whoever entered by himself has written once. If somebody has since, it may be a call that would take it back.
        return held if held.mod_revision == create_revision else await self._claim(held, deadline)

    async def proclaim(self, key: bytes, create_revision: int, lease: int, value: bytes, deadline: float | None) -> int:
        """Give the key another value, if it is still the same one; the revision of that.

        Raises:
            Gone: it is not.
        """
        request = requests.proclamation(key, create_revision, lease, value)
        check_txn(request, self._limits)
        await self._quota.check_space()
        response = await self._propose(request, deadline)
        if not response.succeeded:
            raise Gone
        return response.header.revision

    async def release(self, key: bytes, create_revision: int, deadline: float | None) -> tuple[bool, int]:
        """Delete the key if it is still the one created then (0: whichever it is).

        Returns:
            Whether it was there, and the store's revision after that.
        """
        request = requests.release(key, create_revision)
        check_txn(request, self._limits)
        self._quota.check_intact()
        response = await self._propose(request, deadline)
        deleted = response.succeeded and response.responses[0].response_delete_range.deleted > 0
        return deleted, response.header.revision

    async def first(self, name: bytes, deadline: float | None, *, patient: bool) -> tuple[KeyValue | None, int]:
        """The first of `name`, linearizably, and the revision at which it was that.

        Args:
            patient: wait for a leader however long there is none.
        """
        request = TxnRequest(success=[requests.first(name)])
        check_txn(request, self._limits)
        response = await self._read(request, deadline, patient=patient)
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

    # Entering, and taking back.

    async def _grant(self, deadline: float | None) -> int:
        while True:
            lease = secrets.randbelow(requests.LEASE_MAX) + 1
            payload = LeaseGrantRequest(ID=lease, TTL=ORPHAN_TTL_S).SerializeToString()
            result = await self._node.propose(CommandKind.LEASE_GRANT, payload, deadline)
            if not isinstance(result, Refusal):
                return lease
            if result.code is not RefusalCode.LEASE_EXISTS:
                raise Refused(result)

    @contextlib.asynccontextmanager
    async def _calling(self, key: bytes) -> AsyncIterator[_Callers]:
        callers = self._callers.setdefault(key, _Callers())
        callers.calls += 1
        try:
            yield callers
        except (asyncio.CancelledError, RequestError) as fault:
            owes = callers.calls == 1 and (callers.written or callers.entering)
            if owes and not isinstance(fault, Stopping):
                self._spawn_withdrawal(key, callers)
            raise
        finally:
            callers.calls -= 1
            self._forget(key, callers)

    def _forget(self, key: bytes, callers: _Callers) -> None:
        if not callers.calls and not callers.withdrawals:
            del self._callers[key]

    async def _enter(self, callers: _Callers, request: TxnRequest, lease: int, deadline: float | None) -> TxnResponse:
        # A task of its own, because a cancelled caller's command may be in the log already: then what it made has to
        # be known before it can be taken back.
        async def enter() -> TxnResponse:
            response = await self._propose(request, deadline)
            callers.entered(response, lease)
            return response

        task = asyncio.ensure_future(enter())
        callers.entering.add(task)
        task.add_done_callback(callers.entering.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
        return await asyncio.shield(task)

    def _spawn_withdrawal(self, key: bytes, callers: _Callers) -> None:
        callers.withdrawals += 1
        task = asyncio.ensure_future(self._withdraw(key, callers))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            callers.withdrawals -= 1
            self._forget(key, callers)

        task.add_done_callback(ended)

    async def _withdraw(self, key: bytes, callers: _Callers) -> None:
        while callers.entering and not callers.calls:
            await asyncio.wait(callers.entering)
        # Until nothing is to be taken back, or that is the business of a call that came since. Saying it twice does no
        # harm, and there may be no leader for a while: then that is why the call has failed.
        while (written := callers.written) and not callers.calls:
            try:
                await self._propose(requests.withdrawal(key, written), None)
            except (Refused, Stopping):
                return  # its lease ends it
            except RequestError:
                await asyncio.sleep(RETRY_S)
            else:
                callers.written = 0 if callers.written == written else callers.written

    async def _claim(self, held: Held, deadline: float | None) -> Held:
        """Somebody has written the key since we did, perhaps a call that takes it back when it ends: be the last."""
        response = await self._propose(requests.claim(held.key, held.create_revision, held.lease), deadline)
        if not response.succeeded:
            raise Gone
        revision = response.header.revision
        return held._replace(revision=revision, mod_revision=revision)

    # Waiting and reading.

    async def _wait(self, name: bytes, key: bytes, created: int, lease: int, deadline: float | None) -> Held:
        look = requests.look(name, key, created)
        check_txn(look, self._limits)
        came = self._node.mark()
        again = False
        while True:
            if self._ending:
                raise Stopping
            # Whom to wait for is told by what this node has; only what we answer must be certain. It is so without
            # another round where we lead and something was committed since: the release that woke us, for one.
            linearizable = self._node.is_after(came)
            if again and not linearizable:
                linearizable = True
                response = await self._read(look, deadline, patient=True)
            else:
                self._quota.check_intact()
                response = await self._look(look)
            again = True
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
                return Held(key, created, lease, response.header.revision, own[0].mod_revision)

    async def _read(self, request: TxnRequest, deadline: float | None, *, patient: bool) -> TxnResponse:
        """Read at one revision, linearizably. Who is patient has a place in a queue, which is kept without a leader."""
        loop = asyncio.get_running_loop()
        while True:
            self._quota.check_intact()
            if self._ending:
                raise Stopping
            try:
                await self._node.read_barrier(deadline)
                break
            except (RequestTimeout, NoLeader):
                if not patient or (deadline is not None and loop.time() >= deadline):
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
