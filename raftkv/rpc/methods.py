"""What grpc's generated code registers, served by calls: handlers, their context, deadlines.

A handler sees of a call what it sees of one in grpc.aio, as far as handlers here make use of it. It is cancelled when
the client leaves the call, or its deadline passes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final, NoReturn

import grpc

from raftkv.rpc.call import Call, Ended, Metadata
from raftkv.rpc.server import Handler, Server

_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_DIGITS_MAX: Final = 8  # of a deadline, says gRPC


class ClientGone(Exception):
    """The client has left its call; the cancellation of who serves it is on its way."""


class Context:
    """What a handler knows of its call, and can do with it; named as in `grpc.aio.ServicerContext`."""

    __slots__ = ("_call", "_deadline")

    def __init__(self, call: Call, deadline: float | None) -> None:
        self._call = call
        self._deadline = deadline

    def invocation_metadata(self) -> Metadata:
        """What the client sent along, gRPC's own headers too. Binary values are as they come, in base64."""
        return tuple(self._call.headers.items())

    def header(self, name: str) -> str | None:
        """One value of it."""
        return self._call.headers.get(name)

    def time_remaining(self) -> float | None:
        """Seconds until the client gives up; None where it did not say."""
        return None if self._deadline is None else self._deadline - asyncio.get_running_loop().time()

    async def read(self) -> bytes | None:
        """The next request; None when the client sends no more.

        Raises:
            ClientGone: it has left.
        """
        try:
            return await self._call.read()
        except Ended as ended:
            raise ClientGone from ended

    async def feed(self, take: Callable[[bytes], bool]) -> bytes | None:
        """As `read`, but each request goes to `take` in the moment it arrives: see `Call.feed`.

        Raises:
            ClientGone: it has left.
        """
        try:
            return await self._call.feed(take)
        except Ended as ended:
            raise ClientGone from ended

    @property
    def held_up(self) -> bool:
        """Whether the client does not take what it is sent."""
        return self._call.held_up

    def send(self, *responses: bytes) -> None:
        """Send responses, together and at once, to a client that is not held up; dropped when it has left."""
        self._call.accept()
        self._call.send(*responses)
        self._call.flush()

    async def write(self, *responses: bytes) -> None:
        """Send responses, together; waits while the client does not take them.

        Raises:
            ClientGone: nobody is there to get it.
        """
        call = self._call
        call.accept()
        call.send(*responses)
        try:
            if call.held_up:
                await call.drain()
        except Ended as ended:
            raise ClientGone from ended
        if call.ended is not None:
            raise ClientGone

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status; does not return."""
        raise Ended(code, details, trailing_metadata)


class MethodServer(Server):
    """A server for handlers as generated code has them."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: object) -> None:
        """Nothing: generated code gives the same handlers to `add_registered_method_handlers`."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Serve the methods of a service, by name. Not for methods with a stream of requests and one response."""
        for name, handler in handlers.items():
            self.add(f"/{service}/{name}", _served(handler))

    def _serve(self, call: Call) -> None:
        encoding = call.headers.get("grpc-encoding", "identity")
        if encoding == "identity":
            super()._serve(call)
            return
        text = f'raftkv: messages that are compressed by "{encoding}" are not read here'
        call.finish(Ended(grpc.StatusCode.UNIMPLEMENTED, text, (("grpc-accept-encoding", "identity"),)))


def _served(handler: Any) -> Handler:
    """`handler` is a `grpc.RpcMethodHandler`, whose attributes the stubs do not know."""
    parse = handler.request_deserializer or bytes
    serialize = handler.response_serializer or bytes
    if handler.unary_unary is not None:
        serve = _unary(handler.unary_unary, parse, serialize)
    elif handler.unary_stream is not None:
        serve = _stream(handler.unary_stream, parse, serialize)
    else:
        assert handler.stream_stream is not None, "a method with a stream of requests and one response"
        serve = _bidi(handler.stream_stream, parse, serialize)

    async def run(call: Call) -> None:
        if call.ended is not None:
            return
        task = asyncio.current_task()
        assert task is not None, "every call has a task"
        call.on_end = partial(_leave, task)
        wanted = call.headers.get("grpc-timeout")
        if wanted is None:
            await within(call, None)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _seconds(wanted)
        timer = loop.call_at(deadline, _give_up, call, task)
        try:
            await within(call, deadline)
        finally:
            timer.cancel()

    async def within(call: Call, deadline: float | None) -> None:
        with contextlib.suppress(ClientGone):
            await serve(call, Context(call, deadline))

    return run


def _unary(method: Any, parse: Callable[[bytes], Any], serialize: Callable[[Any], bytes]) -> Any:
    async def serve(call: Call, context: Context) -> None:
        request = await _only_request(call)
        response = serialize(await method(parse(request), context))
        call.accept()
        call.send(response)

    return serve


def _stream(method: Any, parse: Callable[[bytes], Any], serialize: Callable[[Any], bytes]) -> Any:
    async def serve(call: Call, context: Context) -> None:
        request = await _only_request(call)
        await _send_all(method(parse(request), context), context, serialize)

    return serve


def _bidi(method: Any, parse: Callable[[bytes], Any], serialize: Callable[[Any], bytes]) -> Any:
    async def requests(context: Context) -> AsyncIterator[Any]:
        while (request := await context.read()) is not None:
            yield parse(request)

    async def serve(call: Call, context: Context) -> None:
        answers = method(requests(context), context)
        if isinstance(answers, AsyncGenerator):
            await _send_all(answers, context, serialize)
        else:
            await answers  # it reads and writes by the context
        call.accept()

    return serve


async def _only_request(call: Call) -> bytes:
    request = await call.read()
    if request is None:
        raise Ended(grpc.StatusCode.INTERNAL, "the call came without a request")
    return request


async def _send_all(responses: AsyncGenerator[Any, None], context: Context, serialize: Callable[[Any], bytes]) -> None:
    try:
        async for response in responses:
            await context.write(serialize(response))
    finally:
        await responses.aclose()


def _leave(task: asyncio.Task[Any]) -> None:
    task.cancel()


def _give_up(call: Call, task: asyncio.Task[Any]) -> None:
    call.on_end = None
    if call.unsent:
        call.cancel()  # what is half sent can't be followed by a status
    else:
        call.finish(Ended(grpc.StatusCode.DEADLINE_EXCEEDED, "context deadline exceeded"))
    task.cancel()


def _seconds(text: str) -> float:
    """A deadline as gRPC writes it.

    Raises:
        Ended: it is none.
    """
    digits, unit = text[:-1], _UNITS.get(text[-1:])
    if unit is None or not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS_MAX:
        raise Ended(grpc.StatusCode.INTERNAL, f"malformed grpc-timeout {text!r}")
    return int(digits) * unit
