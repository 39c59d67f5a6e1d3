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
from raftkv.state.results import Refusal, Refused, Result
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
        request = RangeRequest.FromString(raw)
        check_range(request, self._limits)
        self._quota.check_intact()
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
        request = PutRequest.FromString(raw)
        check_size(len(raw), self._limits)
        check_put(request, self._limits)
        await self._quota.check_space()
        result = await self._node.propose(CommandKind.PUT, raw, deadline_of(context))
        return self._reply(result)

    async def delete_range(self, raw: bytes, context: Context) -> bytes:
        """Delete keys."""
        request = DeleteRangeRequest.FromString(raw)
        check_size(len(raw), self._limits)
        check_delete(request, self._limits)
        self._quota.check_intact()
        return self._reply(await self._node.propose(CommandKind.DELETE_RANGE, raw, deadline_of(context)))

    async def txn(self, raw: bytes, context: Context) -> bytes:
        """Compare, then do one of two lists of operations."""
        request = TxnRequest.FromString(raw)
        check_size(len(raw), self._limits)
        check_txn(request, self._limits)
        _check_compares(request)
        if is_read_only(request):
            self._quota.check_intact()
            if not is_serializable(request):
                await self._node.read_barrier(deadline_of(context))
            return await self._reads.txn(request)
        if needs_space(request):
            await self._quota.check_space()
        else:
            self._quota.check_intact()
        return self._reply(await self._node.propose(CommandKind.TXN, raw, deadline_of(context)))

    async def compact(self, raw: bytes, context: Context) -> bytes:
        """Forget history; with `physical`, wait until it is gone from this node's store."""
        request = CompactionRequest.FromString(raw)
        check_size(len(raw), self._limits)
        self._quota.check_intact()
        deadline = deadline_of(context)
        response = self._reply(await self._node.propose(CommandKind.COMPACT, raw, deadline))
        if request.physical:
            await self._swept(deadline)
        return response

    async def _swept(self, deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._node.config.request_timeout_s if deadline is None else deadline
        while self._node.machine.sweeping:
            if loop.time() >= limit:
                raise RequestTimeout(TimeoutKind.APPLY, executed="unknown")
            await asyncio.sleep(SWEEP_POLL_S)

    def _reply(self, result: Result) -> bytes:
        if isinstance(result, Refusal):
            raise Refused(result)
        assert isinstance(result, _RESPONSES), "a result of no command of KV"
        fill_header(self._node, result.header)
        return result.SerializeToString()


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
