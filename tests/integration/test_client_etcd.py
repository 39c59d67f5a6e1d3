"""The SDK against a real etcd: it is a Python client for etcd too."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from raftkv.client import (
    AsyncClient,
    Client,
    Compacted,
    ConditionFailed,
    Delete,
    FutureRevision,
    Get,
    InvalidRequest,
    Key,
    LeaseNotFound,
    OutcomeUnknown,
    Put,
    RequestTooLarge,
    Timeout,
    Unavailable,
)
from tests.integration.test_coordination_etcd import Etcd

pytestmark = [pytest.mark.system, pytest.mark.integration]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path_factory.mktemp("etcd"), 3)
    try:
        with Client(etcd.endpoints, timeout=30) as client:
            client.put("ready", "yes")
        yield etcd
    finally:
        etcd.stop()


@pytest.fixture
async def client(etcd: Etcd):
    async with AsyncClient(etcd.endpoints, timeout=30) as client:
        await client.delete("", prefix=True)
        yield client


async def test_keys_and_values(client):
    put = await client.put("k", "1")
    item = await client.get("k")
    assert (item.key, item.text, item.create_revision, item.mod_revision, item.version, item.lease) == (
        b"k", "1", put.revision, put.revision, 1, 0
    )  # fmt: skip
    assert (await client.put("k", "2", prev=True)).previous == item
    assert (await client.get("k", revision=put.revision)).text == "1"
    assert (await client.get("k", serializable=True)) is not None
    deleted = await client.delete("k", prev=True)
    assert (deleted.deleted, deleted.previous[0].text) == (1, "2")
    assert (await client.delete("k")).deleted == 0
    assert await client.get("k") is None


async def test_ranges(client):
    for number in (3, 1, 2):
        await client.put(f"r/{number}", str(9 - number))
    assert [item.key for item in await client.range("r/", prefix=True)] == [b"r/1", b"r/2", b"r/3"]
    assert [item.key for item in await client.range("r/", prefix=True, sort="-mod")] == [b"r/2", b"r/1", b"r/3"]
    assert [item.text for item in await client.range("r/", prefix=True, sort="value")] == ["6", "7", "8"]
    limited = await client.range("r/1", "r/3", limit=1)
    assert (len(limited), limited.count, limited.more) == (1, 2, True)
    assert (await client.range("r/2", "\0", count_only=True)).count == 2
    assert (await client.range("r/", prefix=True, keys_only=True)).items[0].value == b""
    newest = (await client.range("r/", prefix=True, sort="-mod", limit=1)).items[0].mod_revision
    assert len(await client.range("r/", prefix=True, min_mod_revision=newest)) == 1
    assert (await client.range("", prefix=True, count_only=True)).count == 3
    assert [item.key async for item in client.scan("r/", page_size=2)] == [b"r/1", b"r/2", b"r/3"]
    inside = client.with_options(namespace="r/")
    assert [item.key for item in await inside.range("", prefix=True)] == [b"1", b"2", b"3"]
    assert [item.key for item in await inside.range("2", "\0")] == [b"2", b"3"]


async def test_transactions(client):
    txn = client.txn().when(Key("t").version == 0, Key("t/", prefix=True).version == 0)
    first = await txn.then(Put("t", "1"), Get("t")).otherwise(Get("t")).commit()
    assert first.succeeded
    assert first.results[1].items[0].text == "1"
    second = await txn.commit()
    assert not second.succeeded
    nested = client.txn().when(Key("t").value == "1").then(Delete("t")).otherwise(Put("t", "0"))
    third = await client.txn().when(Key("t").mod_revision == first.revision).then(nested, Put("u", "2")).commit()
    assert third.results[0].results[0].deleted == 1
    with pytest.raises(InvalidRequest, match="duplicate key"):
        await client.txn().then(Put("t", "1"), Put("t", "2")).commit()
    with pytest.raises(InvalidRequest, match="too many operations"):
        await client.txn().then(*(Put(f"m{number}", "") for number in range(129))).commit()


async def test_conditions_and_update(client):
    put = await client.put("c", "1", if_absent=True)
    with pytest.raises(ConditionFailed):
        await client.put("c", "2", if_absent=True)
    await client.put("c", "2", if_revision=put.revision)
    with pytest.raises(ConditionFailed):
        await client.delete("c", if_revision=put.revision)
    await asyncio.gather(*(client.update("n", _add_one, max_retries=100) for _ in range(20)))
    assert (await client.get("n")).text == "20"


def _add_one(item):
    return str(int(item.text) + 1 if item else 1)


async def test_refusals_have_their_own_errors(client):
    revision = (await client.put("k", "v")).revision
    with pytest.raises(FutureRevision):
        await client.get("k", revision=revision + 1000)
    await client.compact(revision)
    with pytest.raises(Compacted):
        await client.compact(revision)
    with pytest.raises(Compacted):
        await client.get("k", revision=revision - 1)
    with pytest.raises(LeaseNotFound):
        await client.put("k", "v", lease=12345)
    with pytest.raises(ConditionFailed):
        await client.put("none", "", ignore_value=True)
    with pytest.raises(RequestTooLarge):
        await client.put("k", b"x" * 1_600_000)
    with pytest.raises(RequestTooLarge):
        await client.put("k", b"x" * 3_000_000)
    with pytest.raises(InvalidRequest):
        await client.put("k", "v", ignore_value=True)
    assert (await client.get("k")).text == "v"


async def test_cluster_and_maintenance(client, etcd, tmp_path):
    members = await client.cluster.members()
    assert {member.client_urls[0] for member in members} == {f"http://{endpoint}" for endpoint in etcd.endpoints}
    statuses = await client.cluster.status()
    leader = statuses[await asyncio.to_thread(etcd.leader)].status.member_id
    assert [status.status.is_leader for status in statuses].count(True) <= 1
    target = next(member for member in members if member.id != leader)
    await client.cluster.move_leader(target.name)
    await client.put("k", "v")
    async with asyncio.timeout(30):
        while {status.status.leader for status in await client.cluster.status()} != {target.id}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # until the last one has heard of it
    for endpoint in client.endpoints:
        async with AsyncClient(endpoint, timeout=30) as one:
            await one.get("k")  # linearizable: this one has applied the put
    revision = (await client.get("k")).mod_revision
    assert len({hashed.hash for hashed in await client.maintenance.hash_kv(revision)}) == 1
    assert await client.maintenance.alarms() == ()
    assert await client.maintenance.disarm() == ()
    assert await client.maintenance.defragment(timeout=60) == tuple(etcd.endpoints)
    saved = await client.maintenance.save_snapshot(tmp_path / "snap", timeout=60)
    checked = await asyncio.to_thread(
        subprocess.run,
        ["etcdctl", "snapshot", "status", saved.path],
        env={**os.environ, "ETCDCTL_API": "3"},
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


async def test_reads_go_on_when_the_leader_is_killed_and_no_write_is_lost(client, etcd):
    done: dict[str, str] = {}
    unknown: set[str] = set()
    stop = asyncio.Event()

    async def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            key = f"w/{number}"
            try:
                await client.put(key, str(number), timeout=30)
                done[key] = str(number)
            except OutcomeUnknown:
                unknown.add(key)  # etcd itself says "request timed out" for what its dead leader may have done

    async def read() -> None:
        while not stop.is_set():
            await client.get("w/1", timeout=Timeout(total=60, attempt=1))

    await client.put("w/0", "0")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(write()), group.create_task(read())]
        await asyncio.sleep(0.5)
        victim = await asyncio.to_thread(etcd.leader)
        etcd.kill(victim)
        before = len(done)
        async with asyncio.timeout(60):
            while len(done) < before + 20:  # noqa: ASYNC110 - progress has no event
                await asyncio.sleep(0.05)
        etcd.processes[victim] = etcd.launch(victim)
        await asyncio.sleep(1)
        stop.set()
        await asyncio.wait(tasks)
    found = {item.key.decode(): item.text async for item in client.scan("w/")}
    assert done.items() <= found.items()
    assert found.keys() <= done.keys() | unknown | {"w/0"}
    assert len(unknown) <= 4  # of each of etcd's elections one at most; where it stands still for a second it has more


async def test_no_write_is_handed_to_etcd_while_its_leader_is_gone(etcd):
    """A member that has not missed its leader yet would lose it, and say "request timed out" after seconds."""
    seen, failed = asyncio.Event(), asyncio.Event()
    hooks = {"leader": lambda _: seen.set(), "attempt_failed": lambda _: failed.set()}
    async with AsyncClient(etcd.endpoints, timeout=20, event_hooks=hooks) as client:
        await client.put("h", "0")
        await seen.wait()
        victim = await asyncio.to_thread(etcd.leader)
        etcd.kill(victim)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(client.get("h"))  # learns that the connection is broken, and goes elsewhere
            noticed = group.create_task(failed.wait())
            await asyncio.wait([reading, noticed], return_when=asyncio.FIRST_COMPLETED)
            failed.set()
            for number in range(20):
                group.create_task(client.put(f"h/{number}", "x"))
        etcd.processes[victim] = etcd.launch(victim)
        assert len(await client.range("h/", prefix=True)) == 20


async def test_a_frozen_member_is_left_behind(etcd):
    async with AsyncClient(etcd.endpoints, timeout=30) as client:
        await client.put("f", "1")
        victim = await asyncio.to_thread(etcd.leader)
        etcd.processes[victim].send_signal(signal.SIGSTOP)
        try:
            assert (await client.get("f", timeout=Timeout(total=60, attempt=0.3))).text == "1"
        finally:
            etcd.processes[victim].send_signal(signal.SIGCONT)


async def test_nobody_there_is_unavailable_in_time():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(Unavailable):
            await client.put("k", "v", timeout=0.5)
