"""The cluster as such: its members, what each node says of itself, who leads."""

from __future__ import annotations

import asyncio

import grpc.aio

from raftkv._pb import cluster_pb2, maintenance_pb2
from raftkv.client.connection import Connection
from raftkv.client.errors import InvalidRequest, RaftkvError
from raftkv.client.faults import FaultKind, error_of, understand
from raftkv.client.kv import Context
from raftkv.client.methods import MEMBER_LIST, MOVE_LEADER, STATUS, Method, RequestT, ResponseT
from raftkv.client.options import DEFAULT, TimeoutArg, timeout_from
from raftkv.client.results import EndpointStatus, Member, Status
from raftkv.client.routing import Purpose


class Cluster:
    """`client.cluster`."""

    __slots__ = ("_context",)

    def __init__(self, context: Context) -> None:
        self._context = context

    async def members(self, *, linearizable: bool = True, timeout: TimeoutArg = DEFAULT) -> tuple[Member, ...]:
        """The members of the cluster.

        Args:
            linearizable: False takes any node's own view, even without a quorum.
            timeout: as in every call.
        Raises:
            Unavailable: nothing was read in time.

        Same as etcd v3 `MemberList`.
        """
        response = await self._context.call(
            MEMBER_LIST,
            cluster_pb2.MemberListRequest(linearizable=linearizable),
            Purpose.READ if linearizable else Purpose.STALE_READ,
            timeout,
        )
        return tuple(
            Member(member.ID, member.name, tuple(member.peerURLs), tuple(member.clientURLs), member.isLearner)
            for member in response.members
        )

    async def status(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[EndpointStatus, ...]:
        """What the node behind each endpoint says of itself, in the order of the endpoints; served without quorum.

        An endpoint that does not answer in time has `.status` None and the reason in `.error`; this never raises for
        one that is down.

        Same as etcd v3 `Status`, asked of every endpoint.
        """
        pool = self._context.pool
        pool.enter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._status_of(c, timeout)) for c in pool.connections]
        return tuple(task.result() for task in tasks)

    async def _status_of(self, connection: Connection, timeout: TimeoutArg) -> EndpointStatus:
        try:
            response = await direct(self._context, connection, STATUS, maintenance_pb2.StatusRequest(), timeout)
        except RaftkvError as error:
            return EndpointStatus(connection.endpoint, None, error.message)
        header = response.header
        status = Status(
            member_id=header.member_id,
            cluster_id=header.cluster_id,
            version=response.version,
            leader=response.leader,
            raft_term=response.raftTerm,
            raft_index=response.raftIndex,
            raft_applied_index=response.raftAppliedIndex,
            revision=header.revision,
            db_size=response.dbSize,
            db_size_in_use=response.dbSizeInUse,
            is_learner=response.isLearner,
            errors=tuple(response.errors),
        )
        return EndpointStatus(connection.endpoint, status)

    async def move_leader(self, target: int | str, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Hand leadership to another member.

        Args:
            target: the member's id or name.
            timeout: as in every call.
        Raises:
            InvalidRequest: there is no such member, or it cannot lead.
            LeaderChanged: the leader is not among the endpoints, or it changed just now.
            OutcomeUnknown: sent, and no answer arrived.
            Unavailable: it was not done.

        Same as etcd v3 `MoveLeader`; the SDK finds the leader by itself.
        """
        target_id = await self._member_id(target, timeout) if isinstance(target, str) else target
        try:
            request = maintenance_pb2.MoveLeaderRequest(targetID=target_id)
        except ValueError as error:
            raise InvalidRequest(f"target: {error}", code="INVALID_ARGUMENT") from None
        await self._context.call(MOVE_LEADER, request, Purpose.LEADER, timeout)
        self._context.pool.leader_wanted()

    async def _member_id(self, name: str, timeout: TimeoutArg) -> int:
        members = await self.members(timeout=timeout)
        for member in members:
            if member.name == name:
                return member.id
        known = ", ".join(sorted(member.name for member in members))
        raise InvalidRequest(f"there is no member named {name!r} (there are: {known})", code="MEMBER_NOT_FOUND")


async def direct(
    context: Context,
    connection: Connection,
    method: Method[RequestT, ResponseT],
    request: RequestT,
    timeout: TimeoutArg,
) -> ResponseT:
    """Ask one endpoint and no other, once; waits for its connection as long as the time allows."""
    total_s = timeout_from(timeout, context.timeout).total
    epoch = connection.breaker.epoch
    try:
        # A refused connection is an answer here ("it is down"), so no wait_for_ready.
        response = await connection.unary(method)(request, timeout=total_s)
    except grpc.aio.AioRpcError as error:
        fault = understand(error.code(), error.details() or "", error.trailing_metadata())
        if fault.kind.blames_endpoint:
            context.pool.unanswered(connection, epoch, silent=fault.kind is FaultKind.SILENT)
        raise error_of(fault, endpoint=connection.endpoint, attempts=1) from error
    context.pool.observe(connection, response.header)
    return response
