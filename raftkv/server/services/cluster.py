"""Cluster: who belongs to it.

Members are listed from what this node has applied; changing them over the wire comes later. Same as etcd v3 Cluster.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from raftkv._pb.cluster_pb2 import Member, MemberListRequest, MemberListResponse
from raftkv.server.errors import NotSupported
from raftkv.server.services.contract import Node, fill_header
from raftkv.server.services.registry import Context, Method, Service, deadline_of


class Cluster:
    """The methods of raftkv.v1.Cluster, which are those of etcdserverpb.Cluster."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(
            ("raftkv.v1.Cluster", "etcdserverpb.Cluster"),
            (
                Method("MemberList", self.member_list, counted=False),
                *(
                    Method(name, _not_yet(name), counted=False)
                    for name in ("MemberAdd", "MemberRemove", "MemberUpdate", "MemberPromote")
                ),
            ),
        )

    async def member_list(self, raw: bytes, context: Context) -> bytes:
        """List the members; `linearizable` makes sure that no later change is missed."""
        request = MemberListRequest.FromString(raw)
        if request.linearizable:
            await self._node.read_barrier(deadline_of(context))
        response = MemberListResponse(
            members=[
                Member(
                    ID=member.member_id,
                    name=member.name,
                    peerURLs=member.peer_urls,
                    clientURLs=member.client_urls,
                    isLearner=member.is_learner,
                )
                for member in self._node.members()
            ]
        )
        fill_header(self._node, response.header)  # without a revision, as etcd
        return response.SerializeToString()


def _not_yet(name: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def refuse(raw: bytes, context: Context) -> bytes:
        raise NotSupported(f"{name}: members cannot be changed over the wire yet; they are those of --initial-cluster")

    return refuse
