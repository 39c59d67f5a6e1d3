"""Election: one of many clients leads, on a name, for as long as its lease lives.

Same as etcd v3 Election, except that a campaign that waited looks at its own key again before it answers, as a lock
does: in etcd a campaign can win with a lease that has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from raftkv._pb.common_pb2 import Event, KeyValue
from raftkv._pb.election_pb2 import (
    CampaignRequest,
    CampaignResponse,
    LeaderRequest,
    LeaderResponse,
    ProclaimRequest,
    ProclaimResponse,
    ResignRequest,
    ResignResponse,
)
from raftkv.server.errors import LeaderNotGiven, NobodyElected, NotElected
from raftkv.server.limits import Inflight
from raftkv.server.services.candidates import Candidates, Gone
from raftkv.server.services.contract import Node, fill_header
from raftkv.server.services.registry import Context, Method, Service, deadline_of
from raftkv.server.watch_matching import prefix_end
from raftkv.server.watch_stream import HistoryGone

OBSERVERS_MAX = 10_000
OBSERVER_BYTES_MAX = 16 * 1024 * 1024
"""Streams of `Observe`, and the bytes of their requests, on a node: they last, so they do not count as in flight."""


class Election:
    """The methods of raftkv.v1.Election, which are those of v3electionpb.Election."""

    def __init__(self, node: Node, candidates: Candidates) -> None:
        self._node = node
        self._candidates = candidates
        self.observers = Inflight(OBSERVERS_MAX, OBSERVER_BYTES_MAX, "election_observers")

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(
            ("raftkv.v1.Election", "v3electionpb.Election"),
            (
                Method("Campaign", self.campaign, mutates=True, counted=False),
                Method("Proclaim", self.proclaim, mutates=True),
                Method("Leader", self.leader),
                Method("Observe", stream=self.observe, lasting=True, counted=False),
                Method("Resign", self.resign, mutates=True),
            ),
        )

    async def campaign(self, raw: bytes, context: Context) -> bytes:
        """Answer when elected."""
        request = CampaignRequest.FromString(raw)
        try:
            with self._candidates.waiters.during(len(raw)):
                held = await self._candidates.hold(request.name, request.lease, request.value, deadline_of(context))
        except Gone:
            raise NotElected from None
        response = CampaignResponse()
        leader = response.leader
        leader.name, leader.key, leader.rev, leader.lease = request.name, held.key, held.create_revision, held.lease
        response.header.revision = held.revision
        fill_header(self._node, response.header)
        return response.SerializeToString()

    async def proclaim(self, raw: bytes, context: Context) -> bytes:
        """Change the value that the leader has published."""
        request = ProclaimRequest.FromString(raw)
        if not request.HasField("leader"):
            raise LeaderNotGiven
        leader = request.leader
        response = ProclaimResponse()
        try:
            response.header.revision = await self._candidates.proclaim(
                leader.key, leader.rev or -1, leader.lease, request.value, deadline_of(context)
            )
        except Gone:
            raise NotElected from None
        fill_header(self._node, response.header)
        return response.SerializeToString()

    async def leader(self, raw: bytes, context: Context) -> bytes:
        """Who leads now."""
        request = LeaderRequest.FromString(raw)
        kv, revision = await self._candidates.first(request.name, deadline_of(context), patient=False)
        if kv is None:
            raise NobodyElected
        return self._told(kv, revision)

    async def observe(self, raw: bytes, context: Context) -> AsyncGenerator[bytes, None]:
        """Who leads now, what he proclaims, and everyone who leads after him."""
        request = LeaderRequest.FromString(raw)
        with self.observers.during(len(raw)):
            async with contextlib.aclosing(self._observe(request.name, deadline_of(context))) as leaders:
                async for told in leaders:
                    yield told

    async def _observe(self, name: bytes, deadline: float | None) -> AsyncGenerator[bytes, None]:
        prefix = name + b"/"
        while True:
            kv, revision = await self._candidates.first(name, deadline, patient=True)
            with self._candidates.listen() as listener:
                try:
                    if kv is None:
                        listener.add(prefix, prefix_end(prefix), revision + 1)
                        while (await listener.next()).event.type == Event.DELETE:
                            pass
                        continue
                    yield self._told(kv, revision)
                    listener.add(kv.key, kv.key + b"\0", revision + 1)
                    while (change := await listener.next()).event.type == Event.PUT:
                        yield self._told(change.event.kv, change.revision)
                except HistoryGone:
                    continue

    async def resign(self, raw: bytes, context: Context) -> bytes:
        """Leave; of no effect for one who does not lead (any more)."""
        request = ResignRequest.FromString(raw)
        if not request.HasField("leader"):
            raise LeaderNotGiven
        leader = request.leader
        response = ResignResponse()
        _, response.header.revision = await self._candidates.release(leader.key, leader.rev or -1, deadline_of(context))
        fill_header(self._node, response.header)
        return response.SerializeToString()

    def _told(self, kv: KeyValue, revision: int) -> bytes:
        response = LeaderResponse(kv=kv)
        response.header.revision = revision
        fill_header(self._node, response.header)
        return response.SerializeToString()
