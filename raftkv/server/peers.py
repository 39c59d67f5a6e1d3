"""Traffic between nodes: one long-lived stream to each peer, and what its breaking tells.

Every node dials every other and sends on its own stream; replies travel on the other's. What gathers for one
peer while a write is under way leaves as one message, because what costs is the message, not the byte.

A stream that breaks is the first sign of a dead leader. `probe` then asks the kernel of that machine: a
refused connection is proof that the process is gone (a frozen one still accepts), and the replica may campaign
without waiting for the election time-out.

Nothing on one stream is ever left out: when too much gathers for a peer that does not read, the whole stream is
reset, and the replica re-sends what must not be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import grpc
import structlog

from raftkv._pb import raft_pb2, raft_pb2_grpc
from raftkv.raft.types import NodeId
from raftkv.server import convert
from raftkv.server.convert import PeerMessage

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.http2.ping_timeout_ms", 1_000),  # the one that decides; docs/adr/0004
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
SERVER_OPTIONS = (
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.http2.ping_timeout_ms", 1_000),
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 64 << 20),
)

ORDINARY_ENDS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
BATCH_BYTES_MAX = 4 << 20
OUTBOX_BYTES_MAX = 64 << 20
RECONNECT_DELAY_S = 0.05
PROBE_TRIES = 20
PROBE_EVERY_S = 0.005


class Receiver(Protocol):
    """What the transport tells the runtime."""

    def on_messages(self, sender: NodeId, messages: list[PeerMessage]) -> None:
        """Messages of one peer, in the order it sent them."""

    def on_connected(self, peer: NodeId) -> None:
        """Our stream to `peer` is new."""

    def on_broken(self, peer: NodeId) -> None:
        """A stream to or from `peer` broke."""


class Link:
    """Our stream to one peer: an outbox, a writer, a reconnect loop."""

    def __init__(self, peer: NodeId, address: str, metadata: tuple[tuple[str, str], ...], receiver: Receiver) -> None:
        self.peer = peer
        self.address = address
        self._metadata = metadata
        self._receiver = receiver
        self._log = structlog.get_logger().bind(peer=f"{peer:x}", address=address)
        self._outbox: list[PeerMessage] = []
        self._outbox_bytes = 0
        self._wakeup = asyncio.Event()
        self._connected = False
        self._resetting = False
        self._call: grpc.aio.StreamUnaryCall[raft_pb2.PeerBatch, raft_pb2.PeerClosed] | None = None

    def send(self, message: PeerMessage) -> None:
        """Put one message into the outbox; a peer we are not connected to gets nothing (Raft sends again)."""
        if not self._connected:
            return
        self._outbox.append(message)
        self._outbox_bytes += convert.size_hint(message)
        if self._outbox_bytes > OUTBOX_BYTES_MAX and self._call is not None:
            self._log.warning("peer_reset", reason="it does not read", outbox_bytes=self._outbox_bytes)
            self._connected = False
            self._resetting = True
            self._call.cancel()  # the writer may be waiting in it
        self._wakeup.set()

    async def run(self) -> None:
        """Keep the stream alive until cancelled."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = raft_pb2_grpc.PeerStub(channel)
            refused = ""
            while True:
                try:
                    await self._stream(stub)
                except grpc.aio.AioRpcError as fault:
                    if fault.code() not in ORDINARY_ENDS and refused != fault.details():
                        refused = fault.details() or ""
                        self._log.error("peer_refused", code=fault.code().name, reason=refused)
                await asyncio.sleep(RECONNECT_DELAY_S)

    async def _stream(self, stub: raft_pb2_grpc.PeerAsyncStub) -> None:
        call = stub.Stream(metadata=self._metadata)
        call.add_done_callback(lambda _: self._wakeup.set())
        established = False
        try:
            await call.wait_for_connection()
            established = self._connected = True
            self._call = call
            self._resetting = False
            self._receiver.on_connected(self.peer)
            while not call.done():
                await self._wakeup.wait()
                self._wakeup.clear()
                while self._outbox and not call.done():
                    await call.write(self._next_batch())
            await call  # raises what ended it
        except asyncio.InvalidStateError:
            pass  # the call ended between the look and the write
        except asyncio.CancelledError:
            # Of this task: it ends. Of the call alone, by `send`: the peer is dialled anew.
            if not self._resetting:
                raise
        finally:
            call.cancel()
            self._call = None
            self._connected = False
            self._outbox.clear()
            self._outbox_bytes = 0
            if established:
                self._receiver.on_broken(self.peer)

    def _next_batch(self) -> raft_pb2.PeerBatch:
        """Everything that gathered, up to BATCH_BYTES_MAX."""
        outbox, self._outbox = self._outbox, []
        if self._outbox_bytes > BATCH_BYTES_MAX:
            size = count = 0
            for message in outbox:
                size += convert.size_hint(message)
                count += 1
                if size > BATCH_BYTES_MAX:
                    break
            self._outbox = outbox[count:]
            outbox = outbox[:count]
            self._outbox_bytes -= size
        else:
            self._outbox_bytes = 0
        return convert.to_batch(outbox)


class PeerService(raft_pb2_grpc.PeerServicer):
    """The receiving side: checks who calls, hands messages to the runtime."""

    def __init__(self, node_id: NodeId, cluster_id: int, known: Callable[[NodeId], bool], receiver: Receiver) -> None:
        self._node_id = node_id
        self._cluster_id = cluster_id
        self._known = known
        self._receiver = receiver

    async def Stream(
        self, request_iterator: object, context: grpc.aio.ServicerContext[raft_pb2.PeerBatch, raft_pb2.PeerClosed]
    ) -> raft_pb2.PeerClosed:
        """One peer's stream, for as long as it lasts."""
        sender = await self.identify(context)
        await context.send_initial_metadata(())
        try:
            while True:
                batch: object = await context.read()
                if not isinstance(batch, raft_pb2.PeerBatch):
                    break
                self._receiver.on_messages(sender, convert.from_batch(batch))
        finally:
            self._receiver.on_broken(sender)
        return raft_pb2.PeerClosed()

    async def identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> NodeId:
        """The caller's id, or the call ends with the reason why it is not welcome."""
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        try:
            cluster = int(metadata["raftkv-cluster"], 16)
            sender = int(metadata["raftkv-from"], 16)
            receiver = int(metadata["raftkv-to"], 16)
        except (KeyError, ValueError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "raftkv-cluster, raftkv-from, raftkv-to: not given")
        if cluster != self._cluster_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"etcdserver: cluster ID mismatch: this node is of cluster {self._cluster_id:x}, not {cluster:x}",
            )
        if receiver != self._node_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this is node {self._node_id:x}, not {receiver:x}"
            )
        if not self._known(sender):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"node {sender:x} is no member")
        return sender


class Peers:
    """All links of one node."""

    def __init__(self, node_id: NodeId, cluster_id: int, incarnation: int, receiver: Receiver) -> None:
        self._node_id = node_id
        self._cluster_id = cluster_id
        self._incarnation = incarnation
        self._receiver = receiver
        self._links: dict[NodeId, tuple[Link, asyncio.Task[None]]] = {}

    def metadata(self, peer: NodeId) -> tuple[tuple[str, str], ...]:
        """Who we are and whom we mean, for `PeerService.identify`."""
        return (
            ("raftkv-cluster", f"{self._cluster_id:x}"),
            ("raftkv-from", f"{self._node_id:x}"),
            ("raftkv-to", f"{peer:x}"),
            ("raftkv-incarnation", f"{self._incarnation:x}"),
        )

    def update(
        self, spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]], addresses: Mapping[NodeId, str]
    ) -> None:
        """Dial the peers of `addresses` (ourselves left out), drop the others."""
        for peer in [peer for peer in self._links if peer not in addresses]:
            self._links.pop(peer)[1].cancel()
        for peer, address in addresses.items():
            if peer != self._node_id and peer not in self._links:
                link = Link(peer, address, self.metadata(peer), self._receiver)
                self._links[peer] = (link, spawn(link.run(), f"peer-{peer:x}"))

    def address(self, peer: NodeId) -> str | None:
        """Where `peer` listens."""
        link = self._links.get(peer)
        return link[0].address if link else None

    def send(self, peer: NodeId, message: PeerMessage) -> None:
        """Send when the loop comes round to it; unknown peers are passed over."""
        link = self._links.get(peer)
        if link is not None:
            link[0].send(message)

    async def is_gone(self, peer: NodeId) -> bool:
        """Whether the process of `peer` is provably gone: its port refuses connections."""
        address = self.address(peer)
        if address is None:
            return False
        host, _, port = address.rpartition(":")
        for _ in range(PROBE_TRIES):
            try:
                async with asyncio.timeout(PROBE_TRIES * PROBE_EVERY_S):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            except ConnectionRefusedError:
                return True
            except TimeoutError:
                return False  # it is cut off, or frozen; only time can tell
            except OSError:
                pass  # reset in the middle of it: the listening socket was just being closed
            else:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            # A dying process closes its sockets one by one: the listening one may be the last.
            await asyncio.sleep(PROBE_EVERY_S)
        return False
