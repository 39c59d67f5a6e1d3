"""Snapshots on their way to followers whose entries are compacted.

    sender:    view of the state -> spool file -> chunks, from the offset that the receiver names
    receiver:  chunks -> part file -> verified -> new state directory -> `InstallSnapshot` to consensus

A transfer that breaks goes on where the receiver's disk ends, also after a restart of either side, as long as the
spool file is still good: it is kept and offered again until the log has moved past it. One transfer to a peer at a
time, one from anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from raftkv._pb import raft_pb2
from raftkv.raft.types import NodeId, SnapshotMeta
from raftkv.rpc.call import Call, Ended
from raftkv.rpc.connection import dial
from raftkv.server import convert
from raftkv.server.peers import DIAL_S, SNAPSHOT, PeerService, Receiver
from raftkv.storage.errors import NodeFatal, SnapshotFailed
from raftkv.storage.snapshots import IncomingSnapshot, SnapshotFile, SnapshotSpool

if TYPE_CHECKING:
    from raftkv.server.runtime import Runtime

CHUNK_BYTES = 256 << 10
SILENCE_S = 10.0
"""A receiver that acknowledges nothing for so long has failed."""


class Backup:
    """A snapshot for a client to keep; see `services.contract.SpooledSnapshot`."""

    def __init__(self, file: SnapshotFile) -> None:
        self._file = file
        self.size_bytes = file.size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        return self._file.read(offset, length).data

    def close(self) -> None:
        """The spool keeps the file while it is of use; nothing to do."""


class SnapshotSender:
    """Sends what consensus asks for; reports how it ended."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._active: set[NodeId] = set()
        self._spool = SnapshotSpool(runtime.stores.directory / "snapshots")
        self._spooling = asyncio.Lock()

    def start(self, peer: NodeId, index: int) -> None:
        """Begin to send `peer` a snapshot at `index` or later, unless one is on its way."""
        if peer not in self._active:
            self._active.add(peer)
            self._runtime.spawn(self._send(peer, index, self._runtime.term), name=f"snapshot-{peer:x}")

    async def spool(self, index: int) -> SnapshotFile:
        """A file with the state as of `index` or later, written now unless one is there."""
        stores = self._runtime.stores
        async with self._spooling:
            file = self._spool.latest()
            if file is not None and file.meta.index >= max(index, stores.log.first_index() - 1):
                return file
            machine = self._runtime.machine
            conf = self._runtime.replica.raft.conf_at(machine.applied_index)
            meta = SnapshotMeta(machine.applied_index, machine.applied_term, conf)
            view = stores.state.view()
            try:
                return await asyncio.to_thread(self._spool.create, view, meta)
            finally:
                view.close()  # in the loop's thread; whoever waited for the other one has it back

    async def backup(self) -> Backup:
        """The state as of now."""
        return Backup(await self.spool(self._runtime.machine.applied_index))

    async def _send(self, peer: NodeId, index: int, term: int) -> None:
        log = structlog.get_logger().bind(node=self._runtime.config.name, peer=f"{peer:x}")
        sent, ok = index, False
        try:
            file = await self.spool(index)
            sent = file.meta.index
            began = time.monotonic()
            log.info("snapshot_sending", index=sent, bytes=file.size)
            await self._transfer(peer, file, term)
            ok = True
            log.info("snapshot_sent", index=sent, bytes=file.size, seconds=round(time.monotonic() - began, 3))
        except (Ended, SnapshotFailed, OSError) as fault:
            reason = fault.reason if isinstance(fault, Ended) else str(fault)
            log.warning("snapshot_failed", index=sent, reason=reason or type(fault).__name__)
        finally:
            self._active.discard(peer)
            self._runtime.on_snapshot_sent(peer, sent, ok)

    async def _transfer(self, peer: NodeId, file: SnapshotFile, term: int) -> None:
        address = self._runtime.peers.address(peer)
        if address is None:
            raise SnapshotFailed("the peer is no member any more")
        first = raft_pb2.SnapshotChunk(
            term=term,
            meta=convert.meta_to_wire(file.meta),
            snapshot_id=file.snapshot_id,
            total_bytes=file.size,
            digest=file.digest,
        )
        connection = await dial(address, DIAL_S)
        try:
            call = connection.open(SNAPSHOT, self._runtime.peers.metadata(peer))
            call.send(first.SerializeToString())
            offset = (await self._ack(call)).offset
            while offset < file.size:
                data = await asyncio.to_thread(file.read, offset, CHUNK_BYTES)
                chunk = raft_pb2.SnapshotChunk(
                    offset=offset, data=data.data, crc32c=data.crc32c, last=offset + len(data.data) >= file.size
                )
                call.send(chunk.SerializeToString())
                await self._ack(call)
                offset += len(data.data)
            call.complete()
            if not (await self._ack(call)).done:
                raise SnapshotFailed("the receiver did not take it")
        finally:
            connection.abort("the transfer has ended")

    @staticmethod
    async def _ack(call: Call) -> raft_pb2.SnapshotAck:
        async with asyncio.timeout(SILENCE_S):
            message = await call.read()
        if message is None:
            raise SnapshotFailed("the receiver ended the transfer")
        ack = raft_pb2.SnapshotAck.FromString(message)
        if ack.error:
            raise SnapshotFailed(ack.error)
        return ack


class SnapshotReceiver(PeerService):
    """The peer service, with snapshots."""

    def __init__(self, runtime: Runtime, known: Callable[[NodeId], bool]) -> None:
        receiver: Receiver = runtime
        super().__init__(runtime.node_id, runtime.cluster_id, known, receiver)
        self._runtime = runtime
        self._directory = runtime.stores.directory
        self._one = asyncio.Lock()
        self._current: asyncio.Task[object] | None = None

    async def snapshot(self, call: Call) -> None:
        """Take one snapshot; the first acknowledgement says where to begin."""
        sender = self.identify(call)
        call.accept()
        if self._current is not None:
            self._current.cancel()  # a sender that starts anew has lost its old connection; we may not know yet
        self._current = asyncio.current_task()
        async with self._one:
            try:
                await self._take(sender, call)
            except SnapshotFailed as fault:
                _acknowledge(call, raft_pb2.SnapshotAck(error=str(fault)))
            except NodeFatal as fault:
                self._runtime.fatal(fault)

    async def _take(self, sender: NodeId, call: Call) -> None:
        message = await call.read()
        if message is None:
            return
        head = raft_pb2.SnapshotChunk.FromString(message)
        meta = convert.meta_from_wire(head.meta)
        incoming = await asyncio.to_thread(
            IncomingSnapshot.open, self._directory, head.snapshot_id, meta, head.total_bytes
        )
        _acknowledge(call, raft_pb2.SnapshotAck(offset=incoming.offset))
        while incoming.offset < head.total_bytes:
            try:
                message = await call.read()
            except Ended:
                message = None  # the connection broke: the next transfer goes on here
            if message is None:
                await asyncio.to_thread(incoming.close)
                return
            chunk = raft_pb2.SnapshotChunk.FromString(message)
            await asyncio.to_thread(incoming.write, chunk.offset, chunk.data, chunk.crc32c)
            _acknowledge(call, raft_pb2.SnapshotAck(offset=incoming.offset))
        state_name = await asyncio.to_thread(incoming.finish)
        self._runtime.on_snapshot(sender, head.term, meta, state_name)
        _acknowledge(call, raft_pb2.SnapshotAck(offset=head.total_bytes, done=True))


def _acknowledge(call: Call, ack: raft_pb2.SnapshotAck) -> None:
    call.send(ack.SerializeToString())
