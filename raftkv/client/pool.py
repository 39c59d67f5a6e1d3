"""The connections of one client and the work that goes on beside its calls.

One task group holds everything, the lookout (`lookout.py`) and what the parts of the client spawn. It starts with the
first call, in its event loop, and ends with `close`. If one task fails, all end, and calls say so.

    client state:  LOST --an endpoint is READY--> CONNECTED --none is--> SUSPENDED --lost_after_s passed--> LOST
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from raftkv._pb import common_pb2
from raftkv.client.breaker import BreakerConfig, BreakerState
from raftkv.client.connection import Connection
from raftkv.client.errors import Closed, ConfigError, DeadlineExceeded, RaftkvError, Unavailable
from raftkv.client.events import BreakerChanged, ConnectionChanged, Hooks, LeaderSeen
from raftkv.client.health import Health
from raftkv.client.lookout import Lookout
from raftkv.client.options import Routing
from raftkv.client.routing import Purpose, Router
from raftkv.client.tls import TLS

LOG: Final = logging.getLogger("raftkv")

HOLD_S: Final = 3.0  # at most so long do writes wait for etcd's next leader; by default it takes 1 to 2 s
LAST_WORDS_S: Final = 2.5  # at most so long does closing wait for what the cluster should still be told

# The process in which gRPC's threads were first started by this SDK. They do not survive a fork, and grpc.aio hangs
# in the child instead of saying so; hence we say so.
_started_in: int | None = None


class ConnectionState(enum.Enum):
    """How a client stands with its cluster; kazoo's model."""

    CONNECTED = "connected"
    """At least one endpoint is connected."""
    SUSPENDED = "suspended"
    """None is at the moment. Whoever relies on the cluster should pause."""
    LOST = "lost"
    """None has been for `lost_after_s`, or never yet, or the client is closed."""


@dataclass(frozen=True, slots=True)
class ClientStats:
    """Counters since the client was made."""

    calls: int = 0
    """Calls started."""
    retries: int = 0
    """Attempts beyond the first."""
    failures: int = 0
    """Calls that raised."""
    outcomes_unknown: int = 0
    """Calls that raised OutcomeUnknown."""
    breakers_opened: int = 0
    """Times an endpoint's circuit breaker opened."""
    leader_changes: int = 0
    """Times a new leader became known."""


class Pool:
    """Shared by a client and all its `with_options` clones."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        routing: Routing,
        breaker: BreakerConfig,
        hooks: Hooks,
        channel_options: Iterable[tuple[str, Any]],
        interceptors: Iterable[grpc.aio.ClientInterceptor],
        lost_after_s: float,
        tls: TLS | None = None,
    ) -> None:
        self.endpoints: Final = tuple(endpoints)
        self.hooks: Final = hooks
        self.loop: asyncio.AbstractEventLoop | None = None
        self.connections: tuple[Connection, ...] = ()
        self.random: Final = random.Random()
        self.router = Router((), routing, self.random)
        self.state = ConnectionState.LOST
        self.closed = False
        self.calls = 0
        self.retries = 0
        self.failures = 0
        self.outcomes_unknown = 0
        self.cluster_id = 0
        self._breakers_opened = 0
        self._leader_changes = 0
        self._routing: Final = routing
        self._breaker: Final = breaker
        self._channel_options: Final = tuple(channel_options)
        self._interceptors: Final = tuple(interceptors)
        self._lost_after_s: Final = lost_after_s
        self.tls: Final = tls
        self._pid = 0  # of the process that opened it
        self.is_raftkv = False  # known from the first answer that names the leader: etcd's never do
        self.parts: dict[str, Any] = {}  # what there is once a client, by name: the lease keeper, the pipeline
        self.closers: list[Callable[[], Awaitable[None]]] = []  # what to do before everything ends
        self._last_words: set[asyncio.Future[None]] = set()  # one for each coroutine that `close` waits for
        self._group: asyncio.TaskGroup | None = None
        self._to_spawn: list[tuple[Coroutine[Any, Any, None], str, asyncio.Future[None]]] = []
        self._main: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []  # calls that wait for any connection to become ready
        self._listeners: list[Callable[[ConnectionState], None]] = []
        self.lookout: Final = Lookout(self)

    # --- life -------------------------------------------------------------------------------------------------------

    def enter(self) -> asyncio.AbstractEventLoop:
        """Every call begins here: open on first use, refuse what cannot work. Returns the running loop."""
        loop = asyncio.get_running_loop()
        if loop is self.loop and self._pid == os.getpid() and not self.closed and self._failure is None:
            return loop
        self._refuse_unusable(loop)
        if self.loop is None:
            self._open(loop)
        return loop

    def _refuse_unusable(self, loop: asyncio.AbstractEventLoop) -> None:
        here = os.getpid()
        if self.closed:
            raise Closed("this client is closed")
        if self._pid not in (0, here):
            raise Closed(
                f"this client belongs to process {self._pid} and this process ({here}) was forked from it; connections "
                "do not survive a fork: make a client in the child, started by `spawn` or by subprocess"
            )
        if self.loop is not None and self.loop is not loop:
            raise ConfigError(
                "event loop", "this client was first used in another event loop; make one client for each loop"
            )
        if self._failure is not None:
            raise RaftkvError(f"this client's background work failed: {self._failure!r}") from self._failure
        if _started_in not in (None, here):
            raise Closed(
                f"this process ({here}) was forked from process {_started_in} after raftkv had connected there; gRPC "
                "cannot work in such a child: start it by `spawn` or by subprocess, or fork before the first call"
            )

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        global _started_in
        _started_in = self._pid = os.getpid()
        self.loop = loop
        self.connections = tuple(
            Connection(
                endpoint,
                options=self._channel_options,
                interceptors=self._interceptors,
                breaker=self._breaker,
                clock=loop.time,
                on_breaker=self._breaker_changed,
                tls=self.tls,
            )
            for endpoint in self.endpoints
        )
        self.router = Router(self.connections, self._routing, self.random)
        self.lookout.begin(self.connections)
        for connection in self.connections:
            connection.connectivity(connect=True)
        self._main = loop.create_task(self._run(), name="raftkv-client")

    async def _run(self) -> None:
        """All background work; ends by cancellation, or by the first failure."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for coroutine, name, done in self._to_spawn:
                    self._spawn(coroutine, name, done)
                self._to_spawn.clear()
                self.lookout.run_in(group)
                group.create_task(self._declare_lost(), name="raftkv-client lost")
        except Exception as failure:
            self._failure = failure
            LOG.exception("raftkv client: background work failed")
            self.wake_waiters()

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> Callable[[], None]:
        """Run `coroutine` beside the calls, at most as long as the client lives. Returns what ends it.

        It must not raise: its failure would be the failure of the client.
        """
        assert self.loop is not None, "spawn() comes after enter()"
        ended = self.loop.create_future()
        if self._group is None:
            self._to_spawn.append((coroutine, name, ended))
        else:
            self._spawn(coroutine, name, ended)

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        return end

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str, ended: asyncio.Future[None]) -> None:
        assert self._group is not None
        task = self._group.create_task(coroutine, name=f"raftkv-client {name}")
        ended.add_done_callback(lambda _: task.cancel())
        task.add_done_callback(lambda _: None if ended.done() else ended.cancel())

    def spawn_last_words(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """As `spawn`, for what the cluster should still be told if the client is closed meanwhile.

        `close` waits for it, `LAST_WORDS_S` at most.
        """
        assert self.loop is not None, "spawn_last_words() comes after enter()"
        said = self.loop.create_future()
        self._last_words.add(said)

        async def say() -> None:
            try:
                await coroutine
            finally:
                self._last_words.discard(said)
                if not said.done():
                    said.set_result(None)

        self.spawn(say(), name)

    async def pick_for_stream(self) -> Connection:
        """A node to open a stream at: a healthy one, rather not the leader. Waits as long as nobody is connected."""
        while True:
            connection = self.router.pick(Purpose.STALE_READ)
            if connection is not None:
                return connection
            await self.wait_ready(None)

    async def close(self, grace_s: float = 0.0) -> None:
        """End everything: no new calls, calls in flight get `grace_s` to finish, tasks and connections end."""
        if self.closed:
            return
        if self.loop is None or self._pid != os.getpid():
            self.closed = True
            return
        if self.loop is not asyncio.get_running_loop():
            raise ConfigError("event loop", "close a client in the event loop it was used in")
        if self._last_words and self._failure is None:
            await asyncio.wait(self._last_words, timeout=LAST_WORDS_S)
        await self._end(grace_s)

    async def _end(self, grace_s: float) -> None:
        if self.closed:  # by somebody else meanwhile
            return
        self.closed = True
        for closer in self.closers:
            await closer()
        self.wake_waiters()
        if self._main is not None:
            self._main.cancel()
            # Its own cancellation is what we asked for; ours, if it comes meanwhile, still comes out of `wait`.
            await asyncio.wait([self._main])
        for connection in self.connections:
            await connection.channel.close(grace_s or None)
        self._set_state(ConnectionState.LOST)

    # --- for calls --------------------------------------------------------------------------------------------------

    async def wait_ready(self, timeout_s: float | None) -> bool:
        """Wait until something changed for the better; False when `timeout_s` passed first."""
        assert self.loop is not None
        waiter = self.loop.create_future()
        self._waiters.append(waiter)
        try:
            if any(c.is_ready() and not c.foreign for c in self.connections):
                return True
            if all(c.foreign for c in self.connections):
                raise Unavailable("no endpoint belongs to the cluster that answered first")
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiters.remove(waiter)
        self.enter()  # closed or failed meanwhile?
        return True

    async def wait_leader(self, timeout_s: float | None) -> bool:
        """Wait for the leader that follows one which is gone, `HOLD_S` at most; False when `timeout_s` passed first."""
        assert self.loop is not None
        held_until = self.loop.time() + HOLD_S
        until = held_until if timeout_s is None else min(held_until, self.loop.time() + timeout_s)
        while self.router.leader_gone:
            now = self.loop.time()
            if now >= held_until:
                self.router.hold_no_more()
                self.wake_waiters()
            if now >= until:
                return not self.router.leader_gone
            self.leader_wanted()
            waiter = self.loop.create_future()
            self._waiters.append(waiter)
            try:
                async with asyncio.timeout_at(until):
                    await waiter
            except TimeoutError:
                pass
            finally:
                self._waiters.remove(waiter)
            self.enter()  # closed or failed meanwhile?
        return True

    async def connect(self, timeout_s: float | None) -> None:
        """Wait until any endpoint is connected."""
        loop = self.enter()
        until = None if timeout_s is None else loop.time() + timeout_s
        while not any(c.is_ready() and not c.foreign for c in self.connections):
            remaining_s = None if until is None else until - loop.time()
            if (remaining_s is not None and remaining_s <= 0) or not await self.wait_ready(remaining_s):
                raise DeadlineExceeded(self.unreachable(), code="UNREACHABLE")

    def observe(self, connection: Connection, header: common_pb2.ResponseHeader) -> None:
        """Learn from the header of an answer."""
        member_id = header.member_id
        if member_id and member_id != connection.member_id:
            connection.member_id = member_id
            self.router.forget_choices()
        if header.leader and not self.is_raftkv:
            self.is_raftkv = True
            self.router.is_etcd(False)
        term = header.raft_term
        router = self.router
        if term == router.term and header.leader == router.leader_id:
            if connection.heard_in != router.generation:
                router.heard(connection)
            return
        if term > router.term and not header.leader:
            self.lookout.discover()  # an election went by, and this server does not say who won
        self.observe_leader(term, header.leader)
        if term >= router.term:  # what was said in an earlier term may have been under way for long
            router.heard(connection)

    def observe_leader(self, term: int, leader_id: int) -> None:
        """Learn who leads."""
        generation = self.router.generation
        if self.router.observe(term, leader_id):
            self._leader_seen()
        if self.router.generation != generation:
            self.lookout.look_around()

    def unanswered(self, connection: Connection, epoch: int, *, silent: bool) -> None:
        """An attempt over `connection` got no answer: its time ran out (silent) or the connection broke."""
        was_suspect = connection.suspect
        if silent:
            connection.stayed_silent(epoch)
        else:
            connection.broke(epoch)
        if connection.suspect:
            self.lookout.suspect(connection)
            if not was_suspect:
                self.router.doubt()
                self.lookout.look_around()

    def nobody_serves(self) -> bool:
        """Whether every connected node says of itself that it cannot serve."""
        ready = [c for c in self.connections if c.is_ready() and not c.foreign]
        return bool(ready) and all(c.health is Health.NOT_SERVING for c in ready)

    def unreachable(self) -> str:
        """What to say of a cluster none of whose nodes is connected: its endpoints, and why, where we know."""
        text = f"no endpoint could be reached: {', '.join(self.endpoints)}"
        troubles = dict.fromkeys(connection.trouble for connection in self.connections if connection.trouble)
        return f"{text} ({'; '.join(troubles)})" if troubles else text

    def set_health(self, connection: Connection, status: Health) -> None:
        """The node behind `connection` says whether it serves."""
        if status is connection.health:
            return
        connection.health = status
        if status is Health.NOT_SERVING:
            # What the others said of themselves may be old: a leader that froze last said that it serves.
            self.router.doubt()
            self.router.heard(connection)
            self.lookout.does_not_serve(connection)
        self.router.forget_choices()

    def stops(self, connection: Connection) -> None:
        """The node behind `connection` says that it is about to end: it is left at once."""
        connection.health = Health.NOT_SERVING  # until it says otherwise, or comes back
        self.router.forget_choices()
        connection.abandon_streams()

    def leader_wanted(self) -> None:
        """A call found that what we know of the leader is out of date."""
        self.lookout.discover()

    def stats(self) -> ClientStats:
        """The counters now."""
        return ClientStats(
            self.calls,
            self.retries,
            self.failures,
            self.outcomes_unknown,
            self._breakers_opened,
            self._leader_changes,
        )

    def on_change(self, listener: Callable[[ConnectionState], None]) -> Callable[[], None]:
        """Call `listener` with each new state; the returned function ends that."""
        self._listeners.append(listener)

        def stop() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return stop

    # --- what the lookout sees --------------------------------------------------------------------------------------

    def connection_changed(self, connection: Connection, ready: bool) -> None:
        """A connection is there now, or is gone."""
        self.router.forget_choices()
        if ready:
            LOG.debug("raftkv client: connected to %s", connection.endpoint)
            connection.became_ready()
            self.router.heard(connection)  # its process answered the handshake just now
            self.lookout.connected(connection)
            self._set_state(ConnectionState.CONNECTED)
            self.wake_waiters()
        else:
            LOG.info("raftkv client: connection to %s is gone", connection.endpoint)
            self.lookout.disconnected(connection)
            connection.health = Health.UNKNOWN
            self.router.doubt()
            self.lookout.look_around()
            if not any(c.is_ready() for c in self.connections):
                self._set_state(ConnectionState.SUSPENDED)

    async def _declare_lost(self) -> None:
        """SUSPENDED for `lost_after_s` becomes LOST."""
        while True:
            while self.state is not ConnectionState.SUSPENDED:
                await self._state_change()
            try:
                async with asyncio.timeout(self._lost_after_s):
                    await self._state_change()
            except TimeoutError:
                self._set_state(ConnectionState.LOST)

    async def _state_change(self) -> None:
        assert self.loop is not None
        changed = self.loop.create_future()
        stop = self.on_change(lambda _: None if changed.done() else changed.set_result(None))
        try:
            await changed
        finally:
            stop()

    # --- news -------------------------------------------------------------------------------------------------------

    def wake_waiters(self) -> None:
        """What calls wait for may be there: have them look."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _set_state(self, state: ConnectionState) -> None:
        if state is self.state:
            return
        self.state = state
        for listener in tuple(self._listeners):
            try:
                listener(state)
            except Exception:
                LOG.exception("raftkv client: a connection listener failed")
        self.hooks.fire("connection", ConnectionChanged(state))

    def _breaker_changed(self, connection: Connection, state: BreakerState) -> None:
        if state is BreakerState.OPEN:
            self._breakers_opened += 1
            LOG.warning("raftkv client: %s failed repeatedly; leaving it alone for a while", connection.endpoint)
        self.hooks.fire("breaker", BreakerChanged(connection.endpoint, state))

    def _leader_seen(self) -> None:
        self._leader_changes += 1
        leader = self.router.leader()
        if leader is None and any(c.member_id == 0 for c in self.connections):
            self.lookout.discover()
        endpoint = leader.endpoint if leader is not None else None
        LOG.debug("raftkv client: member %x leads term %d", self.router.leader_id, self.router.term)
        self.wake_waiters()
        self.hooks.fire("leader", LeaderSeen(self.router.leader_id, self.router.term, endpoint))
