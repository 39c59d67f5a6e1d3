"""KV: reads by ReadIndex, writes through the log.

    Put, DeleteRange, Txn, Compact: parse -> check -> propose the bytes as they came -> fill in the header
    Range, a Txn that only reads: parse -> check -> read barrier, unless serializable -> read

Same as etcd v3 KV.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    CompactionResponse,
    Compare,
    DeleteRangeRequest,
    DeleteRangeResponse,
    PutRequest,
    PutResponse,
    RangeRequest,
    TxnRequest,
    TxnResponse,
)
from raftkv.server.errors import InvalidField, NotSupported, RequestTimeout, TimeoutKind
from raftkv.server.limits import request_limits
from raftkv.server.services.contract import Node, fill_header
from raftkv.server.services.quota import Quota
from raftkv.server.services.reads import Reads
from raftkv.server.services.registry import Context, Method, Service, deadline_of
from raftkv.state.commands import CommandKind
from raftkv.state.results import PutDone, Refusal, Refused, Result
from raftkv.state.txn import is_read_only, is_serializable, needs_space
from raftkv.state.validate import check_delete, check_put, check_range, check_size, check_txn

SWEEP_POLL_S = 0.02

_RESPONSES = (PutResponse, TxnResponse, DeleteRangeResponse, CompactionResponse)
"""Made once: a union of classes made for each answer costs more than the rest of the way of a put in this file."""


class KV:
    """The methods of raftkv.v1.KV, which are those of etcdserverpb.KV."""

    def __init__(self, node: Node, reads: Reads, quota: Quota) -> None:
        self._node = node
        self._reads = reads
        self._quota = quota
        self._limits = request_limits(node.config)
        self._put_response = PutResponse()  # to a put without `prev_kv`; filled in anew, because making one costs more

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(
            ("raftkv.v1.KV", "etcdserverpb.KV"),
            (
                Method("Range", self.range),
                Method("RangeStream", stream=self.range_stream),
                Method("Put", self.put, mutates=True),
                Method("DeleteRange", self.delete_range, mutates=True),
                Method("Txn", self.txn, mutates=True),
                Method("Compact", self.compact, mutates=True),
            ),
        )

    async def range(self, raw: bytes, context: Context) -> bytes:
        """Read keys, linearizably unless the request says `serializable`."""
        request = self.admit_range(raw)
        if not request.serializable:
            await self._node.read_barrier(deadline_of(context))
        return await self._reads.range(request)

    async def range_stream(self, raw: bytes, context: Context) -> AsyncGenerator[bytes, None]:
        """Read a range of any length in chunks. Key order only, as in etcd."""
        request = RangeRequest.FromString(raw)
        check_range(request, self._limits)
        by_key = request.sort_target == RangeRequest.KEY and request.sort_order != RangeRequest.DESCEND
        filters = (request.min_mod_revision, request.max_mod_revision)
        if not by_key or any(filters) or request.min_create_revision or request.max_create_revision:
            raise NotSupported("RangeStream has neither an order but by key nor revision filters; use Range")
        self._quota.check_intact()
        if not request.serializable:
            await self._node.read_barrier(deadline_of(context))
        async for chunk in self._reads.stream(request):
            yield chunk

    async def put(self, raw: bytes, context: Context) -> bytes:
        """Write one key."""
        self.admit_put(raw)
        await self._quota.check_space()
        return self.reply(await self._node.propose(CommandKind.PUT, raw, deadline_of(context)))

    async def delete_range(self, raw: bytes, context: Context) -> bytes:
        """Delete keys."""
        self.admit_delete(raw)
        return self.reply(await self._node.propose(CommandKind.DELETE_RANGE, raw, deadline_of(context)))

    async def txn(self, raw: bytes, context: Context) -> bytes:
        """Compare, then do one of two lists of operations."""
        request = self.admit_txn(raw)
        if is_read_only(request):
            return await self.read_txn(request, deadline_of(context))
        if needs_space(request):
            await self._quota.check_space()
        return self.reply(await self._node.propose(CommandKind.TXN, raw, deadline_of(context)))

    async def compact(self, raw: bytes, context: Context) -> bytes:
        """Forget history; with `physical`, wait until it is gone from this node's store."""
        self.admit_compact(raw)
        deadline = deadline_of(context)
        return await self.compacted(raw, await self._node.propose(CommandKind.COMPACT, raw, deadline), deadline)

    # For whoever has a request of one of these methods, however it came.

    def admit_range(self, raw: bytes) -> RangeRequest:
        """Check a range.

        Raises:
            InvalidRequest, Corrupt, DecodeError
        """
        request = RangeRequest.FromString(raw)
        check_range(request, self._limits)
        self._quota.check_intact()
        return request

    def admit_put(self, raw: bytes) -> None:
        """Check a put; whether there is room for it is another question.

        Raises:
            InvalidRequest, DecodeError
        """
        request = PutRequest.FromString(raw)
        check_size(len(raw), self._limits)
        check_put(request, self._limits)

    def admit_delete(self, raw: bytes) -> None:
        """Check a delete.

        Raises:
            InvalidRequest, Corrupt, DecodeError
        """
        request = DeleteRangeRequest.FromString(raw)
        check_size(len(raw), self._limits)
        check_delete(request, self._limits)
        self._quota.check_intact()

    def admit_txn(self, raw: bytes) -> TxnRequest:
        """Check a transaction; whether there is room for it is another question.

        Raises:
            InvalidRequest, InvalidField, Corrupt, DecodeError
        """
        request = TxnRequest.FromString(raw)
        check_size(len(raw), self._limits)
        check_txn(request, self._limits)
        _check_compares(request)
        self._quota.check_intact()
        return request

    def admit_compact(self, raw: bytes) -> None:
        """Check a compaction.

        Raises:
            InvalidRequest, Corrupt, DecodeError
        """
        CompactionRequest.FromString(raw)
        check_size(len(raw), self._limits)
        self._quota.check_intact()

    async def read_txn(self, request: TxnRequest, deadline: float | None) -> bytes:
        """Run a transaction that only reads."""
        if not is_serializable(request):
            await self._node.read_barrier(deadline)
        return await self._reads.txn(request)

    async def compacted(self, raw: bytes, result: Result, deadline: float | None) -> bytes:
        """The answer to a compaction that was applied."""
        response = self.reply(result)
        if CompactionRequest.FromString(raw).physical:
            await self._swept(deadline)
        return response

    def reply(self, result: Result) -> bytes:
        """The answer to a command of this service that was applied.

        Raises:
            Refused: by the data.
        """
        if isinstance(result, Refusal):
            raise Refused(result)
        if isinstance(result, PutDone):
            response = self._put_response
            header = response.header
            header.revision = result.revision
            fill_header(self._node, header)
            return response.SerializeToString()
        assert isinstance(result, _RESPONSES), "a result of no command of KV"
        fill_header(self._node, result.header)
        return result.SerializeToString()

    async def _swept(self, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._node.config.request_timeout_s if deadline is None else deadline
        while self._node.machine.sweeping:
            if loop.time() >= limit:
                raise RequestTimeout(TimeoutKind.APPLY, executed="unknown")
            await asyncio.sleep(SWEEP_POLL_S)


def _check_compares(request: TxnRequest) -> None:
    """Refuse comparisons that mean nothing; etcd lets them be true."""
    for compare in request.compare:
        if not 0 <= compare.result <= Compare.NOT_EQUAL:
            raise InvalidField("compare.result", f"{compare.result} is none of 0 to {Compare.NOT_EQUAL:d}")
        if not 0 <= compare.target <= Compare.LEASE:
            raise InvalidField("compare.target", f"{compare.target} is none of 0 to {Compare.LEASE:d}")
    for op in (*request.success, *request.failure):
        if op.HasField("request_txn"):
            _check_compares(op.request_txn)
