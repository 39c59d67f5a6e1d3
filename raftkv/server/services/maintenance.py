"""Maintenance: what operators ask one node. Same as etcd v3 Maintenance.

Status, Hash and Alarm (GET) are answered by every node alone, with or without a quorum.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator

from raftkv._pb.maintenance_pb2 import (
    NONE,
    AlarmMember,
    AlarmRequest,
    AlarmResponse,
    AlarmType,
    DefragmentRequest,
    DefragmentResponse,
    HashKVRequest,
    HashKVResponse,
    HashRequest,
    HashResponse,
    MoveLeaderRequest,
    MoveLeaderResponse,
    SnapshotRequest,
    SnapshotResponse,
    StatusRequest,
    StatusResponse,
)
from raftkv.server.errors import InvalidField, MemberNotFound, NotLeader, NotSupported
from raftkv.server.services.contract import Node, SpooledSnapshot, fill_header
from raftkv.server.services.reads import Reads
from raftkv.server.services.registry import Context, Method, Service, deadline_of
from raftkv.state.commands import CommandKind
from raftkv.state.results import Refusal, Refused

ETCD_VERSION = "3.6.0"
"""The version of etcd whose behaviour this is: clients parse it and choose their ways by it."""

BLOB_BYTES = 32 * 1024
PAYLOAD_UNIT = 512
"""etcdctl takes a saved snapshot for whole when its size is a multiple of this, and 32 for the checksum."""


class Maintenance:
    """The methods of raftkv.v1.Maintenance, which are those of etcdserverpb.Maintenance."""

    def __init__(self, node: Node, reads: Reads) -> None:
        self._node = node
        self._reads = reads

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(
            ("raftkv.v1.Maintenance", "etcdserverpb.Maintenance"),
            (
                Method("Alarm", self.alarm, mutates=True, counted=False),
                Method("Status", self.status, counted=False),
                Method("Defragment", self.defragment, counted=False),
                Method("Hash", self.hash, counted=False),
                Method("HashKV", self.hash_kv, counted=False),
                Method("Snapshot", stream=self.snapshot, counted=False),
                Method("MoveLeader", self.move_leader, mutates=True, counted=False),
                Method("Downgrade", self.downgrade, counted=False),
            ),
        )

    async def alarm(self, raw: bytes, context: Context) -> bytes:
        """List alarms, or arm or disarm one, on all nodes."""
        request = AlarmRequest.FromString(raw)
        if request.action not in AlarmRequest.AlarmAction.values():
            raise InvalidField("action", f"{request.action} is none of GET (0), ACTIVATE (1), DEACTIVATE (2)")
        if request.alarm not in AlarmType.values():
            raise InvalidField("alarm", f"{request.alarm} is none of NONE (0), NOSPACE (1), CORRUPT (2)")
        node = self._node
        before = node.machine.alarms
        if request.action == AlarmRequest.GET:
            shown = [
                alarm
                for alarm in sorted(before)
                if request.memberID in (0, alarm[0]) and request.alarm in (NONE, alarm[1])
            ]
        else:
            if request.action == AlarmRequest.ACTIVATE and request.alarm == NONE:
                raise InvalidField("alarm", "NONE (0) cannot be activated; NOSPACE (1) or CORRUPT (2) can")
            if request.memberID and request.memberID not in {member.member_id for member in node.members()} | {
                member_id for member_id, _ in before
            }:
                raise MemberNotFound
            if request.action == AlarmRequest.ACTIVATE and not request.memberID:
                request.memberID = node.node_id
            payload = request.SerializeToString()
            result = await node.propose(CommandKind.ALARM, payload, deadline_of(context))
            if isinstance(result, Refusal):
                raise Refused(result)
            after = node.machine.alarms
            shown = sorted(after - before if request.action == AlarmRequest.ACTIVATE else before - after)
        response = AlarmResponse(
            alarms=[AlarmMember(memberID=member, alarm=AlarmType.ValueType(kind)) for member, kind in shown]
        )
        response.header.revision = node.machine.revision
        fill_header(node, response.header)
        return response.SerializeToString()

    async def status(self, raw: bytes, context: Context) -> bytes:
        """How this node is."""
        StatusRequest.FromString(raw)
        node = self._node
        status = node.status()
        response = StatusResponse(
            version=ETCD_VERSION,
            dbSize=status.state_bytes,
            dbSizeInUse=status.state_bytes_in_use,
            dbSizeQuota=node.config.quota_backend_bytes,
            leader=status.leader,
            raftIndex=status.commit,
            raftTerm=status.term,
            raftAppliedIndex=status.applied,
            isLearner=status.is_learner,
            storageVersion=ETCD_VERSION,
        )
        if not status.leader:
            response.errors.append("etcdserver: no leader")
        response.errors.extend(
            f"memberID:{member} alarm:{AlarmType.Name(AlarmType.ValueType(kind))}"
            for member, kind in sorted(node.machine.alarms)
        )
        response.header.revision = node.machine.revision
        fill_header(node, response.header)
        return response.SerializeToString()

    async def defragment(self, raw: bytes, context: Context) -> bytes:
        """Have LevelDB give back room. Unlike etcd's, it goes on serving."""
        DefragmentRequest.FromString(raw)
        await self._node.defragment()
        return DefragmentResponse().SerializeToString()  # without a header, as etcd

    async def hash(self, raw: bytes, context: Context) -> bytes:
        """A checksum of all that was applied; equal on nodes that applied equally much."""
        HashRequest.FromString(raw)
        machine = self._node.machine
        response = HashResponse(hash=machine.hash())
        response.header.revision = machine.revision
        fill_header(self._node, response.header)
        return response.SerializeToString()

    async def hash_kv(self, raw: bytes, context: Context) -> bytes:
        """A checksum of the keys at a revision; equal on all nodes at equal compact revisions."""
        request = HashKVRequest.FromString(raw)
        result = await self._reads.hash_kv(request.revision)
        response = HashKVResponse(
            hash=result.hash, compact_revision=result.compact_revision, hash_revision=result.hash_revision
        )
        response.header.revision = self._node.machine.revision
        fill_header(self._node, response.header)
        return response.SerializeToString()

    async def snapshot(self, raw: bytes, context: Context) -> AsyncGenerator[bytes, None]:
        """The state in blobs, then their SHA-256."""
        SnapshotRequest.FromString(raw)
        node = self._node
        spool = await node.spool_snapshot()
        try:
            digest = hashlib.sha256()
            total = -(-spool.size_bytes // PAYLOAD_UNIT) * PAYLOAD_UNIT
            sent = 0
            while sent < total:
                blob = await asyncio.to_thread(_blob, spool, sent, total)
                digest.update(blob)
                sent += len(blob)
                yield self._blob_response(blob, total - sent)
            yield self._blob_response(digest.digest(), 0)
        finally:
            spool.close()

    def _blob_response(self, blob: bytes, remaining: int) -> bytes:
        response = SnapshotResponse(remaining_bytes=remaining, blob=blob, version=ETCD_VERSION)
        response.header.revision = self._node.machine.revision
        fill_header(self._node, response.header)
        return response.SerializeToString()

    async def move_leader(self, raw: bytes, context: Context) -> bytes:
        """Hand leadership over."""
        request = MoveLeaderRequest.FromString(raw)
        node = self._node
        if node.leader != node.node_id:
            raise NotLeader
        if request.targetID != node.node_id:  # to itself is done already, as in etcd
            await node.transfer_leadership(request.targetID, deadline_of(context))
        return MoveLeaderResponse().SerializeToString()  # without a header, as etcd

    async def downgrade(self, raw: bytes, context: Context) -> bytes:
        """Not ours: there is no older raftkv to go back to."""
        raise NotSupported("Downgrade: there is no earlier version of raftkv to go back to")


def _blob(spool: SpooledSnapshot, offset: int, total: int) -> bytes:
    """The next blob; behind the end of the file there are zeros, up to `total`."""
    length = min(BLOB_BYTES, total - offset)
    blob = spool.read(offset, min(length, spool.size_bytes - offset))
    return blob.ljust(length, b"\0")
