"""Keeps all leases of one client alive, over one stream.

Each is renewed every third of its time. Who does not confirm within a sixth of it is left for another node; a new
stream begins with renewing everything, so that no late answer of an old stream can be taken for one of the new.

Invariant: at most one renewal of a lease is under way on a stream, so an answer belongs to the last one sent.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from raftkv._pb import lease_pb2
from raftkv.client import clock
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import Connection
from raftkv.client.errors import RaftkvError
from raftkv.client.methods import LEASE_KEEP_ALIVE

if TYPE_CHECKING:
    from raftkv.client.lease import Lease
    from raftkv.client.pool import Pool

RENEW_SHARE: Final = 1 / 3
TRY_SHARE: Final = 1 / 6
LOOK_S: Final = 0.5  # how late at most a loss is noticed after a suspend
PAUSE_S: Final = 0.1

_Stream = grpc.aio.StreamStreamCall[lease_pb2.LeaseKeepAliveRequest, lease_pb2.LeaseKeepAliveResponse]


class _Silent(Exception):
    """A renewal was not confirmed in time."""


@dataclass(slots=True, eq=False)
class _Kept:
    lease: Lease
    due: float  # when to renew it next
    sent: float = 0.0  # when the renewal that is under way was sent; 0: none is
    until: float = 0.0  # so long it is waited for the first renewal of a lease that was granted late

    @property
    def deadline(self) -> float:
        return self.until if self.lease.undecided else self.lease.deadline


class Keeper:
    """Of one client and its clones."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kept: dict[int, _Kept] = {}
        self._watched: dict[int, _Kept] = {}  # that nobody renews
        self._changed = asyncio.Event()
        self._looks_at = math.inf  # when the leases are looked at next if nothing changes; endless where none is kept
        self._running = False

    def add(self, lease: Lease) -> None:
        """Keep `lease` alive from now on."""
        due = lease.confirmed + lease.ttl_s * RENEW_SHARE
        self._kept[lease.id] = _Kept(lease, due, until=clock.now() + lease.ttl_s)
        if due < self._looks_at:
            self._changed.set()
        self._run()

    def watch(self, lease: Lease) -> None:
        """Tell when `lease` runs out, without keeping it alive."""
        self._watched[lease.id] = _Kept(lease, math.inf)
        self._run()

    def _run(self) -> None:
        if not self._running:
            self._running = True
            self._pool.spawn(self._keep(), "leases")
            self._pool.spawn(self._watch_deadlines(), "lease deadlines")

    def remove(self, lease: Lease) -> None:
        """Let go of `lease`."""
        self._kept.pop(lease.id, None)
        self._watched.pop(lease.id, None)

    async def _watch_deadlines(self) -> None:
        """Tell the holders of what ran out, whether or not anybody can be reached."""
        try:
            while True:
                moment = clock.now()
                for kept in self._all():
                    if moment >= kept.deadline:
                        self.remove(kept.lease)
                        kept.lease.end(f"no renewal was confirmed within {kept.lease.ttl_s:g} s")
                next_s = min((kept.deadline for kept in self._all()), default=moment + LOOK_S) - moment
                await asyncio.sleep(min(max(next_s, 0.0), LOOK_S))
        finally:
            for kept in self._all():
                kept.lease.end("the client was closed")
            self._kept.clear()
            self._watched.clear()

    def _all(self) -> list[_Kept]:
        return [*self._kept.values(), *self._watched.values()]

    async def _keep(self) -> None:
        while True:
            while not self._kept:
                self._looks_at = math.inf
                self._changed.clear()
                await self._changed.wait()
            try:
                connection = await self._pool.pick_for_stream()
            except RaftkvError:
                await asyncio.sleep(PAUSE_S)
                continue
            await self._keep_at(connection)
            await asyncio.sleep(PAUSE_S)

    async def _keep_at(self, connection: Connection) -> None:
        """Renew over a stream to this node until it fails or nothing is left to be kept."""
        epoch = connection.breaker.epoch
        call: _Stream = connection.open_stream(LEASE_KEEP_ALIVE, (("hasleader", "true"),))
        for kept in self._kept.values():
            kept.sent = 0.0
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(connection, call, epoch))
                await self._write(call)
                reader.cancel()
        except* _Silent:
            self._pool.unanswered(connection, epoch, silent=True)
        except* grpc.aio.AioRpcError as errors:
            code = next((e.code() for e in errors.exceptions if isinstance(e, grpc.aio.AioRpcError)), None)
            self._pool.unanswered(connection, epoch, silent=code is not grpc.StatusCode.UNAVAILABLE)
        except* (EOFError, asyncio.InvalidStateError):
            pass  # ended by the node, or abandoned by us, while the other half was at work
        finally:
            connection.close_stream(call)
            connection.breaker.released(epoch)
        if being_cancelled():
            raise asyncio.CancelledError  # which the group above may have kept to itself

    async def _write(self, call: _Stream) -> None:
        while self._kept:
            moment = clock.now()
            next_at = moment + LOOK_S
            for kept in list(self._kept.values()):
                ttl_s = kept.lease.ttl_s
                if kept.sent:
                    if moment >= kept.sent + ttl_s * TRY_SHARE:
                        raise _Silent
                    next_at = min(next_at, kept.sent + ttl_s * TRY_SHARE)
                elif moment >= kept.due:
                    kept.sent = moment
                    await _renew(call, kept.lease.id, ttl_s * TRY_SHARE)
                else:
                    next_at = min(next_at, kept.due)
            self._changed.clear()
            self._looks_at = next_at
            try:
                async with asyncio.timeout(max(0.0, next_at - clock.now())):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _read(self, connection: Connection, call: _Stream, epoch: int) -> None:
        while True:
            try:
                response = await call.read()
            except asyncio.CancelledError:
                if being_cancelled():
                    raise
                raise EOFError from None  # abandoned: the node fell silent or stops serving
            if not isinstance(response, lease_pb2.LeaseKeepAliveResponse):
                raise EOFError
            connection.answered(epoch)
            self._pool.observe(connection, response.header)
            kept = self._kept.get(response.ID)
            if kept is None or not kept.sent:
                continue
            sent, kept.sent = kept.sent, 0.0
            if response.TTL <= 0 and response.ttl_ms <= 0:
                self.remove(kept.lease)
                kept.lease.end("the cluster says that it is gone")
                continue
            kept.lease.renewed(sent, response.ttl_ms / 1000 if response.ttl_ms else float(response.TTL))
            kept.due = sent + kept.lease.ttl_s * RENEW_SHARE


async def _renew(call: _Stream, lease: int, timeout_s: float) -> None:
    """Send one keepalive. In grpc.aio a write waits for ever when its call ends before the call's metadata was sent.

    Raises:
        _Silent: it did not leave in time.
        EOFError: the call was abandoned.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await call.write(lease_pb2.LeaseKeepAliveRequest(ID=lease))
    except TimeoutError:
        raise _Silent from None
    except asyncio.CancelledError:
        if being_cancelled():
            raise
        raise EOFError from None
