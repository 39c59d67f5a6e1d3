"""Watches and locks on real nodes: killed leaders, clients that never read, a follower that gets a snapshot."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from raftkv import AsyncClient
from raftkv._pb import lease_pb2, lock_pb2, watch_pb2
from raftkv.local import AsyncLocalCluster

pytestmark = pytest.mark.integration


class Stream:
    """A watch stream that gathers the values it is told, by watch id."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        method: Any = channel.stream_stream("/etcdserverpb.Watch/Watch")
        self.call = method()
        self.seen: list[tuple[int, bytes]] = []
        self.events = 0

    async def create(self, **fields: Any) -> None:
        request = watch_pb2.WatchRequest(create_request=watch_pb2.WatchCreateRequest(**fields))
        await self.call.write(request.SerializeToString())

    async def read(self) -> watch_pb2.WatchResponse:
        raw = await self.call.read()
        assert raw is not grpc.aio.EOF, await self.call.details()
        response = watch_pb2.WatchResponse.FromString(raw)
        assert not response.canceled
        self.events += len(response.events)
        self.seen += [(event.kv.mod_revision, event.kv.value) for event in response.events]
        return response


@pytest.mark.slow
async def test_watches_survive_the_death_of_leaders() -> None:
    """On a node that lives nothing is missed, repeated or out of order, and elsewhere a watch can be taken up again."""
    async with AsyncLocalCluster(3) as cluster, AsyncClient(cluster.endpoints, timeout=15.0) as client:
        leader = await cluster.wait_leader()
        follower = next(name for name in cluster.names if name != leader)
        async with grpc.aio.insecure_channel(cluster.endpoint(follower)) as channel:
            stream = Stream(channel)
            await stream.create(key=b"k")
            assert (await stream.read()).created
            written = [(await client.put("k", f"{number}")).revision for number in range(20)]
            await cluster.kill(leader)
            written += [(await client.put("k", f"{number}")).revision for number in range(20, 40)]
            async with asyncio.timeout(60):
                while stream.events < 40:
                    await stream.read()
            assert stream.seen == [(revision, b"%d" % number) for number, revision in enumerate(written)]
            await cluster.restart(leader)
            await cluster.wait_healthy()
        async with grpc.aio.insecure_channel(cluster.endpoint(leader)) as channel:
            resumed = Stream(channel)
            await resumed.create(key=b"k", start_revision=written[9] + 1)
            async with asyncio.timeout(60):
                while resumed.events < 30:
                    await resumed.read()
            assert resumed.seen == stream.seen[10:]  # W7: the same suffix on any member
            resumed.call.cancel()


@pytest.mark.slow
async def test_clients_that_never_read_cost_a_bounded_amount() -> None:
    """Row 64: 20 streams of large values once took etcd to 15 GB."""
    async with (
        AsyncLocalCluster(1) as cluster,
        AsyncClient(cluster.endpoints, timeout=15.0) as client,
        grpc.aio.insecure_channel(cluster.endpoints[0]) as channel,
    ):
        streams = [Stream(channel) for _ in range(200)]
        for stream in streams:
            await stream.create(key=b"k/", range_end=b"k0")
            await stream.read()
        await client.put("k/0", b"x" * 100_000)
        before = (await cluster.status())[0].rss_bytes or 0
        for number in range(400):  # 40 MB, 8 GB if each watch kept its own
            await client.put(f"k/{number % 10}", b"%06d" % number + bytes(100_000))
        after = (await cluster.status())[0].rss_bytes or 0
        assert after - before < 250_000_000, f"{before} -> {after}"
        for stream in streams[1:]:
            stream.call.cancel()
        async with asyncio.timeout(30):
            while streams[0].events < 401:
                await streams[0].read()
        assert [value[:6] for _, value in streams[0].seen[1:]] == [b"%06d" % number for number in range(400)]
        streams[0].call.cancel()


async def test_a_lock_outlives_the_node_it_is_waited_for_on() -> None:
    async with AsyncLocalCluster(3) as cluster:
        leader = await cluster.wait_leader()

        async def call(name: str, method: str, request: Any, answer: Any) -> Any:
            async with grpc.aio.insecure_channel(cluster.endpoint(name)) as channel:
                unary: Any = channel.unary_unary(method)
                return answer.FromString(await unary(request.SerializeToString(), timeout=100))

        async def grant(name: str) -> int:
            request = lease_pb2.LeaseGrantRequest(TTL=600)
            lease: int = (await call(name, "/raftkv.v1.Lease/LeaseGrant", request, lease_pb2.LeaseGrantResponse)).ID
            return lease

        async def lock(name: str, lease: int) -> Any:
            request = lock_pb2.LockRequest(name=b"l", lease=lease)
            return await call(name, "/raftkv.v1.Lock/Lock", request, lock_pb2.LockResponse)

        first, second = (name for name in cluster.names if name != leader)
        held = await lock(first, await grant(first))
        lease = await grant(second)
        waiter = asyncio.ensure_future(lock(second, lease))
        await asyncio.sleep(0.5)
        await cluster.kill(leader)  # its waiter goes on with the next leader
        await cluster.wait_leader(other_than=leader)
        await cluster.restart(leader)
        await cluster.wait_healthy()
        await asyncio.sleep(0.2)
        assert not waiter.done()
        await cluster.stop(second)  # orderly: it is told, and its place is kept
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await waiter
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        again = asyncio.ensure_future(lock(first, lease))
        await asyncio.sleep(0.3)
        assert not again.done()
        unlock = lock_pb2.UnlockRequest(key=held.key, fence=held.fence)
        await call(first, "/raftkv.v1.Lock/Unlock", unlock, lock_pb2.UnlockResponse)
        assert (await asyncio.wait_for(again, 60)).fence > held.fence
