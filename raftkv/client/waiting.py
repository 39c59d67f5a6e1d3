"""The calls of a pipeline that have begun and not ended: room for them, and when their time is up.

    enter: there is room, or they wait for it in turn --> under way, one alarm for all of them --> leave

One timer for all calls, at the earliest deadline there was when it was set: nearly all calls end long before theirs, so
that a timer each would be made only to be thrown away.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from raftkv.client.errors import DeadlineExceeded
from raftkv.client.faults import Fault
from raftkv.client.methods import Method
from raftkv.client.retry import Retry
from raftkv.client.session import ServerSession


class Call:
    """One mutation of one caller."""

    __slots__ = (
        "attempts", "deadline", "fault", "future", "id", "method", "payload", "perhaps_done", "retry", "sent",
        "seq", "session", "waits",
    )  # fmt: skip

    def __init__(
        self,
        method: Method[Any, Any],
        payload: bytes,
        deadline: float | None,
        retry: Retry,
        future: asyncio.Future[bytes],
    ) -> None:
        self.method = method
        self.payload = payload
        self.deadline = deadline
        self.retry = retry
        self.future = future
        self.id = 0
        self.session: ServerSession | None = None
        self.seq = 0
        self.sent = False  # on the stream that is open now, and not answered
        self.perhaps_done = False  # an earlier attempt ended without an answer
        self.attempts = 0
        self.waits = 0
        self.fault: Fault | None = None  # of the last attempt


class Waiting:
    """See the module."""

    def __init__(self, loop: asyncio.AbstractEventLoop, calls_max: int, time_is_up: Callable[[Call], None]) -> None:
        """
        Args:
            time_is_up: called once for each call whose deadline has come.
        """
        self._loop: Final = loop
        self._time_is_up: Final = time_is_up
        self._room = calls_max  # 0 while anybody queues
        self._queue: deque[asyncio.Future[None]] = deque()  # those who wait for room
        self._timed: set[Call] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = float("inf")  # <= every deadline in `_timed`

    async def enter(self, call: Call) -> None:
        """Begin a call; `leave` must follow.

        Raises:
            DeadlineExceeded: there was no room in its time; it has not begun.
        """
        if self._room:
            self._room -= 1
        else:
            await self._wait_for_room(call.deadline)
        deadline = call.deadline
        if deadline is not None:
            self._timed.add(call)
            if deadline < self._alarm_at:
                self._set_alarm(deadline)

    def leave(self, call: Call) -> None:
        """A call has ended."""
        self._timed.discard(call)
        self._give_room()

    def _give_room(self) -> None:
        while self._queue:
            next_in_turn = self._queue.popleft()
            if not next_in_turn.done():
                next_in_turn.set_result(None)  # the room is handed over: nobody can come between
                return
        self._room += 1

    async def _wait_for_room(self, deadline: float | None) -> None:
        turn = self._loop.create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as fault:
            if turn.done() and not turn.cancelled():
                self._give_room()  # it came too late
            turn.cancel()
            if isinstance(fault, TimeoutError):
                raise DeadlineExceeded("too many calls of this client are under way", code="CLIENT_BUSY") from None
            raise

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_at = None, float("inf")
        now = self._loop.time()
        next_deadline = float("inf")
        for call in tuple(self._timed):
            assert call.deadline is not None, "without a deadline nothing ends"
            if call.deadline <= now:
                self._timed.discard(call)
                self._time_is_up(call)
            else:
                next_deadline = min(next_deadline, call.deadline)
        if self._timed:
            self._set_alarm(next_deadline)
