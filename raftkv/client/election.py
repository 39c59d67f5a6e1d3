"""Elections among clients: who leads on a name, with a value that all can see.

    election = client.election("scheduler", ttl=10)
    async with election.campaign("host-1") as leadership:
        ...                                     # cancelled, and left with NotLeading, when leadership is lost

The queue is that of locks; the key's value is what the leader proclaims. `etcdctl elect` takes part in it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from raftkv._pb import kv_pb2
from raftkv.client.contender import Contender, LockState
from raftkv.client.errors import Compacted, ConfigError, NotLeading
from raftkv.client.keys import Text, prefix_end, to_bytes
from raftkv.client.lease import check_ttl
from raftkv.client.lock import Lock
from raftkv.client.methods import RANGE, TXN
from raftkv.client.options import DEFAULT, TimeoutArg
from raftkv.client.results import KeyValue
from raftkv.client.routing import Purpose
from raftkv.client.watch import WatchCalls

if TYPE_CHECKING:
    from raftkv.client.kv import Context

_Pb = kv_pb2.RangeRequest


class ElectionCalls:
    """The election half of `AsyncClient`."""

    _context: Context

    def election(self, name: Text, ttl: float = 10.0) -> Election:
        """An election on a name.

        Args:
            name: the keys' prefix; `etcdctl elect NAME` takes part in the same election.
            ttl: seconds after which a leader that is not heard of any more has lost it.
        """
        return Election(self._context, name, ttl)


class Election:
    """An election; made by `client.election`."""

    def __init__(self, context: Context, name: Text, ttl_s: float) -> None:
        check_ttl(ttl_s)
        if not to_bytes(name, "name").strip(b"/"):
            raise ConfigError("name", "must not be empty")
        self._context = context
        self._name = name
        self._ttl_s = ttl_s

    def campaign(self, value: Text = b"", *, timeout: TimeoutArg = None) -> Leadership:
        """Stand for leader: `async with election.campaign("me") as leadership:`, or `await leadership.acquire()`.

        Args:
            value: what the others see of the leader.
            timeout: for entering; None waits for ever.
        """
        return Leadership(self._context, self._name, self._ttl_s, value, timeout)

    async def leader(self, *, timeout: TimeoutArg = DEFAULT) -> KeyValue | None:
        """Who leads now, None where nobody does. Same as `Leader` of etcd's v3election."""
        found, _ = await self._first(timeout)
        return found

    async def _first(self, timeout: TimeoutArg) -> tuple[KeyValue | None, int]:
        context = self._context
        prefix = self._prefix()
        request = _Pb(key=prefix, range_end=prefix_end(prefix), sort_order=_Pb.ASCEND, sort_target=_Pb.CREATE, limit=1)
        response = await context.call(RANGE, request, Purpose.READ, timeout)
        found = context.namespace.item(response.kvs[0]) if response.kvs else None
        return found, response.header.revision

    def _prefix(self) -> bytes:
        return self._context.namespace.prefix + to_bytes(self._name, "name") + b"/"

    async def observe(self) -> AsyncIterator[KeyValue]:
        """The leader now and every later one, also when a leader changes its value. Same as etcd's `Observe`.

        What came and went between two looks may be left out; the latest is never.
        """
        watcher = WatchCalls()
        watcher._context = self._context
        name = to_bytes(self._name, "name") + b"/"
        last: tuple[bytes, int] | None = None
        while True:
            found, revision = await self._first(DEFAULT)
            if found is not None and (found.key, found.mod_revision) != last:
                last = (found.key, found.mod_revision)
                yield found
            try:
                async with watcher.watch(name, prefix=True, start_revision=revision + 1) as watch:
                    async for batch in watch.batches():
                        if not batch.events:
                            continue
                        found, _ = await self._first(DEFAULT)
                        if found is not None and (found.key, found.mod_revision) != last:
                            last = (found.key, found.mod_revision)
                            yield found
            except Compacted:
                continue


class Leadership(Lock):
    """One candidacy; made by `election.campaign`. As a lock, but what is raised on loss is NotLeading; and its value
    may be changed.
    """

    _lost_error = NotLeading
    _what = "leadership"

    async def proclaim(self, value: Text, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Change the value that the others see.

        Raises:
            NotLeading: this candidate does not lead any more.
            OutcomeUnknown, Unavailable: as in `put`; repeating it is harmless.

        Same as etcd's `Proclaim`.
        """
        contender = self._leading()
        put = kv_pb2.PutRequest(key=contender.key, value=to_bytes(value, "value"), lease=contender.lease.id)
        request = kv_pb2.TxnRequest(compare=[contender.guard().compare()], success=[kv_pb2.RequestOp(request_put=put)])
        response = await self._context.call(TXN, request, Purpose.WRITE, timeout)
        if not response.succeeded:
            contender.lose("its key is gone")
            raise NotLeading(f"this candidate does not lead {self._name!r} any more", code="LOCK_LOST")

    async def resign(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Give leadership up; no error if it was lost before. Same as etcd's `Resign`."""
        contender = self._contender
        if contender is None:
            return
        if contender.state is LockState.LOST:
            contender.abandon()
            self._told = True
            return
        self._contender = None
        await contender.leave(timeout)

    def _leading(self) -> Contender:
        if not self.held or self._contender is None:
            raise NotLeading(f"this candidate does not lead {self._name!r}", code="LOCK_LOST")
        return self._contender
