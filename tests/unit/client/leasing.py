"""A node with leases, watches and conditions on create revisions: what locks and elections need. As etcd, in memory.

Nothing runs out by itself: `LeasingNode.expire` ends a lease as the cluster does, `Clock` lets its holder's time pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from raftkv._pb import common_pb2, kv_pb2, lease_pb2, lock_pb2, watch_pb2
from raftkv.client import AsyncClient
from tests.unit.client.conftest import FakeCluster, FakeNode, Refused

MakeClient = Callable[..., AsyncClient]
NO_LEASE = Refused(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")


class Clock:
    """The clock by which leases are held, standing still until it is told otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moment = 1000.0
        monkeypatch.setattr("raftkv.client.clock.now", lambda: self.moment)

    def advance(self, seconds: float) -> None:
        self.moment += seconds


class LeasingCluster(FakeCluster):
    """A store that knows leases, create revisions and what was deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.leases: dict[int, int] = {}  # their times, in milliseconds
        self.granted: dict[int, int] = {}  # the same, of all that ever were
        self.deleted: list[common_pb2.Event] = []
        self.compacted = 0
        self.changed = asyncio.Event()

    def tell(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def put(self, request: kv_pb2.PutRequest) -> kv_pb2.PutResponse:
        if request.lease and request.lease not in self.leases:
            raise NO_LEASE
        response = super().put(request)
        self.data[request.key].lease = request.lease
        return response

    def range(self, request: kv_pb2.RangeRequest) -> kv_pb2.RangeResponse:
        found = [self.data[key] for key in self._keys(request)]
        if request.max_create_revision:
            found = [kv for kv in found if kv.create_revision <= request.max_create_revision]
        if request.sort_target == kv_pb2.RangeRequest.CREATE:
            descending = request.sort_order == kv_pb2.RangeRequest.DESCEND
            found.sort(key=lambda kv: kv.create_revision, reverse=descending)
        limit = request.limit or len(found)
        return kv_pb2.RangeResponse(kvs=found[:limit], more=len(found) > limit, count=len(found))

    def delete(self, request: kv_pb2.DeleteRangeRequest) -> kv_pb2.DeleteRangeResponse:
        keys = self._keys(request)
        response = super().delete(request)
        for key in keys:
            kv = common_pb2.KeyValue(key=key, mod_revision=self.revision)
            self.deleted.append(common_pb2.Event(type=common_pb2.Event.DELETE, kv=kv))
        self.tell()
        return response

    def txn(self, request: kv_pb2.TxnRequest) -> kv_pb2.TxnResponse:
        """Compares create revisions for equality: what locks need."""
        holds = True
        for compare in request.compare:
            found = [self.data[key] for key in self._keys(compare)] or [kv_pb2.KeyValue()]
            holds = holds and all(kv.create_revision == compare.create_revision for kv in found)
        plain = kv_pb2.TxnRequest(success=request.success if holds else request.failure)
        response = super().txn(plain)
        response.succeeded = holds
        response.header.revision = self.revision
        return response

    def grant(self, request: lease_pb2.LeaseGrantRequest) -> lease_pb2.LeaseGrantResponse:
        self.leases[request.ID] = self.granted[request.ID] = request.ttl_ms
        return lease_pb2.LeaseGrantResponse(ID=request.ID, TTL=request.TTL, ttl_ms=request.ttl_ms)

    def revoke(self, request: lease_pb2.LeaseRevokeRequest) -> lease_pb2.LeaseRevokeResponse:
        if request.ID not in self.leases:
            raise NO_LEASE
        self.expire(request.ID)
        return lease_pb2.LeaseRevokeResponse()

    def expire(self, lease: int) -> None:
        del self.leases[lease]
        for key in [key for key, kv in self.data.items() if kv.lease == lease]:
            self.delete(kv_pb2.DeleteRangeRequest(key=key))

    def keys(self, prefix: bytes) -> list[bytes]:
        return sorted(key for key in self.data if key.startswith(prefix))


class LeasingNode(FakeNode):
    """A node of a `LeasingCluster`."""

    def __init__(self, cluster: LeasingCluster, member_id: int = 1) -> None:
        super().__init__(cluster, member_id)
        self.cluster: LeasingCluster = cluster
        self.renewing = asyncio.Event()  # whether renewals are answered
        self.renewing.set()
        self.watches = 0  # streams that are open
        self.serves_locks = True  # as raftkv's nodes do, and etcd's not in our way

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        keep_alive = grpc.stream_stream_rpc_method_handler(
            self._keep_alive,
            request_deserializer=lease_pb2.LeaseKeepAliveRequest.FromString,
            response_serializer=lease_pb2.LeaseKeepAliveResponse.SerializeToString,
        )
        watch = grpc.stream_stream_rpc_method_handler(
            self._watch,
            request_deserializer=watch_pb2.WatchRequest.FromString,
            response_serializer=watch_pb2.WatchResponse.SerializeToString,
        )
        lock = grpc.unary_unary_rpc_method_handler(
            self._lock,
            request_deserializer=lock_pb2.LockRequest.FromString,
            response_serializer=lock_pb2.LockResponse.SerializeToString,
        )
        lease = {
            "LeaseGrant": self._unary("LeaseGrant", lease_pb2.LeaseGrantRequest, self.cluster.grant),
            "LeaseRevoke": self._unary("LeaseRevoke", lease_pb2.LeaseRevokeRequest, self.cluster.revoke),
            "LeaseKeepAlive": keep_alive,
        }
        return [
            *super()._handlers(),
            grpc.method_handlers_generic_handler("etcdserverpb.Lease", lease),
            grpc.method_handlers_generic_handler("etcdserverpb.Watch", {"Watch": watch}),
            grpc.method_handlers_generic_handler("raftkv.v1.Lock", {"Lock": lock}),
        ]

    async def _lock(self, request: lock_pb2.LockRequest, context: Any) -> lock_pb2.LockResponse:
        self.calls.append("Lock")
        if not self.serves_locks:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown service")
        prefix = request.name + b"/"
        while True:
            changed = self.cluster.changed
            first = min(self.cluster.keys(prefix), key=lambda key: self.cluster.data[key].create_revision)
            if first == prefix + b"%x" % request.lease:
                response = lock_pb2.LockResponse(key=first)
                self.fill(response.header)
                return response
            await changed.wait()

    async def _keep_alive(
        self, requests: AsyncIterator[lease_pb2.LeaseKeepAliveRequest], context: Any
    ) -> AsyncIterator[lease_pb2.LeaseKeepAliveResponse]:
        async for request in requests:
            self.calls.append("KeepAlive")
            await self.renewing.wait()
            ttl_ms = self.cluster.leases.get(request.ID, 0)
            response = lease_pb2.LeaseKeepAliveResponse(ID=request.ID, TTL=ttl_ms // 1000, ttl_ms=ttl_ms)
            self.fill(response.header)
            yield response

    async def _watch(
        self, requests: AsyncIterator[watch_pb2.WatchRequest], context: Any
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        wanted = (await anext(requests)).create_request
        first = wanted.start_revision or self.cluster.revision + 1
        self.calls.append("Watch")
        self.watches += 1
        try:
            yield self._response(created=True)
            if first < self.cluster.compacted:
                yield self._response(canceled=True, compact_revision=self.cluster.compacted)
                return
            while True:
                changed = self.cluster.changed
                for event in [each for each in self.cluster.deleted if each.kv.mod_revision >= first]:
                    first = event.kv.mod_revision + 1
                    if event.kv.key == wanted.key:
                        yield self._response(events=[event])
                await changed.wait()
        finally:
            self.watches -= 1

    def _response(self, **fields: Any) -> watch_pb2.WatchResponse:
        response = watch_pb2.WatchResponse(watch_id=1, **fields)
        self.fill(response.header)
        return response


async def started() -> LeasingNode:
    """A cluster of one."""
    node = LeasingNode(LeasingCluster())
    node.cluster.nodes = [node]
    await node.start()
    return node
