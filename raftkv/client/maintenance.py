"""Maintenance of nodes: hashes, defragmentation, alarms, snapshots."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

import grpc.aio

from raftkv._pb import maintenance_pb2
from raftkv.client.cluster import direct
from raftkv.client.connection import Connection
from raftkv.client.errors import ConfigError, RaftkvError, Unavailable
from raftkv.client.faults import error_of, understand
from raftkv.client.kv import Context
from raftkv.client.methods import ALARM, DEFRAGMENT, HASH_KV, SNAPSHOT
from raftkv.client.options import DEFAULT, TimeoutArg, timeout_from
from raftkv.client.results import Alarm, HashKV, SavedSnapshot
from raftkv.client.routing import Purpose

DIGEST_BYTES: Final = 32


class SnapshotDamaged(RaftkvError):
    """A snapshot arrived incomplete or changed; nothing was saved. Fetch it again."""


class Maintenance:
    """`client.maintenance`."""

    __slots__ = ("_context",)

    def __init__(self, context: Context) -> None:
        self._context = context

    def _connections(self, endpoint: str | None) -> tuple[Connection, ...]:
        pool = self._context.pool
        pool.enter()
        if endpoint is None:
            return pool.connections
        for connection in pool.connections:
            if connection.endpoint == endpoint:
                return (connection,)
        raise ConfigError("endpoint", f"{endpoint!r} is not one of {', '.join(pool.endpoints)}")

    async def hash_kv(
        self, revision: int = 0, *, endpoint: str | None = None, timeout: TimeoutArg = DEFAULT
    ) -> tuple[HashKV, ...]:
        """The hash of each node's store as of `revision`, to compare them.

        Args:
            revision: 0 is each node's own latest, which may differ from node to node.
            endpoint: only this one; None is all.
            timeout: as in every call.
        Raises:
            Compacted, FutureRevision: of the first endpoint that cannot answer for `revision`.
            Unavailable: an endpoint did not answer.

        Same as etcd v3 `HashKV`.
        """
        results = []
        for connection in self._connections(endpoint):
            request = maintenance_pb2.HashKVRequest(revision=revision)
            response = await direct(self._context, connection, HASH_KV, request, timeout)
            results.append(
                HashKV(connection.endpoint, response.hash, response.hash_revision, response.compact_revision)
            )
        return tuple(results)

    async def defragment(self, *, endpoint: str | None = None, timeout: TimeoutArg = None) -> tuple[str, ...]:
        """Give unused disk space back, on one node after the other.

        Args:
            endpoint: only this one; None is all.
            timeout: for each node, seconds. The default is without limit: it takes as long as it takes.
        Returns:
            The endpoints that did it.
        Raises:
            Unavailable: an endpoint did not answer; those before it are done.

        Same as etcd v3 `Defragment`. Repeating it is harmless.
        """
        done = []
        for connection in self._connections(endpoint):
            await direct(self._context, connection, DEFRAGMENT, maintenance_pb2.DefragmentRequest(), timeout)
            done.append(connection.endpoint)
        return tuple(done)

    async def alarms(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[Alarm, ...]:
        """The alarms that are on.

        Same as etcd v3 `Alarm` with GET.
        """
        request = maintenance_pb2.AlarmRequest(action=maintenance_pb2.AlarmRequest.GET)
        response = await self._context.call(ALARM, request, Purpose.READ, timeout)
        return tuple(map(_alarm, response.alarms))

    async def disarm(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[Alarm, ...]:
        """Switch every alarm off.

        Returns:
            The alarms that were on.
        Raises:
            OutcomeUnknown: sent, and no answer arrived; repeating it is harmless.

        Same as etcd v3 `Alarm` with DEACTIVATE, for each alarm that is on.
        """
        alarms = await self.alarms(timeout=timeout)
        for alarm in alarms:
            request = maintenance_pb2.AlarmRequest(
                action=maintenance_pb2.AlarmRequest.DEACTIVATE,
                memberID=alarm.member_id,
                alarm=maintenance_pb2.AlarmType.Value(alarm.name),
            )
            await self._context.call(ALARM, request, Purpose.WRITE, timeout)
        return alarms

    async def snapshot(self, *, endpoint: str | None = None, timeout: TimeoutArg = None) -> AsyncIterator[bytes]:
        """Stream a snapshot of one node's state: the bytes that belong in a snapshot file, its checksum last.

        Args:
            endpoint: which node; None is any that is connected.
            timeout: for all of it; the default is without limit.
        Raises:
            SnapshotDamaged: it ended early, or its checksum does not match. What was yielded is to be thrown away.
            Unavailable: the connection broke.

        Same as etcd v3 `Snapshot`, as `etcdctl snapshot save` stores it.
        """
        connection = await self._any(endpoint, timeout)
        call = connection.server_stream(SNAPSHOT)(
            maintenance_pb2.SnapshotRequest(), timeout=timeout_from(timeout, self._context.timeout).total
        )
        digest = hashlib.sha256()
        tail = b""  # held back, because the last 32 bytes are the checksum of all before
        size_bytes = 0
        try:
            async for part in call:
                if not part.blob:
                    continue
                yield part.blob
                size_bytes += len(part.blob)
                held = tail + part.blob
                digest.update(held[:-DIGEST_BYTES])
                tail = held[-DIGEST_BYTES:]
        except grpc.aio.AioRpcError as error:
            fault = understand(error.code(), error.details() or "", error.trailing_metadata())
            raise error_of(fault, endpoint=connection.endpoint, attempts=1) from error
        finally:
            call.cancel()
        if size_bytes < DIGEST_BYTES or digest.digest() != tail:
            raise SnapshotDamaged(
                f"the snapshot is incomplete or damaged: {size_bytes} bytes, checksum does not match",
                endpoint=connection.endpoint,
                attempts=1,
            )

    async def save_snapshot(
        self, path: str | os.PathLike[str], *, endpoint: str | None = None, timeout: TimeoutArg = None
    ) -> SavedSnapshot:
        """Save a snapshot to a file. The file appears under its name only when it is complete and on disk.

        Raises:
            FileExistsError: there is something at `path`; nothing is overwritten.
            SnapshotDamaged, Unavailable: as in `snapshot`; nothing is left behind.
        """
        target = Path(path)
        file = await asyncio.to_thread(_create_part, target)
        digest = hashlib.sha256()
        size_bytes = 0
        try:
            async for blob in self.snapshot(endpoint=endpoint, timeout=timeout):
                digest.update(blob)
                size_bytes += len(blob)
                await asyncio.to_thread(file.write, blob)
            await asyncio.to_thread(_finish, file, target)
        except BaseException:
            _discard(file)
            raise
        return SavedSnapshot(str(target), size_bytes, digest.hexdigest())

    async def _any(self, endpoint: str | None, timeout: TimeoutArg) -> Connection:
        candidates = self._connections(endpoint)
        if endpoint is not None:
            return candidates[0]
        pool = self._context.pool
        while True:
            connection = pool.router.pick(Purpose.STALE_READ)
            if connection is not None:
                return connection
            if not await pool.wait_ready(self._context.timeout.total):
                raise Unavailable(pool.unreachable(), code="UNREACHABLE")


def _create_part(target: Path) -> BinaryIO:
    if target.exists():
        raise FileExistsError(f"{target} exists; a snapshot does not overwrite it")
    return target.with_name(target.name + ".part").open("xb")


def _finish(file: BinaryIO, target: Path) -> None:
    """The bytes must be on disk before the name is, and the name before we say that it is saved."""
    with file:
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).rename(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _discard(file: BinaryIO) -> None:
    file.close()
    Path(file.name).unlink(missing_ok=True)


def _alarm(alarm: maintenance_pb2.AlarmMember) -> Alarm:
    return Alarm(alarm.memberID, maintenance_pb2.AlarmType.Name(alarm.alarm))
