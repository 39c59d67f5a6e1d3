"""One HTTP/2 connection, and the calls on it: an asyncio protocol around h2's state machine.

What is not checked is whether headers are well-formed: h2 would spend half of a small call on it. Who reads a header
takes one that is missing, or nonsense, for what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast
from urllib.parse import quote, unquote

import grpc
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import FlowControlError, H2Error, StreamClosedError, StreamIDTooLowError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from raftkv.rpc.call import Call, Ended, Metadata
from raftkv.rpc.frames import PREFACE_BYTES, FrameReader, Window, data_header
from raftkv.rpc.limits import BETWEEN_NODES, Limits

LOG: Final = logging.getLogger("raftkv")

GRACE_S: Final = 0.1
"""A process that was held up finds the answer in its socket: it looks there once more before it drops anything."""
WRITE_BUFFER_BYTES: Final = 1 << 20
"""With so much in the socket's buffer, calls are held up."""
UNREAD_BYTES_MAX: Final = 16 << 20
"""Who lets so much gather there (answers to pings, statuses: nothing holds those up) is sent away."""
WINDOW_AT_FIRST: Final = 65_535  # of HTTP/2

PING_STRIKES_MAX: Final = 2
_CLOSED: Final = (StreamClosedError, StreamIDTooLowError)  # what h2 says of a stream that is no more
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_ANSWER_HEADERS: Final = ((":status", "200"), ("content-type", "application/grpc"))


class Connection(asyncio.Protocol):
    """See the module."""

    def __init__(
        self,
        limits: Limits = BETWEEN_NODES,
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
        self.message_bytes_max = limits.message_bytes_max
        self.peer_name = ""
        self.authority = "raftkv"
        """What calls that begin here name as the server."""
        self._limits = limits
        self._on_call = on_call
        self._on_lost = on_lost
        self._h2 = H2Connection(
            H2Configuration(
                client_side=on_call is None,
                header_encoding="utf-8",
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._calls: dict[int, Call] = {}
        self._reader = FrameReader(self._calls, limits.frame_bytes, PREFACE_BYTES if on_call is not None else 0)
        self._window = Window(0, limits.window_bytes)
        self._untaken = 0  # bytes received in all calls for which the other side has no room yet
        self._outgoing = bytearray()  # what leaves with the next flush, before what h2 has to send
        self._last = 0  # the number of the last call that the other side began
        self._going_away = False
        self._is_done = False  # all is sent, for good
        self._lost: Ended | None = None  # why the connection is no more
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._flush_due = False
        self._keepalive: asyncio.TimerHandle | None = None
        self._heard = False  # something arrived since the last look
        self._asked = False  # whether it is there
        self._overdue = False  # its answer is
        self._pinged = -math.inf  # when we were asked last, since we sent something
        self._strikes = 0

    # From asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol."""
        limits = self._limits
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.peer_name = str(transport.get_extra_info("peername"))
        settings = {
            SettingCodes.INITIAL_WINDOW_SIZE: limits.call_window_bytes,
            SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes,
            SettingCodes.MAX_CONCURRENT_STREAMS: limits.calls_max,
            SettingCodes.MAX_HEADER_LIST_SIZE: H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
            SettingCodes.ENABLE_PUSH: 0,
        }
        # From the first, and not when they are acknowledged: some begin many calls before they have read any.
        self._h2.local_settings = Settings(client=self._on_call is None, initial_values=settings)
        self._h2.max_inbound_frame_size = limits.frame_bytes
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(limits.window_bytes - WINDOW_AT_FIRST)
        self.is_paused = False
        self.flush()
        self._keepalive = self._loop.call_later(limits.keepalive_s, self._look_after)

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        self._heard = True
        flushes_at_once, self._flush_due = not self._flush_due, True  # what is sent meanwhile leaves below
        try:
            for call, part in self._reader.split(data):
                if self._lost is not None:
                    return
                if call is not None:
                    self._received(call, part, len(part))
                else:
                    for event in self._h2.receive_data(part):
                        self._on_event(event)
        except (H2Error, UnicodeDecodeError) as fault:
            self.flush()  # it says what was wrong
            self.abort(f"the other side broke the rules of HTTP/2: {fault}")
            return
        if flushes_at_once:
            self.flush()

    def pause_writing(self) -> None:
        """Of asyncio.Protocol."""
        self.is_paused = True
        if self._limits.answers_first and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Of asyncio.Protocol."""
        self.is_paused = False
        if self._limits.answers_first and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        for call in list(self._calls.values()):
            self._pump_on(call)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self._end_all(str(exc or "the connection was closed"))
        self._transport = None
        self._on_lost(self)

    # For who has the connection.

    def open(self, path: str, metadata: Metadata) -> Call:
        """Begin a call of `path`; it has ended already where the connection is no more."""
        if self._lost is not None:
            call = Call(self, 0, {}, 0)
            call.ended = self._lost
            return call
        number = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", self.authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
        ]
        call = self._calls[number] = Call(self, number, dict(headers), self._limits.call_window_bytes)
        self._h2.send_headers(number, headers)
        self._sent()
        return call

    def go_away(self) -> None:
        """Have the other side begin no more calls here; those that it has begun go on, and the last one closes."""
        if not self._going_away and self._transport is not None:
            self._going_away = True
            self._go_away(ErrorCodes.NO_ERROR, b"")
            self._close_when_done()

    def _go_away(self, code: ErrorCodes, why: bytes) -> None:
        # Not by h2, which takes nothing for a connection that is to end.
        frame = GoAwayFrame(0, last_stream_id=self._last, error_code=code, additional_data=why)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame.serialize())

    def abort(self, reason: str) -> None:
        """Drop the connection at once."""
        self._end_all(reason)
        if self._transport is not None:
            self._transport.abort()

    # For calls.

    # Of what arrives together, h2 has taken note of all before we hear of the first: a stream may be closed whose end
    # is an event yet to come.

    def pump(self, call: Call) -> None:
        """Hand over what the call has to send, as far as the other side takes it."""
        with contextlib.suppress(*_CLOSED):
            self._pump(call)
        self._sent()

    def _pump(self, call: Call) -> None:
        unsent = call.unsent
        if unsent and not self.is_paused:
            connection = self._h2
            stream = connection.streams.get(call.number)
            if stream is None or stream.closed:
                return
            while unsent and not self.is_paused:
                room = min(connection.outbound_flow_control_window, stream.outbound_flow_control_window)
                size = min(len(unsent), room, connection.max_outbound_frame_size)
                if size <= 0:
                    break
                connection.outbound_flow_control_window -= size
                stream.outbound_flow_control_window -= size
                self._outgoing += connection.data_to_send()  # what is to be sent before
                self._outgoing += data_header(call.number, size)
                if size == len(unsent):
                    self._outgoing += unsent
                    unsent.clear()
                else:
                    self._outgoing += unsent[:size]
                    del unsent[:size]
                self._pinged, self._strikes = -math.inf, 0
                if len(self._outgoing) > WRITE_BUFFER_BYTES:
                    self.flush()  # which tells whether the socket takes more
        if call.is_completing and not unsent:
            call.is_completing = False
            self._h2.end_stream(call.number)

    def flush(self) -> None:
        """Have what was sent leave now."""
        self._flush_due = False
        data = self._h2.data_to_send()
        if self._outgoing:
            self._outgoing += data
            data = bytes(self._outgoing)
            self._outgoing.clear()
        transport = self._transport
        if data and transport is not None and not (self._is_done or transport.is_closing()):
            transport.write(data)
            if self.is_paused and transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
                self.abort("the other side does not read what it is sent")

    def begin_answer(self, call: Call) -> None:
        """Send the headers of an answer."""
        with contextlib.suppress(*_CLOSED):
            self._h2.send_headers(call.number, _ANSWER_HEADERS)
        self._sent()

    def end_answer(self, call: Call, ended: Ended) -> None:
        """End an answer with a status."""
        status = [("grpc-status", str(ended.code.value[0])), ("grpc-message", quote(ended.reason)), *ended.trailers]
        head = () if call.answered else _ANSWER_HEADERS
        with contextlib.suppress(*_CLOSED):
            self._h2.send_headers(call.number, [*head, *status], end_stream=True)
            if not call.is_complete:
                self._h2.reset_stream(call.number, ErrorCodes.NO_ERROR)  # it need not send the rest
        self._end(call, ended)
        self._sent()

    def taken(self, call: Call) -> None:
        """What the call has received needs no more room here: the other side may send as much anew."""
        size, counted = call.untaken - call.counted, call.counted
        self._untaken -= call.untaken
        call.untaken = call.counted = 0
        if counted:
            self._h2.acknowledge_received_data(counted, call.number)
        update = self._window.give_back(size)
        if call.ended is None:
            update += call.window.give_back(size)
        if update:
            self._outgoing += update
        if counted or update:
            self._sent()

    def reset(self, call: Call) -> None:
        """Break the call off, on both sides."""
        with contextlib.suppress(*_CLOSED):
            self._h2.reset_stream(call.number, ErrorCodes.CANCEL)
        self._end(call, Ended(grpc.StatusCode.CANCELLED, "it was broken off here"))
        self._sent()

    # Inside.

    def _sent(self) -> None:
        """Something is to leave."""
        if self._flush_due:
            return
        if self._limits.gathers:
            self._flush_due = True
            self._loop.call_soon(self.flush)
        else:
            self.flush()

    def _on_event(self, event: events.Event) -> None:
        if isinstance(event, events.DataReceived):
            self._data(event)
        elif isinstance(event, events.WindowUpdated):
            if not event.stream_id:
                self._pump_unsent()
            elif (call := self._calls.get(event.stream_id)) is not None:
                self._pump_on(call)
        elif isinstance(event, events.RequestReceived):
            self._begin(event.stream_id, _headers_of(event.headers))
        elif isinstance(event, events.StreamEnded):
            self._completed(event.stream_id)
        elif isinstance(event, events.StreamReset):
            if (call := self._calls.get(event.stream_id)) is not None:
                self._end(call, Ended(grpc.StatusCode.CANCELLED, "it was broken off by the other side"))
        elif isinstance(event, events.ResponseReceived | events.TrailersReceived):
            self._answered(event.stream_id, _headers_of(event.headers))
        elif isinstance(event, events.RemoteSettingsChanged):
            self._pump_unsent()
        elif isinstance(event, events.PingReceived):
            self._asked_by_it()
        elif isinstance(event, events.ConnectionTerminated):
            self.abort("the other side closes the connection")

    def _data(self, event: events.DataReceived) -> None:
        call = self._calls.get(event.stream_id)
        if call is None:
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            return
        call.counted += event.flow_controlled_length
        self._received(call, event.data, event.flow_controlled_length)

    def _received(self, call: Call, data: bytes, room: int) -> None:
        self._untaken += room
        if self._untaken > self._limits.window_bytes or call.untaken + room > self._limits.call_window_bytes:
            raise FlowControlError("more was sent than there is room for")
        try:
            call.received(data, room)
        except Ended as ended:
            self._fail(call, ended)
        except Exception as fault:
            LOG.exception("raftkv: a call with %s failed", self.peer_name)
            self._fail(call, Ended(grpc.StatusCode.UNKNOWN, f"{type(fault).__name__}: {fault}"))

    def _fail(self, call: Call, ended: Ended) -> None:
        """What the other side sent can't be taken."""
        if self._on_call is not None:
            call.finish(ended)
            return
        with contextlib.suppress(*_CLOSED):
            self._h2.reset_stream(call.number, ErrorCodes.CANCEL)
        self._end(call, ended)
        self._sent()

    def _begin(self, number: int, headers: Mapping[str, str]) -> None:
        if self._going_away:
            with contextlib.suppress(*_CLOSED):
                self._h2.reset_stream(number, ErrorCodes.REFUSED_STREAM)  # so that it is sent elsewhere
            return
        self._last = number
        if self._on_call is None or not headers.get("content-type", "").startswith("application/grpc"):
            with contextlib.suppress(*_CLOSED):
                self._h2.send_headers(number, [(":status", "415")], end_stream=True)
            return
        call = self._calls[number] = Call(self, number, headers, self._limits.call_window_bytes)
        self._on_call(call)

    def _answered(self, number: int, headers: Mapping[str, str]) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        if "grpc-status" in headers:
            code = _CODES.get(int(headers["grpc-status"]) if headers["grpc-status"].isdigit() else 2)
            call.is_complete = True
            reason = unquote(headers.get("grpc-message", ""))
            self._end(call, Ended(code or grpc.StatusCode.UNKNOWN, reason, tuple(headers.items())))
        elif headers.get(":status") != "200":
            self._end(call, Ended(grpc.StatusCode.UNKNOWN, f"HTTP status {headers.get(':status')}"))
        else:
            call.answered = True
            call.is_plain = "content-length" not in headers
            call.wake()

    def _completed(self, number: int) -> None:
        call = self._calls.get(number)
        if call is not None and not call.is_complete:
            call.is_complete = True
            call.wake()

    def _pump_unsent(self) -> None:
        """The other side has more room: of a thousand calls, hardly one waits for it."""
        for call in [call for call in self._calls.values() if call.unsent]:
            self._pump_on(call)

    def _pump_on(self, call: Call) -> None:
        """Go on with what was held up, and say so."""
        if call.unsent:
            self.pump(call)
        if not call.held_up:
            call.wake()
            if call.on_room is not None:
                call.on_room()

    def _asked_by_it(self) -> None:
        now = self._loop.time()
        if now - self._pinged < self._limits.ping_every_s_min:
            self._strikes += 1
            if self._strikes > PING_STRIKES_MAX:
                self._go_away(ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
                self.abort("the other side pings too often")
        self._pinged = now

    def _look_after(self) -> None:
        heard, self._heard = self._heard, False
        if self._asked and not heard:
            if self._overdue:
                self.abort(f"no answer to a ping for {self._limits.answer_s:g} s")
                return
            self._overdue = True
            self._keepalive = self._loop.call_later(GRACE_S, self._look_after)
            return
        self._overdue = False
        self._asked = not heard
        if self._asked:
            self._h2.ping(b"raftkv??")
            self.flush()
        wait_s = self._limits.answer_s if self._asked else self._limits.keepalive_s
        self._keepalive = self._loop.call_later(wait_s, self._look_after)

    def _end(self, call: Call, ended: Ended) -> None:
        """The call is over, for both sides."""
        if self._calls.pop(call.number, None) is not None:
            call.ended = ended
            call.unsent.clear()
            if call.untaken and self._lost is None:
                self.taken(call)
            call.wake()
            if call.on_end is not None:
                call.on_end()
            if self._going_away:
                self._close_when_done()

    def _close_when_done(self) -> None:
        if not self._calls and self._transport is not None and not self._is_done:
            self.flush()
            self._is_done = True
            # The other side closes: what it has sent and we have not read would make our close a reset, and take what
            # we sent last away from it.
            try:
                self._transport.write_eof()
            except (OSError, RuntimeError):  # the other side was faster; we have not heard of it yet
                self._transport.abort()

    def _end_all(self, reason: str) -> None:
        self.is_paused = True
        if self._keepalive is not None:
            self._keepalive.cancel()
        self._lost = self._lost or Ended(grpc.StatusCode.UNAVAILABLE, reason)
        for call in list(self._calls.values()):
            self._end(call, self._lost)


def _headers_of(pairs: Sequence[tuple[object, object]] | None) -> Mapping[str, str]:
    return {str(key): str(value) for key, value in pairs or ()}


async def dial(address: str, timeout_s: float, limits: Limits = BETWEEN_NODES) -> Connection:
    """Connect to a node.

    Args:
        address: `host:port`.
        timeout_s: seconds to wait for it.
        limits: what it may ask of us.
    Raises:
        OSError: it cannot be reached, or not in time.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        _, connection = await loop.create_connection(lambda: Connection(limits), host.strip("[]"), int(port))
    connection.authority = address
    return connection
