"""gRPC on the loop itself: against itself, and with grpc.aio at either end. What breaks ends a call, never the node."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from raftkv.rpc.call import Call, Ended, Metadata
from raftkv.rpc.connection import Connection, dial
from raftkv.rpc.limits import BETWEEN_NODES, Limits
from raftkv.rpc.server import Handler, Server

ECHO = "/test.Echo/Echo"


async def echo(call: Call) -> None:
    call.accept()
    while (message := await call.read()) is not None:
        call.send(message)
        await call.drain()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@asynccontextmanager
async def serving(handlers: Mapping[str, Handler], limits: Limits = BETWEEN_NODES) -> AsyncIterator[str]:
    server = Server(handlers, limits)
    address = f"127.0.0.1:{free_port()}"
    await server.bind(address)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(address: str, limits: Limits = BETWEEN_NODES) -> AsyncIterator[Connection]:
    connection = await dial(address, 5.0, limits)
    try:
        yield connection
    finally:
        connection.abort("the test has ended")


@asynccontextmanager
async def calling(handler: Handler, metadata: Metadata = (), limits: Limits = BETWEEN_NODES) -> AsyncIterator[Call]:
    async with serving({ECHO: handler}) as address, connected(address, limits) as connection:
        yield connection.open(ECHO, metadata)


# --- both ends ours ---------------------------------------------------------------------------------------------------


async def test_messages_come_whole_and_in_order() -> None:
    sent = [b"", b"a", b"b" * 200, b"c" * 70_000, b"d" * 5_000_000, b"e"]
    async with calling(echo) as call:
        for message in sent:
            call.send(message)
        call.complete()
        assert [await call.read() for _ in sent] == sent
        assert await call.read() is None
        assert (await call.wait_end()).code is grpc.StatusCode.OK


async def test_more_than_a_window_waits_until_it_is_read() -> None:
    parts = 3 * BETWEEN_NODES.call_window_bytes // (1 << 20)
    reading = asyncio.Event()
    seen = []

    async def slow(call: Call) -> None:
        call.accept()
        await reading.wait()
        while (message := await call.read()) is not None:
            seen.append(len(message))

    async with calling(slow) as call:
        for _ in range(parts):
            call.send(b"x" * (1 << 20))
        await call.wait_accepted()
        assert call.held_up
        told = asyncio.Event()
        call.on_room = told.set
        reading.set()
        await told.wait()
        assert not call.held_up
        call.complete()
        assert (await call.wait_end()).code is grpc.StatusCode.OK
    assert seen == [1 << 20] * parts


async def test_messages_can_be_handed_on_as_they_arrive() -> None:
    seen: list[bytes] = []

    async def direct(call: Call) -> None:
        call.accept()
        call.hand_to(seen.append)
        assert await call.read() is None

    async with calling(direct) as call:
        for number in range(100):
            call.send(b"%d" % number)
        call.complete()
        await call.wait_end()
    assert seen == [b"%d" % number for number in range(100)]


@pytest.mark.parametrize("at_once", [True, False])
async def test_messages_are_fed_as_they_arrive_and_wait_in_order_behind_one_that_is_left(at_once: bool) -> None:
    taken: list[bytes] = []
    left: list[bytes | None] = []
    go_on = asyncio.Event()

    def take(message: bytes) -> bool:
        if message.startswith(b"wait"):
            return False
        taken.append(message)
        return True

    async def feed(call: Call) -> None:
        call.accept()
        while (message := await call.feed(take)) is not None:
            left.append(message)
            await go_on.wait()
            taken.append(message)

    async with calling(feed) as call:
        sent = [b"1", b"2", b"wait 3", b"4", b"wait 5", b"6"]
        if not at_once:
            await call.wait_accepted()
        call.send(*sent)
        async with asyncio.timeout(10):
            while not left:  # noqa: ASYNC110 - nobody says so
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert taken == [b"1", b"2"]
        go_on.set()
        call.send(b"7")
        call.complete()
        assert (await call.wait_end()).code is grpc.StatusCode.OK
    assert taken == [*sent, b"7"]
    assert left == [b"wait 3", b"wait 5"]


async def test_who_leaves_what_he_is_fed_holds_the_sender_up() -> None:
    limits = Limits(call_window_bytes=1 << 16)

    async def feed(call: Call) -> None:
        call.accept()
        await call.feed(lambda message: False)
        await call.wait_end()

    async with serving({ECHO: feed}, limits) as address, connected(address) as connection:
        call = connection.open(ECHO, ())
        await call.wait_accepted()
        for _ in range(20):
            call.send(bytes(10_000))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call.drain(), 0.2)


async def test_metadata_and_a_status_with_any_text_arrive() -> None:
    async def refuse(call: Call) -> None:
        raise Ended(grpc.StatusCode.FAILED_PRECONDITION, f"nicht für {call.headers['who']}: 100 %\n", [("why", "1")])

    async with calling(refuse, [("who", "n7")]) as call:
        ended = await call.wait_end()
        assert (ended.code, ended.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "nicht für n7: 100 %\n")
        assert ("why", "1") in ended.trailers
        await call.wait_accepted()  # is over too
        with pytest.raises(Ended):
            await call.read()


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving({}) as address, connected(address) as connection:
        assert (await connection.open(ECHO, ()).wait_end()).code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("direct", [False, True])
async def test_a_handler_that_fails_ends_its_call_and_nothing_else(direct: bool) -> None:
    def broken(message: bytes) -> None:
        raise ValueError("no such kind")

    async def fail(call: Call) -> None:
        call.accept()
        if direct:
            call.hand_to(broken)
        message = await call.read()
        if message is not None:
            broken(message)

    async with serving({ECHO: fail, "/ok": echo}) as address, connected(address) as connection:
        other = connection.open("/ok", ())
        call = connection.open(ECHO, ())
        await call.wait_accepted()
        call.send(b"x")
        ended = await call.wait_end()
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNKNOWN, "ValueError: no such kind")
        other.send(b"still here")
        assert await other.read() == b"still here"


async def test_either_side_may_break_a_call_off() -> None:
    begun: asyncio.Queue[Call] = asyncio.Queue()

    async def wait(call: Call) -> None:
        call.accept()
        begun.put_nowait(call)
        await call.read()

    async with serving({ECHO: wait}) as address, connected(address) as connection:
        call = connection.open(ECHO, ())
        theirs = await begun.get()
        call.cancel()
        assert (await theirs.wait_end()).code is grpc.StatusCode.CANCELLED
        call = connection.open(ECHO, ())
        (await begun.get()).cancel()
        assert (await call.wait_end()).code is grpc.StatusCode.CANCELLED


async def test_a_lost_connection_ends_its_calls_on_both_sides() -> None:
    begun: asyncio.Queue[Call] = asyncio.Queue()

    async def wait(call: Call) -> None:
        call.accept()
        begun.put_nowait(call)
        await call.read()

    async with serving({ECHO: wait}) as address, connected(address) as connection:
        call = connection.open(ECHO, ())
        theirs = await begun.get()
        connection.abort("cut")
        assert (await call.wait_end()).code is grpc.StatusCode.UNAVAILABLE
        assert (await theirs.wait_end()).code is grpc.StatusCode.UNAVAILABLE
        late = connection.open(ECHO, ())  # who had not heard of it yet
        late.send(b"x")
        assert (await late.wait_end()).reason == "cut"
        late.cancel()


async def test_a_caller_that_cannot_take_an_answer_ends_its_call_and_nothing_else() -> None:
    def broken(message: bytes) -> None:
        raise ValueError("no such kind")

    left: asyncio.Queue[Call] = asyncio.Queue()

    async def answer(call: Call) -> None:
        call.accept()
        call.send(b"x")
        left.put_nowait(call)
        await call.read()

    async with serving({ECHO: answer, "/ok": echo}) as address, connected(address) as connection:
        other = connection.open("/ok", ())
        call = connection.open(ECHO, ())
        call.hand_to(broken)
        ended = await call.wait_end()
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNKNOWN, "ValueError: no such kind")
        assert (await (await left.get()).wait_end()).code is grpc.StatusCode.CANCELLED
        other.send(b"still here")
        assert await other.read() == b"still here"


# --- the other end is grpc.aio ----------------------------------------------------------------------------------------


async def test_grpc_can_call_us() -> None:
    async def strict(call: Call) -> None:
        if call.headers.get("key") != "7":
            raise Ended(grpc.StatusCode.INVALID_ARGUMENT, "key: ü")
        await echo(call)

    async with serving({ECHO: strict}) as address, grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.stream_stream(ECHO)
        call = method(metadata=(("key", "7"),))
        for size in (0, 10, 100_000, 3_000_000):
            await call.write(b"m" * size)
            assert await call.read() == b"m" * size
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        refused = method(metadata=(("key", "8"),))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await refused.read()
        assert (failure.value.code(), failure.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "key: ü")
        unknown: Any = channel.unary_unary("/test.Echo/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await unknown(b"")
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_we_can_call_grpc() -> None:
    async def method(request_iterator: object, context: Any) -> None:
        if dict(context.invocation_metadata())["key"] != "7":
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "key: ü")
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server()
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(method)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connected(f"127.0.0.1:{port}") as connection:
            call = connection.open(ECHO, [("key", "7")])
            for size in (0, 10, 100_000, 3_000_000):
                call.send(b"m" * size)
                assert await call.read() == b"m" * size
            call.complete()
            assert await call.read() is None
            refused = await connection.open(ECHO, [("key", "8")]).wait_end()
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "key: ü")
            unknown = await connection.open("/test.Echo/Nothing", ()).wait_end()
            assert unknown.code is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(None)


# --- what no decent peer does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 40,
        b"\0" * 1000,
    ],
)
async def test_who_does_not_speak_http2_is_sent_away_and_others_are_served(garbage: bytes) -> None:
    async with serving({ECHO: echo}) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        while await reader.read(65_536):
            pass
        writer.close()
        async with connected(address) as connection:
            call = connection.open(ECHO, ())
            call.send(b"x")
            assert await call.read() == b"x"


async def test_a_message_that_is_too_long_is_refused_by_its_length() -> None:
    async with calling(echo) as call:
        await call.wait_accepted()
        call.unsent += (BETWEEN_NODES.message_bytes_max + 1).to_bytes(5, "big")
        call._connection.pump(call)
        assert (await call.wait_end()).code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_another_content_type_is_refused() -> None:
    async with serving({ECHO: echo}) as address, connected(address) as connection:
        call = connection.open(ECHO, ())
        plain = connection._h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", ECHO), (":authority", "x")]
        connection._calls[plain] = other = Call(connection, plain, {}, 1 << 20)
        connection._h2.send_headers(plain, headers)
        connection.flush()
        assert (await other.wait_end()).reason == "HTTP status 415"
        call.send(b"x")
        assert await call.read() == b"x"


async def test_who_falls_silent_is_given_up() -> None:
    impatient = Limits(keepalive_s=0.05, answer_s=0.05)
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # the kernel accepts, nobody answers
        async with connected(f"127.0.0.1:{frozen.getsockname()[1]}", impatient) as connection:
            ended = await connection.open(ECHO, ()).wait_end()
            assert ended.code is grpc.StatusCode.UNAVAILABLE
            assert "ping" in ended.reason


async def test_a_process_that_was_held_up_looks_into_its_socket_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with calling(echo, limits=Limits(keepalive_s=0.05, answer_s=30)) as call:
        await call.wait_accepted()
        connection = call._connection
        sent = connection._h2.ping
        pinged = asyncio.Event()

        def noting(data: bytes) -> None:
            pinged.set()
            sent(data)

        monkeypatch.setattr(connection._h2, "ping", noting)
        await pinged.wait()
        connection._look_after()  # as if a second had passed in which nothing could be read
        assert call.ended is None
        call.send(b"x")
        assert await call.read() == b"x"


async def test_who_is_quiet_but_answers_pings_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with calling(echo, limits=Limits(keepalive_s=0.02, answer_s=0.5)) as call:
        connection = call._connection
        asked: asyncio.Queue[bytes] = asyncio.Queue()
        ping = connection._h2.ping

        def noting(data: bytes) -> None:
            asked.put_nowait(data)
            ping(data)

        monkeypatch.setattr(connection._h2, "ping", noting)
        for _ in range(5):
            await asked.get()
        assert call.ended is None
        call.send(b"x")
        assert await call.read() == b"x"
