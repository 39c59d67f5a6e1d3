"""aetcd, an etcd client for Python that knows nothing of us, does what its documentation shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import aetcd
import pytest

from tests.compat.clusters import Cluster, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[aetcd.Client]:
    host, port = cluster.endpoints[-1].split(":")
    async with aetcd.Client(host=host, port=int(port), timeout=30) as connected:
        yield connected


@pytest.fixture
def p(prefix: str) -> bytes:
    return prefix.encode()


async def test_get_and_put(client: aetcd.Client, p: bytes) -> None:
    assert await client.get(p + b"k") is None
    await client.put(p + b"k", b"v")
    found = await client.get(p + b"k")
    assert (found.key, found.value, found.version, found.lease) == (p + b"k", b"v", 1, 0)
    assert found.create_revision == found.mod_revision == found.header.revision
    replaced = await client.put(p + b"k", b"w", prev_kv=True)
    assert replaced.prev_kv.value == b"v"


async def test_get_serializable(client: aetcd.Client, p: bytes) -> None:
    await client.put(p + b"k", b"v")
    await client.get(p + b"k")
    assert (await client.get(p + b"k", serializable=True)).value == b"v"


async def test_ranges(client: aetcd.Client, p: bytes) -> None:
    for key, value in ((b"a", b"3"), (b"b", b"1"), (b"c", b"2")):
        await client.put(p + key, value)
    found = await client.get_prefix(p)
    assert [(pair.key[-1:], pair.value) for pair in found] == [(b"a", b"3"), (b"b", b"1"), (b"c", b"2")]
    found = await client.get_prefix(p, sort_order="descend", sort_target="value")
    assert [pair.key[-1:] for pair in found] == [b"a", b"c", b"b"]
    assert (found.count, found.more) == (3, False)
    found = await client.get_prefix(p, keys_only=True)
    assert [(pair.key[-1:], pair.value) for pair in found] == [(b"a", b""), (b"b", b""), (b"c", b"")]
    assert [pair.key[-1:] for pair in await client.get_range(p + b"a", p + b"c")] == [b"a", b"b"]
    assert {p + b"a", p + b"b", p + b"c"} <= {pair.key for pair in await client.get_all(keys_only=True)}


async def test_deletes(client: aetcd.Client, p: bytes) -> None:
    for key in (b"a", b"b", b"c", b"d"):
        await client.put(p + key, b"v")
    gone = await client.delete(p + b"a", prev_kv=True)
    assert gone.prev_kv.value == b"v"
    assert await client.delete(p + b"a") is None
    assert (await client.delete_range(p + b"b", p + b"d")).deleted == 2
    assert (await client.delete_prefix(p)).deleted == 1


async def test_replace_is_compare_and_swap(client: aetcd.Client, p: bytes) -> None:
    await client.put(p + b"k", b"one")
    assert await client.replace(p + b"k", b"one", b"two")
    assert not await client.replace(p + b"k", b"one", b"three")
    assert (await client.get(p + b"k")).value == b"two"


async def test_transaction(client: aetcd.Client, p: bytes) -> None:
    key = p + b"k"
    make = client.transactions
    arguments = {
        "compare": [make.version(key) == 0],
        "success": [make.put(key, b"v"), make.get(key)],
        "failure": [make.get(key), make.delete(key)],
    }
    done, answers = await client.transaction(**arguments)
    assert done
    assert len(answers) == 2
    done, answers = await client.transaction(**arguments)
    assert not done
    assert await client.get(key) is None


@pytest.mark.parametrize("holds", [True, False])
async def test_transaction_compares(client: aetcd.Client, p: bytes, holds: bool) -> None:
    key = p + b"k"
    await client.put(key, b"b")
    found = await client.get(key)
    make = client.transactions
    compares = {
        True: [
            make.value(key) == b"b",
            make.value(key) > b"a",
            make.version(key) > 0,
            make.create(key) == found.create_revision,
            make.mod(key) < found.mod_revision + 1,
            make.version(p + b"missing") == 0,
        ],
        False: [make.value(key) == b"a", make.mod(key) > found.mod_revision, make.value(p + b"missing") == b""],
    }
    for compare in compares[holds]:
        done, _ = await client.transaction(compare=[compare], success=[], failure=[])
        assert done is holds


async def test_cluster_calls(client: aetcd.Client, cluster: Cluster, p: bytes) -> None:
    members = [member async for member in client.members()]
    assert len(members) == len(cluster.endpoints)
    status = await client.status()
    assert status.leader.id in {member.id for member in members}
    await client.put(p + b"k", b"v")
    at = (await client.put(p + b"k", b"w")).header.revision
    await client.compact(at)
    await client.hash()
    await client.defragment()


# leases, locks, watches


async def test_lease(client: aetcd.Client, p: bytes) -> None:
    lease = await client.lease(6)
    assert lease.ttl == 6
    await client.put(p + b"k", b"v", lease=lease)
    for _ in range(4):  # longer than its time
        await asyncio.sleep(2)
        await lease.refresh()
    assert (await client.get(p + b"k")).lease == lease.id
    assert await lease.granted_ttl() == 6
    assert 0 <= await lease.remaining_ttl() <= 6
    assert list(await lease.keys()) == [p + b"k"]
    async with asyncio.timeout(30):
        while await client.get(p + b"k") is not None:  # noqa: ASYNC110 - it runs out at the server
            await asyncio.sleep(0.1)
    assert await lease.remaining_ttl() == -1
    other = await client.lease(60, lease_id=97531)
    await client.put(p + b"k", b"v", lease=97531)
    await other.revoke()
    assert await client.get(p + b"k") is None


async def test_lock(client: aetcd.Client, p: bytes) -> None:
    async with client.lock(p + b"l", ttl=20) as held:
        assert await held.is_acquired()
        await held.refresh()
        other = client.lock(p + b"l", ttl=20)
        assert not await other.acquire(timeout=1)
        waiting = asyncio.create_task(other.acquire(timeout=15))
        await asyncio.sleep(0.3)
        assert not waiting.done()
    assert await waiting
    assert not await held.is_acquired()
    assert await other.release()
    await client.lock(p + b"l", ttl=2).acquire()  # left alone: it runs out
    assert await client.lock(p + b"l").acquire(timeout=15)


async def test_watch(client: aetcd.Client, p: bytes) -> None:
    first = (await client.put(p + b"a", b"0")).header.revision + 1
    watch = await client.watch_prefix(p, start_revision=first, prev_kv=True)
    await client.put(p + b"a", b"1")
    await client.put(p + b"b", b"2")
    await client.delete(p + b"a")
    events = [await anext(aiter(watch)) for _ in range(3)]
    assert [(aetcd.EventKind(each.kind).name, each.kv.key[-1:], each.kv.value) for each in events] == [
        ("PUT", b"a", b"1"), ("PUT", b"b", b"2"), ("DELETE", b"a", b""),
    ]  # fmt: skip
    assert [each.prev_kv.value for each in events] == [b"0", b"", b"1"]
    await watch.cancel()
    deletes = await client.watch(p + b"a", start_revision=first, kind=aetcd.EventKind.DELETE)
    assert (await anext(aiter(deletes))).kind == aetcd.EventKind.DELETE
    await deletes.cancel()
    once = asyncio.create_task(client.watch_once(p + b"c", timeout=60))
    while not once.done():  # it does not say when it watches
        await client.put(p + b"c", b"told")
        await asyncio.wait([once], timeout=0.2)
    assert (await once).kv.value == b"told"
    await client.compact((await client.put(p + b"a", b"3")).header.revision)
    late = await client.watch(p + b"a", start_revision=first)
    with pytest.raises(aetcd.RevisionCompactedError):
        await anext(aiter(late))


async def test_the_leaders_death(mortal: Cluster, p: bytes) -> None:
    """Reads, writes, a lease, a lock and a watch of a client at a follower go on."""
    host, port = mortal.followers()[0].split(":")
    seen: list[bytes] = []
    written = 0

    async def persist(attempt: Callable[[], Awaitable[object]]) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    await attempt()
                except (aetcd.ClientError, TimeoutError):
                    await asyncio.sleep(0.05)
                else:
                    return

    async with aetcd.Client(host=host, port=int(port), timeout=30) as client:
        watch = await client.watch_prefix(p + b"n/")

        async def look() -> None:
            async for event in watch:
                seen.append(event.kv.key.removeprefix(p + b"n/"))  # noqa: PERF401 - seen as it grows

        watching = asyncio.create_task(look())
        lease = await client.lease(10)
        await client.put(p + b"leased", b"v", lease=lease)
        async with client.lock(p + b"l", ttl=60) as held:
            killing = asyncio.create_task(asyncio.to_thread(mortal.kill_leaders, 1))
            while not killing.done():
                key = p + b"n/%d" % written
                await persist(lambda key=key: client.put(key, b"v"))
                await persist(lease.refresh)
                written += 1
                await asyncio.sleep(0.05)
            await killing
            assert await held.is_acquired()
        assert await client.get(p + b"leased") is not None
        assert (await client.get_prefix(p + b"n/", keys_only=True)).count == written
        await asyncio.to_thread(until, lambda: len(seen) and seen[-1] == b"%d" % (written - 1))
        watching.cancel()
    assert list(dict.fromkeys(seen)) == [b"%d" % number for number in range(written)]
