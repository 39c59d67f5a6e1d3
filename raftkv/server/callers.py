"""Those who wait for this node, each with a future or as a `Waiter` of its own kind, and until when they wait.

submit, read, wait --answered, or time over--> the waiter is told, and forgotten here
                   --abandon--> forgotten, by the replica too; a command not sent yet is dropped before the log
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from raftkv.raft.types import NodeId
from raftkv.replica.effects import Answers
from raftkv.replica.proposals import Pending
from raftkv.replica.reads import WaitingRead
from raftkv.replica.replica import Replica
from raftkv.server.errors import OutcomeHidden, RequestTimeout, TimeoutKind
from raftkv.state.commands import CommandKind
from raftkv.state.results import Result


class Waiter(Protocol):
    """Who waits for one thing; a future is one. Others are told in the turn in which it comes, and must not wait then:
    with many under way the loop's way to who awaits a future costs as much as all else."""

    def done(self) -> bool:
        """Whether it does not want to be told any more."""
        ...

    def set_result(self, result: Any, /) -> None:
        """It is there."""
        ...

    def set_exception(self, fault: Exception, /) -> None:
        """It will not come."""
        ...

    def cancel(self) -> object:
        """It was abandoned."""
        ...


class Callers:
    """See the module. All of it belongs to the node's loop."""

    def __init__(self, replica: Replica, leader: Callable[[], NodeId], request_timeout_s: float) -> None:
        self._replica = replica
        self._leader = leader
        self._timeout_s = request_timeout_s
        self._loop = asyncio.get_running_loop()
        # Until when, and for what; None: not for the replica.
        self._waiting: dict[Waiter, tuple[float, Pending | WaitingRead | None]] = {}

    @property
    def idle(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def submit(
        self, kind: CommandKind, payload: bytes, deadline: float | None, *, leading: bool = False
    ) -> asyncio.Future[Result]:
        """Wait for a command to be committed and applied; `leading` as in `Replica.propose`."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self.submit_for(future, kind, payload, deadline, leading=leading)
        return future

    def submit_for(
        self, waiter: Waiter, kind: CommandKind, payload: bytes, deadline: float | None, *, leading: bool = False
    ) -> None:
        """As `submit`, for somebody's own waiter."""
        self._waiting[waiter] = (self.limit(deadline), self._replica.propose(kind, payload, waiter, leading=leading))

    def read(self, deadline: float | None) -> asyncio.Future[object]:
        """Wait for a read index to be found and applied."""
        future: asyncio.Future[object] = self._loop.create_future()
        self._waiting[future] = (self.limit(deadline), self._replica.read(future))
        return future

    def wait(self, deadline: float | None) -> asyncio.Future[object]:
        """Wait for something that somebody else will give."""
        future: asyncio.Future[object] = self._loop.create_future()
        self._waiting[future] = (self.limit(deadline), None)
        return future

    def give(self, waiter: Any, result: object) -> None:
        """What a waiter was waiting for is there."""
        self._waiting.pop(waiter, None)
        if not waiter.done():
            waiter.set_result(result)

    def abandon(self, waiter: Waiter) -> None:
        """It does not wait any more."""
        _, pending = self._waiting.pop(waiter, (0.0, None))
        if pending is not None:
            self._replica.abandon(pending)
        waiter.cancel()

    def answer(self, answers: Answers) -> None:
        """The replica has answers."""
        give = self.give
        for ticket, result in answers.results:
            give(ticket, result)
        for ticket in answers.reads:
            give(ticket, None)
        for ticket in answers.unknown:
            waiter: Any = ticket
            self._waiting.pop(waiter, None)
            if not waiter.done():
                waiter.set_exception(OutcomeHidden())

    def expire(self) -> None:
        """End the waiting of those whose time is over."""
        now = self._loop.time()
        over = [(waiter, pending) for waiter, (limit, pending) in self._waiting.items() if limit <= now]
        for waiter, pending in over:
            if self._waiting.pop(waiter, None) is None:
                continue  # abandoned by one that was told just now
            unsent = not isinstance(pending, Pending) or pending.term == 0
            if pending is not None:
                self._replica.abandon(pending)
            kind = TimeoutKind.LEADER_FAILURE if self._leader() == 0 else TimeoutKind.GENERAL
            if not waiter.done():
                waiter.set_exception(RequestTimeout(kind, executed="no" if unsent else "unknown"))

    def limit(self, deadline: float | None) -> float:
        """Until when at most somebody with this deadline waits."""
        limit = self._loop.time() + self._timeout_s
        return limit if deadline is None else min(deadline, limit)
