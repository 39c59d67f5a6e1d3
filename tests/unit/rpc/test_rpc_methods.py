"""Methods as generated code registers them, called by grpc.aio and by bytes of our own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, Event, PingAckReceived
from h2.settings import SettingCodes

from raftkv.rpc import connection
from raftkv.rpc.connection import dial
from raftkv.rpc.limits import Limits
from raftkv.rpc.methods import ClientGone, Context, MethodServer
from tests.unit.server.fake_node import failure, trailers, until

LIMITS = Limits(
    message_bytes_max=1 << 20,
    call_window_bytes=1 << 16,
    calls_max=10_000,
    keepalive_s=60,
    gathers=True,
    answers_first=True,
)
MAKERS: dict[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    "unary": grpc.unary_unary_rpc_method_handler,
    "stream": grpc.unary_stream_rpc_method_handler,
    "bidi": grpc.stream_stream_rpc_method_handler,
}


@asynccontextmanager
async def serving(limits: Limits = LIMITS, **handlers: Any) -> AsyncIterator[tuple[MethodServer, str]]:
    """Serve `unary_x=` and so on as /t.T/x."""
    server = MethodServer({}, limits)
    made = {}
    for name, handler in handlers.items():
        kind, _, method = name.partition("_")
        made[method] = MAKERS[kind](handler)
    server.add_registered_method_handlers("t.T", made)
    port = await server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def echo(request: bytes, context: Context) -> bytes:
    return request


class Endless:
    """A handler that waits for ever, and knows what became of it."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, request: object, context: Context) -> bytes:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError("it never comes")


# --- what handlers see ------------------------------------------------------------------------------------------------


async def test_all_kinds_of_methods_are_served() -> None:
    async def count(request: bytes, context: Context) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    async def talk(_: object, context: Context) -> None:
        while (request := await context.read()) is not None:
            await context.write(request.upper())

    async def generate(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request + b"!"

    async with (
        serving(unary_echo=echo, stream_count=count, bidi_talk=talk, bidi_generate=generate) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        assert await channel.unary_unary("/t.T/echo")(b"x") == b"x"
        assert [each async for each in channel.unary_stream("/t.T/count")(b"3")] == [b"0", b"1", b"2"]
        assert [each async for each in channel.unary_stream("/t.T/count")(b"0")] == []
        for method, expected in (("talk", [b"A", b"B"]), ("generate", [b"a!", b"b!"])):
            assert [each async for each in channel.stream_stream(f"/t.T/{method}")(iter([b"a", b"b"]))] == expected


async def test_metadata_and_deadline_are_known() -> None:
    seen: list[tuple[str | None, float | None]] = []

    async def look(request: bytes, context: Context) -> bytes:
        assert ("who", "me") in context.invocation_metadata()
        seen.append((context.header("who"), context.time_remaining()))
        return b""

    async with serving(unary_look=look) as (_, address), grpc.aio.insecure_channel(address) as channel:
        await channel.unary_unary("/t.T/look")(b"", metadata=(("who", "me"),))
        await channel.unary_unary("/t.T/look")(b"", metadata=(("who", "me"),), timeout=100)
    assert seen[0] == ("me", None)
    remaining = seen[1][1]
    assert remaining is not None
    assert 50 < remaining <= 102  # gRPC rounds it up


async def test_a_status_carries_its_text_and_trailers() -> None:
    async def refuse(request: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "zu groß: 100 %", (("why", "size"),))

    async def tell_then_refuse(request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b"one"
        await context.abort(grpc.StatusCode.ABORTED, "no more")

    async with (
        serving(unary_refuse=refuse, stream_some=tell_then_refuse) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        error = await failure(channel.unary_unary("/t.T/refuse")(b""))
        assert (error.code(), error.details()) == (grpc.StatusCode.OUT_OF_RANGE, "zu groß: 100 %")
        assert trailers(error)["why"] == "size"
        call = channel.unary_stream("/t.T/some")(b"")
        assert await call.read() == b"one"
        assert (await failure(call.read())).details() == "no more"


async def test_what_a_handler_fails_with_is_its_calls_status_only() -> None:
    async def fail(request: bytes, context: Context) -> bytes:
        raise ValueError("of no use")

    async with (
        serving(unary_fail=fail, unary_echo=echo) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        error = await failure(channel.unary_unary("/t.T/fail")(b""))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNKNOWN, "ValueError: of no use")
        assert await channel.unary_unary("/t.T/echo")(b"x") == b"x"


async def test_what_is_not_there_or_not_understood_is_said() -> None:
    async with serving(unary_echo=echo) as (_, address), grpc.aio.insecure_channel(address) as channel:
        assert (await failure(channel.unary_unary("/t.T/nothing")(b""))).code() is grpc.StatusCode.UNIMPLEMENTED
        zipped = channel.unary_unary("/t.T/echo")(b"x" * 1000, compression=grpc.Compression.Gzip)
        error = await failure(zipped)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in str(error.details())
        large = await failure(channel.unary_unary("/t.T/echo")(b"x" * (LIMITS.message_bytes_max + 1)))
        assert large.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert large.details() == "grpc: received message larger than max (1048577 vs. 1048576)"
        whole = b"x" * LIMITS.message_bytes_max  # sixteen windows
        assert await channel.unary_unary("/t.T/echo")(whole) == whole


# --- how calls end ----------------------------------------------------------------------------------------------------


async def test_the_server_keeps_to_the_deadline_by_itself() -> None:
    endless = Endless()
    async with serving(unary_wait=endless) as (_, address):
        caller = await dial(address, 5.0)
        call = caller.open("/t.T/wait", [("grpc-timeout", "50m")])
        call.send(b"")
        assert (await call.wait_end()).code is grpc.StatusCode.DEADLINE_EXCEEDED
        await endless.cancelled.wait()
        caller.abort("the test has ended")


@pytest.mark.parametrize("text", ["", "5", "S", "-1S", "1x", "123456789S", "1.5S", "٣S"])
async def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    async with serving(unary_echo=echo) as (_, address):
        caller = await dial(address, 5.0)
        call = caller.open("/t.T/echo", [("grpc-timeout", text)])
        call.send(b"")
        ended = await call.wait_end()
        assert ended.code is grpc.StatusCode.INTERNAL
        assert "grpc-timeout" in ended.reason
        caller.abort("the test has ended")


async def test_who_leaves_a_call_ends_it() -> None:
    endless = Endless()
    async with serving(unary_wait=endless) as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/t.T/wait")(b"")
        await endless.began.wait()
        call.cancel()
        await endless.cancelled.wait()


async def test_who_is_gone_leaves_all_his_calls() -> None:
    waits = [Endless(), Endless()]
    async with serving(unary_a=waits[0], bidi_b=waits[1]) as (_, address):
        caller = await dial(address, 5.0)
        for name in ("a", "b"):
            caller.open(f"/t.T/{name}", ()).send(b"")
        for each in waits:
            await each.began.wait()
        caller.abort("the test pulls the plug")
        for each in waits:
            await each.cancelled.wait()


async def test_who_reads_or_writes_for_a_client_that_is_gone_is_told() -> None:
    told: list[str] = []
    gone = asyncio.Event()

    async def stubborn(_: object, context: Context) -> None:
        assert await context.read() == b"x"
        with contextlib.suppress(asyncio.CancelledError):
            await gone.wait()
        for act in (context.read(), context.write(b"x")):
            try:
                await act
            except ClientGone:
                told.append("gone")

    async with serving(bidi_s=stubborn) as (server, address):
        caller = await dial(address, 5.0)
        caller.open("/t.T/s", ()).send(b"x")
        await until(lambda: server._tasks)
        caller.abort("the test pulls the plug")
        await until(lambda: not server._tasks)
    assert told == ["gone", "gone"]


async def test_a_stream_may_be_ended_while_the_client_still_sends() -> None:
    async def enough(_: object, context: Context) -> None:
        await context.read()
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "enough")

    async with (
        serving(bidi_enough=enough, unary_echo=echo) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = channel.stream_stream("/t.T/enough")()
        await call.write(b"x")
        assert (await failure(call.read())).details() == "enough"
        assert await channel.unary_unary("/t.T/echo")(b"x") == b"x"


async def test_a_server_that_stops_answers_what_is_under_way_and_takes_no_more() -> None:
    go = asyncio.Event()

    async def slow(request: bytes, context: Context) -> bytes:
        began.set()
        await go.wait()
        return request

    began = asyncio.Event()
    async with serving(unary_slow=slow) as (server, address), grpc.aio.insecure_channel(address) as channel:
        first = channel.unary_unary("/t.T/slow")(b"x")
        await began.wait()
        stopping = asyncio.create_task(server.stop(30))
        await asyncio.sleep(0)
        late = await failure(channel.unary_unary("/t.T/slow")(b"y", timeout=30))
        assert late.code() is grpc.StatusCode.UNAVAILABLE
        go.set()
        assert await first == b"x"
        await stopping


async def test_a_server_that_stops_waits_no_longer_than_told() -> None:
    endless = Endless()
    async with serving(unary_wait=endless) as (server, address), grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/t.T/wait")(b"")
        await endless.began.wait()
        await server.stop(0.05)
        assert endless.cancelled.is_set()
        assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE


# --- clients that mean no good ----------------------------------------------------------------------------------------


class Raw:
    """A client that sends what it likes, and reads only when told."""

    def __init__(self) -> None:
        config = H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
        )
        self.h2 = H2Connection(config)
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30})
        self.h2.increment_flow_control_window(1 << 30)
        self._reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def connect(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._reader, self.writer = await asyncio.open_connection(host, int(port), limit=1 << 16)
        await self.send()

    async def send(self) -> None:
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    def call(self, path: bytes, message: bytes, extra: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        number = self.h2.get_next_available_stream_id()
        head = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x")]
        self.h2.send_headers(number, [*head, (b"content-type", b"application/grpc"), *extra])
        self.h2.send_data(number, len(message).to_bytes(5, "big") + message, end_stream=True)

    async def events(self) -> list[Event]:
        """What happened, once something has."""
        data = await self._reader.read(1 << 16)
        assert data, "the connection was dropped"
        found = self.h2.receive_data(data)
        await self.send()
        return found

    async def to_the_end(self) -> list[Event]:
        """What happens until the server closes."""
        found: list[Event] = []
        with contextlib.suppress(OSError):
            while data := await self._reader.read(1 << 16):
                found += self.h2.receive_data(data)
        return found

    async def drop(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def test_a_client_that_reads_no_answers_is_not_read() -> None:
    served = 0

    async def large(request: bytes, context: Context) -> bytes:
        nonlocal served
        served += 1
        return bytes(64 << 10)

    calls = 500  # 31 MB of answers
    async with serving(replace(LIMITS, window_bytes=1 << 30), unary_large=large) as (server, address):
        raw = Raw()
        await raw.connect(address)
        for _ in range(calls):
            raw.call(b"/t.T/large", b"")
            raw.writer.write(raw.h2.data_to_send())
        (one,) = server._connections
        await until(lambda: one.is_paused)
        before = -1
        while before != served:  # what it had read before it stopped to read
            before = served
            await asyncio.sleep(0.05)
        assert served < calls
        while served < calls:
            for event in raw.h2.receive_data(await raw._reader.read(1 << 20)):
                size = getattr(event, "flow_controlled_length", 0)
                if size:
                    raw.h2.acknowledge_received_data(size, event.stream_id)  # type: ignore[union-attr]
            await raw.send()
        await raw.drop()


async def test_who_floods_with_pings_and_reads_no_answer_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_BUFFER_BYTES", 1 << 14)
    monkeypatch.setattr(connection, "UNREAD_BYTES_MAX", 1 << 16)
    async with serving(replace(LIMITS, answers_first=False), unary_echo=echo) as (server, address):
        raw = Raw()
        await raw.connect(address)
        await until(lambda: server._connections)
        flood = b"".join((b"\0\0\x08\x06\0\0\0\0\0" + b"raftkv??",) * 10_000)
        while server._connections:
            raw.writer.write(flood)
            with contextlib.suppress(OSError):
                await raw.writer.drain()
            await asyncio.sleep(0)
        await raw.drop()


async def test_who_pings_too_often_is_told_and_sent_away() -> None:
    async with serving(replace(LIMITS, ping_every_s_min=60), unary_echo=echo) as (_, address):
        raw = Raw()
        await raw.connect(address)
        for _ in range(3):
            raw.h2.ping(b"12345678")
            await raw.send()
            raw.call(b"/t.T/echo", b"x")  # an answer in between makes it no flood
            await raw.send()
            while not any(isinstance(each, PingAckReceived) for each in await raw.events()):
                pass
        for _ in range(4):
            raw.h2.ping(b"12345678")
        await raw.send()
        ends = [each for each in await raw.to_the_end() if isinstance(each, ConnectionTerminated)]
        assert [(each.error_code, each.additional_data) for each in ends] == [(11, b"too_many_pings")]
        await raw.drop()


@pytest.mark.parametrize(
    "extra", [((b"who", b"\xff\xfe"),), ((b"Upper", b"case"),), ((b"x" * 70_000, b"y"),), ((b":late", b"pseudo"),)]
)
async def test_headers_that_are_nonsense_harm_nobody_else(extra: tuple[tuple[bytes, bytes], ...]) -> None:
    async with serving(unary_echo=echo) as (_, address), grpc.aio.insecure_channel(address) as channel:
        raw = Raw()
        await raw.connect(address)
        raw.call(b"/t.T/echo", b"x", extra)
        await raw.send()
        assert await raw._reader.read(1)  # an answer, or why there is none
        await raw.drop()
        assert await channel.unary_unary("/t.T/echo")(b"x") == b"x"


async def test_a_call_without_a_request_is_refused() -> None:
    async with serving(unary_echo=echo) as (_, address):
        caller = await dial(address, 5.0)
        call = caller.open("/t.T/echo", ())
        call.complete()
        assert (await call.wait_end()).code is grpc.StatusCode.INTERNAL
        caller.abort("the test has ended")


@pytest.mark.parametrize("window", [16, 1 << 20])
async def test_a_call_that_ends_in_the_same_breath_ends_nothing_else(window: int) -> None:
    """h2 has closed the stream before the first of its events is looked at."""

    async def answer(request: bytes, context: Context) -> bytes:
        return bytes(1000)

    async with serving(unary_a=answer) as (_, address):
        raw = Raw()
        raw.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        await raw.connect(address)
        raw.call(b"/t.T/a", b"")
        await raw.send()
        raw.h2.receive_data(await raw._reader.read(1 << 16))
        raw.h2.increment_flow_control_window(100, 1)
        raw.h2.reset_stream(1)
        raw.call(b"/t.T/a", b"x" * (LIMITS.message_bytes_max >> 6))
        raw.h2.reset_stream(3)
        for path, extra in ((b"/t.T/none", ()), (b"/t.T/a", ((b"grpc-encoding", b"gzip"),))):
            raw.call(path, b"", extra)
            raw.h2.reset_stream(raw.h2.highest_outbound_stream_id)
        await raw.send()
        raw.call(b"/t.T/a", b"")
        number = raw.h2.highest_outbound_stream_id
        raw.h2.increment_flow_control_window(1000, number)
        await raw.send()
        got = 0
        while got < 1005:
            data = await raw._reader.read(1 << 16)
            assert data, "the connection was dropped"
            for event in raw.h2.receive_data(data):
                got += len(getattr(event, "data", b"")) if getattr(event, "stream_id", 0) == number else 0
        await raw.drop()
