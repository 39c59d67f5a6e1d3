"""One node process, put together and taken apart again.

open the stores -> bind both ports -> run consensus -> serve
SIGTERM, SIGINT: health off -> hand leadership over -> end streams with a status -> stop -> close
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys

import structlog
import uvloop

from raftkv._pb import state_pb2
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.replica.replica import Replica
from raftkv.rpc.server import Server
from raftkv.server import interpreter, logs, peers, services, transport
from raftkv.server.config import NodeConfig
from raftkv.server.errors import RequestError
from raftkv.server.health import Health
from raftkv.server.runtime import Runtime
from raftkv.server.snapshots import SnapshotReceiver
from raftkv.server.stores import EXIT_FATAL, Stores
from raftkv.state.commands import CommandKind
from raftkv.state.results import Refusal
from raftkv.state.store import StoreDamaged
from raftkv.storage.errors import NodeFatal, StoreUnusable

DRAIN_S = 5.0
LONE_BYTES_MAX = 4096  # some callers' small writes: a lock, a lease
LINGER_S = 0.3
REFUSED_S = 1.0


def run(config: NodeConfig) -> int:
    """Run one node until it is told to stop.

    Returns:
        0 after an orderly stop, 1 when it could not start (one line on stderr says why).
    """
    logs.setup(config)
    interpreter.tune()
    try:
        return uvloop.run(_serve(config))
    except (StoreUnusable, StoreDamaged, NodeFatal, transport.BindError) as fault:
        print(f"raftkv: {config.name}: {fault}", file=sys.stderr)
        return 1
    except ExceptionGroup as group:
        # A part of the node failed in a way nobody foresaw. What it would do next is unknown, so it does nothing.
        structlog.get_logger().error("node_failed", node=config.name, exc_info=group)
        logs.flush()
        Stores.die(_first_of(group))
        return EXIT_FATAL


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    fault: BaseException = group
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return fault


def _raft_config(config: NodeConfig) -> RaftConfig:
    return RaftConfig(
        heartbeat_ticks=max(1, config.heartbeat_ms // config.tick_ms),
        election_ticks=max(2, config.election_ms // config.tick_ms),
        disk_stall_ticks=max(2, config.election_ms // config.tick_ms),
        lone_bytes_max=LONE_BYTES_MAX,
    )


async def _serve(config: NodeConfig) -> int:
    log = structlog.get_logger().bind(node=config.name)
    stores = Stores(config)
    for text in stores.repaired:
        log.warning("store_repaired", detail=text)
    incarnation = secrets.randbits(63) | 1
    raft = Raft(
        stores.identity.node_id,
        _raft_config(config),
        stores.log,
        stores.machine.applied_index,
        random.Random(incarnation),
    )
    stores.check_membership(raft.conf)
    runtime = Runtime(config, stores, Replica(raft, incarnation), incarnation)
    members = stores.members()
    servicer = SnapshotReceiver(runtime, lambda node: node in members or node in raft.status().conf.members())
    peer_server = Server({peers.STREAM: servicer.stream, peers.SNAPSHOT: servicer.snapshot})
    await transport.bind(peer_server, config.listen_peer, "listen_peer")
    client_server = transport.client_server(config)
    health = Health()
    registered = services.register(client_server, runtime)
    health.register(client_server)
    runtime.evidence.on_reasons = health.update
    await transport.bind(client_server, config.listen_client, "listen_client")
    stop = _stop_on_signals(config)
    async with asyncio.TaskGroup() as tasks:
        await peer_server.start()
        runtime.start(tasks)
        await client_server.start()
        log.info(
            "node_started",
            member=f"{runtime.node_id:x}",
            cluster=f"{runtime.cluster_id:x}",
            client=config.listen_client,
            peers=config.listen_peer,
            pid=os.getpid(),
            term=raft.term,
            applied=stores.machine.applied_index,
        )
        publish = tasks.create_task(_publish(runtime, config), name="publish")
        reason = await stop
        log.info("node_stopping", reason=reason)
        await runtime.drain()
        # Clients that watch our health go elsewhere now; what they had sent before is still served.
        await asyncio.sleep(LINGER_S)
        registered.end_streams()
        await client_server.stop(DRAIN_S)
        publish.cancel()
        await peer_server.stop(0)
        runtime.end_tasks()
    registered.close()
    runtime.close()
    log.info("node_stopped")
    logs.flush()
    return 0


async def _publish(runtime: Runtime, config: NodeConfig) -> None:
    """Tell the cluster our name and where clients find us, until it has been written once."""
    attributes = state_pb2.MemberAttributes(
        id=runtime.node_id,
        name=config.name,
        peer_urls=[f"http://{config.initial_cluster[config.name]}"],
        client_urls=[f"http://{config.advertise_client}"],
    )
    payload = attributes.SerializeToString(deterministic=True)
    while runtime.machine.members.get(runtime.node_id) != attributes:
        with contextlib.suppress(RequestError):
            if isinstance(await runtime.propose(CommandKind.MEMBER_ATTR, payload, None), Refusal):
                await asyncio.sleep(REFUSED_S)  # while an alarm stops every write


def _stop_on_signals(config: NodeConfig) -> asyncio.Future[str]:
    """A future that says why this node is to stop."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()

    def ask(reason: str) -> None:
        if not stop.done():
            stop.set_result(reason)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, signal.Signals(number).name)
    if config.lifeline_fd is not None:
        descriptor = config.lifeline_fd

        def at_end_of_file() -> None:
            if not os.read(descriptor, 1):
                loop.remove_reader(descriptor)
                ask("the process that started this node has ended")

        loop.add_reader(descriptor, at_end_of_file)
    return stop
