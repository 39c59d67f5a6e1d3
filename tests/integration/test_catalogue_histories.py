"""What clients see of a cluster that loses nodes, held against the one history there is (K1, K2, W1 to W3, W7, W8).

The history is what a watch from the first revision tells; each answer names the revision it speaks of.
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import pytest

from raftkv._pb import watch_pb2
from raftkv.client import AsyncClient, Event, KeyValue, Put, RaftkvError
from raftkv.local import AsyncLocalCluster

pytestmark = [pytest.mark.integration, pytest.mark.slow]

KEYS = [f"h/{number}" for number in range(8)]


@dataclass(frozen=True, slots=True)
class Done:
    """One call that was answered."""

    kind: str  # "write", "read", "stale read"
    began: float
    ended: float
    revision: int
    key: str = ""
    item: KeyValue | None = None  # what a read found
    value: bytes = b""  # what a write put


class History:
    """All changes, by revision."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._of_key: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
        for event in events:
            self._of_key[event.key.decode()].append((event.revision, event.value))

    def at(self, key: str, revision: int) -> tuple[int, bytes] | None:
        """Revision and value of the last change of a key up to a revision."""
        changes = self._of_key[key]
        place = bisect_right(changes, revision, key=lambda change: change[0])
        return changes[place - 1] if place else None


def violations(done: Sequence[Done], history: History) -> list[str]:
    """K1 by witness: each answer is that of a replay at its revision, and no answer contradicts time."""
    found = []
    for each in done:
        there = history.at(each.key, each.revision)
        if each.kind == "write":
            if there != (each.revision, each.value):
                found.append(f"{each} is not in the history: {there}")
        elif there != (None if each.item is None else (each.item.mod_revision, each.item.value)):
            found.append(f"{each} is not what a replay finds: {there}")
    # In real time: what begins after something has ended comes later; a write later than all of it.
    current = [each for each in done if each.kind != "stale read"]
    ends = sorted((each.ended, each.revision) for each in current)
    place = highest = 0
    for each in sorted(current, key=lambda each: each.began):
        while place < len(ends) and ends[place][0] < each.began:
            highest = max(highest, ends[place][1])
            place += 1
        if each.revision < highest or (each.kind == "write" and each.revision == highest):
            found.append(f"{each} began when revision {highest} had been answered")
    return found


async def all_events(client: AsyncClient) -> list[Event]:
    await client.put("h0", "")
    events: list[Event] = []
    async with client.watch("h", prefix=True, start_revision=1) as watch, asyncio.timeout(60):
        async for event in watch:
            if event.key == b"h0":
                break
            events.append(event)
    return events


class Callers:
    """Write and read at random; what was answered is kept."""

    def __init__(self) -> None:
        self.done: list[Done] = []
        self.stopped = False
        self.failed = 0

    def kinds(self) -> dict[str, int]:
        return {kind: sum(each.kind == kind for each in self.done) for kind in ("write", "read", "stale read")}

    async def run(self, client: AsyncClient, number: int) -> None:
        rng = random.Random(number)
        turn = 0
        while not self.stopped:
            turn += 1
            try:
                await self._one(client, rng, f"{number} {turn}".encode())
            except RaftkvError:
                self.failed += 1
            await asyncio.sleep(0.005)

    async def _one(self, client: AsyncClient, rng: random.Random, value: bytes) -> None:
        began = time.monotonic()
        key = rng.choice(KEYS)
        choice = rng.random()
        if choice < 0.3:
            revision = (await client.put(key, value)).revision
            self.done.append(Done("write", began, time.monotonic(), revision, key, value=value))
        elif choice < 0.4:
            pair = rng.sample(KEYS, 2)
            revision = (await client.txn().then(*(Put(each, value) for each in pair)).commit()).revision
            ended = time.monotonic()
            self.done += [Done("write", began, ended, revision, each, value=value) for each in pair]
        else:
            stale = choice < 0.6
            found = await client.range(key, serializable=stale)
            item = found.items[0] if found.items else None
            kind = "stale read" if stale else "read"
            self.done.append(Done(kind, began, time.monotonic(), found.revision, key, item))


@pytest.mark.timeout(300)
async def test_answers_are_those_of_one_history_while_leaders_die() -> None:
    callers = Callers()
    rng = random.Random(3)
    async with AsyncLocalCluster(5) as cluster:
        await cluster.wait_leader()
        async with (
            AsyncClient(cluster.endpoints, timeout=20) as one,
            AsyncClient(cluster.endpoints[2:], timeout=20, routing="any") as two,
            AsyncClient(cluster.endpoints[:1], timeout=2) as alone,
        ):
            async with asyncio.TaskGroup() as group:
                for number in range(15):
                    group.create_task(callers.run((one, two, alone)[number % 3], number))
                for how in ("kill", "pause", "kill", "stop", "pause"):
                    await asyncio.sleep(0.7)
                    leader = await cluster.wait_leader(timeout_s=30)
                    await getattr(cluster, how)(leader)
                    await cluster.wait_leader(other_than=leader, timeout_s=30)
                    await asyncio.sleep(rng.uniform(0.3, 1.0))
                    if how == "pause":  # it wakes and believes to lead
                        await cluster.resume(leader)
                    else:
                        await cluster.restart(leader)
                while min(callers.kinds().values()) <= 100:  # noqa: ASYNC110 - counts of what others do
                    await asyncio.sleep(0.05)
                callers.stopped = True
            history = History(await all_events(one))
    assert violations(callers.done, history) == []


async def test_nothing_that_is_not_committed_is_ever_told() -> None:
    """W8: a leader without a majority takes a write, is watched, and dies; the others go on without it."""
    async with AsyncLocalCluster(5) as cluster:
        leader = await cluster.wait_leader()
        near, *far = [name for name in cluster.names if name != leader]
        seen: list[bytes] = []

        async def look(name: str, began: asyncio.Event) -> None:
            async with grpc.aio.insecure_channel(cluster.endpoint(name)) as channel:
                method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
                    "/raftkv.v1.Watch/Watch"
                )
                call = method()
                create = watch_pb2.WatchCreateRequest(key=b"k")
                await call.write(watch_pb2.WatchRequest(create_request=create).SerializeToString())
                try:
                    while isinstance(raw := await call.read(), bytes):
                        began.set()
                        seen.extend(event.kv.value for event in watch_pb2.WatchResponse.FromString(raw).events)
                except grpc.aio.AioRpcError:
                    return  # it was killed

        async with AsyncClient(cluster.endpoints, timeout=20) as client:
            await client.put("k", "before")
            looking = []
            for name in (leader, near):
                async with AsyncClient([cluster.endpoint(name)]) as one:
                    await one.get("k")  # it has applied "before", which is none of the news then
                began = asyncio.Event()
                looking.append(asyncio.create_task(look(name, began)))
                await asyncio.wait_for(began.wait(), 10)
            await cluster.pause(",".join(far))
            async with AsyncClient([cluster.endpoint(leader)], timeout=1.0) as cut_off:
                with pytest.raises(RaftkvError):
                    await cut_off.put("k", "never committed")
            await asyncio.sleep(0.3)
            assert seen == []
            await cluster.kill(f"{leader},{near}")
            await cluster.resume(",".join(far))
            await client.put("k", "after")
            await cluster.restart(f"{leader},{near}")
            async with client.watch("k", start_revision=1) as watch, asyncio.timeout(20):
                told = [(await anext(watch)).value for _ in range(2)]
            assert told == [b"before", b"after"]
            await asyncio.gather(*looking)
            assert seen == []


def test_the_checker_finds_what_it_is_for() -> None:
    def event(revision: int, key: str, value: bytes) -> Event:
        return Event("put", KeyValue(key.encode(), value, 1, revision, 1))

    def read(began: float, revision: int, value: bytes, mod_revision: int, kind: str = "read") -> Done:
        return Done(kind, began, began + 0.5, revision, "a", KeyValue(b"a", value, 1, mod_revision, 1))

    history = History([event(2, "a", b"1"), event(3, "b", b"2"), event(4, "a", b"3")])
    good = [
        Done("read", 0.0, 0.5, 1, "a"),
        Done("write", 1.0, 2.0, 2, "a", value=b"1"),
        read(2.1, 3, b"1", 2),
        Done("write", 3.0, 4.0, 4, "a", value=b"3"),
        read(5.0, 2, b"1", 2, "stale read"),
    ]
    assert violations(good, history) == []
    for bad in (
        read(5.0, 2, b"1", 2),  # stale
        read(5.0, 4, b"1", 2),  # not of its revision
        Done("read", 5.0, 5.5, 4, "a"),  # lost
        Done("write", 5.0, 5.5, 4, "a", value=b"3"),  # done before it was asked for
        Done("write", 1.0, 1.5, 3, "a", value=b"9"),  # nowhere
        read(5.0, 2, b"3", 4, "stale read"),  # from the future
    ):
        assert violations([*good, bad], history) != [], bad
