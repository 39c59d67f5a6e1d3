"""From a method of ours to handlers of gRPC: one layer between the wire and the method, for every method.

A method takes the bytes of the request and gives the bytes of the response. The layer counts, keeps to what may be in
flight, answers `hasleader`, and turns whatever is raised into a status by the one table of `grpc_errors`. There are no
interceptors: each would cost a put more than all of this does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import grpc

from raftkv.server.errors import DeadlineExceeded, NoLeader
from raftkv.server.grpc_errors import abort, answer_to
from raftkv.server.limits import Inflight
from raftkv.server.services.contract import Node
from raftkv.state.store import StoreDamaged
from raftkv.storage.errors import NodeFatal

Context = grpc.aio.ServicerContext[bytes, bytes]
HAS_LEADER = "hasleader"
ANSWER_EARLY_S = 0.05


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    Attributes:
        name: as in the .proto.
        call: request bytes to response bytes; for a `stream`, to an iterator over them.
        mutates: whether it may change replicated state: then a failure must say whether it did.
        counted: whether it takes part of what may be in flight.
    """

    name: str
    call: Callable[[bytes, Context], Awaitable[bytes]] | None = None
    stream: Callable[[bytes, Context], AsyncGenerator[bytes, None]] | None = None
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
        self.counts: dict[str, MethodCounts] = {}

    def add(self, server: grpc.aio.Server, service: Service) -> None:
        """Serve `service` on `server`, under each of its names."""
        handlers = {method.name: self._handler(service.names[0], method) for method in service.methods}
        for name in service.names:
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
            server.add_registered_method_handlers(name, handlers)

    def _handler(self, service: str, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        counts = self.counts[f"{service}/{method.name}"] = MethodCounts()
        # No (de)serializers: the bytes are what is proposed, so they are kept as they came.
        if method.call is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, method.call, counts))
        assert method.stream is not None, f"{method.name} has neither call nor stream"
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
        node, inflight = self._node, self._inflight if method.counted else _unlimited()

        async def handle(request: bytes, context: Context) -> AsyncGenerator[bytes, None]:
            counts.started += 1
            size = len(request)
            try:
                inflight.enter(size)
                try:
                    if not node.leader and wants_leader(context):
                        raise NoLeader
                    async with contextlib.aclosing(stream(request, context)) as responses:
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

    async def _fail(self, fault: Exception, method: Method, counts: MethodCounts, context: Context) -> None:
        if isinstance(fault, NodeFatal | StoreDamaged):
            self._node.fatal(fault)  # ends the process; in tests, whose node has none to end, the client waits
        answer = answer_to(fault, method=method.name, mutates=method.mutates)
        counts.failed[answer.code] += 1
        await abort(context, answer)


def wants_leader(context: Context) -> bool:
    """Whether the caller would rather fail at once than wait for a leader. Costly; ask only when there is none."""
    return any(key == HAS_LEADER and value == "true" for key, value in context.invocation_metadata() or ())


def deadline_of(context: Context) -> float | None:
    """Until when to work for the caller, as `loop.time()`; None where it did not say.

    A little before it gives up itself: then it still hears whether its request was proposed.

    Raises:
        DeadlineExceeded: that moment has passed: nothing is to be proposed.
    """
    remaining = cast("float | None", context.time_remaining())  # the stubs know no calls without a deadline
    if remaining is None:
        return None
    if remaining <= 0:
        raise DeadlineExceeded
    return asyncio.get_running_loop().time() + remaining - min(ANSWER_EARLY_S, remaining / 10)


def _unlimited() -> Inflight:
    return Inflight(1 << 62, 1 << 62)
