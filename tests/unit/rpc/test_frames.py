"""What is read and counted beside h2: that nothing is lost, reordered or left without room, whatever the frames are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, PingAckReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PingFrame
from hypothesis import given
from hypothesis import strategies as st

from raftkv.rpc.call import Call, Ended
from raftkv.rpc.frames import PREFACE_BYTES, FrameReader, Window
from raftkv.rpc.limits import Limits
from raftkv.rpc.server import Server

SMALL = Limits(call_window_bytes=1 << 16, window_bytes=1 << 16, frame_bytes=1 << 14)
ECHO = "/test.Echo/Echo"
REFUSE = "/test.Echo/Refuse"
IDLE = "/test.Echo/Idle"


def head(path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    first = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
    return [*first, ("content-type", "application/grpc"), ("te", "trailers"), *more]


class Idle:
    """A connection that does nothing."""

    is_paused = False
    message_bytes_max = 1 << 20

    def pump(self, call: Call) -> None: ...
    def begin_answer(self, call: Call) -> None: ...
    def end_answer(self, call: Call, ended: Ended) -> None: ...
    def taken(self, call: Call) -> None: ...
    def reset(self, call: Call) -> None: ...


# --- reading ----------------------------------------------------------------------------------------------------------


def data_frames() -> st.SearchStrategy[Frame]:
    def make(number: int, data: bytes, flags: set[str]) -> Frame:
        return DataFrame(number, data, pad_length=3 if "PADDED" in flags else 0, flags=flags)

    flags = st.sampled_from([set[str](), set[str](), {"END_STREAM"}, {"PADDED"}])
    return st.builds(make, st.sampled_from([1, 3, 5, 7, 9]), st.binary(max_size=40), flags)


def other_frames() -> st.SearchStrategy[Frame]:
    pings = st.builds(lambda body: PingFrame(0, body), st.binary(min_size=8, max_size=8))
    return pings | st.builds(lambda data: HeadersFrame(1, data), st.binary(max_size=30))


@given(st.lists(data_frames() | other_frames(), max_size=12), st.lists(st.integers(1, 60)), st.booleans())
def test_each_byte_goes_to_its_call_or_to_h2_in_order_however_it_is_cut(
    frames: list[Frame], cuts: list[int], is_server: bool
) -> None:
    calls = {number: Call(Idle(), number, {}, 1 << 16) for number in (1, 3)}
    calls[5] = Call(Idle(), 5, {"content-length": "1"}, 1 << 16)
    calls[7] = Call(Idle(), 7, {}, 1 << 16)
    calls[7].is_complete = True  # 9 is unknown
    preface = b"p" * PREFACE_BYTES if is_server else b""
    reader = FrameReader(calls, 1 << 14, len(preface))
    sent = preface + b"".join(frame.serialize() for frame in frames)
    got: list[tuple[int, bytes]] = []
    place = 0
    for cut in [*cuts, len(sent)]:
        for call, part in reader.split(sent[place : place + cut]):
            got.append((call.number if call is not None else 0, part))
        place += cut
    expected: list[tuple[int, bytes]] = [(0, preface)] if preface else []
    for frame in frames:
        if isinstance(frame, DataFrame) and not frame.flags and frame.stream_id in (1, 3):
            expected.append((frame.stream_id, frame.data))
        else:
            expected.append((0, frame.serialize()))
    assert _joined(got) == _joined(expected)


def _joined(parts: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """With what follows one another for h2 as one."""
    joined: list[tuple[int, bytes]] = []
    for number, part in parts:
        if not number and joined and not joined[-1][0]:
            joined[-1] = (0, joined[-1][1] + part)
        else:
            joined.append((number, part))
    return joined


def test_a_frame_that_is_too_long_is_shown_to_h2_at_once() -> None:
    reader = FrameReader({1: Call(Idle(), 1, {}, 1 << 16)}, 100, 0)
    head = DataFrame(1, b"x" * 101).serialize()[:20]
    assert list(reader.split(head)) == [(None, head)]


@given(st.integers(8, 1 << 20), st.lists(st.integers(0, 1 << 18)))
def test_room_is_given_back_to_the_byte(size: int, taken: list[int]) -> None:
    window = Window(5, size)
    given_back = 0
    for each in taken:
        frame = window.give_back(each)
        if frame:
            parsed, length = Frame.parse_frame_header(memoryview(frame[:9]))
            parsed.parse_body(memoryview(frame[9:]))
            assert (parsed.stream_id, length, len(frame)) == (5, 4, 13)
            given_back += parsed.window_increment  # type: ignore[attr-defined]
    assert 0 <= sum(taken) - given_back < size // 4


# --- on a connection --------------------------------------------------------------------------------------------------


class Client:
    """Speaks HTTP/2 as h2 does, and says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.reader = reader
        self.writer = writer
        self.seen: list[Event] = []

    async def send(self, raw: bytes = b"") -> None:
        self.writer.write(self.h2.data_to_send() + raw)
        await self.writer.drain()

    async def until(self, done: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not done():
                data = await self.reader.read(1 << 16)
                assert data, "the connection was dropped"
                for event in self.h2.receive_data(data):
                    self.seen.append(event)
                    if isinstance(event, DataReceived):
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                await self.send()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.seen if isinstance(event, kind)]


async def echo(call: Call) -> None:
    call.accept()
    while (message := await call.read()) is not None:
        call.send(message)
        await call.drain()


async def refuse(call: Call) -> None:
    call.accept()
    await asyncio.sleep(0.01)  # what is sent meanwhile gathers
    raise Ended(grpc.StatusCode.PERMISSION_DENIED)


async def idle(call: Call) -> None:
    call.accept()
    await call.wait_end()


@asynccontextmanager
async def client_of(limits: Limits = SMALL) -> AsyncIterator[Client]:
    server = Server({ECHO: echo, REFUSE: refuse, IDLE: idle}, limits)
    port = await server.bind("127.0.0.1:0")
    await server.start()
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield client
    finally:
        client.writer.close()
        await server.stop(0)


def message(size: int) -> bytes:
    return size.to_bytes(5, "big") + bytes(size)


async def test_frames_of_every_kind_share_the_room_and_never_run_out_of_it() -> None:
    """Both kinds are counted apart: what is given back by one must not starve the other."""
    async with client_of() as client:
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, head(ECHO))
        await client.send()
        size, sent = 3000, 0
        for turn in range(150):
            data = message(size)
            padding = 100 if turn % 3 == 0 else None
            needed = len(data) + 300
            await client.until(lambda needed=needed: client.h2.local_flow_control_window(number) >= needed)
            client.h2.send_data(number, data, pad_length=padding)
            sent += len(data)
            await client.send()
        client.h2.end_stream(number)
        await client.send()
        await client.until(lambda: client.of(StreamEnded))
        assert sum(len(event.data) for event in client.of(DataReceived)) == sent  # type: ignore[attr-defined]
        (trailers,) = client.of(TrailersReceived)
        assert ("grpc-status", "0") in trailers.headers  # type: ignore[attr-defined]


@pytest.mark.parametrize("padding", [None, 10])
async def test_the_room_of_calls_that_ended_unread_is_given_back(padding: int | None) -> None:
    """Else a connection would be stuck after some of them."""
    async with client_of() as client:
        for _ in range(30):
            number = client.h2.get_next_available_stream_id()
            client.h2.send_headers(number, head(REFUSE))
            await client.send()
            await client.until(lambda n=number: client.h2.local_flow_control_window(n) >= 6100)
            client.h2.send_data(number, message(6000), pad_length=padding)
            await client.send()
            await client.until(lambda n=number: n in {event.stream_id for event in client.of(StreamEnded)})  # type: ignore[attr-defined]


async def test_who_sends_more_than_there_is_room_for_is_dropped() -> None:
    async with client_of() as client:
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, head(IDLE))
        await client.send()
        raw = DataFrame(number, message(10_000)).serialize()
        for _ in range(6):
            await client.send(raw)
        client.h2.ping(b"12345678")
        await client.send()
        await client.until(lambda: client.of(PingAckReceived))  # so much there is room for
        await client.send(raw)
        with pytest.raises((AssertionError, ConnectionError)):
            await client.until(lambda: False)


@pytest.mark.parametrize(("announced", "is_right"), [(8, True), (9, False)])
async def test_h2_counts_where_a_length_was_announced(announced: int, is_right: bool) -> None:
    async with client_of() as client:
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, head(ECHO, ("content-length", str(announced))))
        await client.send(DataFrame(number, message(3)).serialize())
        await client.send(DataFrame(number, b"", flags=["END_STREAM"]).serialize())
        if is_right:
            await client.until(lambda: client.of(TrailersReceived))
        else:
            with pytest.raises(AssertionError):
                await client.until(lambda: client.of(TrailersReceived) or client.of(StreamReset))


async def test_a_stream_whose_end_is_an_event_yet_to_come_is_sent_nothing() -> None:
    """Of what arrives together h2 knows all when we hear of the first: here that there is room again."""
    async with client_of() as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1000})
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, head(ECHO))
        client.h2.send_data(number, message(10_000))
        await client.send()
        received = 0
        while received < 1000:  # and nothing of it is acknowledged, so the rest waits there
            received += len(await client.reader.read(1 << 16))
        client.h2.increment_flow_control_window(1000, number)
        client.h2.reset_stream(number)
        other = client.h2.get_next_available_stream_id()
        client.h2.send_headers(other, head(ECHO))
        client.h2.send_data(other, message(3), end_stream=True)
        await client.send()
        found = b""
        while b"grpc-status" not in found and message(3) not in found:
            data = await asyncio.wait_for(client.reader.read(1 << 16), 10)
            assert data, "the connection was dropped"
            found += data
