"""From a method of ours to handlers of gRPC: one layer between the wire and the method, for every method.

A method takes the bytes of the request and gives the bytes of the response, or has a stream of either. The layer
counts, keeps to what may be in flight, answers `hasleader`, and turns whatever is raised into a status by the one table
of `grpc_errors`. There are no interceptors: each would cost a put more than all of this does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from raftkv.rpc.methods import ClientGone, Context, MethodServer
from raftkv.server.errors import NoLeader
from raftkv.server.grpc_errors import abort, answer_to
from raftkv.server.limits import Inflight
from raftkv.server.services.contract import Node
from raftkv.server.services.streams import Stream, Streams, deadline_of, wants_leader
from raftkv.state.store import StoreDamaged
from raftkv.storage.errors import NodeFatal

__all__ = ["Context", "Method", "MethodCounts", "Registry", "Service", "Stream", "deadline_of"]


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    Attributes:
        name: as in the .proto.
        call: request bytes to response bytes; for a `stream`, to an iterator over them.
        bidi: reads requests and writes responses by itself; the stream ends when it returns.
        lasting: of a `stream` that has no end of its own, so that a node that stops does not wait for it.
        mutates: whether it may change replicated state: then a failure must say whether it did.
        counted: whether it takes part of what may be in flight. A `bidi` never does by itself.
    """

    name: str
    call: Callable[[bytes, Context], Awaitable[bytes]] | None = None
    stream: Callable[[bytes, Context], AsyncGenerator[bytes, None]] | None = None
    bidi: Callable[[Stream], Awaitable[None]] | None = None
    lasting: bool = False
    mutates: bool = False
    counted: bool = True


@dataclass(slots=True)
class MethodCounts:
    """What became of the calls of one method, under either service name. started = ok + sum(failed) + under way."""

    started: int = 0
    ok: int = 0
    failed: Counter[grpc.StatusCode] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Service:
    """A service under all its names."""

    names: tuple[str, ...]
    methods: Sequence[Method]


class Registry:
    """Builds the handlers of one node's services."""

    def __init__(self, node: Node, inflight: Inflight) -> None:
        self._node = node
        self._inflight = inflight
        self.streams = Streams(node)
        self.counts: dict[str, MethodCounts] = {}

    def add(self, server: MethodServer, service: Service) -> None:
        """Serve `service` on `server`, under each of its names."""
        handlers = {method.name: self._handler(service.names[0], method) for method in service.methods}
        for name in service.names:
            server.add_registered_method_handlers(name, handlers)

    def _handler(self, service: str, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        counts = self.counts[f"{service}/{method.name}"] = MethodCounts()
        # No (de)serializers: the bytes are what is proposed, so they are kept as they came.
        if method.call is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, method.call, counts))
        if method.bidi is not None:
            return grpc.stream_stream_rpc_method_handler(self._bidi(method, method.bidi, counts))
        assert method.stream is not None, f"{method.name} has neither call, stream nor bidi"
        return grpc.unary_stream_rpc_method_handler(self._stream(method, method.stream, counts))

    def _unary(
        self, method: Method, call: Callable[[bytes, Context], Awaitable[bytes]], counts: MethodCounts
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        node, inflight = self._node, self._inflight if method.counted else _unlimited()

        async def handle(request: bytes, context: Context) -> bytes:
            counts.started += 1
            size = len(request)
            try:
                inflight.enter(size)
                try:
                    if not node.leader and wants_leader(context):
                        raise NoLeader
                    response = await call(request, context)
                finally:
                    inflight.leave(size)
            except asyncio.CancelledError:
                counts.failed[grpc.StatusCode.CANCELLED] += 1
                raise
            except Exception as fault:  # whatever it is, the client gets a status and never a traceback
                await self._fail(fault, method, counts, context)
                raise AssertionError("abort does not return") from fault
            counts.ok += 1
            return response

        return handle

    def _stream(
        self, method: Method, stream: Callable[[bytes, Context], AsyncGenerator[bytes, None]], counts: MethodCounts
    ) -> Callable[[bytes, Context], AsyncGenerator[bytes, None]]:
        inflight = self._inflight if method.counted else _unlimited()

        async def handle(request: bytes, context: Context) -> AsyncGenerator[bytes, None]:
            counts.started += 1
            size = len(request)
            try:
                inflight.enter(size)
                try:
                    with self.streams.open(context, lasting=method.lasting) as interrupt:
                        async with interrupt.guard(), contextlib.aclosing(stream(request, context)) as responses:
                            async for response in responses:
                                yield response
                finally:
                    inflight.leave(size)
            except (asyncio.CancelledError, GeneratorExit):
                counts.failed[grpc.StatusCode.CANCELLED] += 1
                raise
            except Exception as fault:  # noqa: BLE001 - as above
                await self._fail(fault, method, counts, context)
            counts.ok += 1

        return handle

    def _bidi(
        self, method: Method, bidi: Callable[[Stream], Awaitable[None]], counts: MethodCounts
    ) -> Callable[[object, Context], Awaitable[None]]:
        async def handle(_: object, context: Context) -> None:
            counts.started += 1
            try:
                with self.streams.open(context, lasting=True) as interrupt:
                    await bidi(Stream(context, interrupt))
            except asyncio.CancelledError:
                counts.failed[grpc.StatusCode.CANCELLED] += 1
                raise
            except Exception as fault:
                first = _first_of(fault)
                if isinstance(first, ClientGone):
                    counts.failed[grpc.StatusCode.CANCELLED] += 1
                    raise asyncio.CancelledError from fault
                await self._fail(first, method, counts, context)
            counts.ok += 1

        return handle

    async def _fail(self, fault: Exception, method: Method, counts: MethodCounts, context: Context) -> None:
        if isinstance(fault, NodeFatal | StoreDamaged):
            self._node.fatal(fault)  # ends the process; in tests, whose node has none to end, the client waits
        answer = answer_to(fault, method=method.name, mutates=method.mutates)
        counts.failed[answer.code] += 1
        await abort(context, answer)


def _first_of(fault: Exception) -> Exception:
    """What ended a TaskGroup, where it was one that ended."""
    while isinstance(fault, ExceptionGroup):
        fault = fault.exceptions[0]
    return fault


def _unlimited() -> Inflight:
    return Inflight(1 << 62, 1 << 62)
