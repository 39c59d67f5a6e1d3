"""Traffic between nodes: one long-lived stream to each peer, and what its breaking tells.

Every node dials every other and sends on its own stream; replies travel on the other's. What one turn of the loop has
for a peer, and what gathers while its socket is full, leaves as one message: what costs is the message, not the byte.

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
from typing import Any, Final, Protocol

import grpc
import structlog

from raftkv._pb import raft_pb2
from raftkv.raft.types import NodeId
from raftkv.rpc.call import Call, Ended
from raftkv.rpc.connection import dial
from raftkv.server import convert
from raftkv.server.convert import PeerMessage

STREAM: Final = "/raftkv.v1.Peer/Stream"
SNAPSHOT: Final = "/raftkv.v1.Peer/Snapshot"

ORDINARY_ENDS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
BATCH_BYTES_MAX = 4 << 20
OUTBOX_BYTES_MAX = 64 << 20
DIAL_S = 1.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 0.3
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
    """Our stream to one peer: an outbox, and a task that dials again."""

    def __init__(self, peer: NodeId, address: str, metadata: tuple[tuple[str, str], ...], receiver: Receiver) -> None:
        self.peer = peer
        self.address = address
        self._metadata = metadata
        self._receiver = receiver
        self._log = structlog.get_logger().bind(peer=f"{peer:x}", address=address)
        self._outbox: list[PeerMessage] = []
        self._call: Call | None = None  # while we are connected

    def send(self, message: PeerMessage) -> None:
        """Put one message into the outbox; a peer we are not connected to gets nothing (Raft sends again)."""
        if self._call is not None:
            self._outbox.append(message)

    def flush(self, encoded: dict[tuple[int, ...], bytes]) -> None:
        """Send what is in the outbox, as one message, unless the one before is still on its way.

        Args:
            encoded: what other links have sent in this turn, by the ids of the messages in it. Followers in step get
                the same messages, which are encoded once.
        """
        call = self._call
        while self._outbox and call is not None:
            if call.held_up:
                self._check_room(call)
                return
            batch = self._next_batch()
            same = tuple(map(id, batch))
            message = encoded.get(same)
            if message is None:
                message = encoded[same] = convert.to_batch(batch).SerializeToString()
            call.send(message)

    def _check_room(self, call: Call) -> None:
        if sum(map(convert.size_hint, self._outbox)) > OUTBOX_BYTES_MAX:
            self._log.warning("peer_reset", reason="it does not read", outbox=len(self._outbox))
            self._call = None
            call.cancel()

    async def run(self) -> None:
        """Keep the stream alive until cancelled."""
        refused = ""
        delay_s = RECONNECT_MIN_S
        while True:
            try:
                ended = await self._stream()
            except OSError:  # TimeoutError too
                delay_s = min(2 * delay_s, RECONNECT_MAX_S)
            else:
                delay_s = RECONNECT_MIN_S
                if ended.code not in ORDINARY_ENDS and refused != ended.reason:
                    refused = ended.reason
                    self._log.error("peer_refused", code=ended.code.name, reason=refused)
            await asyncio.sleep(delay_s)

    async def _stream(self) -> Ended:
        connection = await dial(self.address, DIAL_S)
        try:
            call = connection.open(STREAM, self._metadata)
            await call.wait_accepted()
            if call.ended is not None:
                return call.ended
            self._call = call
            call.on_room = lambda: self.flush({})
            self._receiver.on_connected(self.peer)
            try:
                return await call.wait_end()
            finally:
                self._call = None
                self._outbox.clear()
                self._receiver.on_broken(self.peer)
        finally:
            connection.abort("this node ends the connection")

    def _next_batch(self) -> list[PeerMessage]:
        """Everything that gathered, up to BATCH_BYTES_MAX."""
        outbox = self._outbox
        size = count = 0
        while count < len(outbox) and size <= BATCH_BYTES_MAX:
            size += convert.size_hint(outbox[count])
            count += 1
        self._outbox = outbox[count:]
        return outbox if count == len(outbox) else outbox[:count]


class PeerService:
    """The receiving side: checks who calls, hands messages to the runtime."""

    def __init__(self, node_id: NodeId, cluster_id: int, known: Callable[[NodeId], bool], receiver: Receiver) -> None:
        self._node_id = node_id
        self._cluster_id = cluster_id
        self._known = known
        self._receiver = receiver

    async def stream(self, call: Call) -> None:
        """One peer's stream, for as long as it lasts."""
        sender = self.identify(call)
        parse, receive = raft_pb2.PeerBatch.FromString, self._receiver.on_messages

        def on_message(message: bytes) -> None:
            receive(sender, convert.from_batch(parse(message)))

        call.accept()
        try:
            call.hand_to(on_message)
            await call.read()  # to its end: messages go another way
        finally:
            self._receiver.on_broken(sender)
        call.send(raft_pb2.PeerClosed().SerializeToString())

    def identify(self, call: Call) -> NodeId:
        """The caller's id.

        Raises:
            Ended: the caller is not welcome, and why.
        """
        try:
            cluster, sender, receiver = (
                int(call.headers[key], 16) for key in ("raftkv-cluster", "raftkv-from", "raftkv-to")
            )
        except (KeyError, ValueError):
            raise Ended(grpc.StatusCode.INVALID_ARGUMENT, "raftkv-cluster, raftkv-from, raftkv-to: not given") from None
        reason = ""
        if cluster != self._cluster_id:
            reason = f"etcdserver: cluster ID mismatch: this node is of cluster {self._cluster_id:x}, not {cluster:x}"
        elif receiver != self._node_id:
            reason = f"this is node {self._node_id:x}, not {receiver:x}"
        elif not self._known(sender):
            reason = f"node {sender:x} is no member"
        if reason:
            raise Ended(grpc.StatusCode.FAILED_PRECONDITION, reason)
        return sender


class Peers:
    """All links of one node."""

    def __init__(self, node_id: NodeId, cluster_id: int, incarnation: int, receiver: Receiver) -> None:
        self._node_id = node_id
        self._cluster_id = cluster_id
        self._incarnation = incarnation
        self._receiver = receiver
        self._links: dict[NodeId, tuple[Link, asyncio.Task[None]]] = {}
        self._to_flush: dict[Link, None] = {}

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
        """Put a message into the outbox of a peer, for `flush`; unknown peers are passed over."""
        link = self._links.get(peer)
        if link is not None:
            link[0].send(message)
            self._to_flush[link[0]] = None

    def flush(self) -> None:
        """Send what one turn had for the peers."""
        if self._to_flush:
            links, self._to_flush = self._to_flush, {}
            encoded: dict[tuple[int, ...], bytes] = {}
            for link in links:
                link.flush(encoded)

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
