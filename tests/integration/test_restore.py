"""A cluster is lost and begins again with a backup: with real nodes, and clients that live through it.

L1, L7, W3 and X3 over a restore: nothing that the old cluster gave out after the backup is taken for something new.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from raftkv.client import AsyncClient, Compacted, Guard, KeyValue, LockLost, OutcomeUnknown
from raftkv.client.contender import LockState
from raftkv.local import AsyncLocalCluster, ports
from raftkv.local.layout import Layout, NodeSpec
from tests.integration.test_exactly_once import Talk, revision_of

pytestmark = [pytest.mark.integration, pytest.mark.slow]

BUMP = 1_000_000_000
OFTEN = ("--snapshot-entries", "20", "--snapshot-catchup-entries", "5")


async def raftkv(*arguments: object) -> str:
    command = [sys.executable, "-m", "raftkv", *map(str, arguments)]
    done = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await done.communicate()
    assert done.returncode == 0, error.decode()
    return out.decode()


async def save(cluster: AsyncLocalCluster, file: Path) -> int:
    """A backup of the leader, which has applied all that was answered. Returns the revision."""
    await raftkv("snapshot", "save", file, "--endpoints", cluster.endpoint(await cluster.wait_leader()))
    return int((await raftkv("snapshot", "status", file)).split(", ")[1])


async def restore(file: Path, layout: Layout, *arguments: object) -> None:
    """Make the data directories of a cluster that is started then."""
    members = ",".join(f"{node.name}={layout.peer(node)}" for node in layout.nodes)
    for name in layout.names:
        options = ("--name", name, "--data-dir", layout.data(name), "--initial-cluster", members)
        await raftkv("snapshot", "restore", file, *options, *arguments)  # makes what is missing above the directory
    layout.save(None)


async def content(client: AsyncClient) -> dict[bytes, KeyValue]:
    return {item.key: item async for item in client.scan("")}


async def check_alike(cluster: AsyncLocalCluster) -> None:
    """HashKV of all nodes at one revision, once each has it."""
    revision = 0
    for endpoint in cluster.endpoints:
        async with AsyncClient([endpoint], timeout=20) as client:
            revision = max(revision, (await client.range("none")).revision)  # linearizable: it has caught up
    async with AsyncClient(cluster.endpoints, timeout=20) as client:
        hashes = await client.maintenance.hash_kv(revision)
    assert len(hashes) == len(cluster.endpoints)
    assert len({(each.hash, each.compact_revision) for each in hashes}) == 1


@asynccontextmanager
async def holding(cluster: AsyncLocalCluster, name: str, ttl: str) -> AsyncIterator[bytes]:
    """A process that holds a lock; gives the lock's key."""
    command = [sys.executable, "-m", "raftkv", "lock", name, "--ttl", ttl, "--endpoints", ",".join(cluster.endpoints)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).strip()
        assert await process.wait() == 1, "it was told that the lock is lost"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def check_goes_on(cluster: AsyncLocalCluster, client: AsyncClient) -> None:
    """A node that was away gets a snapshot; all of them start again on what they have."""
    leader = await cluster.wait_leader()
    late = next(name for name in cluster.names if name != leader)
    await cluster.kill(late)
    for number in range(100):
        await client.put(f"more/{number % 7}", str(number))
    await cluster.restart(late)
    await check_alike(cluster)
    before = await content(client)
    await cluster.kill("all")
    await cluster.restart("all")
    assert await content(client) == before
    await check_alike(cluster)


@pytest.mark.timeout(400)
async def test_a_cluster_that_was_lost_begins_again_with_its_backup(tmp_path: Path) -> None:
    file = tmp_path / "backup"
    async with (
        AsyncLocalCluster(3, directory=tmp_path / "old") as old,
        AsyncClient(old.endpoints, timeout=60) as client,
        client.watch("k/", prefix=True) as watch,
    ):
        talk = Talk(old.endpoints[0])
        kept_session = await talk.open()
        for number in range(50):
            await client.put(f"k/{number % 40}", str(number))
        assert revision_of(await talk.put("once", kept_session, 1))
        async with holding(old, "job", "20s") as key:
            in_backup = await content(client)
            saved_at = await save(old, file)
            assert saved_at == max(item.mod_revision for item in in_backup.values())
            first = in_backup[key].create_revision
            # What the backup knows nothing of.
            lost_session = await talk.open()
            assert revision_of(await talk.put("lost", lost_session, 1))
            assert revision_of(await talk.put("once", kept_session, 2))
            await client.put("k/lost", "")
            await client.revoke_lease(in_backup[key].lease)
        lock = await client.lock("job", ttl=30).acquire()
        lost = Guard(lock.key, lock.fence)
        last = (await client.put("under-the-lost-lock", "", guards=[lost])).revision
        assert first < lost.token < last
        seen = [await anext(watch) for _ in range(51)]
        assert seen[-1].key == b"k/lost"
        layout = dataclasses.replace(old.layout, directory=tmp_path / "new")  # at the same addresses
        await old.pause("all")
        under_way = asyncio.create_task(client.put("under-way", "", timeout=120))
        await old.kill("all")
        await talk.close()
        await old.close()
        await restore(file, layout)
        async with AsyncLocalCluster(directory=layout.directory, arguments=OFTEN) as new:
            # The lock is held as in the backup, until its lease runs out; who held it later has lost it.
            assert (await client.put("x", "1", guards=[Guard(key, first)])).revision > saved_at + BUMP
            for guard in (lost, Guard(key, lost.token)):
                with pytest.raises(LockLost):
                    await client.put("x", "2", guards=[guard])
            # A write that was on its way is repeated only if it had not been sent.
            try:
                await under_way
                done = {b"under-way"}
            except OutcomeUnknown:
                done = set()
            found = await content(client)
            assert found.keys() - in_backup.keys() == {b"x"} | done
            assert found.items() >= in_backup.items()
            await asyncio.wait_for(lock.lost.wait(), 60)
            assert lock.state is LockState.LOST
            # Watches: the one that has lived through it, and those that resume anywhere before.
            with pytest.raises(Compacted):
                await asyncio.wait_for(anext(watch), 60)
            for revision in (1, saved_at, saved_at + 1, last, saved_at + BUMP - 1):
                with pytest.raises(Compacted) as caught:
                    async with client.watch("k/", prefix=True, start_revision=revision) as resumed:
                        await asyncio.wait_for(anext(resumed), 60)
                assert caught.value.compact_revision == saved_at + BUMP
            # Sessions: those of the old cluster are unknown, and no new one is taken for one of them.
            talk = Talk(new.endpoints[1])
            for session in (kept_session, lost_session):
                for seq in (1, 2, 3):
                    refused = await talk.put("once", session, seq)
                    assert (refused.error.reason, refused.error.executed) == ("SESSION_EXPIRED", "no")
            assert await talk.open() > lost_session
            await talk.close()
            async with client.lock("job", ttl=10, timeout=60) as again:
                assert again.fence > saved_at + BUMP > lost.token
                await client.put("x", "3", guards=[again.guard()])
                for token in (first, lost.token):
                    with pytest.raises(LockLost):
                        await client.put("x", "4", guards=[Guard(key, token)])
            await check_alike(new)
            await check_goes_on(new, client)


@pytest.mark.timeout(400)
async def test_a_backup_moves_to_another_cluster_and_from_there_on(tmp_path: Path) -> None:
    """Three nodes to one, at other addresses and under another token; and the same again from its own backup."""
    async with AsyncLocalCluster(3) as first, AsyncClient(first.endpoints, timeout=30) as client:
        await client.put("a", "1")
        expected = await content(client)
        revision = await save(first, tmp_path / "backup-0")
    for number in (1, 2):
        token = ("--initial-cluster-token", f"number {number}")
        free = ports.lease_free(2, "127.0.0.1")
        layout = Layout(tmp_path / str(number), "127.0.0.1", (NodeSpec("n1", *free.ports),))
        free.release()
        await restore(tmp_path / f"backup-{number - 1}", layout, *token)
        async with (
            AsyncLocalCluster(directory=layout.directory, arguments=token) as cluster,
            AsyncClient(cluster.endpoints, timeout=30) as client,
        ):
            assert await content(client) == expected
            (member,) = await client.cluster.members()
            assert member.name == "n1"
            revision += BUMP + 1
            assert (await client.put("b", str(number))).revision == revision
            expected = await content(client)
            assert await save(cluster, tmp_path / f"backup-{number}") == revision
