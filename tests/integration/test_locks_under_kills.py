"""Locks of the SDK and of the Lock service on one name while leaders die, all nodes restart and one gets a snapshot.

Invariants L1, L6, L7: whoever held the lock is found in the order of the fences, and no two at one time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass

import grpc
import pytest

from raftkv._pb import lease_pb2, lock_pb2
from raftkv.client import AsyncClient, Event, LockLost, RaftkvError
from raftkv.local import AsyncLocalCluster

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NAME = "turns"
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True, slots=True)
class Turn:
    """One time that the lock was held."""

    fence: int
    began: float  # when it was known to be held
    sure: float  # the last moment before which it was asked for and certain
    who: str


def violations(turns: list[Turn], writes: list[Event]) -> list[str]:
    """What is wrong with a history; `writes` are those made under guards, each with the fence as its value."""
    found = []
    in_order = sorted(turns, key=lambda turn: turn.fence)
    for before, after in itertools.pairwise(in_order):
        if before.fence == after.fence:
            found.append(f"the same fence twice: {before}, {after}")
        if after.began < before.began:
            found.append(f"a later fence came first: {before}, {after}")
        if after.began < before.sure:
            found.append(f"two at one time: {before}, {after}")
    fences = [int(event.value) for event in writes]
    if fences != sorted(fences):
        found.append("writes of holders do not follow the order of their fences")
    return found


class Contenders:
    """Those who want the lock, and the history they make."""

    def __init__(self, cluster: AsyncLocalCluster) -> None:
        self._cluster = cluster
        self.turns: list[Turn] = []
        self.lost = 0
        self.stopped = False

    async def have_turns(self) -> None:
        """Wait until the lock was held twenty times from now on."""
        enough = len(self.turns) + 20
        async with asyncio.timeout(90):
            while len(self.turns) < enough:  # noqa: ASYNC110 - that tells nobody
                await asyncio.sleep(0.05)

    async def use_the_sdk(self, client: AsyncClient, who: str) -> None:
        while not self.stopped:
            try:
                async with client.lock(NAME, ttl=6, timeout=90) as lock:
                    began = sure = time.monotonic()
                    try:
                        for _ in range(2):
                            await client.put("guarded", str(lock.fence), guards=[lock.guard()])
                            asked = time.monotonic()
                            lock.check()
                            sure = asked
                    finally:
                        self.turns.append(Turn(lock.fence, began, sure, who))
            except LockLost:
                self.lost += 1

    async def use_the_service(self, number: int) -> None:
        """With a lease that outlives the test, and through one node after the other."""
        names = self._cluster.names
        service = _Service(1000 + number, f"service {number}", self.turns)
        node = number
        while not self.stopped:
            try:
                async with grpc.aio.insecure_channel(self._cluster.endpoint(names[node % len(names)])) as channel:
                    while not self.stopped:
                        await service.turn(channel)
            except grpc.aio.AioRpcError as error:
                if error.code() not in PASSING:
                    raise
                node += 1
                await asyncio.sleep(0.2)


class _Service:
    """Locks and unlocks by the Lock service."""

    def __init__(self, lease: int, who: str, turns: list[Turn]) -> None:
        self._lease = lease
        self._who = who
        self._turns = turns
        self._granted = False
        self._fence = 0  # of the last turn

    async def turn(self, channel: grpc.aio.Channel) -> None:
        grant: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/raftkv.v1.Lease/LeaseGrant")
        lock: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/raftkv.v1.Lock/Lock")
        unlock: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/raftkv.v1.Lock/Unlock")
        if not self._granted:
            try:
                await grant(lease_pb2.LeaseGrantRequest(ID=self._lease, TTL=3600).SerializeToString(), timeout=10)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # by an earlier attempt
                    raise
            self._granted = True
        raw = await lock(lock_pb2.LockRequest(name=NAME.encode(), lease=self._lease).SerializeToString(), timeout=60)
        held = lock_pb2.LockResponse.FromString(raw)
        if held.fence != self._fence:  # else its unlock has not been done: it is the same turn still
            self._fence = held.fence
            began = time.monotonic()
            await asyncio.sleep(0.02)
            self._turns.append(Turn(held.fence, began, time.monotonic(), self._who))
        await unlock(lock_pb2.UnlockRequest(key=held.key, fence=held.fence).SerializeToString(), timeout=60)


async def guarded_writes(client: AsyncClient) -> list[Event]:
    """All changes of `guarded`, in order."""
    await client.put("guarded/end", "")
    events: list[Event] = []
    async with client.watch("guarded", prefix=True, start_revision=1) as watch, asyncio.timeout(60):
        async for event in watch:
            if event.key != b"guarded":
                break
            events.append(event)
    return events


def installed_a_snapshot(cluster: AsyncLocalCluster, name: str) -> bool:
    lines = cluster.log(name).read_text().splitlines()
    return any(json.loads(line)["event"] == "snapshot_installed" for line in lines if line.startswith("{"))


async def kill_the_leader(cluster: AsyncLocalCluster) -> None:
    (leader,) = await cluster.kill("leader")
    await cluster.wait_leader(other_than=leader, timeout_s=30)
    await asyncio.sleep(0.5)
    await cluster.restart(leader, timeout_s=60)


async def let_one_need_a_snapshot(cluster: AsyncLocalCluster, client: AsyncClient) -> str:
    """Kill a follower, and restart it when the others have cut their logs."""
    leader = await cluster.wait_leader()
    late = next(name for name in cluster.names if name != leader)
    await cluster.kill(late)
    for number in range(200):
        await client.put(f"filler/{number % 9}", "x" * 100)
    for name in cluster.names:  # their caches of recent entries would still have what the logs have not
        if name != late:
            await cluster.restart(name, wait=False)
            await cluster.wait_leader(timeout_s=30)
            await asyncio.sleep(1.0)
    await cluster.restart(late, timeout_s=60)
    async with asyncio.timeout(60):
        while not installed_a_snapshot(cluster, late):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)
    return late


@pytest.mark.timeout(400)
async def test_locks_exclude_and_fences_rise_whatever_dies() -> None:
    arguments = ("--snapshot-entries", "50", "--snapshot-catchup-entries", "10")
    async with (
        AsyncLocalCluster(5, arguments=arguments) as cluster,
        AsyncClient(cluster.endpoints, timeout=60) as one,
        AsyncClient(cluster.endpoints, timeout=60) as two,
        AsyncClient(cluster.endpoints, timeout=60) as other,
    ):
        await cluster.wait_leader()
        contenders = Contenders(cluster)
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(contenders.use_the_sdk(one if number % 2 else two, f"sdk {number}"))
            for number in range(3):
                group.create_task(contenders.use_the_service(number))
            await contenders.have_turns()
            for _ in range(4):
                await kill_the_leader(cluster)
                await contenders.have_turns()
            await cluster.kill("all")
            await cluster.restart("all", timeout_s=60)
            await contenders.have_turns()
            late = await let_one_need_a_snapshot(cluster, other)
            # Who got a snapshot leads: what it knows of locks is what it was sent.
            await other.cluster.move_leader(late, timeout=60)
            await contenders.have_turns()
            contenders.stopped = True
        writes = await guarded_writes(other)
        await wait_until_all_agree(other)
    assert violations(contenders.turns, writes) == []
    assert {turn.who[:3] for turn in contenders.turns} == {"sdk", "ser"}


async def wait_until_all_agree(client: AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if len({each.hash for each in await client.maintenance.hash_kv()}) == 1:
                    return
            except RaftkvError:
                pass
            await asyncio.sleep(0.2)


def test_the_checker_finds_what_it_is_for() -> None:
    good = [Turn(2, 1.0, 2.0, "a"), Turn(5, 2.5, 3.0, "b"), Turn(9, 3.0, 3.0, "a")]
    assert violations(good, []) == []
    assert len(violations([*good, Turn(9, 3.5, 3.6, "c")], [])) == 1
    assert len(violations([*good, Turn(7, 0.5, 0.6, "c")], [])) >= 1
    assert len(violations([*good, Turn(3, 1.5, 1.6, "c")], [])) == 1
