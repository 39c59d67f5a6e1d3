"""A node that commits at once: no peers, no disk, but the real state machine, and the real services on a real server.

`hold()` keeps proposals and barriers waiting, as a cluster without a leader would.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from raftkv._pb import cluster_pb2_grpc, kv_pb2_grpc, lease_pb2_grpc, maintenance_pb2_grpc
from raftkv.raft.errors import InvalidTransferee
from raftkv.server import services, transport
from raftkv.server.callers import Waiter
from raftkv.server.config import NodeConfig
from raftkv.server.errors import NoLeader, RequestTimeout
from raftkv.server.health import Health
from raftkv.server.lessor import LeaseLeft, Lessor
from raftkv.server.services.contract import Mark, MemberFacts, NodeStatus
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result
from raftkv.state.store import MemoryStore


@dataclass(slots=True)
class FakeSpool:
    content: bytes
    closed: bool = False

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.content)
        return self.content[offset : offset + length]

    def close(self) -> None:
        self.closed = True


class FakeNode:
    """See the module; satisfies `contract.Node`."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.config = NodeConfig(name="n1", data_dir=directory, **settings)
        self.node_id = self.config.member_id
        self.cluster_id = self.config.cluster_id
        self.machine = StateMachine(MemoryStore())
        self.leader = self.node_id
        self.term = 3
        self.proposed: list[tuple[CommandKind, bytes]] = []
        self.deadlines: list[float | None] = []
        self.barriers = 0
        self.is_leader = False  # marks prove something
        self.expects_news = False
        self.abandoned = 0
        self.fault: Exception | None = None  # raised by the next calls
        self.bytes_on_disk = 4096
        self.defragmented = 0
        self.transferred_to = 0
        self.spool = FakeSpool(b"state" * 20_000)
        self.clock_s = 1000.0  # of leases
        self.lessor = Lessor(lambda: self.clock_s)
        self.leases_asked: list[tuple[int, bool]] = []  # lease, renewed
        self.fatal_faults: list[BaseException] = []
        self.on_applied: Callable[[], None] = lambda: None
        self._open = asyncio.Event()
        self._open.set()
        self._submitted: dict[Waiter, asyncio.Future[Result]] = {}

    def hold(self) -> None:
        """Answer nothing from now on."""
        self._open.clear()

    def release(self) -> None:
        """Go on."""
        self._open.set()

    async def propose(self, kind: CommandKind, payload: bytes, deadline: float | None) -> Result:
        self.deadlines.append(deadline)
        await self._wait(deadline)
        self.proposed.append((kind, payload))
        machine = self.machine
        group = Group(self.node_id, 1, (Command(1, kind, payload),))
        result = machine.apply(machine.applied_index + 1, self.term, (group,))[0][0]
        self.on_applied()
        return result

    def submit_for(self, waiter: Waiter, kind: CommandKind, payload: bytes, deadline: float | None) -> None:
        def tell(done: asyncio.Future[Result]) -> None:
            self._submitted.pop(waiter, None)
            if done.cancelled():
                return
            fault = done.exception()
            if fault is None:
                waiter.set_result(done.result())
            else:
                assert isinstance(fault, Exception)
                waiter.set_exception(fault)

        task = self._submitted[waiter] = asyncio.ensure_future(self.propose(kind, payload, deadline))
        task.add_done_callback(tell)

    def submit_read(self, deadline: float | None) -> asyncio.Future[object]:
        return asyncio.ensure_future(self.read_barrier(deadline))

    def expect_news(self, expected: bool) -> None:
        self.expects_news = expected

    def mark(self) -> Mark:
        return Mark(self.term if self.is_leader else 0, self.machine.applied_index)

    def is_after(self, mark: Mark) -> bool:
        return 0 < mark.term == self.machine.applied_term and self.machine.applied_index > mark.last

    def ask_lease(self, lease: int, *, renew: bool, deadline: float | None) -> asyncio.Future[LeaseLeft]:
        return asyncio.ensure_future(self._ask_lease(lease, renew, deadline))

    async def _ask_lease(self, lease: int, renew: bool, deadline: float | None) -> LeaseLeft:
        await self._wait(deadline)
        self.leases_asked.append((lease, renew))
        if self.lessor.term != self.term:
            self.machine.take_lease_events()
            self.lessor.lead(self.term, self.machine.leases, self.machine.sessions)
        self.lessor.applied(self.machine.take_lease_events(), self.machine.take_session_events())
        return self.lessor.renew(lease) if renew else self.lessor.look(lease)

    def abandon(self, waiter: Waiter) -> None:
        (self._submitted.get(waiter) or waiter).cancel()

    async def read_barrier(self, deadline: float | None) -> None:
        self.barriers += 1
        self.deadlines.append(deadline)
        await self._wait(deadline)

    async def _wait(self, deadline: float | None) -> None:
        if self.fault is not None:
            raise self.fault
        if self._open.is_set():
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + self.config.request_timeout_s
        try:
            async with asyncio.timeout_at(until if deadline is None else min(until, deadline)):
                await self._open.wait()
        except TimeoutError:
            raise NoLeader if not self.leader else RequestTimeout(executed="no") from None
        except asyncio.CancelledError:
            self.abandoned += 1
            raise

    async def transfer_leadership(self, target: int, deadline: float | None) -> None:
        if target not in {member.member_id for member in self.members()}:
            raise InvalidTransferee(target)
        self.transferred_to = target

    def status(self) -> NodeStatus:
        applied = self.machine.applied_index
        return NodeStatus(
            self.term, self.leader, applied, applied, applied, False, self.bytes_on_disk, self.bytes_on_disk // 2
        )

    def members(self) -> Sequence[MemberFacts]:
        return (
            MemberFacts(self.node_id, "n1", ("http://127.0.0.1:2380",), ("http://127.0.0.1:2379",)),
            MemberFacts(77, "", ("http://127.0.0.1:2480",), ()),
        )

    def state_bytes(self) -> int:
        return self.bytes_on_disk

    async def defragment(self) -> None:
        self.defragmented += 1

    async def spool_snapshot(self) -> FakeSpool:
        return self.spool

    def fatal(self, fault: BaseException) -> None:
        self.fatal_faults.append(fault)


@dataclass(slots=True)
class Served:
    """A fake node at work, and a client of it."""

    node: FakeNode
    services: services.Services
    health: Health
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel

    @property
    def kv(self) -> kv_pb2_grpc.KVAsyncStub:
        return kv_pb2_grpc.KVStub(self.channel)

    @property
    def lease(self) -> lease_pb2_grpc.LeaseAsyncStub:
        return lease_pb2_grpc.LeaseStub(self.channel)

    @property
    def cluster(self) -> cluster_pb2_grpc.ClusterAsyncStub:
        return cluster_pb2_grpc.ClusterStub(self.channel)

    @property
    def maintenance(self) -> maintenance_pb2_grpc.MaintenanceAsyncStub:
        return maintenance_pb2_grpc.MaintenanceStub(self.channel)

    async def raw(self, method: str, request: bytes, **options: Any) -> bytes:
        """Call a method with bytes, whatever they are."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(method)
        return await call(request, **options)


@contextlib.asynccontextmanager
async def serve(node: FakeNode) -> AsyncIterator[Served]:
    """Serve `node` on a free port."""
    server = transport.client_server(node.config)
    served = services.register(server, node)
    health = Health()
    health.register(server)
    port = await server.bind("127.0.0.1:0")
    await server.start()
    health.update(frozenset())
    address = f"127.0.0.1:{port}"
    # Large answers are wanted here; the client's own limit is not what is tested.
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        try:
            yield Served(node, served, health, server, address, channel)
        finally:
            health.update(frozenset(("stopping",)))
            await server.stop(0)
            served.close()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call did not fail")


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """What the node said beside the status."""
    return {key: str(value) for key, value in error.trailing_metadata() or ()}


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)
