"""`Client`: the blocking twin of `AsyncClient`.

    Client (any thread) --coroutine--> the one loop thread of the process --result--> Client

One implementation, the asynchronous one; each method here hands over to its twin. All blocking clients of a process
share one daemon thread that runs their event loop (measured: 0.62 ms a call against 0.51 ms natively, equal from 16
threads on). At the end of the process the thread closes what was left open.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar

import grpc.aio

from raftkv.client.blocking_coordination import BlockingCoordination
from raftkv.client.breaker import BreakerConfig
from raftkv.client.client import (
    DEFAULT_BREAKER,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT,
    AsyncClient,
    Connectivity,
    settings_from_url,
)
from raftkv.client.cluster import Cluster
from raftkv.client.errors import Closed, RaftkvError
from raftkv.client.events import Hook
from raftkv.client.keys import Text
from raftkv.client.kv import Sort
from raftkv.client.maintenance import Maintenance
from raftkv.client.methods import Method, RequestT, ResponseT
from raftkv.client.options import DEFAULT, Consistency, Default, Routing, Timeout, TimeoutArg
from raftkv.client.pool import ClientStats
from raftkv.client.results import (
    Alarm,
    CompactResult,
    DeleteResult,
    EndpointStatus,
    HashKV,
    KeyValue,
    Member,
    PutResult,
    RangeResult,
    SavedSnapshot,
    TxnResult,
)
from raftkv.client.retry import Retry
from raftkv.client.routing import Purpose
from raftkv.client.tls import TLS
from raftkv.client.txn import Branches, Guard, TxnBuilder

T = TypeVar("T")
EXIT_TIMEOUT_S: Final = 2.0

BlockingTxn: TypeAlias = TxnBuilder[TxnResult]
"""What `Client.txn()` gives: like `Txn`, but `commit` returns the result itself."""


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.pid: Final = os.getpid()
        self.loop: Final = asyncio.new_event_loop()
        self.clients: Final[weakref.WeakSet[AsyncClient]] = weakref.WeakSet()
        self._thread: Final = threading.Thread(target=self._run, name="raftkv-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` in the loop and wait for its result; interrupting the wait cancels it."""
        if threading.get_ident() == self._thread.ident:
            coroutine.close()
            raise RaftkvError("a blocking client cannot be used in a callback of raftkv: it would wait for itself")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting; without effect where the call itself failed
            raise

    def finish(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """As `call`, but where the loop itself asks, it only sees to it that this is done."""
        if threading.get_ident() == self._thread.ident:
            asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        else:
            self.call(coroutine)

    def shut_down(self) -> None:
        """Close what is still open and stop; at the end of the process."""
        if self.pid != os.getpid() or not self._thread.is_alive():
            return
        future = asyncio.run_coroutine_threadsafe(self._close_clients(), self.loop)
        try:
            future.result(EXIT_TIMEOUT_S)
        except TimeoutError:
            future.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(EXIT_TIMEOUT_S)

    async def _close_clients(self) -> None:
        for client in tuple(self.clients):
            await client.close()


_lock = threading.Lock()
_shared: LoopThread | None = None


def loop_thread() -> LoopThread:
    """The loop thread of this process, started on first use; after a fork a new one."""
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():
            _shared = LoopThread()
            atexit.register(_shared.shut_down)
        return _shared


def _renew_lock() -> None:
    # Another thread of the parent may have held it in the moment of the fork, and nobody would ever release it here.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class _Handover:
    """Hands calls of one blocking client to its asynchronous twin."""

    __slots__ = ("_thread",)

    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._thread.pid != os.getpid():
            coroutine.close()
            raise Closed(
                f"this client belongs to process {self._thread.pid} and this process ({os.getpid()}) was forked from "
                "it; make a client in the child, started by `spawn` or by subprocess"
            )
        return self._thread.call(coroutine)

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """An asynchronous generator as a plain one."""
        try:
            while True:
                ended, item = self(_next(source))
                if ended:
                    return
                assert item is not None
                yield item
        finally:
            # An iteration that was left unfinished ends where it is collected: in any thread, even the loop's own.
            self._thread.finish(_end(source))


async def _next(source: AsyncIterator[T]) -> tuple[bool, T | None]:
    try:
        return False, await anext(source)
    except StopAsyncIteration:
        return True, None


async def _end(source: AsyncIterator[Any]) -> None:
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()


class BlockingCluster:
    """`client.cluster`; see `Cluster`."""

    __slots__ = ("_call", "_twin")

    def __init__(self, twin: Cluster, call: _Handover) -> None:
        self._twin = twin
        self._call = call

    def members(self, *, linearizable: bool = True, timeout: TimeoutArg = DEFAULT) -> tuple[Member, ...]:
        """As `Cluster.members`."""
        return self._call(self._twin.members(linearizable=linearizable, timeout=timeout))

    def status(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[EndpointStatus, ...]:
        """As `Cluster.status`."""
        return self._call(self._twin.status(timeout=timeout))

    def move_leader(self, target: int | str, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `Cluster.move_leader`."""
        self._call(self._twin.move_leader(target, timeout=timeout))


class BlockingMaintenance:
    """`client.maintenance`; see `Maintenance`."""

    __slots__ = ("_call", "_twin")

    def __init__(self, twin: Maintenance, call: _Handover) -> None:
        self._twin = twin
        self._call = call

    def hash_kv(
        self, revision: int = 0, *, endpoint: str | None = None, timeout: TimeoutArg = DEFAULT
    ) -> tuple[HashKV, ...]:
        """As `Maintenance.hash_kv`."""
        return self._call(self._twin.hash_kv(revision, endpoint=endpoint, timeout=timeout))

    def defragment(self, *, endpoint: str | None = None, timeout: TimeoutArg = None) -> tuple[str, ...]:
        """As `Maintenance.defragment`."""
        return self._call(self._twin.defragment(endpoint=endpoint, timeout=timeout))

    def alarms(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[Alarm, ...]:
        """As `Maintenance.alarms`."""
        return self._call(self._twin.alarms(timeout=timeout))

    def disarm(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[Alarm, ...]:
        """As `Maintenance.disarm`."""
        return self._call(self._twin.disarm(timeout=timeout))

    def snapshot(self, *, endpoint: str | None = None, timeout: TimeoutArg = None) -> Iterator[bytes]:
        """As `Maintenance.snapshot`."""
        return self._call.iterate(self._twin.snapshot(endpoint=endpoint, timeout=timeout))

    def save_snapshot(
        self, path: str | os.PathLike[str], *, endpoint: str | None = None, timeout: TimeoutArg = None
    ) -> SavedSnapshot:
        """As `Maintenance.save_snapshot`."""
        return self._call(self._twin.save_snapshot(path, endpoint=endpoint, timeout=timeout))


class Client(BlockingCoordination):
    """A client of a raftkv (or etcd) cluster that blocks; safe to be used from many threads at once.

    Arguments, methods, results and errors are those of `AsyncClient`. Callbacks (`event_hooks`, `state.on_change`) run
    in raftkv's own thread and must not use a blocking client.
    """

    _call: _Handover

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
        twin = AsyncClient(
            endpoints,
            timeout=timeout,
            retry=retry,
            namespace=namespace,
            consistency=consistency,
            routing=routing,
            breaker=breaker,
            event_hooks=event_hooks,
            channel_options=channel_options,
            interceptors=interceptors,
            lost_after_s=lost_after_s,
            tls=tls,
        )
        self._use(twin, loop_thread())

    def _use(self, twin: AsyncClient, thread: LoopThread) -> None:
        self._twin = twin
        self._thread = thread
        self._call = _Handover(thread)
        self.cluster = BlockingCluster(twin.cluster, self._call)
        self.maintenance = BlockingMaintenance(twin.maintenance, self._call)
        thread.clients.add(twin)

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """As `AsyncClient.from_url`."""
        return cls(**{**settings_from_url(url), **settings})

    def with_options(
        self,
        *,
        timeout: TimeoutArg = DEFAULT,
        retry: Retry | Default | None = DEFAULT,
        namespace: Text | None = None,
        consistency: Consistency | None = None,
    ) -> Self:
        """As `AsyncClient.with_options`."""
        clone = type(self).__new__(type(self))
        twin = self._twin.with_options(timeout=timeout, retry=retry, namespace=namespace, consistency=consistency)
        clone._use(twin, self._thread)
        return clone

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints, normalised."""
        return self._twin.endpoints

    @property
    def namespace(self) -> bytes:
        """As `AsyncClient.namespace`."""
        return self._twin.namespace

    @property
    def state(self) -> Connectivity:
        """As `AsyncClient.state`."""
        return self._twin.state

    def stats(self) -> ClientStats:
        """As `AsyncClient.stats`."""
        return self._twin.stats()

    def connect(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `AsyncClient.connect`."""
        self._call(self._twin.connect(timeout=timeout))

    def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        purpose: Purpose = Purpose.READ,
        *,
        timeout: TimeoutArg = DEFAULT,
    ) -> ResponseT:
        """As `AsyncClient.call`."""
        return self._call(self._twin.call(method, request, purpose, timeout=timeout))

    def close(self, *, grace_s: float = 0.0) -> None:
        """As `AsyncClient.close`. In a forked child this does nothing: the connections are the parent's."""
        if self._thread.pid == os.getpid():
            self._call(self._twin.close(grace_s=grace_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({','.join(self.endpoints)!r})"

    def get(
        self, key: Text, *, revision: int = 0, serializable: bool | None = None, timeout: TimeoutArg = DEFAULT
    ) -> KeyValue | None:
        """As `AsyncClient.get`."""
        return self._call(self._twin.get(key, revision=revision, serializable=serializable, timeout=timeout))

    def range(
        self,
        key: Text,
        end: Text | None = None,
        *,
        prefix: bool = False,
        limit: int = 0,
        sort: Sort | None = None,
        keys_only: bool = False,
        count_only: bool = False,
        revision: int = 0,
        min_mod_revision: int = 0,
        max_mod_revision: int = 0,
        min_create_revision: int = 0,
        max_create_revision: int = 0,
        serializable: bool | None = None,
        timeout: TimeoutArg = DEFAULT,
    ) -> RangeResult:
        """As `AsyncClient.range`."""
        return self._call(
            self._twin.range(
                key,
                end,
                prefix=prefix,
                limit=limit,
                sort=sort,
                keys_only=keys_only,
                count_only=count_only,
                revision=revision,
                min_mod_revision=min_mod_revision,
                max_mod_revision=max_mod_revision,
                min_create_revision=min_create_revision,
                max_create_revision=max_create_revision,
                serializable=serializable,
                timeout=timeout,
            )
        )

    def scan(
        self,
        prefix: Text,
        *,
        page_size: int = 500,
        revision: int = 0,
        keys_only: bool = False,
        serializable: bool | None = None,
        timeout: TimeoutArg = DEFAULT,
    ) -> Iterator[KeyValue]:
        """As `AsyncClient.scan`."""
        pages = self._twin.pages(
            prefix,
            page_size=page_size,
            revision=revision,
            keys_only=keys_only,
            serializable=serializable,
            timeout=timeout,
        )
        for page in self._call.iterate(pages):
            yield from page

    def put(
        self,
        key: Text,
        value: Text,
        *,
        lease: int = 0,
        prev: bool = False,
        if_revision: int | None = None,
        if_absent: bool = False,
        ignore_value: bool = False,
        ignore_lease: bool = False,
        guards: Sequence[Guard] = (),
        timeout: TimeoutArg = DEFAULT,
    ) -> PutResult:
        """As `AsyncClient.put`."""
        return self._call(
            self._twin.put(
                key,
                value,
                lease=lease,
                prev=prev,
                if_revision=if_revision,
                if_absent=if_absent,
                ignore_value=ignore_value,
                ignore_lease=ignore_lease,
                guards=guards,
                timeout=timeout,
            )
        )

    def delete(
        self,
        key: Text,
        end: Text | None = None,
        *,
        prefix: bool = False,
        prev: bool = False,
        if_revision: int | None = None,
        guards: Sequence[Guard] = (),
        timeout: TimeoutArg = DEFAULT,
    ) -> DeleteResult:
        """As `AsyncClient.delete`."""
        return self._call(
            self._twin.delete(
                key, end, prefix=prefix, prev=prev, if_revision=if_revision, guards=guards, timeout=timeout
            )
        )

    def txn(self, *, guards: Sequence[Guard] = ()) -> BlockingTxn:
        """As `AsyncClient.txn`; `commit()` returns the result itself."""

        def send(branches: Branches, timeout: TimeoutArg) -> TxnResult:
            return self.commit(branches, guards=guards, timeout=timeout)

        return TxnBuilder(send)

    def commit(self, branches: Branches, *, guards: Sequence[Guard] = (), timeout: TimeoutArg = DEFAULT) -> TxnResult:
        """As `AsyncClient.commit`."""
        return self._call(self._twin.commit(branches, guards=guards, timeout=timeout))

    def update(
        self,
        key: Text,
        change: Callable[[KeyValue | None], Text],
        *,
        max_retries: int = 16,
        timeout: TimeoutArg = DEFAULT,
    ) -> KeyValue:
        """As `AsyncClient.update`. `change` is called in raftkv's own thread."""
        return self._call(self._twin.update(key, change, max_retries=max_retries, timeout=timeout))

    def compact(self, revision: int, *, physical: bool = False, timeout: TimeoutArg = DEFAULT) -> CompactResult:
        """As `AsyncClient.compact`."""
        return self._call(self._twin.compact(revision, physical=physical, timeout=timeout))
