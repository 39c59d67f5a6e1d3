"""gRPC between nodes, spoken on the loop itself: calls over HTTP/2 connections, without a thread.

    dial ──► Connection ──open──► Call ══messages══► Call ◄──accept── Connection ◄── Server
                                   └──── status, metadata ◄────┘

On the wire it is gRPC, and any gRPC stack may be at the other end; h2 keeps the state of the protocol. What is not
here is a thread: in grpc.aio a message passes three on each side, and between nodes that share a machine these switches
were most of what a lone write cost (docs/adr/0017). Clients go on being served by grpc.aio, which stands up to anybody.

A message is handed on in the moment it arrives (`Call.hand_to`) or waits for `Call.read`. What is sent leaves at
once, as far as the other side's window and the socket take it; the rest follows by itself, and `held_up` says so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast
from urllib.parse import quote, unquote

import grpc
import structlog
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes

Metadata = Sequence[tuple[str, str]]

MESSAGE_BYTES_MAX: Final = 64 << 20
WINDOW_BYTES: Final = 16 << 20
"""How much may be under way in a call, and in a connection, before the receiver has looked at it."""
FRAME_BYTES: Final = 1 << 20
CALLS_MAX: Final = 16
"""Of one connection. A node needs one for its messages and one for a snapshot."""
KEEPALIVE_S: Final = 1.0
"""So often each side asks whether the other is there; it has as long to answer, or the connection is dropped."""
GRACE_S: Final = 0.1
"""A process that was held up finds the answer in its socket: it looks there once more before it drops anything."""
WRITE_BUFFER_BYTES: Final = 1 << 20

_PREFIX: Final = 5  # of each message: a byte whether it is compressed, four how long it is
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_ORDER: Final = "big"


class Ended(Exception):
    """A call has ended, or is to be ended.

    Attributes:
        code: gRPC's status.
        reason: in words; empty where all is well.
    """

    def __init__(self, code: grpc.StatusCode, reason: str = "") -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code = code
        self.reason = reason


class Call:
    """One call, as either side sees it. All of it belongs to the loop."""

    def __init__(self, connection: Connection, number: int, headers: Mapping[str, str]) -> None:
        self.headers = headers
        """What the caller sent along: metadata, and `:path`."""
        self.on_room: Callable[[], None] = lambda: None
        """Told when the call is no longer held up."""
        self.accepted = asyncio.Event()
        """The other side has taken the call, or it has ended."""
        self.ended: Ended | None = None
        self.number: Final = number
        self._connection = connection
        self._inbox: deque[bytes] = deque()
        self._on_message: Callable[[bytes], None] = self._keep
        self._partial = bytearray()
        self._taken = 0  # bytes received for which the other side has no room yet
        self._is_complete = False  # the other side sends no more
        self._changed = asyncio.Event()
        self._unsent = bytearray()
        self._is_completing = False  # the end of our half follows what is unsent
        self._answered = False  # the server's headers are sent

    # Sending.

    def send(self, message: bytes) -> None:
        """Send one message; dropped when the call has ended."""
        if self.ended is None:
            self._unsent += len(message).to_bytes(_PREFIX, _ORDER)
            self._unsent += message
            self._connection.pump(self)

    @property
    def held_up(self) -> bool:
        """Whether something waits for the other side to take it."""
        return bool(self._unsent) or self._connection.is_paused

    async def drain(self) -> None:
        """Wait until the call is not held up.

        Raises:
            Ended: it was.
        """
        while self.held_up:
            await self._change()

    def accept(self) -> None:
        """Of the server: take the call, before the first message."""
        if not self._answered and self.ended is None:
            self._answered = True
            self._connection.send_headers(self.number, [(":status", "200"), ("content-type", "application/grpc")])

    def finish(self, ended: Ended) -> None:
        """Of the server: end the call with a status, behind what was sent. Harmless when it has ended."""
        if self.ended is None:
            status = [("grpc-status", str(ended.code.value[0])), ("grpc-message", quote(ended.reason))]
            head = [] if self._answered else [(":status", "200"), ("content-type", "application/grpc")]
            self._connection.send_headers(self.number, head + status, end=True)
            self._connection.end(self, ended)

    def complete(self) -> None:
        """Of the caller: no more messages come, behind those that were sent."""
        if self.ended is None:
            self._is_completing = True
            self._connection.pump(self)

    def cancel(self) -> None:
        """Break the call off. Harmless when it has ended."""
        if self.ended is None:
            self._connection.reset(self)

    # Receiving.

    async def read(self) -> bytes | None:
        """The next message; None when the other side sends no more.

        Raises:
            Ended: otherwise than well.
        """
        while not self._inbox:
            if self._is_complete and (self.ended is None or self.ended.code is grpc.StatusCode.OK):
                return None
            await self._change()
        message = self._inbox.popleft()
        self._make_room()
        return message

    def _make_room(self) -> None:
        """The other side may send as much anew, once nothing waits to be read."""
        if self._taken and not self._inbox:
            self._connection.taken(self, self._taken)
            self._taken = 0

    def hand_to(self, on_message: Callable[[bytes], None]) -> None:
        """Hand each message to `on_message` in the moment it arrives, in place of `read`; what it raises ends the call.

        What has arrived before comes at once.
        """
        self._on_message = on_message
        while self._inbox:
            on_message(self._inbox.popleft())
        self._make_room()

    async def _change(self) -> None:
        if self.ended is not None:
            raise self.ended
        self._changed.clear()
        await self._changed.wait()

    async def wait_end(self) -> Ended:
        """How the call ends."""
        while self.ended is None:
            self._changed.clear()
            await self._changed.wait()
        return self.ended

    # From the connection.

    def _received(self, data: bytes, room: int) -> None:
        self._taken += room
        self._split(data)
        self._make_room()

    def _split(self, data: bytes) -> None:
        size = len(data)
        if not self._partial and size >= _PREFIX and int.from_bytes(data[:_PREFIX], _ORDER) == size - _PREFIX:
            self._on_message(data[_PREFIX:])  # just one message, as nearly always
            return
        self._partial += data
        place = 0
        while len(self._partial) - place >= _PREFIX:
            length = int.from_bytes(self._partial[place : place + _PREFIX], _ORDER)
            if length > MESSAGE_BYTES_MAX:  # the byte before the length says "compressed", or it is too long
                raise Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message exceeds {MESSAGE_BYTES_MAX} bytes")
            if len(self._partial) - place < _PREFIX + length:
                break
            self._on_message(bytes(self._partial[place + _PREFIX : place + _PREFIX + length]))
            place += _PREFIX + length
        del self._partial[:place]

    def _keep(self, message: bytes) -> None:
        self._inbox.append(message)
        self._changed.set()


class Connection(asyncio.Protocol):
    """One HTTP/2 connection, and the calls on it."""

    def __init__(
        self,
        *,
        on_call: Callable[[Call], None] | None = None,
        on_lost: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        """
        Args:
            on_call: told of each call that the other side begins; None makes this the side that calls.
            on_lost: told when the connection is no more.
        """
        self.is_paused = True
        self.peer_name = ""
        self._on_call = on_call
        self._on_lost = on_lost
        self._h2 = H2Connection(H2Configuration(client_side=on_call is None, header_encoding="utf-8"))
        self._calls: dict[int, Call] = {}
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._keepalive: asyncio.TimerHandle | None = None
        self._heard = False  # something arrived since the last look
        self._asked = False  # a ping is under way
        self._overdue = False  # its answer is

    # From asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.peer_name = str(transport.get_extra_info("peername"))
        self._h2.initiate_connection()
        self._h2.update_settings(
            {
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
                SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES,
                SettingCodes.MAX_CONCURRENT_STREAMS: CALLS_MAX,
            }
        )
        self._h2.increment_flow_control_window(WINDOW_BYTES - 65_535)
        self.is_paused = False
        self._flush()
        self._keepalive = self._loop.call_later(KEEPALIVE_S, self._look_after)

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        self._heard = True
        try:
            for event in self._h2.receive_data(data):
                self._on_event(event)
        except H2Error as fault:
            self._flush()  # it says what was wrong
            self.abort(f"the other side broke the rules of HTTP/2: {fault}")
            return
        self._flush()

    def pause_writing(self) -> None:
        """Of asyncio.Protocol."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Of asyncio.Protocol."""
        self.is_paused = False
        for call in list(self._calls.values()):
            self._pump_on(call)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self._end_all(str(exc or "the connection was closed"))
        self._on_lost(self)

    # For calls.

    def open(self, path: str, metadata: Metadata) -> Call:
        """Begin a call of `path`."""
        number = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "raftkv"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
        ]
        call = self._calls[number] = Call(self, number, dict(headers))
        self.send_headers(number, headers)
        return call

    def pump(self, call: Call) -> None:
        """Hand over what the call has to send, as far as the other side takes it."""
        unsent = call._unsent
        while unsent and not self.is_paused:
            size = min(self._h2.local_flow_control_window(call.number), self._h2.max_outbound_frame_size)
            if size <= 0:
                break
            self._h2.send_data(call.number, bytes(unsent[:size]))
            del unsent[:size]
        if call._is_completing and not unsent:
            call._is_completing = False
            self._h2.end_stream(call.number)
        self._flush()

    def send_headers(self, number: int, headers: list[tuple[str, str]], *, end: bool = False) -> None:
        """Begin a call or an answer, or end an answer."""
        self._h2.send_headers(number, headers, end_stream=end)
        self._flush()

    def taken(self, call: Call, size: int) -> None:
        """So many bytes need no more room here: the other side may send as many anew."""
        if call.ended is None:
            self._h2.acknowledge_received_data(size, call.number)
            self._flush()

    def reset(self, call: Call) -> None:
        """Break the call off, on both sides."""
        self._h2.reset_stream(call.number, ErrorCodes.CANCEL)
        self._flush()
        self.end(call, Ended(grpc.StatusCode.CANCELLED, "it was broken off here"))

    def end(self, call: Call, ended: Ended) -> None:
        """The call is over, for both sides."""
        if self._calls.pop(call.number, None) is not None:
            call.ended = ended
            call.accepted.set()
            call._changed.set()
            call._unsent.clear()

    def abort(self, reason: str) -> None:
        """Drop the connection at once."""
        self._end_all(reason)
        if self._transport is not None:
            self._transport.abort()

    # Inside.

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            assert self._transport is not None, "not connected"
            self._transport.write(data)

    def _on_event(self, event: events.Event) -> None:
        if isinstance(event, events.DataReceived):
            call = self._calls.get(event.stream_id)
            if call is None:
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                return
            self._receive(call, event.data, event.flow_controlled_length)
            if event.stream_ended is not None:
                self._completed(event.stream_id)
        elif isinstance(event, events.WindowUpdated | events.RemoteSettingsChanged):
            for call in list(self._calls.values()):
                self._pump_on(call)
        elif isinstance(event, events.PingAckReceived):
            self._asked = False
        elif isinstance(event, events.RequestReceived):
            self._begin(event.stream_id, _headers_of(event.headers))
        elif isinstance(event, events.ResponseReceived | events.TrailersReceived):
            self._answered(event.stream_id, _headers_of(event.headers))
        elif isinstance(event, events.StreamEnded):
            self._completed(event.stream_id)
        elif isinstance(event, events.StreamReset):
            if (call := self._calls.get(event.stream_id)) is not None:
                self.end(call, Ended(grpc.StatusCode.CANCELLED, "it was broken off by the other side"))
        elif isinstance(event, events.ConnectionTerminated):
            self.abort("the other side closes the connection")

    def _receive(self, call: Call, data: bytes, room: int) -> None:
        try:
            call._received(data, room)
        except Ended as ended:
            call.finish(ended)
        except Exception as fault:  # noqa: BLE001 - one call's, not the node's
            structlog.get_logger().error("peer_call_failed", peer=self.peer_name, exc_info=fault)
            call.finish(Ended(grpc.StatusCode.UNKNOWN, f"{type(fault).__name__}: {fault}"))

    def _begin(self, number: int, headers: Mapping[str, str]) -> None:
        if self._on_call is None or not headers.get("content-type", "").startswith("application/grpc"):
            self._h2.send_headers(number, [(":status", "415")], end_stream=True)
            return
        call = self._calls[number] = Call(self, number, headers)
        self._on_call(call)

    def _answered(self, number: int, headers: Mapping[str, str]) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        if "grpc-status" in headers:
            code = _CODES.get(int(headers["grpc-status"]) if headers["grpc-status"].isdigit() else 2)
            call._is_complete = True
            self.end(call, Ended(code or grpc.StatusCode.UNKNOWN, unquote(headers.get("grpc-message", ""))))
        elif headers.get(":status") != "200":
            self.end(call, Ended(grpc.StatusCode.UNKNOWN, f"HTTP status {headers.get(':status')}"))
        else:
            call.accepted.set()

    def _completed(self, number: int) -> None:
        call = self._calls.get(number)
        if call is not None and not call._is_complete:
            call._is_complete = True
            call._changed.set()

    def _pump_on(self, call: Call) -> None:
        """Go on with what was held up, and say so."""
        self.pump(call)
        if not call.held_up:
            call._changed.set()
            call.on_room()

    def _look_after(self) -> None:
        if self._asked and not self._heard:
            if self._overdue:
                self.abort(f"no answer to a ping for {KEEPALIVE_S:g} s")
                return
            self._overdue = True
            self._keepalive = self._loop.call_later(GRACE_S, self._look_after)
            return
        self._overdue = False
        if not self._heard:
            self._asked = True
            self._h2.ping(b"raftkv??")
            self._flush()
        self._heard = False
        self._keepalive = self._loop.call_later(KEEPALIVE_S, self._look_after)

    def _end_all(self, reason: str) -> None:
        self.is_paused = True
        if self._keepalive is not None:
            self._keepalive.cancel()
        for call in list(self._calls.values()):
            self.end(call, Ended(grpc.StatusCode.UNAVAILABLE, reason))


def _headers_of(pairs: Sequence[tuple[object, object]] | None) -> Mapping[str, str]:
    return {str(key): str(value) for key, value in pairs or ()}


async def dial(address: str, timeout_s: float) -> Connection:
    """Connect to a node.

    Args:
        address: `host:port`.
        timeout_s: seconds to wait for it.
    Raises:
        OSError: it cannot be reached, or not in time.
    """
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(timeout_s):
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host.strip("[]"), int(port))
    return connection
