"""`AsyncClient`: the SDK's front door.

    async with AsyncClient("127.0.0.1:2379,127.0.0.1:2479,127.0.0.1:2579") as client:
        await client.put("greeting", "hello")
        item = await client.get("greeting")

It connects with its first call, to all endpoints at once, and from then on belongs to that event loop and process. It
speaks to raftkv and to etcd >= 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import grpc.aio

from raftkv.client.breaker import BreakerConfig
from raftkv.client.cluster import Cluster
from raftkv.client.election import ElectionCalls
from raftkv.client.endpoints import parse_url, resolve_endpoints
from raftkv.client.errors import ConfigError
from raftkv.client.events import Hook, Hooks
from raftkv.client.keys import Namespace, Text, to_bytes
from raftkv.client.kv import KV, Context
from raftkv.client.lease import LeaseCalls
from raftkv.client.lock import LockCalls
from raftkv.client.maintenance import Maintenance
from raftkv.client.methods import Method, RequestT, ResponseT
from raftkv.client.options import (
    CONSISTENCIES,
    DEFAULT,
    ROUTINGS,
    Consistency,
    Default,
    Routing,
    Timeout,
    TimeoutArg,
    check_seconds,
    timeout_from,
)
from raftkv.client.pool import ClientStats, ConnectionState, Pool
from raftkv.client.retry import Retry
from raftkv.client.routing import Purpose
from raftkv.client.tls import TLS
from raftkv.client.watch import WatchCalls

DEFAULT_TIMEOUT: Final = Timeout()
DEFAULT_RETRY: Final = Retry()
DEFAULT_BREAKER: Final = BreakerConfig()


class Connectivity:
    """`client.state`: how the client stands with its cluster, kazoo's model."""

    __slots__ = ("_pool",)

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def current(self) -> ConnectionState:
        """The state now."""
        return self._pool.state

    def on_change(self, listener: Callable[[ConnectionState], None]) -> Callable[[], None]:
        """Call `listener` with each new state, in the client's event loop; it must not block.

        Returns:
            A function that ends it.
        """
        return self._pool.on_change(listener)


class AsyncClient(KV, LeaseCalls, WatchCalls, LockCalls, ElectionCalls):
    """A client of a raftkv (or etcd) cluster, for asyncio.

    Args:
        endpoints: "h1:2379,h2:2379" or a sequence; None takes RAFTKV_ENDPOINTS, ETCDCTL_ENDPOINTS, 127.0.0.1:2379.
        timeout: seconds for a call with all its retries, or a `Timeout`; None waits for ever.
        retry: how long to wait between attempts; None tries everything once.
        namespace: a prefix that all keys get, and lose again in answers.
        consistency: of reads that do not say: "linearizable", or "serializable" (fast, perhaps stale).
        routing: "auto" sends what can be repeated (reads, and writes in a session) to the leader, and other writes to
            another member, which survives the leader's death and knows what became of them (to etcd, whose followers
            do not: to the leader too, and none while there is no leader); "leader" sends all to the leader; "any" does
            not care.
        breaker: when an endpoint is left alone.
        event_hooks: callbacks by event: `attempt_failed`, `breaker`, `leader`, `connection`.
        channel_options: gRPC channel options; they win over the SDK's.
        interceptors: of grpc.aio, for tracing and the like.
        lost_after_s: how long without any connection until the state is LOST.
        tls: whom to trust and what to show; None speaks plain text.
    Raises:
        ConfigError: names the argument that is wrong. Nothing has started.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        timeout: float | Timeout | None = DEFAULT_TIMEOUT,
        retry: Retry | None = DEFAULT_RETRY,
        namespace: Text = b"",
        consistency: Consistency = "linearizable",
        routing: Routing = "auto",
        breaker: BreakerConfig = DEFAULT_BREAKER,
        event_hooks: Mapping[str, Hook | Sequence[Hook]] | None = None,
        channel_options: Iterable[tuple[str, Any]] = (),
        interceptors: Iterable[grpc.aio.ClientInterceptor] = (),
        lost_after_s: float = 10.0,
        tls: TLS | None = None,
    ) -> None:
        if routing not in ROUTINGS:
            raise ConfigError("routing", f"{routing!r} is not one of {', '.join(ROUTINGS)}")
        check_seconds("lost_after_s", lost_after_s)
        _check_consistency(consistency)
        self._owner = True
        pool = Pool(
            resolve_endpoints(endpoints, tls=tls is not None),
            routing=routing,
            breaker=breaker,
            hooks=Hooks(event_hooks),
            channel_options=channel_options,
            interceptors=interceptors,
            lost_after_s=lost_after_s,
            tls=tls,
        )
        limits = timeout_from(timeout, DEFAULT_TIMEOUT)
        self._use(Context(pool, limits, retry, Namespace(to_bytes(namespace, "namespace")), consistency))

    def _use(self, context: Context) -> None:
        self._context = context
        self.cluster = Cluster(context)
        self.maintenance = Maintenance(context)
        self.state = Connectivity(context.pool)

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """Make a client from `raftkv://h1:2379,h2:2379/namespace?timeout=2&routing=leader&consistency=serializable`.

        Args:
            url: no host means what `endpoints=None` means.
            settings: as of the constructor; they win over the URL.
        Raises:
            ConfigError: names the part of the URL that is wrong.
        """
        return cls(**{**settings_from_url(url), **settings})

    def with_options(
        self,
        *,
        timeout: TimeoutArg = DEFAULT,
        retry: Retry | Default | None = DEFAULT,
        namespace: Text | None = None,
        consistency: Consistency | None = None,
    ) -> Self:
        """A client with other settings over the same connections. Closing it leaves this one open.

        Args:
            timeout, retry, consistency: as of the constructor; left out, they stay.
            namespace: replaces this client's, it is not appended to it.
        """
        context = self._context
        if timeout is not DEFAULT:
            context = replace(context, timeout=timeout_from(timeout, context.timeout))
        if not isinstance(retry, Default):
            context = replace(context, retry=retry)
        if namespace is not None:
            context = replace(context, namespace=Namespace(to_bytes(namespace, "namespace")))
        if consistency is not None:
            _check_consistency(consistency)
            context = replace(context, consistency=consistency)
        clone = type(self).__new__(type(self))
        clone._owner = False
        clone._use(context)
        return clone

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints, normalised."""
        return self._context.pool.endpoints

    @property
    def namespace(self) -> bytes:
        """The prefix that all keys of this client get on the wire, and the key in a `Guard` made by hand."""
        return self._context.namespace.prefix

    def stats(self) -> ClientStats:
        """Counters since the client was made; clones count together."""
        return self._context.pool.stats()

    async def connect(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """Connect now instead of with the first call.

        Raises:
            Unavailable: no endpoint could be reached in time.
        """
        await self._context.pool.connect(timeout_from(timeout, self._context.timeout).total)

    async def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        purpose: Purpose = Purpose.READ,
        *,
        timeout: TimeoutArg = DEFAULT,
    ) -> ResponseT:
        """Make one call of `raftkv.client.methods` with protobuf messages, retried as any other call.

        For what the typed methods leave out. Keys are sent as they are, without the client's namespace.

        Args:
            method: which RPC.
            request: its request message.
            purpose: what the request needs: a WRITE is never repeated where its outcome is unknown, unless
                it goes in a session.
            timeout: as in every call.
        Raises:
            RaftkvError: as every call.
        """
        return await self._context.call(method, request, purpose, timeout)

    async def close(self, *, grace_s: float = 0.0) -> None:
        """End all connections and everything that runs in the background. Calls made after this raise Closed.

        Args:
            grace_s: how long calls in flight may go on; those that do not end in time raise Closed.
        """
        if self._owner:
            await self._context.pool.close(grace_s)

    async def __aenter__(self) -> Self:
        self._context.pool.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({','.join(self.endpoints)!r})"


def settings_from_url(url: str) -> dict[str, Any]:
    """The constructor's settings that a URL stands for."""
    parsed = parse_url(url)
    settings: dict[str, Any] = {"endpoints": parsed.endpoints, "namespace": parsed.namespace, **parsed.options}
    if "timeout" in settings:
        try:
            settings["timeout"] = float(settings["timeout"])
        except ValueError:
            raise ConfigError("url", f"timeout={settings['timeout']!r} is not a number of seconds") from None
    return settings


def _check_consistency(consistency: str) -> None:
    if consistency not in CONSISTENCIES:
        raise ConfigError("consistency", f"{consistency!r} is not one of {', '.join(CONSISTENCIES)}")
