"""grpc.health.v1, truthful for each service.

    ""                                             SERVING while the process serves at all: its liveness
    KV, Lease, Watch and most others               SERVING when the node has no reason not to
    Maintenance (under either name)                SERVING until the node stops: it answers without a quorum too

The reasons are the node's; "stopping" is the one that ends everything. Then each watcher is told, and its stream ended
with a status, so that stopping a server does not wait for them.

The library's own aio servicer is not used: when one watcher leaves, it forgets the others of that service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from raftkv.rpc.methods import Context, MethodServer

STOPPING = "stopping"
LIVENESS = ""
NEEDS_A_HEALTHY_NODE = (
    *("raftkv.v1.KV", "etcdserverpb.KV"),
    *("raftkv.v1.Lease", "etcdserverpb.Lease"),
    *("raftkv.v1.Cluster", "etcdserverpb.Cluster"),
    *("raftkv.v1.Watch", "etcdserverpb.Watch"),
    *("raftkv.v1.Lock", "v3lockpb.Lock"),
    *("raftkv.v1.Election", "v3electionpb.Election"),
    "raftkv.v1.Session",
)
NEEDS_A_PROCESS = ("raftkv.v1.Maintenance", "etcdserverpb.Maintenance")
WATCHERS_MAX = 10_000


class Health(health_pb2_grpc.HealthServicer):
    """The health of one node; `update` and the RPCs belong to one event loop."""

    def __init__(self) -> None:
        self._reasons: frozenset[str] = frozenset(("starting",))
        self._changed = asyncio.Event()  # replaced at each change, so that every watcher sees each
        self._watchers = 0

    @property
    def reasons(self) -> frozenset[str]:
        """Why this node does not serve; empty while it does."""
        return self._reasons

    def register(self, server: MethodServer) -> None:
        """Serve it on `server`, which must not have started yet."""
        health_pb2_grpc.add_HealthServicer_to_server(self, cast("grpc.aio.Server", server))

    def update(self, reasons: frozenset[str]) -> None:
        """The node has other reasons not to serve."""
        if reasons == self._reasons or STOPPING in self._reasons:
            return
        self._reasons = reasons
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def status(self, service: str) -> int | None:
        """The status of a service; None for one that is not known."""
        if service in NEEDS_A_HEALTHY_NODE:
            serves = not self._reasons
        elif service in NEEDS_A_PROCESS or service == LIVENESS:
            serves = STOPPING not in self._reasons
        else:
            return None
        return HealthCheckResponse.SERVING if serves else HealthCheckResponse.NOT_SERVING

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """One look."""
        status = self.status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"raftkv: no service {request.service!r}")
        return HealthCheckResponse(status=status)

    async def Watch(self, request: HealthCheckRequest, context: Context) -> AsyncGenerator[HealthCheckResponse, None]:
        """The status now and each time it changes, until the node stops."""
        if self._watchers >= WATCHERS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"raftkv: {WATCHERS_MAX} watchers of health are the most"
            )
        self._watchers += 1
        try:
            told: int | None = None
            while True:
                changed = self._changed  # before the look, so that no change falls in between
                status = self.status(request.service)
                if status is None:
                    status = HealthCheckResponse.SERVICE_UNKNOWN
                if status != told:
                    told = status
                    yield HealthCheckResponse(status=status)
                if STOPPING in self._reasons:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: server stopped")
                await changed.wait()
        finally:
            self._watchers -= 1
