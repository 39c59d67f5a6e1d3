"""What carries a pipeline's stream to one node.

    plain endpoint ──► WireStream: a connection of its own, on the loop itself
    otherwise      ──► ChannelStream: the endpoint's channel, as grpc.aio makes it: TLS, interceptors, options, a proxy

Each write of a lone caller waits for two messages, and in grpc.aio each of them passes threads. On the wire both are
the same. A connection decides once which it is (`Connection.is_plain`).    See: ADR 0023.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import grpc
import grpc.aio

from raftkv._pb import session_pb2
from raftkv.client import health
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import KEEPALIVE_ANSWER_S, KEEPALIVE_S, Connection
from raftkv.client.faults import Fault, understand
from raftkv.client.methods import SESSION_STREAM
from raftkv.rpc.call import Call, Ended
from raftkv.rpc.connection import Connection as Wire
from raftkv.rpc.connection import dial
from raftkv.rpc.limits import Limits

DIAL_S: Final = (
    1.0  # the endpoint's channel is connected, so this one will be within a round trip, or something is wrong
)
LIMITS: Final = Limits(
    message_bytes_max=(1 << 31) - 1,  # answers of any size
    keepalive_s=KEEPALIVE_S,
    answer_s=KEEPALIVE_ANSWER_S,
)

OnAnswers = Callable[[session_pb2.SessionResponses], None]


class StreamBroken(Exception):
    """A stream ended, and not because that was asked for.

    Attributes:
        code: gRPC's status.
        fault: what it means.
    """

    def __init__(self, code: grpc.StatusCode, fault: Fault) -> None:
        super().__init__(f"{code.name}: {fault.text}")
        self.code = code
        self.fault = fault


class SessionStream(Protocol):
    """A stream that is open; `close` must follow."""

    async def serve(self, on_answers: OnAnswers) -> None:
        """Hand on what arrives, until the stream ends well or by `cancel`.

        Raises:
            StreamBroken: it ended otherwise.
        """
        ...

    async def send(self, message: session_pb2.SessionRequests) -> None:
        """Send a message; waits while the node does not take it.

        Raises:
            StreamBroken: the stream has ended.
            EOFError: as was asked for.
        """
        ...

    async def complete(self) -> None:
        """Nothing more is sent. Raises as `send`."""
        ...

    async def is_alive(self, timeout_s: float) -> bool:
        """Whether the node gives a sign of life within `timeout_s`."""
        ...

    def cancel(self) -> None:
        """End the stream; `serve` returns."""
        ...

    def close(self) -> None:
        """End the stream and whatever was made for it."""
        ...


async def open_session_stream(connection: Connection) -> SessionStream:
    """Begin a stream at the node behind `connection`; it ends when the node turns out to be silent.

    Raises:
        StreamBroken: it cannot be reached.
    """
    if not connection.is_plain:
        return ChannelStream(connection)
    try:
        wire = await dial(connection.endpoint, DIAL_S, LIMITS)
    except OSError as error:
        code = grpc.StatusCode.UNAVAILABLE
        raise StreamBroken(code, understand(code, f"cannot connect: {str(error) or 'no answer'}", None)) from None
    return WireStream(connection, wire)


class WireStream:
    """A stream over a connection of its own; a `SessionStream`."""

    def __init__(self, connection: Connection, wire: Wire) -> None:
        self._connection = connection
        self._wire = wire
        self._call: Call = wire.open(SESSION_STREAM.path, ())
        self._cancelled = False
        connection.open_streams.add(self)

    async def serve(self, on_answers: OnAnswers) -> None:
        parse = SESSION_STREAM.parse
        self._call.hand_to(lambda message: on_answers(parse(message)))
        ended = self._why(await self._call.wait_end())
        if isinstance(ended, StreamBroken):
            raise ended

    async def send(self, message: session_pb2.SessionRequests) -> None:
        call = self._call
        call.send(message.SerializeToString())
        if call.held_up:
            try:
                await call.drain()
            except Ended as ended:
                raise self._why(ended) from None

    async def complete(self) -> None:
        self._call.complete()

    async def is_alive(self, timeout_s: float) -> bool:
        if self._call.ended is not None:
            return False
        # Over this connection: that the node answers over another one is no comfort.
        call = self._wire.open(health.CHECK_PATH, ())
        call.send(health.encode_request(""))
        call.complete()
        try:
            async with asyncio.timeout(timeout_s):
                return await call.read() is not None
        except TimeoutError:
            return False
        except Ended as ended:
            return ended.code is not grpc.StatusCode.UNAVAILABLE
        finally:
            call.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()

    def close(self) -> None:
        self._connection.open_streams.discard(self)
        self.cancel()
        self._wire.abort("the stream has ended")

    def _why(self, ended: Ended) -> StreamBroken | EOFError:
        if self._cancelled or ended.code is grpc.StatusCode.OK:
            return EOFError()
        return StreamBroken(ended.code, understand(ended.code, ended.reason, ended.trailers))


class ChannelStream:
    """A stream over the endpoint's channel; a `SessionStream`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._call = connection.open_stream(SESSION_STREAM)

    async def serve(self, on_answers: OnAnswers) -> None:
        while True:
            try:
                message = await self._call.read()
            except asyncio.CancelledError:
                if being_cancelled():
                    raise
                return  # the stream was abandoned: the node fell silent or stops serving
            except grpc.aio.AioRpcError as error:
                raise _broken(error) from None
            if not isinstance(message, session_pb2.SessionResponses):
                return
            on_answers(message)

    async def send(self, message: session_pb2.SessionRequests) -> None:
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise _broken(error) from None
        except (asyncio.InvalidStateError, grpc.aio.UsageError):
            raise EOFError from None

    async def complete(self) -> None:
        try:
            await self._call.done_writing()
        except grpc.aio.AioRpcError as error:
            raise _broken(error) from None

    async def is_alive(self, timeout_s: float) -> bool:
        return await self._connection.is_alive(timeout_s)

    def cancel(self) -> None:
        self._call.cancel()

    def close(self) -> None:
        self._connection.close_stream(self._call)


def _broken(error: grpc.aio.AioRpcError) -> StreamBroken:
    return StreamBroken(error.code(), understand(error.code(), error.details() or "", error.trailing_metadata()))
