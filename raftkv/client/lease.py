"""Leases: keys bound to one vanish when it is not kept alive.

    HELD --no renewal confirmed for ttl/2--> AT_RISK --deadline passed, or the server says it is gone--> LOST
      ^------------- renewal confirmed ---------|                                  (final for this handle)

The deadline counts from the moment the last confirmed renewal was *sent*, on a clock that does not stop in a suspend.
What a handle says of itself is computed from that clock whenever it is asked: it is right even if this process was
stopped or its event loop blocked.
"""

from __future__ import annotations

import asyncio
import enum
import math
import secrets
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from raftkv._pb import lease_pb2
from raftkv.client import callbacks, clock
from raftkv.client.errors import (
    Closed,
    ConditionFailed,
    ConfigError,
    LeaseLost,
    LeaseNotFound,
    OutcomeUnknown,
    RaftkvError,
)
from raftkv.client.keeper import Keeper
from raftkv.client.methods import LEASE_GRANT, LEASE_LEASES, LEASE_REVOKE, LEASE_TIME_TO_LIVE
from raftkv.client.options import DEFAULT, TimeoutArg, check_seconds, timeout_from
from raftkv.client.routing import Purpose

if TYPE_CHECKING:
    from raftkv.client.kv import Context

TTL_MAX_S: Final = 9_000_000_000
REVOKE_TIMEOUT_S: Final = 2.0
UNKNOWN_TRIES_MAX: Final = 5  # grants are named by us, so that asking again after a lost answer is harmless


class LeaseState(enum.Enum):
    """How a lease stands, as its holder may believe."""

    HELD = "held"
    AT_RISK = "at risk"
    """No renewal was confirmed for half of its time; still certainly alive."""
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """A lease that was granted."""

    id: int
    ttl_s: float
    """As granted: the server raises what is too short."""


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """What the cluster says of a lease."""

    id: int
    remaining_s: float
    granted_s: float
    keys: tuple[bytes, ...] = ()
    """The keys bound to it, if asked for; as on the wire, namespace included."""


class LeaseCalls:
    """The lease half of `AsyncClient`."""

    _context: Context

    def lease(self, ttl: float, *, keep_alive: bool = True, timeout: TimeoutArg = DEFAULT) -> Lease:
        """A lease that is kept alive by itself: `async with client.lease(10) as lease:` or `await client.lease(10)`.

        Args:
            ttl: seconds; the cluster has a minimum (etcd's: 2) and raises what is below.
            keep_alive: renew it every third of its time, until it is revoked or the client closed. Without, it is
                lost when its time is over, which is told as any loss is.
            timeout: for granting.
        """
        check_ttl(ttl)
        return Lease(self._context, ttl, keep_alive, timeout)

    async def grant_lease(self, ttl: float, *, id: int = 0, timeout: TimeoutArg = DEFAULT) -> LeaseGrant:
        """Grant a lease that nobody keeps alive.

        Args:
            ttl: seconds.
            id: the lease's id; 0 lets the SDK choose.
        Raises:
            ConditionFailed: `id` is taken (code LEASE_EXISTS).
            Unavailable: it was not done.
            OutcomeUnknown: perhaps done, several times without an answer; it then runs out by itself.

        Same as etcd v3 `LeaseGrant`.
        """
        check_ttl(ttl)
        return await grant(self._context, ttl, timeout, id)

    async def revoke_lease(self, id: int, *, timeout: TimeoutArg = DEFAULT) -> None:
        """End a lease and delete its keys, in one revision.

        Raises:
            LeaseNotFound: there is no such lease (any more).
            Unavailable, OutcomeUnknown: as in `put`; repeating it is harmless.

        Same as etcd v3 `LeaseRevoke`.
        """
        await self._context.call(LEASE_REVOKE, lease_pb2.LeaseRevokeRequest(ID=id), Purpose.WRITE, timeout)

    async def lease_info(self, id: int, *, keys: bool = False, timeout: TimeoutArg = DEFAULT) -> LeaseInfo:
        """What is left of a lease.

        Raises:
            LeaseNotFound: there is no such lease (any more).

        Same as etcd v3 `LeaseTimeToLive`.
        """
        request = lease_pb2.LeaseTimeToLiveRequest(ID=id, keys=keys)
        response = await self._context.call(LEASE_TIME_TO_LIVE, request, Purpose.READ, timeout)
        if response.TTL < 0:
            raise LeaseNotFound(f"lease {id:x} does not exist", code="LEASE_NOT_FOUND")
        remaining_s = response.ttl_ms / 1000 if response.ttl_ms else float(response.TTL)
        return LeaseInfo(id, remaining_s, float(response.grantedTTL), tuple(response.keys))

    async def leases(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[int, ...]:
        """The ids of all leases. Same as etcd v3 `LeaseLeases`."""
        response = await self._context.call(LEASE_LEASES, lease_pb2.LeaseLeasesRequest(), Purpose.READ, timeout)
        return tuple(lease.ID for lease in response.leases)


class Lease:
    """A lease that is kept alive by itself; made by `client.lease`.

    Attributes:
        lost: set when the lease is lost; revoking it yourself sets it too.
    """

    def __init__(
        self, context: Context, ttl_s: float, keep_alive: bool, timeout: TimeoutArg, linger_s: float = 0.0
    ) -> None:
        """
        Args:
            linger_s: so much longer does the cluster keep it than its holder believes in it.
        """
        self._context = context
        self._timeout = timeout
        self._keep_alive = keep_alive
        self._asked_ttl_s = ttl_s
        self._linger_s = linger_s
        self._gone = ""  # why it is lost for certain; "" while it is not
        self._watchers: Final = callbacks.Callbacks()
        self._last_words = False  # the cluster is being told in the background that it is over
        self.chosen: Final = secrets.randbits(62) + 1  # what its id will be: named by us, so that others need not wait
        self.id = 0  # 0: not granted yet
        self.ttl_s = 0.0
        self._decided: asyncio.Future[None] | None = None  # while a late grant waits for its first renewal
        self.confirmed = 0.0  # when the last confirmed renewal was sent, by `clock.now()`
        self.lost: Final = asyncio.Event()

    async def grant(self) -> Self:
        """Have it granted; entering or awaiting it does the same. Raises as `grant_lease`."""
        if self.id:
            raise ConfigError("lease", "it has been granted already")
        pool = self._context.pool
        pool.enter()
        sent = clock.now()
        try:
            granted = await grant(self._context, self._asked_ttl_s + self._linger_s, self._timeout, self.chosen)
        except (asyncio.CancelledError, OutcomeUnknown):
            self._revoke_in_background()
            raise
        self.id, self.ttl_s = granted.id, granted.ttl_s - self._linger_s
        self.confirmed = sent
        if not self._keep_alive:
            keeper_of(self._context).watch(self)
        else:
            if clock.now() >= self.deadline:
                # The answer took longer than the lease lasts (etcd takes 7 s when a leader dies), so it may be over or
                # have just begun: nobody holds anything by it yet, so a renewal may decide.
                self._decided = asyncio.get_running_loop().create_future()
            keeper_of(self._context).add(self)
            if self._decided is not None:
                try:
                    await self._decided
                except asyncio.CancelledError:
                    self.abandon()
                    raise
                finally:
                    self._decided = None
        return self

    @property
    def deadline(self) -> float:
        """Until when it is certainly alive, by `raftkv.client.clock.now()`."""
        return clock.lease_deadline(self.confirmed, self.ttl_s)

    @property
    def state(self) -> LeaseState:
        """How it stands now. Reads the clock; never waits."""
        moment = clock.now()
        if self._gone or not self.id or moment >= self.deadline:
            return LeaseState.LOST
        return LeaseState.AT_RISK if moment >= self.confirmed + self.ttl_s / 2 else LeaseState.HELD

    @property
    def why_lost(self) -> str:
        """Why it is lost; "" while it is not."""
        if self._gone:
            return self._gone
        return "" if self.state is not LeaseState.LOST else f"no renewal was confirmed within {self.ttl_s:g} s"

    def remaining(self) -> float:
        """Seconds for which it is certainly still alive; 0.0 when it is lost. Reads the clock; never waits."""
        return 0.0 if self.state is LeaseState.LOST else max(0.0, self.deadline - clock.now())

    def check(self) -> None:
        """Raise LeaseLost unless it is certainly alive. Reads the clock; never waits."""
        if self.state is LeaseState.LOST:
            raise LeaseLost(f"lease {self.id:x} is lost: {self.why_lost}", code="LEASE_LOST")

    def on_lost(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` in the event loop when it is lost; at once where it is lost already.

        Returns:
            A function that ends it.
        """
        if not self.lost.is_set():
            return self._watchers.add(callback)
        callbacks.call(callback)
        return lambda: None

    def renewed(self, sent: float, ttl_s: float) -> None:
        """A renewal sent at `sent` was confirmed. Lost is lost, even if the lease turns out to be alive."""
        if self.state is not LeaseState.LOST or (self._decided is not None and not self._gone):
            self.confirmed = max(self.confirmed, sent)
            self.ttl_s = ttl_s - self._linger_s
            self._decide()

    @property
    def undecided(self) -> bool:
        """Whether it was granted so late that its first renewal decides whether it is alive."""
        return self._decided is not None

    def _decide(self) -> None:
        if self._decided is not None and not self._decided.done():
            self._decided.set_result(None)

    def end(self, reason: str) -> None:
        """It is lost, for this reason."""
        if self.lost.is_set():
            return
        self._gone = self._gone or reason
        self.lost.set()
        self._decide()
        self._watchers.fire()

    async def revoke(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """End it, and delete its keys. It is no error if it is gone already.

        Where that fails or is cancelled, it is tried a little longer in the background.

        Raises:
            Unavailable, OutcomeUnknown: the cluster could not be told; it then runs out by itself.
        """
        if not self.id:
            return
        keeper_of(self._context).remove(self)
        self.end("it was revoked")
        try:
            await self._revoke(timeout)
        except BaseException:
            self._revoke_in_background()  # perhaps it was not sent yet, and others would wait for it to run out
            raise

    async def _revoke(self, timeout: TimeoutArg) -> None:
        for attempt in range(UNKNOWN_TRIES_MAX):
            try:
                await self._context.call(LEASE_REVOKE, lease_pb2.LeaseRevokeRequest(ID=self.id), Purpose.WRITE, timeout)
            except LeaseNotFound:
                return
            except OutcomeUnknown:
                if attempt == UNKNOWN_TRIES_MAX - 1:
                    raise
            else:
                return

    def abandon(self) -> None:
        """Stop keeping it alive and revoke it in the background: for whoever has no time to wait.

        Closing the client still waits for that, a short time.
        """
        if self.id and not self._context.pool.closed:
            keeper_of(self._context).remove(self)
            self.end("it was revoked")
            self._revoke_in_background()

    def let_run_out(self) -> None:
        """Stop keeping it alive, and leave it to the cluster to end it in its time."""
        if self.id:
            keeper_of(self._context).remove(self)
            self.end(self.why_lost or "it was given up")

    def _revoke_in_background(self) -> None:
        pool = self._context.pool
        if not self._last_words and not pool.closed:
            self._last_words = True
            pool.spawn_last_words(self._revoke_quietly(self.chosen), f"revoke {self.chosen:x}")

    async def _revoke_quietly(self, id: int) -> None:
        request = lease_pb2.LeaseRevokeRequest(ID=id)
        try:
            await self._context.call(LEASE_REVOKE, request, Purpose.WRITE, REVOKE_TIMEOUT_S)
        except RaftkvError:
            return  # it runs out by itself

    def __await__(self) -> Generator[Any, None, Self]:
        return self.grant().__await__()

    async def __aenter__(self) -> Self:
        return self if self.id else await self.grant()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.abandon()
            return
        try:
            await self.revoke(timeout=REVOKE_TIMEOUT_S)
        except Closed:
            return
        except RaftkvError:
            if error is None:
                raise

    def __repr__(self) -> str:
        return f"<Lease {self.id:x} {self.state.value} {self.remaining():.2f} s>"


def keeper_of(context: Context) -> Keeper:
    """The one keeper of a client and its clones."""
    keeper = context.pool.parts.get("keeper")
    if keeper is None:
        keeper = context.pool.parts["keeper"] = Keeper(context.pool)
    assert isinstance(keeper, Keeper)
    return keeper


def check_ttl(ttl: float, field: str = "ttl") -> None:
    """Raise ConfigError unless `ttl` is a possible time to live."""
    check_seconds(field, ttl)
    if ttl > TTL_MAX_S:
        raise ConfigError(field, f"{ttl:g} s is more than {TTL_MAX_S} s")


async def grant(context: Context, ttl_s: float, timeout: TimeoutArg, id: int = 0) -> LeaseGrant:
    """Grant a lease under a name of our own, so that a lost answer can be asked for again."""
    chosen = id or secrets.randbits(62) + 1
    request = lease_pb2.LeaseGrantRequest(TTL=math.ceil(ttl_s), ID=chosen, ttl_ms=math.ceil(ttl_s * 1000))
    limits = timeout_from(timeout, context.timeout)
    for attempt in range(UNKNOWN_TRIES_MAX):
        try:
            response = await context.call(LEASE_GRANT, request, Purpose.WRITE, limits)
        except OutcomeUnknown:
            if attempt == UNKNOWN_TRIES_MAX - 1:
                raise
        except ConditionFailed as error:
            if error.code != "LEASE_EXISTS" or attempt == 0:
                raise
            # Ours, from an attempt whose answer was lost. How long it is must be asked for.
            info = lease_pb2.LeaseTimeToLiveRequest(ID=chosen)
            left = await context.call(LEASE_TIME_TO_LIVE, info, Purpose.READ, limits)
            return LeaseGrant(chosen, float(left.grantedTTL))
        else:
            return LeaseGrant(response.ID, response.ttl_ms / 1000 if response.ttl_ms else float(response.TTL))
    raise AssertionError("unreachable")
