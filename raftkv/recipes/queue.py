"""A queue among processes: first in, first out; each item to one consumer.

    queue = Queue(client, "jobs")
    await queue.put("resize 17")
    async with queue.take() as job:               # given back when the body raises or its process dies
        await client.put("done/17", work(job.value), guards=[job.guard()])

`take` hands an item out under a claim, and it is gone when the block has ended well: at least once, and with `guard()`
or `done(...)` exactly once. `get` removes it at once: at most once.

    <name>/.queue/all/item/<priority>/<store revision before the put><chance>      an item
    <name>/.queue/all/claim/<the same>                                             its claim, bound to a lease
    <name>/.queue/line/<lease id in hex>                                           who waits, a lock

An item's key begins with a revision that was read, linearizably, when its put began: what was put after something else
had been put comes after it, at the cost of one read, and without a counter that all producers fight over. Consumers
that find nothing line up, and only the first of them watches: an item that comes wakes one, however many wait.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from raftkv.client import (
    DEFAULT,
    AsyncClient,
    DeadlineExceeded,
    Delete,
    Event,
    Get,
    Key,
    KeyValue,
    Lock,
    LockLost,
    LockTimeout,
    OutcomeUnknown,
    Put,
    RaftkvError,
    RangeResult,
)
from raftkv.client.keys import Text
from raftkv.client.options import TimeoutArg, check_seconds
from raftkv.client.txn import Branches, Op
from raftkv.recipes.holding import Holding, Place
from raftkv.recipes.names import TRIES_MAX, prefix_of
from raftkv.recipes.waiting import Deadline, changed

T = TypeVar("T")
LINE_TTL_S: Final = 10.0
LOOK_MIN: Final = 32
RELEASE_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Item:
    """What was in a queue."""

    id: bytes
    """Its place in the order: of two items, the one with the smaller id is handed out first."""
    value: bytes

    @property
    def text(self) -> str:
        """The value as UTF-8 text. Raises UnicodeDecodeError where it is none."""
        return self.value.decode()


class Queue:
    """A queue on a name.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name share it.
    """

    _kind = "queue"

    def __init__(self, client: AsyncClient, name: Text) -> None:
        self._client = client
        self._name = name
        root = prefix_of(name, self._kind)
        self._all = root + b"all/"
        self._items = root + b"all/item/"
        self._claims = root + b"all/claim/"
        self._line = root + b"line"
        self._releases: set[asyncio.Task[None]] = set()

    async def put(self, value: Text, *, timeout: TimeoutArg = DEFAULT) -> bytes:
        """Add an item; its id.

        Raises:
            OutcomeUnknown: perhaps it was added; repeating the call may add it twice.
            Unavailable, InvalidRequest: it was not added.
        """
        return await self._put(b"0", value, timeout)

    async def _put(self, level: bytes, value: Text, timeout: TimeoutArg) -> bytes:
        read = await self._client.range(self._items, count_only=True, serializable=False, timeout=timeout)
        id = b"%s/%016x%s" % (level, read.revision, secrets.token_hex(8).encode())
        await self._client.put(self._items + id, value, timeout=timeout)
        return id

    async def size(self, *, timeout: TimeoutArg = DEFAULT) -> int:
        """How many items there are, those that are claimed included."""
        found = await self._client.range(self._items, prefix=True, count_only=True, serializable=False, timeout=timeout)
        return found.count

    async def get(self, *, timeout: float | None = None) -> Item:
        """Remove the first item and return it. Cancelled in the wrong moment the item is lost; `take` loses none.

        Args:
            timeout: seconds to wait for one; None waits for ever.
        Raises:
            DeadlineExceeded: there was none in time. Nothing was removed.
            OutcomeUnknown: perhaps an item was removed, which then is lost.
            Unavailable: the cluster could not be asked. Nothing was removed.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)

        async def remove(item: KeyValue) -> Item | None:
            there = Key(item.key).create_revision == item.create_revision
            free = Key(self.claim_of(item.key)).create_revision == 0
            result = await self._client.commit(Branches((there, free), (Get(item.key), Delete(item.key))))
            if not result.succeeded:
                return None
            found = result.results[0]
            assert isinstance(found, RangeResult), "a transaction answers each operation in its kind"
            return self.item(found.items[0])

        return await self.obtain(remove, Deadline(timeout))

    def take(self, *, ttl: float = 10.0, owner: Text = b"", timeout: float | None = None) -> Claim:
        """Work on the first item that is free: `async with queue.take() as job:`, or `acquire` and `done`.

        Args:
            ttl: seconds after which the item of a consumer that is not heard of any more is free again.
            owner: stored as the claim's value, for people to see.
            timeout: seconds to wait for an item, else LockTimeout; None waits for ever.
        """
        return Claim(self._client, self, self._name, ttl, owner, timeout)

    def item(self, found: KeyValue) -> Item:
        """An item as users see it."""
        return Item(found.key.removeprefix(self._items), found.value)

    def claim_of(self, key: bytes) -> bytes:
        """The key of the claim on an item."""
        return self._claims + key.removeprefix(self._items)

    # --- waiting in line --------------------------------------------------------------------------------------------

    async def obtain(
        self, attempt: Callable[[KeyValue], Awaitable[T | None]], deadline: Deadline, place: Place | None = None
    ) -> T:
        """What `attempt` makes of the first free item; it gives None where somebody else was faster.

        Where a `place` is given, LockLost is raised when its lease is lost.
        """
        item, _ = await self._first_free()
        got = await attempt(item) if item is not None else None
        while got is None:
            # Waiting for this lock never costs an item: nothing is claimed under it that needs it.
            line = self._client.lock(self._line, ttl=LINE_TTL_S)
            try:
                await line.acquire(timeout=deadline.remaining())
            except LockLost:
                if place is not None:
                    place.check_lease()
                continue  # it goes to the end of the line
            except LockTimeout:
                raise self._nothing() from None
            try:
                got = await self._obtain_in_front(attempt, deadline, place, line.lost)
            finally:
                # Others stand behind us: a cancellation does not interrupt this.
                releasing = asyncio.create_task(_release(line), name="raftkv queue line")
                self._releases.add(releasing)
                releasing.add_done_callback(self._releases.discard)
                await asyncio.shield(releasing)
        return got

    async def _obtain_in_front(
        self,
        attempt: Callable[[KeyValue], Awaitable[T | None]],
        deadline: Deadline,
        place: Place | None,
        lost: asyncio.Event,
    ) -> T | None:
        while not lost.is_set():
            item, revision = await self._first_free()
            if item is not None:
                got = await attempt(item)
                if got is not None:
                    return got
                continue
            try:
                async with asyncio.timeout(deadline.remaining()):
                    if place is not None:
                        await place.wait(self._all, revision, prefix=True, wanted=self._frees)
                    else:
                        watch = self._client.watch(self._all, prefix=True, start_revision=revision + 1)
                        await changed(watch, self._frees)
            except TimeoutError as error:
                if isinstance(error, RaftkvError):
                    raise
                raise self._nothing() from None
        return None

    def _frees(self, event: Event) -> bool:
        return event.key.startswith(self._items if event.kind == "put" else self._claims)

    def _nothing(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"queue {self._name!r} had no item in time", code="QUEUE_EMPTY")

    async def _first_free(self) -> tuple[KeyValue | None, int]:
        """The first item without a claim, without its value, and the revision of the look."""
        limit = LOOK_MIN
        while True:
            claims, items = (
                Get(self._claims, prefix=True, keys_only=True),
                Get(self._items, prefix=True, keys_only=True, limit=limit),
            )
            result = await self._client.commit(Branches((), (claims, items)))
            claimed, found = result.results
            assert isinstance(claimed, RangeResult), "a transaction answers each operation in its kind"
            assert isinstance(found, RangeResult), "a transaction answers each operation in its kind"
            taken = {item.key for item in claimed}
            free = next((item for item in found if self.claim_of(item.key) not in taken), None)
            if free is not None or not found.more:
                return free, result.revision
            limit = max(limit * 2, len(taken) + 1)


async def _release(line: Lock) -> None:
    try:
        await line.release(timeout=RELEASE_TIMEOUT_S)
    except RaftkvError:
        return  # lost, or it runs out by itself


class Claim(Holding):
    """An item being worked on; made by `Queue.take`.

    Leaving the block well removes the item; with an error, or when the claim is lost, it is there for others again.
    """

    _what = "queue"

    def __init__(
        self, client: AsyncClient, queue: Queue, name: Text, ttl_s: float, owner: Text, timeout: float | None
    ) -> None:
        super().__init__(client, name, ttl_s, owner, timeout)
        self._queue = queue
        self._item: Item | None = None
        self._item_key = b""

    @property
    def item(self) -> Item:
        """What was taken. Raises LockLost where nothing was."""
        self._present()
        assert self._item is not None, "a place is only had with an item"
        return self._item

    @property
    def value(self) -> bytes:
        """The item's value."""
        return self.item.value

    async def _enter(self, place: Place) -> None:
        async def claim(item: KeyValue) -> Place | None:
            return place if await self._claim(place, item) else None

        await self._queue.obtain(claim, Deadline(None), place)

    async def _claim(self, place: Place, item: KeyValue) -> bool:
        place.check_lease()
        place.key = self._queue.claim_of(item.key)
        there = Key(item.key).create_revision == item.create_revision
        free = Key(place.key).create_revision == 0
        reads = (Get(place.key), Get(item.key))
        put = Put(place.key, place.value, lease=place.lease.id)
        result = await place.commit(Branches((there, free), (put, *reads), reads))
        claim, found = result.results[-2:]
        assert isinstance(claim, RangeResult), "a transaction answers each operation in its kind"
        assert isinstance(found, RangeResult), "a transaction answers each operation in its kind"
        # Ours perhaps from an attempt whose answer was lost; nobody else binds anything to our lease.
        if not claim.items or claim.items[0].lease != place.lease.id or not found.items:
            return False
        place.took(claim)
        self._item = self._queue.item(found.items[0])
        self._item_key = item.key
        return True

    async def done(self, *ops: Op) -> None:
        """Remove the item, and do these in the same transaction: `await job.done(Put("result", ...))`.

        Raises:
            LockLost: the claim was lost; nothing was done, and the item is somebody else's.
            OutcomeUnknown: perhaps it was done; only where the cluster does not answer for long.
            Unavailable: it was not done.
        """
        place = self._present()
        await self._finish(place, ops)
        self._place = None
        place.abandon()

    async def _leave(self, place: Place) -> None:
        await self._finish(place, ())
        place.abandon()

    async def _finish(self, place: Place, ops: tuple[Op, ...]) -> None:
        place.check()
        held = Key(place.key).create_revision == place.fence
        branches = Branches((held,), (Delete(self._item_key), Delete(place.key), *ops))
        unknown: OutcomeUnknown | None = None
        for _ in range(TRIES_MAX):
            try:
                result = await self._client.commit(branches)
            except OutcomeUnknown as error:
                unknown = error
                continue
            if result.succeeded:
                return
            if unknown is None:
                place.lose("its claim is gone")
                raise place.error()
            break
        # It was asked more than once, and the claim is gone. While the lease lives nobody but us removes it.
        assert unknown is not None, "only an unknown outcome leads here"
        if place.lease.remaining() > 0 and await self._client.get(self._item_key, serializable=False) is None:
            return
        raise unknown
