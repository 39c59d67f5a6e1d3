"""The recipes for threads: blocking twins, made with a `raftkv.Client`.

    from raftkv.recipes.blocking import Semaphore
    with Semaphore(client, "database", 5).permit() as permit:
        ...

Arguments, results and errors are those of the asynchronous ones. A thread cannot be cancelled: a body goes on when what
it holds is lost, until it looks (`check()`, `remaining()`, `lost`, a guarded write) or ends, and is then left with
LockLost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from raftkv.client import DEFAULT, Client, Guard, KeyValue, LockLost, LockState, RaftkvError, Unavailable
from raftkv.client.blocking_coordination import BlockingLeadership, in_loop
from raftkv.client.keys import Text
from raftkv.client.loss import loss_of
from raftkv.client.options import Default, TimeoutArg
from raftkv.client.txn import Op
from raftkv.recipes import barrier, counter, double_barrier, queue, read_write_lock, registry, semaphore
from raftkv.recipes import priority_queue as priority_queues
from raftkv.recipes.holding import Holding

T = TypeVar("T")


class BlockingHolding:
    """As `Holding`: a permit, one side of a read-write lock, a claim, a party."""

    def __init__(self, client: Client, twin: Holding) -> None:
        self._call = client._call
        self._twin = twin
        self.lost: threading.Event = threading.Event()
        """Set when it is lost; a new one for each acquisition."""

    @property
    def state(self) -> LockState:
        """As `Holding.state`."""
        return self._twin.state

    @property
    def held(self) -> bool:
        """As `Holding.held`."""
        return self._twin.held

    @property
    def fence(self) -> int:
        """As `Holding.fence`."""
        return self._twin.fence

    @property
    def key(self) -> bytes:
        """As `Holding.key`."""
        return self._twin.key

    def remaining(self) -> float:
        """As `Holding.remaining`."""
        return self._twin.remaining()

    def check(self) -> None:
        """As `Holding.check`."""
        self._twin.check()

    def guard(self) -> Guard:
        """As `Holding.guard`."""
        return self._twin.guard()

    def when_lost(self, callback: Callable[[], None]) -> None:
        """As `Holding.when_lost`. `callback` is called in raftkv's own thread, and must not block."""
        self._call(in_loop(lambda: self._twin.when_lost(callback)))

    def acquire(self, *, timeout: float | Default | None = DEFAULT) -> Self:
        """As `Holding.acquire`."""
        self._call(self._acquire(timeout))
        return self

    async def _acquire(self, timeout: float | Default | None) -> None:
        await self._twin.acquire(timeout=timeout)
        self.lost = lost = loss_of(self._twin._present())
        self._twin.when_lost(lost.set)

    def release(self, *, timeout: TimeoutArg = DEFAULT) -> None:
        """As `Holding.release`."""
        self._call(self._twin.release(timeout=timeout))

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._twin.__aexit__(kind, error, traceback))


class Semaphore:
    """As `raftkv.recipes.Semaphore`."""

    def __init__(self, client: Client, name: Text, permits: int, ttl: float = 10.0) -> None:
        self._client = client
        self._twin = semaphore.Semaphore(client._twin, name, permits, ttl)

    def permit(self, *, owner: Text = b"", timeout: float | None = None) -> BlockingHolding:
        """As `Semaphore.permit`."""
        return BlockingHolding(self._client, self._twin.permit(owner=owner, timeout=timeout))

    @property
    def permits(self) -> int:
        """As `Semaphore.permits`."""
        return self._twin.permits

    def holders(self) -> tuple[KeyValue, ...]:
        """As `Semaphore.holders`."""
        return self._client._call(self._twin.holders())


class ReadWriteLock:
    """As `raftkv.recipes.ReadWriteLock`."""

    def __init__(self, client: Client, name: Text, ttl: float = 10.0) -> None:
        self._client = client
        self._twin = read_write_lock.ReadWriteLock(client._twin, name, ttl)

    def read(self, *, owner: Text = b"", timeout: float | None = None) -> BlockingHolding:
        """As `ReadWriteLock.read`."""
        return BlockingHolding(self._client, self._twin.read(owner=owner, timeout=timeout))

    def write(self, *, owner: Text = b"", timeout: float | None = None) -> BlockingHolding:
        """As `ReadWriteLock.write`."""
        return BlockingHolding(self._client, self._twin.write(owner=owner, timeout=timeout))


class Barrier:
    """As `raftkv.recipes.Barrier`."""

    def __init__(self, client: Client, name: Text) -> None:
        self._call = client._call
        self._twin = barrier.Barrier(client._twin, name)

    def close(self, *, owner: Text = b"", lease: int = 0, timeout: TimeoutArg = DEFAULT) -> bool:
        """As `Barrier.close`."""
        return self._call(self._twin.close(owner=owner, lease=lease, timeout=timeout))

    def open(self, *, timeout: TimeoutArg = DEFAULT) -> bool:
        """As `Barrier.open`."""
        return self._call(self._twin.open(timeout=timeout))

    def is_closed(self, *, timeout: TimeoutArg = DEFAULT) -> bool:
        """As `Barrier.is_closed`."""
        return self._call(self._twin.is_closed(timeout=timeout))

    def wait(self, *, timeout: float | None = None) -> None:
        """As `Barrier.wait`."""
        self._call(self._twin.wait(timeout=timeout))


class DoubleBarrier(BlockingHolding):
    """As `raftkv.recipes.DoubleBarrier`."""

    def __init__(
        self,
        client: Client,
        name: Text,
        parties: int,
        ttl: float = 10.0,
        *,
        owner: Text = b"",
        timeout: float | None = None,
    ) -> None:
        party = double_barrier.DoubleBarrier(client._twin, name, parties, ttl, owner=owner, timeout=timeout)
        super().__init__(client, party)
        self._party = party

    def leave(self) -> None:
        """As `DoubleBarrier.leave`."""
        self._call(self._party.leave())


class Queue:
    """As `raftkv.recipes.Queue`."""

    def __init__(self, client: Client, name: Text) -> None:
        self._client = client
        self._twin = queue.Queue(client._twin, name)

    def put(self, value: Text, *, timeout: TimeoutArg = DEFAULT) -> bytes:
        """As `Queue.put`."""
        return self._client._call(self._twin.put(value, timeout=timeout))

    def get(self, *, timeout: float | None = None) -> queue.Item:
        """As `Queue.get`."""
        return self._client._call(self._twin.get(timeout=timeout))

    def take(self, *, ttl: float = 10.0, owner: Text = b"", timeout: float | None = None) -> BlockingClaim:
        """As `Queue.take`."""
        return BlockingClaim(self._client, self._twin.take(ttl=ttl, owner=owner, timeout=timeout))

    def size(self, *, timeout: TimeoutArg = DEFAULT) -> int:
        """As `Queue.size`."""
        return self._client._call(self._twin.size(timeout=timeout))


class PriorityQueue(Queue):
    """As `raftkv.recipes.PriorityQueue`."""

    def __init__(self, client: Client, name: Text) -> None:
        super().__init__(client, name)
        self._twin = self._priorities = priority_queues.PriorityQueue(client._twin, name)

    def put(
        self, value: Text, *, priority: int = priority_queues.PRIORITY_DEFAULT, timeout: TimeoutArg = DEFAULT
    ) -> bytes:
        """As `PriorityQueue.put`."""
        return self._client._call(self._priorities.put(value, priority=priority, timeout=timeout))


class BlockingClaim(BlockingHolding):
    """As `Claim`."""

    def __init__(self, client: Client, twin: queue.Claim) -> None:
        super().__init__(client, twin)
        self._claim = twin

    @property
    def item(self) -> queue.Item:
        """As `Claim.item`."""
        return self._claim.item

    @property
    def value(self) -> bytes:
        """As `Claim.value`."""
        return self._claim.value

    def done(self, *ops: Op) -> None:
        """As `Claim.done`."""
        self._call(self._claim.done(*ops))


class Counter:
    """As `raftkv.recipes.Counter`."""

    def __init__(self, client: Client, name: Text) -> None:
        self._call = client._call
        self._twin = counter.Counter(client._twin, name)

    def value(self, *, timeout: TimeoutArg = DEFAULT) -> int:
        """As `Counter.value`."""
        return self._call(self._twin.value(timeout=timeout))

    def add(
        self,
        amount: int = 1,
        *,
        at_least: int | None = None,
        at_most: int | None = None,
        guards: Sequence[Guard] = (),
        timeout: float | None = 30.0,
    ) -> int:
        """As `Counter.add`."""
        return self._call(self._twin.add(amount, at_least=at_least, at_most=at_most, guards=guards, timeout=timeout))

    def set(self, value: int, *, guards: Sequence[Guard] = (), timeout: TimeoutArg = DEFAULT) -> None:
        """As `Counter.set`."""
        self._call(self._twin.set(value, guards=guards, timeout=timeout))


class LeaderTask(Generic[T]):
    """As `raftkv.recipes.LeaderTask`; the work is a plain function, which must look whether it still leads."""

    def __init__(
        self,
        client: Client,
        name: Text,
        work: Callable[[BlockingLeadership], T],
        *,
        value: Text = b"",
        ttl: float = 10.0,
        pause_s: float = 0.5,
    ) -> None:
        self._election = client.election(name, ttl)
        self._work = work
        self._value = value
        self._pause_s = pause_s
        self._leadership: BlockingLeadership | None = None
        self._times_led = 0

    @property
    def leading(self) -> bool:
        """As `LeaderTask.leading`."""
        leadership = self._leadership
        return leadership is not None and leadership.held

    @property
    def times_led(self) -> int:
        """As `LeaderTask.times_led`."""
        return self._times_led

    def run(self) -> T:
        """As `LeaderTask.run`."""
        while True:
            began = False
            results: list[T] = []
            try:
                with self._election.campaign(self._value) as leadership:
                    began = True
                    self._leadership = leadership
                    self._times_led += 1
                    results.append(self._work(leadership))
            except LockLost:
                pass
            except Unavailable:
                if began and not results:
                    raise
            finally:
                self._leadership = None
            if results:
                return results[0]
            time.sleep(self._pause_s)


class Registration:
    """As `raftkv.recipes.Registration`."""

    def __init__(self, client: Client, twin: registry.Registration) -> None:
        self._call = client._call
        self._twin = twin

    @property
    def instance(self) -> registry.Instance:
        """As `Registration.instance`."""
        return self._twin.instance

    @property
    def registered(self) -> bool:
        """Whether it is certainly registered now."""
        return self._twin.registered.is_set()

    @property
    def lost(self) -> bool:
        """Whether it was lost, and has not come back yet."""
        return self._twin.lost.is_set()

    @property
    def losses(self) -> int:
        """As `Registration.losses`."""
        return self._twin.losses

    @property
    def failure(self) -> RaftkvError | None:
        """As `Registration.failure`."""
        return self._twin.failure

    def update(self, *, address: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """As `Registration.update`."""
        self._call(self._twin.update(address=address, metadata=metadata))

    def __enter__(self) -> Self:
        self._call(self._twin.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._twin.__aexit__(kind, error, traceback))


class Registry:
    """As `raftkv.recipes.Registry`."""

    def __init__(self, client: Client, name: Text = "services") -> None:
        self._client = client
        self._twin = registry.Registry(client._twin, name)

    def register(
        self,
        service: str,
        address: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl: float = 10.0,
    ) -> Registration:
        """As `Registry.register`."""
        return Registration(self._client, self._twin.register(service, address, id=id, metadata=metadata, ttl=ttl))

    def instances(self, service: str, *, timeout: TimeoutArg = DEFAULT) -> tuple[registry.Instance, ...]:
        """As `Registry.instances`."""
        return self._client._call(self._twin.instances(service, timeout=timeout))

    def services(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[str, ...]:
        """As `Registry.services`."""
        return self._client._call(self._twin.services(timeout=timeout))

    def follow(self, service: str) -> Iterator[tuple[registry.Instance, ...]]:
        """As `Registry.follow`."""
        source: AsyncIterator[tuple[registry.Instance, ...]] = self._twin.follow(service)
        return self._client._call.iterate(source)
