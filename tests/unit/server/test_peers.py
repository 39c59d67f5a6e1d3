"""Streams between nodes, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from raftkv._pb import raft_pb2, raft_pb2_grpc
from raftkv.raft.messages import Append, AppendReply, Heartbeat
from raftkv.raft.types import Entry, EntryKind
from raftkv.replica.effects import Forward, PeerMessage
from raftkv.server import peers as peers_module
from raftkv.server.peers import SERVER_OPTIONS, Peers, PeerService
from raftkv.state.commands import Command

CLUSTER = 0xC1


class Inbox:
    """Notes what the transport says."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, PeerMessage]] = []
        self.batches = 0
        self.connected: list[int] = []
        self.broken: list[int] = []
        self.changed = asyncio.Event()

    def on_messages(self, sender: int, messages: list[PeerMessage]) -> None:
        self.batches += 1
        self.messages.extend((sender, message) for message in messages)
        self.changed.set()

    def on_connected(self, peer: int) -> None:
        self.connected.append(peer)
        self.changed.set()

    def on_broken(self, peer: int) -> None:
        self.broken.append(peer)
        self.changed.set()

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def listening(
    node: int, inbox: Inbox, *, cluster: int = CLUSTER, port: int = 0
) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    service = PeerService(node, cluster, lambda peer: peer in (1, 2), inbox)
    raft_pb2_grpc.add_PeerServicer_to_server(service, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield server, bound
    finally:
        await server.stop(0)


@asynccontextmanager
async def dialing(
    node: int, inbox: Inbox, addresses: dict[int, str], *, cluster: int = CLUSTER
) -> AsyncIterator[Peers]:
    peers = Peers(node, cluster, 7, inbox)
    tasks: list[asyncio.Task[None]] = []

    def spawn(coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(coroutine, name=name))
        return tasks[-1]

    peers.update(spawn, addresses)
    try:
        yield peers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_messages_arrive_whole_in_order_and_in_batches() -> None:
    there, here = Inbox(), Inbox()
    async with listening(2, there) as (_, port), dialing(1, here, {1: "127.0.0.1:1", 2: f"127.0.0.1:{port}"}) as peers:
        await here.until(lambda: here.connected == [2])
        sent: list[PeerMessage] = [
            Append(3, 1, 2, (Entry(2, 3, EntryKind.NORMAL, b"x" * 100), Entry(3, 3, EntryKind.CONF_CHANGE, b"")), 1),
            AppendReply(3, 5, True, 4, 2),
            Forward(3, 9, (Command(1, 1, b"payload"), Command(2, 3, b""))),
            *(Heartbeat(3, commit, 0) for commit in range(500)),
        ]
        for message in sent:
            peers.send(2, message)
        await there.until(lambda: len(there.messages) == len(sent))
        assert there.messages == [(1, message) for message in sent]
        assert there.batches <= 3  # what gathers in one turn of the loop leaves as one message


async def test_another_cluster_is_refused_and_nothing_of_it_is_heard() -> None:
    there, here = Inbox(), Inbox()
    async with listening(2, there) as (_, port), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for metadata, code in [
            (Peers(1, 0xBAD, 7, here).metadata(2), grpc.StatusCode.FAILED_PRECONDITION),
            (Peers(1, CLUSTER, 7, here).metadata(3), grpc.StatusCode.FAILED_PRECONDITION),
            (Peers(9, CLUSTER, 7, here).metadata(2), grpc.StatusCode.FAILED_PRECONDITION),
            ((("raftkv-from", "zz"),), grpc.StatusCode.INVALID_ARGUMENT),
            ((), grpc.StatusCode.INVALID_ARGUMENT),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raft_pb2_grpc.PeerStub(channel).Stream(iter([raft_pb2.PeerBatch()]), metadata=metadata)
            assert caught.value.code() is code
            if metadata and metadata[0] == ("raftkv-cluster", "bad"):
                assert "cluster ID mismatch" in (caught.value.details() or "")
    assert there.messages == []


async def test_a_stream_that_breaks_is_told_and_comes_back() -> None:
    there, here = Inbox(), Inbox()
    async with listening(2, there) as (server, port), dialing(1, here, {2: f"127.0.0.1:{port}"}) as peers:
        await here.until(lambda: here.connected == [2])
        await server.stop(0)
        await here.until(lambda: 2 in here.broken)
        peers.send(2, Heartbeat(1, 0, 1))  # not connected: passed over, not kept
        async with listening(2, there, port=port):
            await here.until(lambda: here.connected == [2, 2])
            peers.send(2, Heartbeat(1, 0, 2))
            await there.until(lambda: bool(there.messages))
            assert there.messages == [(1, Heartbeat(1, 0, 2))]


async def test_a_peer_that_does_not_read_gets_its_stream_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded; the replica re-sends what matters on the next stream."""
    monkeypatch.setattr(peers_module, "OUTBOX_BYTES_MAX", 4 << 20)

    class Deaf(PeerService):
        async def Stream(self, request_iterator: Any, context: Any) -> raft_pb2.PeerClosed:
            await self.identify(context)
            await context.send_initial_metadata(())
            await asyncio.Event().wait()
            raise AssertionError

    here = Inbox()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    raft_pb2_grpc.add_PeerServicer_to_server(Deaf(2, CLUSTER, lambda _: True, Inbox()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with dialing(1, here, {2: f"127.0.0.1:{port}"}) as peers:
        await here.until(lambda: here.connected == [2])
        big = Append(1, 0, 0, (Entry(1, 1, EntryKind.NORMAL, b"x" * (1 << 20)),), 0)
        async with asyncio.timeout(20):
            while not here.broken:
                peers.send(2, big)
                await asyncio.sleep(0.005)
        await here.until(lambda: here.connected == [2, 2])
    await server.stop(0)


async def test_a_refused_connection_is_proof_and_a_silent_process_is_not() -> None:
    here = Inbox()
    with socket.socket() as frozen, socket.socket() as closed:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen(64)
        closed.bind(("127.0.0.1", 0))  # bound but not listening: the kernel refuses
        addresses = {2: f"127.0.0.1:{frozen.getsockname()[1]}", 3: f"127.0.0.1:{closed.getsockname()[1]}"}
        async with dialing(1, here, addresses) as peers:
            assert await peers.is_gone(3)
            assert not await peers.is_gone(2)
            assert not await peers.is_gone(4)
