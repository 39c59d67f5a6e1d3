"""Starts, watches, disturbs and ends the node processes of one local cluster.

    async with AsyncLocalCluster(nodes=5) as cluster:
        await cluster.kill("leader")
        await cluster.wait_leader()

Whatever happens (an error half-way, Ctrl-C, SIGKILL of this process), no node process is left: an orderly end stops
them, `atexit` kills what is left, and a node dies with its supervisor (`lifeline`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from raftkv.local import layout as layouts
from raftkv.local import ports
from raftkv.local.errors import (
    ClusterRunning,
    LocalClusterError,
    NodeExited,
    NotReady,
    TopologyMismatch,
    UnknownNode,
)
from raftkv.local.layout import Layout, NodeSpec
from raftkv.local.process import NodeProcess
from raftkv.local.status import NodeRow, Probe, agreed, leader_of, summary, table

if TYPE_CHECKING:
    from raftkv._pb import maintenance_pb2

NODE_COMMAND = (sys.executable, "-m", "raftkv", "node")
NODES_DEFAULT = 5
NODES_MAX = 99
_POLL_S = 0.025
_STATUS_TIMEOUT_S = 0.5
_LEADER_S = 10.0
_PORT_ATTEMPTS = 3
_TEMPORARY_PREFIX = "raftkv-"

_live: weakref.WeakSet[AsyncLocalCluster] = weakref.WeakSet()


class AsyncLocalCluster:
    """A cluster of node processes on this machine.

    Args:
        nodes: how many; None takes what `directory` holds, else five.
        directory: where logs and data live, kept at the end; None makes a temporary one, removed at the end.
        base_port: n1 gets this port for clients and the next for peers, n2 the next two, and so on;
            None or 0 takes free ones, reserved against other clusters on this machine for as long as this one lives.
        host: where the nodes listen.
        arguments: more arguments for every `raftkv node`.
        environment: more environment variables for every node.
        command: what to run instead of `python -m raftkv node`.
    """

    def __init__(
        self,
        nodes: int | None = None,
        *,
        directory: Path | str | None = None,
        base_port: int | None = None,
        host: str = "127.0.0.1",
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        command: Sequence[str] = NODE_COMMAND,
    ) -> None:
        if nodes is not None and not 1 <= nodes <= NODES_MAX:
            raise LocalClusterError(f"nodes: {nodes} is not from 1 to {NODES_MAX}")
        last = (base_port or 0) + 2 * (nodes or NODES_DEFAULT) - 1
        if base_port and (base_port < 1 or last > 65535):
            raise LocalClusterError(f"base_port: {base_port} leaves no room for the nodes' ports below 65536")
        self._wanted = nodes
        self._base_port = base_port or 0
        self._directory = None if directory is None else Path(directory).expanduser().absolute()
        self._host = host
        self._arguments = tuple(arguments)
        self._environment = environment or {}
        self._command = tuple(command)
        self._layout: Layout | None = None
        self._processes: dict[str, NodeProcess] = {}
        self._probes: dict[str, Probe] = {}
        self._lease: ports.PortLease | None = None
        self._lock: int | None = None

    # ---- what it is ----

    @property
    def layout(self) -> Layout:
        """The shape of the cluster. Known once it was started."""
        if self._layout is None:
            raise LocalClusterError("the cluster has not been started")
        return self._layout

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names: n1, n2, …"""
        return self.layout.names

    @property
    def endpoints(self) -> tuple[str, ...]:
        """host:port of every node for clients, in the order of `names`."""
        return tuple(self.layout.client(node) for node in self.layout.nodes)

    @property
    def directory(self) -> Path:
        """Where logs and data live."""
        return self.layout.directory

    def process(self, name: str) -> NodeProcess:
        """One node's process."""
        if name not in self._processes:
            raise UnknownNode(name, self.names)
        return self._processes[name]

    def endpoint(self, name: str) -> str:
        """host:port of one node for clients."""
        for node in self.layout.nodes:
            if node.name == name:
                return self.layout.client(node)
        raise UnknownNode(name, self.names)

    def log(self, name: str) -> Path:
        """One node's log file."""
        self.process(name)
        return self.layout.log(name)

    # ---- life ----

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, *, timeout_s: float = 30.0) -> None:
        """Start all nodes at once and wait until they follow one leader.

        Raises:
            PortInUse: names the port and what it was for.
            ClusterRunning: the directory is in use.
            TopologyMismatch: the directory holds a cluster of another shape.
            NodeExited: a node ended at once; carries its last words.
            NotReady: no agreement in time.
        """
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            fresh = self._prepare()
            try:
                for process in self._processes.values():
                    process.start()
                await self.wait_healthy(timeout_s=timeout_s)
                return
            except BaseException as error:
                taken = fresh and isinstance(error, NodeExited) and self._port_taken()
                self.kill_now()
                self._release(remove=fresh)
                # We chose these ports, and a stranger took one just after we looked: choose again.
                if not taken or self._base_port or attempt == _PORT_ATTEMPTS:
                    raise

    async def close(self, *, grace_s: float | None = None) -> None:
        """Stop all nodes and give back what the cluster held. May be called twice.

        Args:
            grace_s: how long nodes get to stop in order before SIGKILL. None: 5 s where the data is kept; at once
                where it is temporary.
        """
        try:
            await self.stop_all(grace_s=(5.0 if self._directory else 0.0) if grace_s is None else grace_s)
        finally:
            self.kill_now()
            self._release(remove=self._directory is None)

    async def stop_all(self, *, grace_s: float = 5.0) -> None:
        """SIGTERM to every node, SIGKILL to those that still run after `grace_s`."""
        running = [process for process in self._processes.values() if process.alive]
        if grace_s > 0:
            for process in running:
                process.terminate()
            await asyncio.gather(*(process.wait_exit(grace_s) for process in running))
        for process in running:
            process.kill()
        await asyncio.gather(*(process.wait_exit(5.0) for process in running))

    def kill_now(self) -> None:
        """SIGKILL every node and reap it, without an event loop."""
        for process in self._processes.values():
            process.kill_now()

    # ---- looking ----

    async def status(self, *, timeout_s: float = _STATUS_TIMEOUT_S) -> list[NodeRow]:
        """One row a node. Nodes that do not answer within `timeout_s` are shown as silent."""
        readings = await self._readings(timeout_s)
        nodes = [
            (self._processes[node.name], self.layout.client(node), self.layout.peer(node)) for node in self.layout.nodes
        ]
        return table(nodes, readings)

    async def leader(self, *, timeout_s: float = _STATUS_TIMEOUT_S) -> str | None:
        """The name of the leader, or None when no node that answers is one."""
        return leader_of(await self._readings(timeout_s))

    async def wait_leader(self, *, timeout_s: float = 10.0, other_than: str | None = None) -> str:
        """Wait until a node leads (a node other than the given one), and return its name.

        Raises:
            NotReady: none did in time.
        """
        found: list[str] = []

        async def led() -> bool:
            leader = await self.leader()
            if leader is None or leader == other_than:
                return False
            found.append(leader)
            return True

        await self._wait("led by a node", led, timeout_s)
        return found[0]

    async def wait_healthy(self, *, timeout_s: float = 30.0) -> None:
        """Wait until every running, unpaused node answers and all follow one leader.

        Raises:
            NodeExited: a node that runs now ended meanwhile.
            NotReady: no agreement in time.
        """
        watched = [process for process in self._processes.values() if process.alive and not process.paused]
        if not watched:
            raise LocalClusterError("no node is running")

        async def healthy() -> bool:
            for process in watched:
                if not process.alive:
                    code = process.exit_code
                    assert code is not None
                    raise NodeExited(process.name, code, process.last_line(), process.log)
            # Until a node listens, a plain connection tells so for a hundredth of what a gRPC call costs.
            if not all(await asyncio.gather(*(self._listens(process.name) for process in watched))):
                return False
            return agreed(await self._readings(_STATUS_TIMEOUT_S, [process.name for process in watched]))

        await self._wait("healthy (all nodes following one leader)", healthy, timeout_s)

    # ---- disturbing ----

    async def resolve(self, target: str) -> list[str]:
        """The names that a target means: a node, a comma-separated list, `leader`, `followers` or `all`.

        Raises:
            UnknownNode: a name is not a node's, or there is no leader. While a majority runs, one is waited for: in an
                election, and where nodes on a busy machine take their time to answer.
        """
        names: list[str] = []
        for word in (part.strip() for part in target.split(",")):
            if word in ("leader", "followers"):
                leader = await self._expected_leader()
                if leader is None:
                    raise UnknownNode(word, self.names, "no node leads now")
                names += [leader] if word == "leader" else [name for name in self.names if name != leader]
            elif word == "all":
                names += self.names
            elif word in self._processes:
                names.append(word)
            else:
                raise UnknownNode(word, self.names)
        return list(dict.fromkeys(names))

    async def kill(self, target: str) -> list[str]:
        """SIGKILL. Returns the nodes that were running, once their processes are gone."""
        return await self._end(target, NodeProcess.kill, 5.0)

    async def stop(self, target: str, *, grace_s: float = 10.0) -> list[str]:
        """SIGTERM, and SIGKILL after `grace_s`. Returns the nodes that were running, once they are gone."""
        return await self._end(target, NodeProcess.terminate, grace_s)

    async def pause(self, target: str) -> list[str]:
        """SIGSTOP: the process keeps its connections and says nothing. Returns the nodes that are paused."""
        paused = [name for name in await self.resolve(target) if self._processes[name].pause()]
        await asyncio.gather(*(self._processes[name].wait_stopped(5.0) for name in paused))
        return paused

    async def resume(self, target: str) -> list[str]:
        """SIGCONT. Returns the nodes that run."""
        return [name for name in await self.resolve(target) if self._processes[name].resume()]

    async def restart(self, target: str, *, wait: bool = True, timeout_s: float = 30.0) -> list[str]:
        """Stop nodes that run (in order, or by force when paused), start them on their data, wait until they follow.

        Raises:
            NodeExited: one ended at once; carries its last words.
            NotReady: one did not join in time. Not raised when no majority runs, as there is nothing to join then.
        """
        names = await self.resolve(target)
        for name in names:
            process = self._processes[name]
            if process.alive:
                process.kill() if process.is_stopped() else process.terminate()
                if not await process.wait_exit(10.0):
                    process.kill()
                    await process.wait_exit(5.0)
        for name in names:
            self._probes[name].close()
            self._processes[name].start()
        if wait and self._majority_runs():
            await self.wait_healthy(timeout_s=timeout_s)
        return names

    async def _end(self, target: str, signal_of: Callable[[NodeProcess], bool], grace_s: float) -> list[str]:
        ended = [name for name in await self.resolve(target) if signal_of(self._processes[name])]
        for name in ended:
            process = self._processes[name]
            if not await process.wait_exit(grace_s):
                process.kill()
                await process.wait_exit(5.0)
        return ended

    # ---- inside ----

    def _majority_runs(self) -> bool:
        running = sum(process.alive and not process.paused for process in self._processes.values())
        return running > len(self._processes) // 2

    async def _expected_leader(self) -> str | None:
        """The leader, waited for while there can be one."""
        deadline = time.monotonic() + _LEADER_S
        while True:
            leader = await self.leader()
            if leader is not None or not self._majority_runs() or time.monotonic() >= deadline:
                return leader
            await asyncio.sleep(_POLL_S)

    async def _readings(
        self, timeout_s: float, names: Sequence[str] | None = None
    ) -> dict[str, maintenance_pb2.StatusResponse | None]:
        asked = self.names if names is None else names
        answering = [name for name in asked if (process := self._processes[name]).alive and not process.paused]
        answers = await asyncio.gather(*(self._probes[name].status(timeout_s) for name in answering))
        return dict.fromkeys(asked) | dict(zip(answering, answers, strict=True))

    async def _listens(self, name: str) -> bool:
        node = next(node for node in self.layout.nodes if node.name == name)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(self._host, node.client_port), 1.0)
        except (OSError, TimeoutError):
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    async def _wait(self, wanted: str, reached: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not await reached():
            if time.monotonic() >= deadline:
                raise NotReady(wanted, timeout_s, summary(await self.status()))
            await asyncio.sleep(_POLL_S)

    def _prepare(self) -> bool:
        """Take the directory and the ports. Returns whether the cluster is new (nothing to lose in the directory)."""
        if self._layout is not None:
            raise LocalClusterError("the cluster is already started")
        if self._directory is None:
            _sweep_temporary()
            directory = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{os.getpid()}-"))
        else:
            directory = self._directory
            directory.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(directory)
        try:
            stored = layouts.load(directory)
            if stored is not None:
                self._layout = self._checked(stored[0])
                self._lease = self._lease_fixed(self._layout.nodes)
            else:
                self._layout = Layout(directory, self._host, self._choose_ports())
            self._layout.save({"pid": os.getpid(), "socket": None})
        except BaseException:
            self._layout = None
            self._release(remove=False)
            if self._directory is None:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        for node in self._layout.nodes:
            self._processes[node.name] = NodeProcess(
                node.name,
                [*self._command, *self._layout.arguments(node), *self._arguments],
                self._layout.log(node.name),
                self._environment,
            )
            self._probes[node.name] = Probe(self._layout.client(node))
        _live.add(self)
        return stored is None

    def _checked(self, stored: Layout) -> Layout:
        if self._wanted is not None and self._wanted != len(stored.nodes):
            raise TopologyMismatch(stored.directory, "nodes", len(stored.nodes), self._wanted)
        if self._base_port and self._base_port != stored.nodes[0].client_port:
            raise TopologyMismatch(stored.directory, "base port", stored.nodes[0].client_port, self._base_port)
        self._host = stored.host
        return stored

    def _choose_ports(self) -> tuple[NodeSpec, ...]:
        count = self._wanted or NODES_DEFAULT
        if self._base_port:
            nodes = layouts.fixed_ports(count, self._base_port)
            self._lease = self._lease_fixed(nodes)
            return nodes
        self._lease = ports.lease_free(2 * count, self._host)
        free = iter(self._lease.ports)
        return tuple(NodeSpec(f"n{i + 1}", next(free), next(free)) for i in range(count))

    def _lease_fixed(self, nodes: Sequence[NodeSpec]) -> ports.PortLease:
        uses = [(node.client_port, f"{node.name}, clients") for node in nodes]
        uses += [(node.peer_port, f"{node.name}, peers") for node in nodes]
        return ports.lease_fixed(uses, self._host)

    def _port_taken(self) -> bool:
        ended = [node for node in self.layout.nodes if not self._processes[node.name].alive]
        return any(not ports.is_free(port, self._host) for node in ended for port in (node.client_port, node.peer_port))

    def _release(self, *, remove: bool) -> None:
        for probe in self._probes.values():
            probe.close()
        if self._lease is not None:
            self._lease.release()
        layout, self._layout, self._lease = self._layout, None, None
        if layout is not None:
            if self._directory is None:
                shutil.rmtree(layout.directory, ignore_errors=True)
            elif remove:
                remove_cluster(layout)
            elif layout.directory.exists():
                layout.save(None)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._processes, self._probes = {}, {}
        _live.discard(self)


def remove_cluster(layout: Layout) -> None:
    """Delete a stopped cluster's logs and data; the directory too when nothing else is in it."""
    for name in layout.names:
        shutil.rmtree(layout.directory / name, ignore_errors=True)
    for file in (layouts.STATE_FILE, layouts.LOCK_FILE, "supervisor.log"):
        (layout.directory / file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        layout.directory.rmdir()


def _take_lock(directory: Path) -> int:
    descriptor = os.open(directory / layouts.LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        stored = layouts.load(directory)
        supervisor = stored[1] if stored is not None else None
        raise ClusterRunning(directory, supervisor["pid"] if supervisor else None) from None
    return descriptor


def _sweep_temporary() -> None:
    """Remove the files of temporary clusters whose supervisor was killed before it could."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY_PREFIX}[0-9]*-*"):
        try:
            os.kill(int(directory.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(directory, ignore_errors=True)
        except (ValueError, OSError):
            continue


@atexit.register
def _kill_what_is_left() -> None:
    for cluster in list(_live):
        cluster.kill_now()
        cluster._release(remove=False)
