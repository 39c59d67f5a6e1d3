"""Nodes to test the SDK against: real grpc.aio servers on real sockets, whose behaviour a test scripts.

`FakeCluster` is a store, a term and a leader; `FakeNode` one server of it. A node's `script` decides before the store
does: it may answer, fail, or wait. `Proxy` stands between a client and a node and can freeze or cut the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from raftkv._pb import cluster_pb2, kv_pb2, maintenance_pb2
from raftkv.client import AsyncClient, Timeout

Script = Callable[[str, Any, Any], Awaitable[Any]]


class Refused(Exception):
    """What a fake answers with an error."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class FakeNode:
    """One server. `calls` lists the RPCs it got, by name; `executed` the writes it carried out."""

    def __init__(self, cluster: FakeCluster, member_id: int) -> None:
        self.cluster = cluster
        self.member_id = member_id
        self.port = 0
        self.calls: list[str] = []
        self.script: Script | None = None
        self.serving = True
        self.health_changed = asyncio.Event()
        self.has_health = True
        self.watching = 0  # health streams that are open
        self.shows_leader = True
        self.options: tuple[tuple[str, int], ...] = ()
        self._server: grpc.aio.Server | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *self.options])
        self._server.add_generic_rpc_handlers(tuple(self._handlers()))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        assert self.port, "the port is taken"
        await self._server.start()

    async def stop(self) -> None:
        """Abruptly: calls in flight break."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        kv = {
            "Range": (kv_pb2.RangeRequest, self.cluster.range),
            "Put": (kv_pb2.PutRequest, self.cluster.put),
            "DeleteRange": (kv_pb2.DeleteRangeRequest, self.cluster.delete),
            "Txn": (kv_pb2.TxnRequest, self.cluster.txn),
        }
        maintenance = {
            "Status": (maintenance_pb2.StatusRequest, self._status),
            "MoveLeader": (maintenance_pb2.MoveLeaderRequest, self.cluster.move_leader),
        }
        members = {"MemberList": (cluster_pb2.MemberListRequest, self.cluster.member_list)}
        services = [
            grpc.method_handlers_generic_handler(
                f"etcdserverpb.{service}", {name: self._unary(name, *what) for name, what in methods.items()}
            )
            for service, methods in (("KV", kv), ("Maintenance", maintenance), ("Cluster", members))
        ]
        streams = {
            "Snapshot": grpc.unary_stream_rpc_method_handler(
                self._snapshot,
                request_deserializer=maintenance_pb2.SnapshotRequest.FromString,
                response_serializer=maintenance_pb2.SnapshotResponse.SerializeToString,
            )
        }
        services.append(grpc.method_handlers_generic_handler("etcdserverpb.Maintenance", streams))
        if self.has_health:
            health = {
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch_health),
                "Check": grpc.unary_unary_rpc_method_handler(self._check_health),
            }
            services.append(grpc.method_handlers_generic_handler("grpc.health.v1.Health", health))
        return services

    def _unary(self, name: str, request_class: Any, answer: Callable[[Any], Any]) -> grpc.RpcMethodHandler:
        async def handle(request: Any, context: Any) -> Any:
            self.calls.append(name)
            if self.script is not None:
                scripted = await self.script(name, request, context)
                if scripted is not None:
                    return scripted
            try:
                response = answer(request)
            except Refused as refusal:
                await context.abort(refusal.code, refusal.text)
            self.fill(response.header)
            return response

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=request_class.FromString, response_serializer=lambda m: m.SerializeToString()
        )

    def fill(self, header: Any) -> None:
        header.cluster_id = self.cluster.cluster_id
        header.member_id = self.member_id
        header.raft_term = self.cluster.term
        header.revision = header.revision or self.cluster.revision
        if self.shows_leader:
            header.leader = self.cluster.leader

    def _status(self, request: Any) -> maintenance_pb2.StatusResponse:
        return maintenance_pb2.StatusResponse(
            version="3.5.0", leader=self.cluster.leader, raftTerm=self.cluster.term, isLearner=False
        )

    async def _snapshot(self, request: Any, context: Any) -> AsyncIterator[maintenance_pb2.SnapshotResponse]:
        self.calls.append("Snapshot")
        for blob in self.cluster.snapshot:
            yield maintenance_pb2.SnapshotResponse(blob=blob)

    async def _watch_health(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.watching += 1
        try:
            while True:
                changed = self.health_changed
                yield b"\x08\x01" if self.serving else b"\x08\x02"
                await changed.wait()
        finally:
            self.watching -= 1

    async def _check_health(self, request: bytes, context: Any) -> bytes:
        self.calls.append("Check")
        return b"\x08\x01"

    def set_serving(self, serving: bool) -> None:
        self.serving = serving
        changed, self.health_changed = self.health_changed, asyncio.Event()
        changed.set()

    def count(self, name: str) -> int:
        return self.calls.count(name)


class FakeCluster:
    """What the nodes share."""

    def __init__(self) -> None:
        self.cluster_id = 7
        self.term = 2
        self.leader = 1
        self.revision = 1
        self.data: dict[bytes, kv_pb2.KeyValue] = {}
        self.snapshot: list[bytes] = []
        self.nodes: list[FakeNode] = []

    def node_of(self, endpoint: str | None) -> FakeNode:
        return next(node for node in self.nodes if node.endpoint == endpoint)

    def elect(self, member_id: int) -> None:
        self.term += 1
        self.leader = member_id

    def put(self, request: kv_pb2.PutRequest) -> kv_pb2.PutResponse:
        self.revision += 1
        old = self.data.get(request.key)
        self.data[request.key] = kv_pb2.KeyValue(
            key=request.key,
            value=request.value,
            create_revision=old.create_revision if old else self.revision,
            mod_revision=self.revision,
            version=old.version + 1 if old else 1,
        )
        response = kv_pb2.PutResponse()
        if request.prev_kv and old:
            response.prev_kv.CopyFrom(old)
        return response

    def range(self, request: kv_pb2.RangeRequest) -> kv_pb2.RangeResponse:
        found = [self.data[key] for key in self._keys(request)]
        limit = request.limit or len(found)
        return kv_pb2.RangeResponse(kvs=found[:limit], more=len(found) > limit, count=len(found))

    def delete(self, request: kv_pb2.DeleteRangeRequest) -> kv_pb2.DeleteRangeResponse:
        keys = self._keys(request)
        if keys:
            self.revision += 1
        return kv_pb2.DeleteRangeResponse(deleted=len([self.data.pop(key) for key in keys]))

    def _keys(self, request: Any) -> list[bytes]:
        end = request.range_end
        if not end:
            return [request.key] if request.key in self.data else []
        return sorted(key for key in self.data if key >= request.key and (end == b"\0" or key < end))

    def txn(self, request: kv_pb2.TxnRequest) -> kv_pb2.TxnResponse:
        """Compares mod_revision and version only: what the SDK's own conditions use."""
        held = True
        for compare in request.compare:
            kv = self.data.get(compare.key)
            field = "mod_revision" if compare.target == kv_pb2.Compare.MOD else "version"
            held = held and (getattr(kv, field) if kv else 0) == getattr(compare, field)
        response = kv_pb2.TxnResponse(succeeded=held)
        for op in request.success if held else request.failure:
            if op.HasField("request_put"):
                response.responses.add(response_put=self.put(op.request_put))
            elif op.HasField("request_range"):
                response.responses.add(response_range=self.range(op.request_range))
            else:
                response.responses.add(response_delete_range=self.delete(op.request_delete_range))
        return response

    def move_leader(self, request: maintenance_pb2.MoveLeaderRequest) -> maintenance_pb2.MoveLeaderResponse:
        self.elect(request.targetID)
        return maintenance_pb2.MoveLeaderResponse()

    def member_list(self, request: cluster_pb2.MemberListRequest) -> cluster_pb2.MemberListResponse:
        return cluster_pb2.MemberListResponse(
            members=[
                cluster_pb2.Member(ID=n.member_id, name=f"n{n.member_id}", clientURLs=[f"http://{n.endpoint}"])
                for n in self.nodes
            ]
        )


class Proxy:
    """Forwards one port to another; `freeze` stops the bytes, `cut` the connections."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._latest = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Known from the first moment: the end may come before the task has begun.
        self._writers.add(writer)
        self._latest = asyncio.Event()
        self._latest.set()
        self._tasks.add(asyncio.create_task(self._forward(reader, writer, self._latest)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target_port)
        self._writers.add(back)
        pumps = [asyncio.create_task(self._pump(*ends, flows)) for ends in ((reader, back), (there, writer))]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, back):
            end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                await flows.wait()
                writer.write(data)
                await writer.drain()

    def freeze(self) -> None:
        self._flowing.clear()

    def freeze_latest(self) -> None:
        """Those of the connection that was made last, for ever."""
        self._latest.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for _ in range(5):  # rounds of the loop, in which what was accepted just before gets here
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        await self._server.wait_closed()


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    """Three nodes; member 1 leads."""
    cluster = FakeCluster()
    cluster.nodes = [FakeNode(cluster, member_id) for member_id in (1, 2, 3)]
    for node in cluster.nodes:
        await node.start()
    yield cluster
    for node in cluster.nodes:
        await node.stop()


@pytest.fixture
async def make_client(cluster: FakeCluster) -> AsyncIterator[Callable[..., AsyncClient]]:
    """Makes clients of the cluster, and closes them."""
    clients: list[AsyncClient] = []

    def make(*nodes: FakeNode | Proxy | str, **settings: Any) -> AsyncClient:
        chosen = [n if isinstance(n, str) else n.endpoint for n in nodes or cluster.nodes]
        settings.setdefault("timeout", Timeout(total=20.0, attempt=1.0))  # more than a busy machine stands still
        client = AsyncClient(chosen, **settings)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
async def make_proxy() -> AsyncIterator[Callable[[FakeNode], Awaitable[Proxy]]]:
    """Makes proxies in front of nodes, and stops them."""
    proxies: list[Proxy] = []

    async def make(node: FakeNode) -> Proxy:
        proxy = Proxy(node.port)
        await proxy.start()
        proxies.append(proxy)
        return proxy

    yield make
    for proxy in proxies:
        await proxy.stop()


class Tools:
    """What tests need besides fixtures."""

    @staticmethod
    def failing(
        code: grpc.StatusCode, text: str, *trailers: tuple[str, str], times: int = 10**9, only: str = ""
    ) -> Script:
        """A script that fails the first `times` calls (of the method `only`)."""
        left = times

        async def script(name: str, request: Any, context: Any) -> None:
            nonlocal left
            if (not only and name in ("Range", "Put", "Txn", "DeleteRange")) or name == only:
                left -= 1
                if left >= 0:
                    await context.abort(code, text, trailers)

        return script

    @staticmethod
    def holding(release: asyncio.Event, *names: str) -> Script:
        """A script that keeps calls until `release` is set."""

        async def script(name: str, request: Any, context: Any) -> None:
            if name in names:
                await release.wait()

        return script

    @staticmethod
    async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait for something that no event tells."""
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)


@pytest.fixture
def tools() -> type[Tools]:
    return Tools


@pytest.fixture
def cluster_in_thread() -> Iterator[str]:
    """The endpoints of a cluster that runs in a thread of its own; calls about the key "hold" are never answered."""
    ready = threading.Event()
    endpoints = ""
    stop: Callable[[], object] = lambda: None  # noqa: E731

    async def serve() -> None:
        nonlocal endpoints, stop
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop = lambda: loop.call_soon_threadsafe(stopping.set)  # noqa: E731
        cluster = FakeCluster()

        async def hold(name: str, request: Any, context: Any) -> None:
            if getattr(request, "key", b"") == b"hold":
                await stopping.wait()

        cluster.nodes = [FakeNode(cluster, member_id) for member_id in (1, 2, 3)]
        for node in cluster.nodes:
            node.script = hold
            await node.start()
        endpoints = ",".join(node.endpoint for node in cluster.nodes)
        ready.set()
        await stopping.wait()
        for node in cluster.nodes:
            await node.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield endpoints
    stop()
    thread.join(30)
    assert not thread.is_alive()
