"""Leases, watches, locks, elections and guards of the SDK against a real etcd, which is killed and frozen meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from raftkv.client import (
    AsyncClient,
    Client,
    Compacted,
    Guard,
    Key,
    LeaseNotFound,
    LeaseState,
    LockLost,
    LockTimeout,
    NotLeading,
    OutcomeUnknown,
    Put,
    Unavailable,
)
from raftkv.local.ports import lease_free

pytestmark = [pytest.mark.system, pytest.mark.integration]


class Etcd:
    """A cluster of etcd processes."""

    def __init__(self, directory: Path, size: int) -> None:
        # Not ephemeral ports: while a member is down, any connection, even one to it, might be given its port.
        self._lease = lease_free(2 * size)
        ports = list(self._lease.ports)
        self.clients, self.peers = ports[:size], ports[size:]
        self.endpoints = [f"127.0.0.1:{port}" for port in self.clients]
        self.directory = directory
        self.processes = [self.launch(number) for number in range(size)]

    def launch(self, number: int) -> subprocess.Popen[bytes]:
        client, peer = f"http://{self.endpoints[number]}", f"http://127.0.0.1:{self.peers[number]}"
        everyone = ",".join(f"e{n}=http://127.0.0.1:{port}" for n, port in enumerate(self.peers))
        arguments = [
            "etcd", "--name", f"e{number}", "--data-dir", str(self.directory / f"e{number}"),
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", everyone,
        ]  # fmt: skip
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def signal(self, number: int, what: int) -> None:
        os.kill(self.processes[number].pid, what)

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def restart(self, number: int) -> None:
        self.processes[number] = self.launch(number)

    def leader(self) -> int:
        """The number of the member that leads, once there is one: any that stands still for a second loses it."""
        deadline = time.monotonic() + 60
        with Client(self.endpoints) as client:
            while True:
                for number, each in enumerate(client.cluster.status(timeout=5)):
                    if each.status and each.status.is_leader:
                        return number
                assert time.monotonic() < deadline, "no leader"
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._lease.release()


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
async def client(etcd: Etcd) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(etcd.endpoints, timeout=30) as client:
        yield client


@pytest.fixture
async def other(etcd: Etcd) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(etcd.endpoints, timeout=30) as client:
        yield client


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)


async def put_surely(client: AsyncClient, key: str, value: str) -> None:
    """Write, again where the outcome is unknown: for keys that each get one value only."""
    while True:
        try:
            await client.put(key, value)
        except (OutcomeUnknown, Unavailable):
            continue
        return


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_lease_is_kept_alive_and_revoked_with_its_keys(client: AsyncClient) -> None:
    async with client.lease(6) as lease:
        await client.put("lease/a", "1", lease=lease.id)
        assert lease.id in await client.leases()
        await asyncio.sleep(7)  # longer than its time
        lease.check()
        assert 0 < lease.remaining() < 6
        assert await client.get("lease/a") is not None
        assert (await client.lease_info(lease.id, keys=True)).keys == (b"lease/a",)
    assert await client.get("lease/a") is None
    assert lease.state is LeaseState.LOST
    with pytest.raises(LeaseNotFound):
        await client.lease_info(lease.id)
    with pytest.raises(LeaseNotFound):
        await client.revoke_lease(lease.id)


async def test_a_revoked_lease_is_lost_within_a_renewal(client: AsyncClient, other: AsyncClient) -> None:
    lease = await client.lease(6)
    await other.revoke_lease(lease.id)
    async with asyncio.timeout(20):
        await lease.lost.wait()
    assert lease.remaining() == 0


async def test_a_lease_nobody_keeps_runs_out_and_was_lost_before(client: AsyncClient) -> None:
    lease = await client.lease(6, keep_alive=False)
    put = await client.put("lease/b", "1", lease=lease.id)
    async with client.watch("lease/b", start_revision=put.revision + 1) as watch:
        async with asyncio.timeout(30):
            event = await anext(watch)
        assert event.kind == "delete"
        assert lease.state is LeaseState.LOST


async def test_leases_outlive_the_death_of_any_node(etcd: Etcd, client: AsyncClient) -> None:
    async with client.lease(12) as lease:  # less than all this takes
        for number in range(3):
            etcd.kill(number)
            await asyncio.sleep(2)
            etcd.restart(number)
            await asyncio.sleep(2.5)
            lease.check()


# --- watches ----------------------------------------------------------------------------------------------------------


async def test_a_watch_sees_everything_once_and_in_order(client: AsyncClient) -> None:
    async with client.watch("w/", prefix=True, prev=True) as watch:
        await client.put("w/a", "1")
        await client.put("elsewhere", "x")
        await client.txn().then(Put("w/a", "2"), Put("w/b", "3")).commit()
        await client.delete("w/a")
        events = [await anext(watch) for _ in range(4)]
    assert [(e.kind, e.key, e.value) for e in events] == [
        ("put", b"w/a", b"1"), ("put", b"w/a", b"2"), ("put", b"w/b", b"3"), ("delete", b"w/a", b""),
    ]  # fmt: skip
    assert events[1].revision == events[2].revision
    assert events[1].previous is not None
    assert events[1].previous.value == b"1"
    assert events[3].previous is not None
    assert events[3].previous.value == b"2"


async def test_filters_namespaces_and_history(client: AsyncClient) -> None:
    mine = client.with_options(namespace="ns/")
    first = (await mine.put("a", "1")).revision
    await mine.delete("a")
    await mine.put("a", "2")
    async with mine.watch("a", start_revision=first, filters=["nodelete"]) as watch:
        events = [await anext(watch) for _ in range(2)]
    assert [(e.key, e.value) for e in events] == [(b"a", b"1"), (b"a", b"2")]
    async with mine.watch("a", start_revision=first, filters=["noput"]) as watch:
        assert (await anext(watch)).kind == "delete"
    future = (await mine.put("a", "3")).revision + 2
    async with mine.watch("a", start_revision=future) as watch:
        await mine.put("a", "4")
        await mine.put("a", "5")
        assert (await anext(watch)).value == b"5"


async def test_compacted_history_is_said_not_skipped(client: AsyncClient) -> None:
    first = (await client.put("c", "1")).revision
    last = (await client.put("c", "2")).revision
    await client.compact(last)
    for endpoint in client.endpoints:  # whichever serves the watch has compacted, then
        async with AsyncClient(endpoint) as one:
            await one.get("c")
    async with client.watch("c", start_revision=first) as watch:
        with pytest.raises(Compacted) as caught:
            await anext(watch)
    assert caught.value.compact_revision == last


async def test_a_watch_loses_nothing_while_every_node_dies_once(etcd: Etcd, client: AsyncClient) -> None:
    seen: list[bytes] = []
    total = 120
    async with client.watch("kill/", prefix=True) as watch:

        async def look() -> None:
            async for event in watch:
                seen.append(event.key)
                if event.key == b"kill/end":
                    return

        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            group.create_task(look())
            for number in range(total):
                if number % 40 == 20:
                    etcd.kill(number // 40)
                if number % 40 == 35:
                    etcd.restart(number // 40)
                await put_surely(client, f"kill/{number:04d}", "x")
                await asyncio.sleep(0.05)
            await put_surely(client, "kill/end", "x")
    keys = list(dict.fromkeys(seen))
    assert keys == [b"kill/%04d" % number for number in range(total)] + [b"kill/end"]


async def test_a_watch_leaves_a_frozen_node(etcd: Etcd, client: AsyncClient) -> None:
    async with client.watch("frozen") as watch:
        number = etcd.endpoints.index(watch.endpoint)
        etcd.signal(number, signal.SIGSTOP)
        try:
            await put_surely(client, "frozen", "1")
            async with asyncio.timeout(15):
                assert (await anext(watch)).value == b"1"
        finally:
            etcd.signal(number, signal.SIGCONT)


# --- locks ------------------------------------------------------------------------------------------------------------


async def test_a_lock_excludes_and_fences_grow(client: AsyncClient, other: AsyncClient) -> None:
    inside = 0
    fences: list[int] = []

    async def worker(mine: AsyncClient) -> None:
        nonlocal inside
        async with mine.lock("jobs", ttl=10) as lock:
            inside += 1
            assert inside == 1
            lock.check()
            fences.append(lock.fence)
            await asyncio.sleep(0.01)
            inside -= 1

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(worker(client if number % 2 else other))
    assert fences == sorted(set(fences))
    assert len(fences) == 16
    assert len(await client.range("jobs/", prefix=True)) == 0


async def test_a_lock_that_is_not_free_in_time_raises_and_leaves_the_queue(
    client: AsyncClient, other: AsyncClient
) -> None:
    async with client.lock("busy"):
        with pytest.raises(LockTimeout):
            async with other.lock("busy", timeout=0.3):
                raise AssertionError("must not be entered")
        async with asyncio.timeout(9):  # less than the time of its lease
            while len(await client.range("busy/", prefix=True)) > 1:  # noqa: ASYNC110 - the revocation is on its way
                await asyncio.sleep(0.02)


async def test_a_lock_is_tried_and_its_delay_is_the_clusters(client: AsyncClient, other: AsyncClient) -> None:
    async with client.lock("try", ttl=5, timeout=0, lock_delay=20) as lock:
        item = await client.get(lock.key)
        assert item is not None
        assert (await client.lease_info(item.lease)).granted_s == 25
        assert lock.remaining() < 5
        with pytest.raises(LockTimeout):
            await other.lock("try", timeout=0).acquire()
        assert len(await client.range("try/", prefix=True)) == 1
    async with other.lock("try", timeout=0):
        pass


async def test_losing_the_lock_cancels_the_body_and_is_told(client: AsyncClient, other: AsyncClient) -> None:
    cancelled = False
    lock = client.lock("lose", ttl=6)

    async def hold() -> None:
        nonlocal cancelled
        async with lock:
            guards.append(lock.guard())
            await other.delete(lock.key)
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled = True
                raise

    guards: list[Guard] = []
    with pytest.raises(LockLost):
        await hold()
    assert cancelled
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(LockLost):
        await client.put("guarded", "1", guards=guards)


async def test_guards_on_etcd_are_done_by_transactions(client: AsyncClient, other: AsyncClient) -> None:
    async with client.lock("g") as lock:
        guards = [lock.guard()]
        put = await client.put("g-data", "1", guards=guards)
        again = await client.put("g-data", "2", if_revision=put.revision, guards=guards)
        result = await client.txn(guards=guards).when(Key("g-data").value == b"9").then(Put("g-data", "0")).commit()
        assert not result.succeeded
        assert (await client.delete("g-data", guards=guards)).deleted == 1
        assert again.revision > put.revision
    with pytest.raises(LockLost):
        await other.put("g-data", "3", guards=guards)
    with pytest.raises(LockLost):
        await other.txn(guards=guards).then(Put("g-data", "3")).commit()
    assert await client.get("g-data") is None


async def test_etcdctl_takes_part_in_the_same_queue(etcd: Etcd, client: AsyncClient) -> None:
    async with client.lock("shared") as lock:
        process = await asyncio.create_subprocess_exec(
            "etcdctl", "--endpoints", etcd.endpoints[0], "lock", "shared", "echo", "got it",
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "ETCDCTL_API": "3", "ETCDCTL_DIAL_TIMEOUT": "30s"},
        )  # fmt: skip
        await asyncio.sleep(1)
        assert process.returncode is None
        lock.check()
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert b"got it" in out


# --- elections --------------------------------------------------------------------------------------------------------


async def test_leadership_passes_on_and_is_observed(client: AsyncClient, other: AsyncClient) -> None:
    ours, theirs = client.election("boss", ttl=30), other.election("boss", ttl=30)
    values: list[bytes] = []

    async def observe() -> None:
        async for leader in theirs.observe():
            values.append(leader.value)
            if leader.value == b"two":
                return

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(observe())
        async with ours.campaign("one") as leadership:
            leader = await theirs.leader()
            assert leader is not None
            assert leader.value == b"one"
            second = theirs.campaign("two")
            candidate = group.create_task(second.acquire())
            await leadership.proclaim("one, still")
            await until(lambda: b"one, still" in values)  # what comes and goes between two looks is not observed
            assert not candidate.done()
        with pytest.raises(NotLeading):
            await leadership.proclaim("too late")
        await candidate
    await second.resign()
    assert values[-1] == b"two"
    assert await ours.leader() is None
