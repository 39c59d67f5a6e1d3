"""Lease: keys that vanish together when their client does.

    Grant, Revoke                through the log
    KeepAlive, TimeToLive        from the leader's memory, on any node: see `raftkv.server.leasing`
    Leases                       from what this node has applied

Same as etcd v3 Lease.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque

from raftkv._pb.lease_pb2 import (
    LeaseGrantRequest,
    LeaseGrantResponse,
    LeaseKeepAliveRequest,
    LeaseKeepAliveResponse,
    LeaseLeasesRequest,
    LeaseLeasesResponse,
    LeaseRevokeRequest,
    LeaseRevokeResponse,
    LeaseStatus,
    LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse,
)
from raftkv.server.lessor import LeaseLeft
from raftkv.server.limits import request_limits
from raftkv.server.services.contract import Node, fill_header
from raftkv.server.services.quota import Quota
from raftkv.server.services.reads import Reads
from raftkv.server.services.registry import Context, Method, Service, Stream, deadline_of
from raftkv.state.commands import CommandKind
from raftkv.state.leases import TTL_MS_MIN, granted_ttl_ms, keys_of
from raftkv.state.mvcc import Reader
from raftkv.state.results import Refusal, RefusalCode, Refused, Result
from raftkv.state.validate import check_lease_grant, check_size

ELECTIONS_MIN = 3
"""A lease outlives so many election timeouts at least, so that a failover alone never costs one."""
KEEP_ALIVES_MAX = 4_096
"""Of one stream, under way; then it is not read until some are answered."""


class Lease:
    """The methods of raftkv.v1.Lease, which are those of etcdserverpb.Lease."""

    def __init__(self, node: Node, quota: Quota, reads: Reads) -> None:
        self._node = node
        self._quota = quota
        self._reads = reads
        self._limits = request_limits(node.config)
        self._ttl_ms_min = max(TTL_MS_MIN, ELECTIONS_MIN * node.config.election_ms)

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(
            ("raftkv.v1.Lease", "etcdserverpb.Lease"),
            (
                Method("LeaseGrant", self.grant, mutates=True),
                Method("LeaseRevoke", self.revoke, mutates=True),
                Method("LeaseKeepAlive", bidi=self.keep_alive),
                Method("LeaseTimeToLive", self.time_to_live),
                Method("LeaseLeases", self.leases),
            ),
        )

    async def grant(self, raw: bytes, context: Context) -> bytes:
        """Begin a lease."""
        deadline = deadline_of(context)
        payload = self.admit_grant(raw)
        await self._quota.check_space()
        while True:
            result = await self._node.propose(CommandKind.LEASE_GRANT, payload, deadline)
            taken = isinstance(result, Refusal) and result.code is RefusalCode.LEASE_EXISTS
            if not taken or LeaseGrantRequest.FromString(raw).ID:
                return self.reply(result)
            payload = self.admit_grant(raw)  # somebody has the id we chose

    async def revoke(self, raw: bytes, context: Context) -> bytes:
        """End a lease and delete its keys."""
        payload = self.admit_revoke(raw)
        return self.reply(await self._node.propose(CommandKind.LEASE_REVOKE, payload, deadline_of(context)))

    async def keep_alive(self, stream: Stream) -> None:
        """Renew leases, one a request; answers come in the order of the requests."""
        node = self._node
        asked: deque[asyncio.Future[LeaseLeft]] = deque()
        changed = asyncio.Event()
        ended = False

        async def answer() -> None:
            while True:
                while asked:
                    left = await asked[0]
                    asked.popleft()
                    await stream.write(self.renewed(left))
                    changed.set()
                if ended:
                    return
                changed.clear()
                await changed.wait()

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(answer())
                while (raw := await stream.read()) is not None:
                    self._quota.check_intact()
                    request = LeaseKeepAliveRequest.FromString(raw)
                    asked.append(node.ask_lease(request.ID, renew=True, deadline=deadline_of(stream.context)))
                    changed.set()
                    while len(asked) >= KEEP_ALIVES_MAX:
                        changed.clear()
                        await changed.wait()
                ended = True
                changed.set()
        finally:
            for future in asked:
                node.abandon(future)

    async def time_to_live(self, raw: bytes, context: Context) -> bytes:
        """How long a lease has left, and its keys where they are asked for."""
        return await self.look(raw, deadline_of(context))

    async def look(self, raw: bytes, deadline: float | None) -> bytes:
        """The same for who has no context."""
        request = LeaseTimeToLiveRequest.FromString(raw)
        node = self._node
        future = node.ask_lease(request.ID, renew=False, deadline=deadline)
        try:
            if request.keys:
                await node.read_barrier(deadline)
            left = await future
        finally:
            if not future.done():
                node.abandon(future)
        response = LeaseTimeToLiveResponse(ID=request.ID, TTL=-1)
        if left.granted_ms:
            response.TTL = left.remaining_ms // 1000
            response.ttl_ms = left.remaining_ms
            response.grantedTTL = left.granted_ms // 1000
        response.header.revision = node.machine.revision
        fill_header(node, response.header)
        if left.granted_ms and request.keys:
            return response.SerializeToString() + await self._reads.apart(lambda reader: _keys(reader, request.ID))
        return response.SerializeToString()

    async def leases(self, raw: bytes, context: Context) -> bytes:
        """All leases, in the order of their ids."""
        LeaseLeasesRequest.FromString(raw)
        node = self._node
        await node.read_barrier(deadline_of(context))
        header = LeaseLeasesResponse()
        header.header.revision = node.machine.revision
        fill_header(node, header.header)
        leases = list(node.machine.leases)  # the one thing to be done here: 2 ms for 100,000 of them
        return header.SerializeToString() + await self._reads.apart(lambda reader: _statuses(leases))

    # For whoever has a request of one of these methods, however it came.

    def admit_grant(self, raw: bytes) -> bytes:
        """Check a grant; the command to be proposed, with an id and the time to live that this node gives.

        Raises:
            InvalidRequest: too large as a whole; a time to live that is too large, a negative id.
        """
        check_size(len(raw), self._limits)
        request = LeaseGrantRequest.FromString(raw)
        check_lease_grant(request)
        # Made anew, so that nothing gets into the log that we do not know.
        return LeaseGrantRequest(
            ID=request.ID or secrets.randbelow((1 << 63) - 1) + 1,
            TTL=request.TTL,
            ttl_ms=granted_ttl_ms(request, self._ttl_ms_min),
        ).SerializeToString(deterministic=True)

    def admit_revoke(self, raw: bytes) -> bytes:
        """Check a revocation; the command to be proposed.

        Raises:
            InvalidRequest, Corrupt
        """
        check_size(len(raw), self._limits)
        request = LeaseRevokeRequest.FromString(raw)
        self._quota.check_intact()
        return LeaseRevokeRequest(ID=request.ID).SerializeToString()

    def renewed(self, left: LeaseLeft) -> bytes:
        """The answer to a keepalive; a time to live of 0 says that there is no such lease (any more)."""
        node = self._node
        response = LeaseKeepAliveResponse(ID=left.lease, TTL=left.granted_ms // 1000, ttl_ms=left.granted_ms)
        response.header.revision = node.machine.revision
        fill_header(node, response.header)
        return response.SerializeToString()

    def reply(self, result: Result) -> bytes:
        """The answer to a grant or a revocation.

        Raises:
            Refused: by the data.
        """
        if isinstance(result, Refusal):
            raise Refused(result)
        assert isinstance(result, LeaseGrantResponse | LeaseRevokeResponse), "a result of no command of Lease"
        fill_header(self._node, result.header)
        return result.SerializeToString()


# Of any length, so made in a thread; the fields of a message may be joined behind its others.


def _keys(reader: Reader, lease: int) -> bytes:
    return LeaseTimeToLiveResponse(keys=keys_of(reader, lease)).SerializeToString()


def _statuses(leases: list[int]) -> bytes:
    return LeaseLeasesResponse(leases=[LeaseStatus(ID=lease) for lease in sorted(leases)]).SerializeToString()
