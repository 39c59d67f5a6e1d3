"""Leases on real nodes that are killed and frozen: none ends early, and each ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from raftkv._pb import kv_pb2, kv_pb2_grpc, lease_pb2_grpc, session_pb2, state_pb2
from raftkv._pb import lease_pb2 as pb
from raftkv.local import AsyncLocalCluster

pytestmark = pytest.mark.integration

TTL_S = 3
KEPT_TTL_S = 6  # of what is kept alive: a stall of two seconds and an election must not cost it


class Holder:
    """Holds leases through one node as a careful client does: what it may believe, it counts from when it sent."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.leases = lease_pb2_grpc.LeaseStub(self.channel)
        self.kv = kv_pb2_grpc.KVStub(self.channel)
        self.safe_until: dict[int, float] = {}

    async def grant(self, ttl_s: int = TTL_S, **options: float) -> int:
        sent = time.monotonic()
        response = await self.leases.LeaseGrant(pb.LeaseGrantRequest(TTL=ttl_s), wait_for_ready=True, timeout=10)
        self.safe_until[response.ID] = sent + response.ttl_ms / 1000
        put = kv_pb2.PutRequest(key=b"lease/%x" % response.ID, value=b"v", lease=response.ID)
        await self.kv.Put(put, timeout=10)
        lease: int = response.ID
        return lease

    async def renew(self, lease: int, timeout_s: float = 10) -> int:
        async def one() -> AsyncIterator[pb.LeaseKeepAliveRequest]:
            yield pb.LeaseKeepAliveRequest(ID=lease)

        sent = time.monotonic()
        async for response in self.leases.LeaseKeepAlive(one(), wait_for_ready=True, timeout=timeout_s):
            if response.ttl_ms:
                self.safe_until[lease] = sent + response.ttl_ms / 1000
            ttl_ms: int = response.ttl_ms
            return ttl_ms
        raise AssertionError("no answer")

    async def alive(self, lease: int) -> bool:
        response = await self.kv.Range(kv_pb2.RangeRequest(key=b"lease/%x" % lease), timeout=10)
        there = bool(response.kvs)
        if not there:
            assert time.monotonic() >= self.safe_until[lease], "it ended early"
        return there


async def gone(holder: Holder, lease: int, timeout_s: float) -> float:
    """Wait until a lease has ended; how long after the time that was safe."""
    async with asyncio.timeout(timeout_s):
        while await holder.alive(lease):  # noqa: ASYNC110 - a node is asked
            await asyncio.sleep(0.05)
    return time.monotonic() - holder.safe_until[lease]


async def test_a_lease_through_any_node_ends_in_time() -> None:
    async with AsyncLocalCluster(3) as cluster:
        await cluster.wait_leader()
        holders = [Holder(cluster.endpoint(name)) for name in cluster.names]
        leases = [await holder.grant(KEPT_TTL_S) for holder in holders]
        for holder, other in zip(holders, [*holders[1:], holders[0]], strict=True):
            for lease in leases:
                assert await other.renew(lease) == KEPT_TTL_S * 1000
            look = await holder.leases.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=leases[0], keys=True))
            assert look.grantedTTL == KEPT_TTL_S
            assert 0 < look.ttl_ms <= KEPT_TTL_S * 1000
            assert list(look.keys) == [b"lease/%x" % leases[0]]
        holders[0].safe_until[leases[0]] = max(holder.safe_until.get(leases[0], 0.0) for holder in holders)
        # Half a second and two per cent are promised; the rest is the machine's, and less than having its time again.
        assert await gone(holders[0], leases[0], 60) < KEPT_TTL_S - 1
        for holder in holders:
            assert await holder.renew(leases[0]) == 0
            look = await holder.leases.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=leases[0]))
            assert look.TTL == -1


@pytest.mark.parametrize("how", ["kill", "stop", "pause"])
async def test_no_lease_is_lost_early_when_the_leader_goes(how: str) -> None:
    async with AsyncLocalCluster(5) as cluster:
        leader = await cluster.wait_leader()
        holder = Holder(cluster.endpoint(next(name for name in cluster.names if name != leader)))
        kept = await asyncio.gather(*(holder.grant(KEPT_TTL_S) for _ in range(20)))
        keeping = True

        async def keep() -> None:
            while keeping:
                # At once: one after the other, the last would come late on a busy machine.
                left_ms = await asyncio.gather(*map(holder.renew, kept))
                assert min(left_ms) > 0, "a lease that is kept alive in time was lost"
                await asyncio.sleep(0.5)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep())
            left = [await holder.grant() for _ in range(20)]
            await asyncio.sleep(1)
            await getattr(cluster, how)(leader)
            await cluster.wait_leader(other_than=leader)
            began = time.monotonic()
            # What is left gets its time anew, and is gone before this is over; so would be what is kept.
            while time.monotonic() - began < KEPT_TTL_S + 2:
                for lease in (*kept, *left):
                    await holder.alive(lease)
                await asyncio.sleep(0.1)
            if how == "pause":  # what the old leader believed must harm nobody
                await cluster.resume(leader)
                began = time.monotonic()
                while time.monotonic() - began < 3:
                    for lease in kept:
                        assert await holder.alive(lease)
                    await asyncio.sleep(0.1)
            keeping = False
        assert [lease for lease in left if await holder.alive(lease)] == []
        assert all([await holder.alive(lease) for lease in kept])


async def test_leases_end_however_often_the_leader_goes() -> None:
    async with AsyncLocalCluster(3) as cluster:
        leader = await cluster.wait_leader()
        holder = Holder(cluster.endpoint(leader))
        lease = await holder.grant(10)
        born = time.monotonic()
        alive = True
        while alive:
            assert time.monotonic() - born < 30, "three times its time is the most"
            await asyncio.sleep(6)  # a checkpoint comes at half of its time
            leader = await cluster.wait_leader()
            await cluster.kill(leader)
            other = await cluster.wait_leader(other_than=leader)
            checker = Holder(cluster.endpoint(other))
            checker.safe_until = holder.safe_until
            alive = await checker.alive(lease)
            await cluster.restart(leader)


async def test_a_session_stream_survives_nothing_but_its_calls_are_done_once() -> None:
    async with AsyncLocalCluster(3) as cluster:
        leader = await cluster.wait_leader()
        names = [name for name in cluster.names if name != leader]
        calls = [Talk(cluster.endpoint(name)) for name in (names[0], names[1], leader)]
        opened = await calls[0].ask(session_pb2.SESSION_METHOD_OPEN, b"")
        session = state_pb2.SessionOpened.FromString(opened.payload).session
        first: list[bytes] = []
        put = kv_pb2.PutRequest(key=b"once", value=b"v").SerializeToString()
        for seq in range(1, 11):
            response = await calls[seq % 3].ask(session_pb2.SESSION_METHOD_PUT, put, session=session, seq=seq)
            first.append(response.payload)
        await cluster.kill(leader)
        for seq in range(1, 11):  # again, through whoever is left
            response = await calls[seq % 2].ask(session_pb2.SESSION_METHOD_PUT, put, session=session, seq=seq)
            again = kv_pb2.PutResponse.FromString(response.payload)
            before = kv_pb2.PutResponse.FromString(first[seq - 1])
            assert again.header.revision == before.header.revision
        payload = kv_pb2.RangeRequest(key=b"once").SerializeToString()
        response = await calls[0].ask(session_pb2.SESSION_METHOD_RANGE, payload)
        assert kv_pb2.RangeResponse.FromString(response.payload).kvs[0].version == 10


class Talk:
    """A session stream to one node."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        call: grpc.aio.StreamStreamCall[bytes, bytes] = self._channel.stream_stream("/raftkv.v1.Session/Stream")()
        self._call = call
        self._next = 1

    async def ask(
        self, method: session_pb2.SessionMethod.ValueType, payload: bytes, session: int = 0, seq: int = 0
    ) -> session_pb2.SessionResponse:
        request = session_pb2.SessionRequest(
            id=self._next, method=method, payload=payload, session=session, seq=seq, first_incomplete=min(seq, 1)
        )
        self._next += 1
        await self._call.write(session_pb2.SessionRequests(requests=[request]).SerializeToString())
        message = await self._call.read()
        assert isinstance(message, bytes)
        (response,) = session_pb2.SessionResponses.FromString(message).responses
        assert response.WhichOneof("result") == "payload", response
        return response
