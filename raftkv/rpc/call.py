"""One call: messages both ways, and how it ends.

A message is handed on in the moment it arrives (`Call.hand_to`) or waits for `Call.read`. What is sent leaves at
once, as far as the other side's window and the socket take it; the rest follows by itself, and `held_up` says so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import grpc

from raftkv.rpc.frames import Window

Metadata = Sequence[tuple[str, str]]

_PREFIX: Final = 5  # of each message: a byte whether it is compressed, four how long it is
_COMPRESSED: Final = 1 << 32
_ORDER: Final = "big"


class Ended(Exception):
    """A call has ended, or is to be ended.

    Attributes:
        code: gRPC's status.
        reason: in words; empty where all is well.
        trailers: metadata that goes with it.
    """

    def __init__(self, code: grpc.StatusCode, reason: str = "", trailers: Metadata = ()) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code = code
        self.reason = reason
        self.trailers = trailers


class Carrier(Protocol):
    """What a call needs of its connection."""

    is_paused: bool
    message_bytes_max: int

    def pump(self, call: Call) -> None: ...
    def flush(self) -> None: ...
    def begin_answer(self, call: Call) -> None: ...
    def end_answer(self, call: Call, ended: Ended) -> None: ...
    def taken(self, call: Call) -> None: ...
    def reset(self, call: Call) -> None: ...


class Call:
    """One call, as either side sees it. All of it belongs to the loop."""

    __slots__ = (
        "_changed",
        "_connection",
        "_inbox",
        "_on_message",
        "_partial",
        "answered",
        "counted",
        "ended",
        "headers",
        "is_complete",
        "is_completing",
        "is_plain",
        "number",
        "on_end",
        "on_room",
        "unsent",
        "untaken",
        "window",
    )

    def __init__(self, connection: Carrier, number: int, headers: Mapping[str, str], window_bytes: int) -> None:
        self.headers = headers
        """What the caller sent along: metadata, and `:path`."""
        self.on_room: Callable[[], None] | None = None
        """Told when the call is no longer held up."""
        self.on_end: Callable[[], None] | None = None
        """Told when the call has ended, unless that was done here."""
        self.ended: Ended | None = None
        self.number: Final = number
        self.answered = False
        """The server's headers are sent, or have come."""
        self.is_complete = False
        """The other side sends no more messages."""
        self.unsent = bytearray()
        """Of the connection: what the other side has no room for yet."""
        self.is_completing = False
        """Of the connection: the end of our half follows what is unsent."""
        self.is_plain = "content-length" not in headers
        """Of the connection: nobody has to count what arrives."""
        self.untaken = 0
        """Of the connection: bytes received for which the other side has no room yet,"""
        self.counted = 0
        """and how many of them h2 knows of."""
        self.window: Final = Window(number, window_bytes)
        """Of the connection: the room for the others."""
        self._connection = connection
        self._inbox: deque[bytes] = deque()
        self._on_message: Callable[[bytes], None] = self._keep
        self._partial = bytearray()
        self._changed: asyncio.Event | None = None  # made by who waits first

    # Sending.

    def send(self, *messages: bytes) -> None:
        """Send messages, together; dropped when the call has ended."""
        if self.ended is None:
            unsent = self.unsent
            for message in messages:
                unsent += len(message).to_bytes(_PREFIX, _ORDER)
                unsent += message
            self._connection.pump(self)

    def flush(self) -> None:
        """Have what was sent leave at once, where a connection gathers."""
        self._connection.flush()

    @property
    def held_up(self) -> bool:
        """Whether something waits for the other side to take it."""
        return bool(self.unsent) or self._connection.is_paused

    async def drain(self) -> None:
        """Wait until the call is not held up.

        Raises:
            Ended: it was.
        """
        while self.held_up:
            await self._change()

    def accept(self) -> None:
        """Of the server: take the call, before the first message. Harmless when that is done."""
        if not self.answered and self.ended is None:
            self.answered = True
            self._connection.begin_answer(self)

    def finish(self, ended: Ended) -> None:
        """Of the server: end the call with a status, behind what was sent. Harmless when it has ended."""
        if self.ended is None:
            self.on_end = None
            self._connection.end_answer(self, ended)

    def complete(self) -> None:
        """Of the caller: no more messages come, behind those that were sent."""
        if self.ended is None:
            self.is_completing = True
            self._connection.pump(self)

    def cancel(self) -> None:
        """Break the call off. Harmless when it has ended."""
        if self.ended is None:
            self.on_end = None
            self._connection.reset(self)

    # Receiving.

    async def read(self) -> bytes | None:
        """The next message; None when the other side sends no more.

        Raises:
            Ended: otherwise than well.
        """
        while not self._inbox:
            if self.is_complete and (self.ended is None or self.ended.code is grpc.StatusCode.OK):
                return None
            await self._change()
        message = self._inbox.popleft()
        self._make_room()
        return message

    async def feed(self, take: Callable[[bytes], bool]) -> bytes | None:
        """As `read`, but each message goes to `take` in the moment it arrives. Returns the first that it leaves.

        `take` must not raise; it says whether it took the message.

        Raises:
            Ended: otherwise than well.
        """
        while self._inbox and take(self._inbox[0]):
            self._inbox.popleft()
        self._make_room()

        def on_message(message: bytes) -> None:
            if self._inbox or not take(message):  # nothing overtakes what waits
                self._keep(message)

        self._on_message = on_message
        try:
            return await self.read()
        finally:
            self._on_message = self._keep

    def hand_to(self, on_message: Callable[[bytes], None]) -> None:
        """Hand each message to `on_message` in the moment it arrives, in place of `read`; what it raises ends the call.

        What has arrived before comes at once.
        """
        self._on_message = on_message
        while self._inbox:
            on_message(self._inbox.popleft())
        self._make_room()

    async def wait_accepted(self) -> None:
        """Until the other side has taken the call, or it has ended."""
        while not self.answered and self.ended is None:
            await self._wait()

    async def wait_end(self) -> Ended:
        """How the call ends."""
        while self.ended is None:
            await self._wait()
        return self.ended

    async def _change(self) -> None:
        if self.ended is not None:
            raise self.ended
        await self._wait()

    async def _wait(self) -> None:
        if self._changed is None:
            self._changed = asyncio.Event()
        self._changed.clear()
        await self._changed.wait()

    # From the connection.

    def wake(self) -> None:
        """Something is otherwise: whoever waits looks again."""
        if self._changed is not None:
            self._changed.set()

    def received(self, data: bytes, room: int) -> None:
        """Bytes arrived, which took so much of the window.

        Raises:
            Ended: they are no message that is taken here.
            Exception: whatever `on_message` raises.
        """
        self.untaken += room
        size = len(data)
        if not self._partial and size >= _PREFIX and int.from_bytes(data[:_PREFIX], _ORDER) == size - _PREFIX:
            if size - _PREFIX > self._connection.message_bytes_max:
                raise self._too_large(size - _PREFIX)
            self._on_message(data[_PREFIX:])  # just one message, as nearly always
        else:
            self._partial += data
            self._split()
        self._make_room()

    def _split(self) -> None:
        partial = self._partial
        place = 0
        while len(partial) - place >= _PREFIX:
            length = int.from_bytes(partial[place : place + _PREFIX], _ORDER)
            if length >= _COMPRESSED:
                raise Ended(grpc.StatusCode.INTERNAL, "raftkv: a message is compressed, and the call did not say how")
            if length > self._connection.message_bytes_max:
                raise self._too_large(length)
            if len(partial) - place < _PREFIX + length:
                break
            self._on_message(bytes(partial[place + _PREFIX : place + _PREFIX + length]))
            place += _PREFIX + length
        del partial[:place]

    def _too_large(self, size: int) -> Ended:
        text = f"grpc: received message larger than max ({size} vs. {self._connection.message_bytes_max})"
        return Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    def _keep(self, message: bytes) -> None:
        self._inbox.append(message)
        self.wake()

    def _make_room(self) -> None:
        """The other side may send as much anew, once nothing waits to be read."""
        if self.untaken and not self._inbox:
            self._connection.taken(self)
