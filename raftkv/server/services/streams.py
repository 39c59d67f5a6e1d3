"""Streams: calls that last, and what ends them from this side.

A stream ends with `NoLeader` when its caller asked for a leader (`hasleader`) and three looks in a row found none, as
in etcd; and with `Stopping` when the node stops. Both reach a method where it waits for its next request; one that only
answers is interrupted wherever it is.

As patient as etcd is at its defaults, too: clientv3 gives a watch up on the first `NoLeader`, and expects none for the
length of an election. Our followers know within milliseconds that the leader is dead, when etcd's still believe in it.
So a stream that is opened then (the client's was at the dead leader) is not refused: it waits for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from raftkv.rpc.methods import Context
from raftkv.server.errors import DeadlineExceeded, NoLeader, RequestError, Stopping
from raftkv.server.services.contract import Node

HAS_LEADER = "hasleader"
ANSWER_EARLY_S = 0.05
LOOKS_WITHOUT_LEADER_MAX = 3
LOOK_EVERY_S_MIN = 1.0  # etcd looks once an election timeout, 1 s by default; ours is shorter, its clients are the same


def wants_leader(context: Context) -> bool:
    """Whether the caller would rather fail than wait for a leader."""
    return context.header(HAS_LEADER) == "true"


def deadline_of(context: Context) -> float | None:
    """Until when to work for the caller, as `loop.time()`; None where it did not say.

    A little before it gives up itself: then it still hears whether its request was proposed.

    Raises:
        DeadlineExceeded: that moment has passed: nothing is to be proposed.
    """
    remaining = context.time_remaining()
    if remaining is None:
        return None
    if remaining <= 0:
        raise DeadlineExceeded
    return asyncio.get_running_loop().time() + remaining - min(ANSWER_EARLY_S, remaining / 10)


class Interrupt:
    """Ends what runs under `guard`, from outside."""

    def __init__(self) -> None:
        self.fault: RequestError | None = None
        self._limit: asyncio.Timeout | None = None

    def set(self, fault: RequestError) -> None:
        """Have `guard` raise `fault` now, and whenever it is entered again; the first one counts."""
        if self.fault is None:
            self.fault = fault
            if self._limit is not None:
                self._limit.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """What is inside ends with the fault as soon as there is one; at most one guard at a time."""
        if self.fault is not None:
            raise self.fault
        try:
            async with asyncio.timeout(None) as self._limit:
                yield
        except TimeoutError:
            if self.fault is None:
                raise
            raise self.fault from None
        finally:
            self._limit = None


class Stream:
    """A call with messages both ways, as its method sees it. One task may read while another writes."""

    def __init__(self, context: Context, interrupt: Interrupt) -> None:
        self.context = context
        self._interrupt = interrupt

    async def read(self) -> bytes | None:
        """The next request; None when the client sends no more.

        Raises:
            NoLeader: the client wanted one, and there has been none for a while.
            Stopping: the node stops; what is under way may still be answered, quickly.
        """
        async with self._interrupt.guard():
            return await self.context.read()

    async def feed(self, take: Callable[[bytes], bool]) -> bytes | None:
        """As `read`, but each request goes to `take` in the moment it arrives. Returns the first that it leaves.

        `take` must not raise; it says whether it took the request.
        """
        async with self._interrupt.guard():
            return await self.context.feed(take)

    @property
    def held_up(self) -> bool:
        """Whether the client does not take what it is sent."""
        return self.context.held_up

    def send(self, *responses: bytes) -> None:
        """Send responses, together and at once, to a client that is not held up."""
        self.context.send(*responses)

    async def write(self, *responses: bytes) -> None:
        """Send responses, together; waits while the client does not read.

        Raises:
            ClientGone: nobody is there to get it.
        """
        await self.context.write(*responses)


class Streams:
    """The streams of one node that are under way."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._lasting: set[Interrupt] = set()
        self._with_leader: set[Interrupt] = set()
        self._missed = 0  # looks in a row that found no leader
        self._polling = False
        self._stopping = False

    @contextlib.contextmanager
    def open(self, context: Context, *, lasting: bool) -> Iterator[Interrupt]:
        """A stream begins; it is watched over until this is left.

        Args:
            lasting: it has no end of its own, so a node that stops does not wait for it.
        Raises:
            NoLeader: the caller wants one, and there has been none for a while.
            Stopping: no streams begin any more.
        """
        if self._stopping:
            raise Stopping
        led = wants_leader(context)
        if led and not self._node.leader and self._missed >= LOOKS_WITHOUT_LEADER_MAX:
            raise NoLeader
        interrupt = Interrupt()
        if lasting:
            self._lasting.add(interrupt)
        if led:
            self._with_leader.add(interrupt)
            self._poll()
        try:
            yield interrupt
        finally:
            self._lasting.discard(interrupt)
            self._with_leader.discard(interrupt)

    def end(self) -> None:
        """The node stops: end all that have no end of their own, and let none begin."""
        self._stopping = True
        for interrupt in self._lasting:
            interrupt.set(Stopping())

    def _poll(self) -> None:
        # One timer for all of them, and none while nobody asked: a thousand watchers may want a leader.
        if not self._polling:
            self._polling = True
            self._loop.call_later(max(self._node.config.election_ms / 1000, LOOK_EVERY_S_MIN), self._look)

    def _look(self) -> None:
        self._polling = False
        self._missed = 0 if self._node.leader else self._missed + 1
        if self._missed >= LOOKS_WITHOUT_LEADER_MAX:
            for interrupt in self._with_leader:
                interrupt.set(NoLeader())
        if self._with_leader or (self._missed and not self._stopping):
            self._poll()
