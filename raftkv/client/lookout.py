"""What a client finds out about its nodes beside the calls: who is connected, who serves, who answers, who leads.

Per endpoint a watcher of the channel's state, a watcher of the node's health and a prober of a suspect connection; and
for all of them one task that finds out who leads, and two that notice a node which stays silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from raftkv._pb import maintenance_pb2
from raftkv.client import health
from raftkv.client.connection import FAILED, READY, Connection
from raftkv.client.health import Health
from raftkv.client.methods import STATUS

if TYPE_CHECKING:
    from raftkv.client.pool import Pool

LOG: Final = logging.getLogger("raftkv")

PROBE_TIMEOUT_S: Final = 1.0
PROBE_PAUSE_S: Final = 0.5
PROGRESS_TICK_S: Final = 0.25  # nothing answered for a whole tick although something is asked: have a look
PROGRESS_PROBE_TIMEOUT_S: Final = 0.5
HEALTH_PAUSE_S: Final = 0.5
STREAM_CHECK_S: Final = 2.0  # a node that only has streams open is asked this often for a sign of life
LEAVE_S: Final = 0.1  # an election is over by then; whoever still cannot serve is cut off from the others
DISCOVERY_TIMEOUT_S: Final = 1.0
DISCOVERY_PAUSE_MAX_S: Final = 2.0  # while there is no leader to be found
DISCOVERY_PAUSE_S: Final = 0.1  # between two rounds: an election takes about that long anyway


class Lookout:
    """Of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool: Final = pool
        self._discover = asyncio.Event()
        self.resting = False  # nobody watches for progress, because nothing is in flight
        self._busy = asyncio.Event()
        self._suspected: dict[Connection, asyncio.Event] = {}
        self._ready: dict[Connection, asyncio.Event] = {}
        self._leaving: dict[Connection, asyncio.TimerHandle] = {}

    def begin(self, connections: Iterable[Connection]) -> None:
        """These are the connections to look after."""
        for connection in connections:
            self._suspected[connection] = asyncio.Event()
            self._ready[connection] = asyncio.Event()

    def run_in(self, group: asyncio.TaskGroup) -> None:
        """Start all there is to do."""
        for connection in self._pool.connections:
            name = f"raftkv-client {connection.endpoint}"
            group.create_task(self._watch_channel(connection), name=f"{name} state")
            group.create_task(self._watch_health(connection), name=f"{name} health")
            group.create_task(self._probe(connection), name=f"{name} probe")
        group.create_task(self._find_leader(), name="raftkv-client leader")
        group.create_task(self._watch_progress(), name="raftkv-client progress")
        group.create_task(self._check_streams(), name="raftkv-client streams")

    # --- what it is told --------------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        """There is something to ask."""
        self._ready[connection].set()
        self._discover.set()

    def disconnected(self, connection: Connection) -> None:
        """There is nothing to ask."""
        self._ready[connection].clear()

    def suspect(self, connection: Connection) -> None:
        """Have a look whether this node still answers."""
        self._suspected[connection].set()

    def does_not_serve(self, connection: Connection) -> None:
        """This node says that it cannot serve: its streams go elsewhere, once it is known that others can."""
        self.look_around()
        if connection not in self._leaving:
            assert self._pool.loop is not None
            self._leaving[connection] = self._pool.loop.call_later(LEAVE_S, self._leave, connection)

    def _leave(self, connection: Connection) -> None:
        del self._leaving[connection]
        if self._pool.closed or connection.health is not Health.NOT_SERVING:
            return
        if self._pool.router.better_than(connection):
            connection.abandon_streams()
        else:
            self.does_not_serve(connection)

    def discover(self) -> None:
        """Find out who leads."""
        self._discover.set()

    def wake(self) -> None:
        """A call begins while nobody watches for progress."""
        self.resting = False
        self._busy.set()

    def look_around(self) -> None:
        """A new generation began: ask every node that was not heard of in it for a sign of life."""
        pool = self._pool
        for connection in pool.connections:
            if connection.heard_in != pool.router.generation and connection.is_ready():
                self._suspected[connection].set()

    # --- what it does -----------------------------------------------------------------------------------------------

    async def _watch_channel(self, connection: Connection) -> None:
        """Keep the channel connecting, and notice at once when its state changes."""
        pool = self._pool
        was_ready = False
        while True:
            # Idle channels connect: after a break gRPC would otherwise wait for the next call.
            state = connection.connectivity(connect=True)
            if (state is READY) != was_ready:
                was_ready = state is READY
                pool.connection_changed(connection, was_ready)
            if pool.tls is not None and state is FAILED:
                await connection.ask_for_trouble()
            await connection.channel.wait_for_state_change(state)

    async def _watch_health(self, connection: Connection) -> None:
        """Know at once when the node says that it cannot serve (no quorum, stopping), as long as it is connected."""
        pool = self._pool
        ready = self._ready[connection]
        while True:
            await ready.wait()
            call = connection.health_watch(health.SERVICE)
            try:
                async for status in call:
                    pool.set_health(connection, status)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    # A server without health service serves as far as we know. It will not grow one meanwhile.
                    await self._until_broken(connection)
            finally:
                call.cancel()  # grpc.aio does not cancel abandoned streams (grpc #43462)
            await asyncio.sleep(HEALTH_PAUSE_S if connection.is_ready() else 0)

    async def _until_broken(self, connection: Connection) -> None:
        while connection.is_ready():
            await connection.channel.wait_for_state_change(READY)

    async def _probe(self, connection: Connection) -> None:
        """Ask a doubtful endpoint for a sign of life; a suspect one until it gives one, so that no call has to."""
        pool = self._pool
        suspected = self._suspected[connection]
        while True:
            await suspected.wait()
            suspected.clear()
            if not connection.suspect and connection.is_ready():
                epoch = connection.breaker.epoch
                if await connection.is_alive(PROGRESS_PROBE_TIMEOUT_S):
                    pool.router.heard(connection)
                    continue
                LOG.info("raftkv client: %s has fallen silent", connection.endpoint)
                connection.abandon_streams()
                connection.broke(epoch)
                pool.router.doubt()
                self.look_around()
            while connection.suspect:
                if connection.is_ready():
                    epoch = connection.breaker.epoch
                    if await connection.is_alive(PROBE_TIMEOUT_S):
                        # Evidence as good as a new connection: whatever made it silent is over.
                        connection.suspect = False
                        connection.breaker.connection_ready()
                        pool.router.heard(connection)
                        pool.router.forget_choices()
                        pool.wake_waiters()
                        break
                    connection.abandon_streams()
                    connection.broke(epoch)
                await asyncio.sleep(PROBE_PAUSE_S)

    async def _watch_progress(self) -> None:
        """Notice a node that is asked and does not answer long before the deadlines of its callers do.

        A write stays where it was sent, but those that follow need not join it: a frozen node (SIGSTOP, a virtual
        machine being moved) keeps its connections, and keepalive takes 15 s to find out.
        """
        pool = self._pool
        before: dict[Connection, int] = {}
        while True:
            if not any(connection.inflight for connection in pool.connections):
                before.clear()
                self._busy.clear()
                self.resting = True
                await self._busy.wait()
            await asyncio.sleep(PROGRESS_TICK_S)
            for connection in pool.connections:
                if not connection.inflight:
                    before.pop(connection, None)
                    continue
                if before.get(connection) == connection.answers:
                    self._suspected[connection].set()
                before[connection] = connection.answers

    async def _check_streams(self) -> None:
        """An open stream says nothing while nothing happens, so that a frozen node goes unnoticed: ask it."""
        pool = self._pool
        while True:
            await asyncio.sleep(STREAM_CHECK_S)
            for connection in pool.connections:
                if connection.open_streams and connection.is_ready():
                    self._suspected[connection].set()

    async def _find_leader(self) -> None:
        """Ask for the members' ids and the leader when something suggests that we do not know them."""
        pool = self._pool
        pause_s = DISCOVERY_PAUSE_S
        while True:
            known = pool.router.leader_id != 0 and not pool.router.leader_gone
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if known else pause_s):
                    await self._discover.wait()
            self._discover.clear()
            ready = [c for c in pool.connections if c.is_ready() and not c.foreign]
            if pool.router.leader_gone:  # a node that is frozen would hold up the round for all of its time
                ready = [c for c in ready if not c.suspect]
            unknown = [c for c in ready if c.member_id == 0]
            # One who knows is enough for the leader, but several are asked: the first may be the one that is cut off.
            async with asyncio.TaskGroup() as group:
                for connection in unknown or ready:
                    group.create_task(self._ask_status(connection))
            if pool.router.leader_id:  # or the next one is on its way
                pause_s = DISCOVERY_PAUSE_S
            else:
                pause_s = min(2 * pause_s, DISCOVERY_PAUSE_MAX_S)
            await asyncio.sleep(DISCOVERY_PAUSE_S)

    async def _ask_status(self, connection: Connection) -> None:
        pool = self._pool
        try:
            status = await connection.unary(STATUS)(maintenance_pb2.StatusRequest(), timeout=DISCOVERY_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return  # whoever cannot say who leads is asked again with the next hint
        header = status.header
        if pool.cluster_id == 0:
            pool.cluster_id = header.cluster_id
        if header.cluster_id != pool.cluster_id:
            if not connection.foreign:
                LOG.error(
                    "raftkv client: %s belongs to another cluster (%x, not %x); it will not be used",
                    connection.endpoint,
                    header.cluster_id,
                    pool.cluster_id,
                )
            connection.foreign = True
            pool.router.forget_choices()
            return
        if status.isLearner is not connection.is_learner:
            connection.is_learner = status.isLearner
            pool.router.forget_choices()
        if status.leader and not header.leader and not pool.is_raftkv:
            pool.router.is_etcd(True)  # whose headers never name the leader
        pool.observe(connection, header)
        pool.observe_leader(max(status.raftTerm, header.raft_term), status.leader)
        if header.raft_term >= pool.router.term:
            pool.router.heard(connection)
        if not pool.router.leader_gone:
            pool.wake_waiters()
