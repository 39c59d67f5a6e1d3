"""aetcd, an etcd client for Python that knows nothing of us, does its key-value and transaction calls."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aetcd
import pytest

from tests.compat.clusters import Cluster

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[aetcd.Client]:
    host, port = cluster.endpoints[-1].split(":")
    async with aetcd.Client(host=host, port=int(port), timeout=10) as connected:
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
