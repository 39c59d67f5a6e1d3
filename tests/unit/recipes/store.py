"""A client of a store in memory: transactions, leases, watches, and every moment at which something may go wrong.

`FakeClient` has the calls of `AsyncClient` that recipes use, over a `Store` that several of them share. Before and
after everything that a call does the loop runs once, so that a cancellation can meet every one of those moments.
`store.lose` says how many of the next writes are done without an answer; `client.reads` counts what a client asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from raftkv.client import (
    AsyncClient,
    ConditionFailed,
    Delete,
    DeleteResult,
    Event,
    Get,
    Guard,
    KeyValue,
    LeaseNotFound,
    LeaseState,
    LockLost,
    OutcomeUnknown,
    Put,
    PutResult,
    RangeResult,
    TxnResult,
)
from raftkv.client.keys import prefix_end, to_bytes
from raftkv.client.txn import Branches, Comparison

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


class Store:
    """What a cluster holds."""

    def __init__(self) -> None:
        self.revision = 1
        self.items: dict[bytes, KeyValue] = {}
        self.history: list[Event] = []
        self.leases: dict[int, FakeLease] = {}
        self.next_lease = 1
        self.lose = 0  # so many of the next writes are done, and their answers lost
        self.changed = asyncio.Condition()

    def span(self, key: bytes, prefix: bool) -> list[KeyValue]:
        if not prefix:
            return [self.items[key]] if key in self.items else []
        end = prefix_end(key)
        return [self.items[name] for name in sorted(self.items) if key <= name < end]

    def holds(self, comparison: Comparison) -> bool:
        key = to_bytes(comparison.key, "key")
        found = self.span(key, comparison.prefix) or [KeyValue(key, b"", 0, 0, 0)]
        compare = OPERATORS[comparison.operator]
        return all(compare(getattr(item, comparison.field), comparison.operand) for item in found)

    def run(self, op: Any, revision: int) -> Any:
        key = to_bytes(op.key, "key")
        if isinstance(op, Get):
            found = self.span(key, op.prefix)
            shown = [] if op.count_only else found[: op.limit or None]
            return RangeResult(tuple(shown), len(found), len(shown) < len(found), revision)
        if isinstance(op, Delete):
            gone = self.span(key, op.prefix)
            for item in gone:
                self.drop(item.key, revision)
            return DeleteResult(len(gone), revision)
        assert isinstance(op, Put)
        old = self.items.get(key)
        lease = old.lease if op.ignore_lease and old is not None else op.lease
        if lease and lease not in self.leases:
            raise LeaseNotFound("no such lease", code="LEASE_NOT_FOUND")
        created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
        self.items[key] = item = KeyValue(key, to_bytes(op.value, "value"), created, revision, version, lease)
        self.history.append(Event("put", item))
        return PutResult(revision)

    def drop(self, key: bytes, revision: int) -> None:
        self.items.pop(key)
        self.history.append(Event("delete", KeyValue(key, b"", 0, revision, 0)))

    async def txn(self, branches: Branches, guards: tuple[Guard, ...]) -> TxnResult:
        for guard in guards:
            item = self.items.get(guard.key)
            if item is None or item.create_revision != guard.token:
                raise LockLost("the lock has moved on", code="LOCK_LOST")
        succeeded = all(self.holds(comparison) for comparison in branches.when)
        ops = branches.then if succeeded else branches.otherwise
        old = (dict(self.items), len(self.history))
        try:
            results = tuple(self.run(op, self.revision + 1) for op in ops)
        except LeaseNotFound:
            self.items, self.history[old[1] :] = old[0], []
            raise
        if len(self.history) > old[1]:
            self.revision += 1
            await self.tell()
        return TxnResult(succeeded, self.revision, results)

    async def tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def end_lease(self, id: int) -> None:
        """As expiry and revocation do: its keys go in one revision."""
        if self.leases.pop(id, None) is None:
            return
        bound = [item.key for item in self.items.values() if item.lease == id]
        if bound:
            self.revision += 1
            for key in bound:
                self.drop(key, self.revision)
            await self.tell()


class FakeLease:
    """As `Lease`. `expire` is what happens when nobody renews it."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self.store = store
        self.id = 0
        self.ttl_s = ttl_s
        self.why_lost = ""
        self.lost = asyncio.Event()
        self.callbacks: list[Callable[[], None]] = []

    @property
    def state(self) -> LeaseState:
        return LeaseState.HELD if self.id and not self.why_lost else LeaseState.LOST  # as its holder believes

    def remaining(self) -> float:
        return 5.0 if self.state is LeaseState.HELD else 0.0

    async def grant(self) -> FakeLease:
        await asyncio.sleep(0)
        self.id = self.store.next_lease
        self.store.next_lease += 1
        self.store.leases[self.id] = self
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.abandon()
            raise
        return self

    def on_lost(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def end(self, why: str) -> None:
        if not self.why_lost:
            self.why_lost = why
            self.lost.set()
            for callback in self.callbacks:
                callback()

    async def expire(self) -> None:
        self.end("it ran out")
        await self.store.end_lease(self.id)

    async def revoke(self, *, timeout: object = None) -> None:
        self.end("it was revoked")
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.abandon()
            raise
        await self.store.end_lease(self.id)

    def abandon(self) -> None:
        self.end("it was revoked")
        BACKGROUND.add(task := asyncio.ensure_future(self.store.end_lease(self.id)))
        task.add_done_callback(BACKGROUND.discard)


BACKGROUND: set[asyncio.Future[None]] = set()


class FakeWatch:
    """As `Watch`."""

    def __init__(self, store: Store, key: bytes, prefix: bool, start: int) -> None:
        self.store, self.key, self.end, self.next = store, key, prefix_end(key) if prefix else b"", start
        self.position = 0
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        BACKGROUND.add(task := asyncio.ensure_future(self.store.tell()))
        task.add_done_callback(BACKGROUND.discard)

    def __aiter__(self) -> FakeWatch:
        return self

    async def __anext__(self) -> Event:
        async with self.store.changed:
            while True:
                if self.stopped:
                    raise StopAsyncIteration
                while self.position < len(self.store.history):
                    event = self.store.history[self.position]
                    self.position += 1
                    mine = self.key <= event.key < self.end if self.end else event.key == self.key
                    if mine and event.revision >= self.next:
                        return event
                await self.store.changed.wait()


class FakeClient(AsyncClient):
    """As `AsyncClient`, as far as recipes use it. `reads` counts what it asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.reads = 0

    @property
    def namespace(self) -> bytes:
        return b""

    async def commit(self, branches: Branches, *, guards: Any = (), timeout: object = None) -> TxnResult:
        self.reads += 1
        await asyncio.sleep(0)
        result = await self.store.txn(branches, tuple(guards))
        await asyncio.sleep(0)
        if branches.writes() and self.store.lose:
            self.store.lose -= 1
            raise OutcomeUnknown("no answer", code="UNKNOWN")
        return result

    async def put(self, key: Any, value: Any, *, lease: int = 0, if_absent: bool = False, **more: Any) -> PutResult:
        from raftkv.client import Key

        when = (Key(key).create_revision == 0,) if if_absent else ()
        result = await self.commit(
            Branches(when, (Put(key, value, lease),), (Get(key),)), guards=more.get("guards", ())
        )
        if not result.succeeded:
            error = ConditionFailed("it exists", code="CONDITION_FAILED")
            error.current = result.results[0].items[0]  # type: ignore[union-attr]
            raise error
        return PutResult(result.revision)

    async def delete(self, key: Any, **more: Any) -> DeleteResult:
        done = (await self.commit(Branches((), (Delete(key, prefix=more.get("prefix", False)),)))).results[0]
        assert isinstance(done, DeleteResult)
        return done

    async def get(self, key: Any, **more: Any) -> KeyValue | None:
        found = await self.range(key)
        return found.items[0] if found.items else None

    async def range(self, key: Any, end: Any = None, **more: Any) -> RangeResult:
        self.reads += 1
        await asyncio.sleep(0)
        everything = self.store.span(to_bytes(key, "key"), more.get("prefix", False))
        found = [item for item in everything if item.create_revision <= (more.get("max_create_revision") or 2**62)]
        sort = more.get("sort")
        if sort is not None:
            found.sort(key=lambda item: item.create_revision, reverse=sort.startswith("-"))
        shown = tuple(found[: more.get("limit") or None])
        result = RangeResult(() if more.get("count_only") else shown, len(everything), False, self.store.revision)
        await asyncio.sleep(0)
        return result

    def lease(self, ttl: float, **more: Any) -> Any:
        return FakeLease(self.store, ttl)

    def watch(self, key: Any, end: Any = None, *, prefix: bool = False, start_revision: int = 0, **more: Any) -> Any:
        return FakeWatch(self.store, to_bytes(key, "key"), prefix, start_revision)

    def lock(self, name: Any, ttl: float = 10.0, **more: Any) -> Any:
        from raftkv.recipes import ReadWriteLock

        return ReadWriteLock(self, to_bytes(name, "name").replace(b".", b""), ttl).write()
