"""The SDK against real nodes: what its callers see while nodes are killed, frozen, stopped and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from raftkv.client import (
    AsyncClient,
    Client,
    Compacted,
    ConditionFailed,
    FutureRevision,
    Get,
    InvalidRequest,
    Key,
    LeaseNotFound,
    NoLeader,
    Put,
    RaftkvError,
    RequestTooLarge,
    Timeout,
)
from raftkv.local import LocalCluster

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(raftkv_fresh_cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(raftkv_fresh_cluster.endpoints, timeout=20) as client:
        await client.put("ready", "yes")
        await asyncio.sleep(0.3)  # health streams and members' ids settle
        yield client


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what others do."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


class Load:
    """Steady writers and readers; remembers what was acknowledged and what callers saw go wrong."""

    def __init__(self, client: AsyncClient, writers: int = 10, readers: int = 5) -> None:
        self.client = client
        self.acknowledged: dict[str, str] = {}
        self.errors: list[RaftkvError] = []
        self._last: dict[str, float] = {}  # of each caller: when its last call that was answered began
        self._stop = asyncio.Event()
        self._sizes = (writers, readers)

    async def _write(self, writer: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            key, started = f"load/{writer}/{number}", time.monotonic()
            try:
                await self.client.put(key, str(number))
                self.acknowledged[key] = str(number)
                self._last[f"writer {writer}"] = started
            except RaftkvError as error:
                self.errors.append(error)
            await asyncio.sleep(0.01)

    async def _read(self, reader: int) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                assert (await self.client.get("ready")) is not None
                self._last[f"reader {reader}"] = started
            except RaftkvError as error:
                self.errors.append(error)
            await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        writers, readers = self._sizes
        async with asyncio.TaskGroup() as group:
            for writer in range(writers):
                group.create_task(self._write(writer))
            for reader in range(readers):
                group.create_task(self._read(reader))
            await self.goes_on()
            yield self
            await self.goes_on()
            await until(lambda: len(self.acknowledged) > 100)
            self._stop.set()

    async def goes_on(self) -> float:
        """Wait until each caller had an answer to what it asked after now; how long that took."""
        began = time.monotonic()
        await until(lambda: len(self._last) == sum(self._sizes) and min(self._last.values()) > began)
        return time.monotonic() - began

    async def assert_nothing_lost(self) -> None:
        found = {item.key.decode(): item.text async for item in self.client.scan("load/")}
        lost = {key for key, value in self.acknowledged.items() if found.get(key) != value}
        assert not lost


async def test_killing_the_leader_is_not_noticed(client: AsyncClient, raftkv_fresh_cluster: LocalCluster) -> None:
    load = Load(client)
    waited_s = []
    async with load.running():
        for _ in range(3):
            dead = await asyncio.to_thread(raftkv_fresh_cluster.kill, "leader")
            waited_s.append(await load.goes_on())
            await asyncio.to_thread(raftkv_fresh_cluster.restart, *dead)
            await load.goes_on()
    assert load.errors == []
    assert sorted(waited_s)[1] < 2.0, waited_s  # a machine that stood still shows in one, what is slow in us in each
    await load.assert_nothing_lost()


async def test_stopping_each_node_in_order_is_not_noticed(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    """A rolling restart. A node that is told to stop finishes what it holds; its health sends new calls elsewhere."""
    load = Load(client)
    async with load.running():
        for name in raftkv_fresh_cluster.names:
            await asyncio.to_thread(raftkv_fresh_cluster.stop, name)
            await load.goes_on()
            await asyncio.to_thread(raftkv_fresh_cluster.restart, name)
            await load.goes_on()
    assert load.errors == []
    await load.assert_nothing_lost()


async def test_freezing_the_leader_is_not_noticed(client: AsyncClient, raftkv_fresh_cluster: LocalCluster) -> None:
    load = Load(client)
    async with load.running():
        frozen = await asyncio.to_thread(raftkv_fresh_cluster.pause, "leader")
        await load.goes_on()  # while it is frozen: nobody waits for it to wake
        await asyncio.sleep(2.0)
        await load.goes_on()
        await asyncio.to_thread(raftkv_fresh_cluster.resume, *frozen)
        await load.goes_on()
    assert load.errors == []
    await load.assert_nothing_lost()


async def test_killing_the_followers_one_by_one_is_not_noticed(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    """The follower that carries the writes takes their answers with it; they are asked for again elsewhere."""
    load = Load(client)
    async with load.running():
        for row in await asyncio.to_thread(raftkv_fresh_cluster.status, timeout_s=20):
            if row.role == "follower":
                await asyncio.to_thread(raftkv_fresh_cluster.kill, row.name)
                await load.goes_on()
                await asyncio.to_thread(raftkv_fresh_cluster.restart, row.name)
                await load.goes_on()
    assert load.errors == []
    await load.assert_nothing_lost()


async def test_without_a_quorum_reads_say_so_and_stale_reads_work(
    client: AsyncClient, raftkv_fresh_cluster: LocalCluster
) -> None:
    await asyncio.to_thread(raftkv_fresh_cluster.kill, "followers")
    await until(lambda: "no leader" in {row.role for row in raftkv_fresh_cluster.status()})  # it has missed them
    started = time.monotonic()
    with pytest.raises(NoLeader) as caught:
        await client.get("ready", timeout=3)
    assert time.monotonic() - started > 2.9
    assert isinstance(caught.value, TimeoutError)
    stale = await client.get("ready", serializable=True)
    assert stale is not None
    statuses = await client.cluster.status(timeout=20)
    assert [status.status is None for status in statuses].count(True) == 2
    # Held, not failed: with the nodes back it is answered.
    waiting = asyncio.create_task(client.get("ready", timeout=60))
    exited = [row.name for row in raftkv_fresh_cluster.status() if row.process == "exited"]
    for name in exited:
        await asyncio.to_thread(raftkv_fresh_cluster.restart, name, wait=False)
    assert (await waiting) is not None


async def test_refusals_have_their_own_errors(client: AsyncClient) -> None:
    revision = (await client.put("k", "v")).revision
    with pytest.raises(FutureRevision) as future:
        await client.get("k", revision=revision + 1000)
    assert future.value.code == "FUTURE_REVISION"
    await client.compact(revision)
    with pytest.raises(Compacted) as compacted:
        await client.get("k", revision=revision - 1)
    assert compacted.value.compact_revision == revision
    with pytest.raises(LeaseNotFound):
        await client.put("k", "v", lease=12345)
    with pytest.raises(ConditionFailed):
        await client.put("none", "", ignore_value=True)
    with pytest.raises(RequestTooLarge):
        await client.put("k", b"x" * 1_600_000)
    with pytest.raises(RequestTooLarge):
        await client.put("k", b"x" * 3_000_000)
    with pytest.raises(InvalidRequest, match="duplicate key") as duplicate:
        await client.txn().then(Put("t", "1"), Put("t", "2")).commit()
    assert duplicate.value.code == "DUPLICATE_KEY"
    with pytest.raises(InvalidRequest, match="too many operations"):
        await client.txn().then(*(Put(f"m{number}", "") for number in range(129))).commit()
    assert (await client.get("k")).text == "v"  # type: ignore[union-attr]


async def test_everything_a_client_does(client: AsyncClient, tmp_path) -> None:
    first = await client.txn().when(Key("t").version == 0).then(Put("t", "1"), Get("t")).commit()
    assert first.succeeded
    await asyncio.gather(*(client.update("n", _add_one, max_retries=100) for _ in range(20)))
    assert (await client.get("n")).text == "20"  # type: ignore[union-attr]
    for number in range(30):
        await client.put(f"s/{number:02}", str(number))
    assert [item.text async for item in client.scan("s/", page_size=7)] == [str(number) for number in range(30)]
    members = await client.cluster.members()
    leader = next(s.status.leader for s in await client.cluster.status() if s.status)
    target = next(member for member in members if member.id != leader)
    await client.cluster.move_leader(target.name)
    await client.put("k", "v")
    while {s.status.leader for s in await client.cluster.status() if s.status} != {target.id}:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # until the last one has heard of it
    for endpoint in client.endpoints:
        async with AsyncClient(endpoint, timeout=20) as one:
            await one.get("k")  # linearizable: this one has applied the put
    revision = (await client.get("k")).mod_revision  # type: ignore[union-attr]
    assert len({hashed.hash for hashed in await client.maintenance.hash_kv(revision)}) == 1
    assert await client.maintenance.alarms() == ()
    assert len(await client.maintenance.defragment(timeout=60)) == 3
    saved = await client.maintenance.save_snapshot(tmp_path / "snap", timeout=60)
    assert saved.size_bytes % 512 == 32
    assert client.stats().failures == 0


def _add_one(item) -> str:
    return str(int(item.text) + 1 if item else 1)


def test_the_blocking_client_from_threads_through_a_failover(raftkv_fresh_cluster: LocalCluster) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cluster = raftkv_fresh_cluster
    with Client(cluster.endpoints, timeout=Timeout(total=20)) as client, ThreadPoolExecutor(8) as pool:
        work: Callable[[int], object] = lambda number: [  # noqa: E731
            client.put(f"{number}/{n}", str(n)) for n in range(50)
        ]
        futures = [pool.submit(work, number) for number in range(8)]
        time.sleep(0.2)
        cluster.kill("leader")
        for future in futures:
            future.result(60)
        assert client.range("", prefix=True, count_only=True).count == 400
