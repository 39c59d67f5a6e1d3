"""What clients call: each service once, under our name and under etcd's."""

from __future__ import annotations

import asyncio
from typing import cast

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from raftkv.rpc.methods import MethodServer
from raftkv.server.limits import Inflight
from raftkv.server.services.candidates import Candidates
from raftkv.server.services.cluster import Cluster
from raftkv.server.services.contract import Node
from raftkv.server.services.election import Election
from raftkv.server.services.kv import KV
from raftkv.server.services.lease import Lease
from raftkv.server.services.lock import Lock
from raftkv.server.services.maintenance import Maintenance
from raftkv.server.services.quota import Quota
from raftkv.server.services.reads import Reads
from raftkv.server.services.registry import MethodCounts, Registry, Service
from raftkv.server.services.session import Session
from raftkv.server.services.watch import Watch
from raftkv.server.watch import WatchHub

HEALTH_NAME = "grpc.health.v1.Health"


class Services:
    """The services of one node, at work."""

    def __init__(self, server: MethodServer, node: Node) -> None:
        self.inflight = Inflight(node.config.inflight_requests_max, node.config.inflight_bytes_max)
        self._reads = Reads(node)
        self.watches = WatchHub(
            lambda: node.machine,
            asyncio.get_running_loop(),
            self._reads.begin,
            node.fatal,
            on_watched=node.expect_news,
        )
        node.on_applied = self.watches.advance
        registry = Registry(node, self.inflight)
        self._streams = registry.streams
        self.counts: dict[str, MethodCounts] = registry.counts
        """By "raftkv.v1.Service/Method": what became of the calls."""
        quota = Quota(node)
        kv = KV(node, self._reads, quota)
        lease = Lease(node, quota, self._reads)
        self._candidates = Candidates(node, self._reads, quota, self.watches)
        self.waiters = self._candidates.waiters
        election = Election(node, self._candidates)
        self.observers = election.observers
        every: tuple[Service, ...] = (
            kv.service(),
            lease.service(),
            Session(node, kv, lease, self._reads, quota, self.inflight).service(),
            Cluster(node).service(),
            Maintenance(node, self._reads).service(),
            Watch(node, self.watches).service(),
            Lock(node, self._candidates).service(),
            election.service(),
        )
        for service in every:
            registry.add(server, service)
        self.names = tuple(name for service in every for name in service.names)
        # Reflection tells of ours only: etcd's messages are in no descriptor pool of this process, on purpose.
        shown = (*(service.names[0] for service in every), HEALTH_NAME, reflection.SERVICE_NAME)
        servicer = reflection.aio.ReflectionServicer(shown)
        add_reflection = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add_reflection(servicer, cast("grpc.aio.Server", server))  # type: ignore[no-untyped-call]  # it is generated

    def end_streams(self) -> None:
        """End the streams under way with a status, and let none begin: they would hold up the stopping server."""
        self._streams.end()
        self._candidates.end()
        self.watches.close()

    def close(self) -> None:
        """Wait for the threads that still read; call it after the server stopped and before the stores are closed."""
        self._candidates.close()
        self._reads.close()


def register(server: MethodServer, node: Node) -> Services:
    """Serve `node` on `server`, which must not have started yet."""
    return Services(server, node)
