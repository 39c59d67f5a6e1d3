"""Those who wait for this node: a future each, and until when they wait.

submit, read, wait --answered, or time over--> the future is done, and forgotten here
                   --abandon--> forgotten, by the replica too; a command not sent yet is dropped before the log
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raftkv.raft.types import NodeId
from raftkv.replica.effects import Answers
from raftkv.replica.proposals import Pending
from raftkv.replica.reads import WaitingRead
from raftkv.replica.replica import Replica
from raftkv.server.errors import OutcomeHidden, RequestTimeout, TimeoutKind
from raftkv.state.commands import CommandKind
from raftkv.state.results import Result


class Callers:
    """See the module. All of it belongs to the node's loop."""

    def __init__(self, replica: Replica, leader: Callable[[], NodeId], request_timeout_s: float) -> None:
        self._replica = replica
        self._leader = leader
        self._timeout_s = request_timeout_s
        self._loop = asyncio.get_running_loop()
        # Until when, and for what; None: not for the replica.
        self._waiting: dict[asyncio.Future[object], tuple[float, Pending | WaitingRead | None]] = {}

    @property
    def idle(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def submit(
        self, kind: CommandKind, payload: bytes, deadline: float | None, *, leading: bool = False
    ) -> asyncio.Future[Result]:
        """Wait for a command to be committed and applied; `leading` as in `Replica.propose`."""
        future: asyncio.Future[object] = self._loop.create_future()
        self._waiting[future] = (self.limit(deadline), self._replica.propose(kind, payload, future, leading=leading))
        return future  # type: ignore[return-value]  # a Future is not covariant

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

    def give(self, future: object, result: object) -> None:
        """What a future was waiting for is there."""
        assert isinstance(future, asyncio.Future), "a ticket that is not ours"
        self._waiting.pop(future, None)
        if not future.done():
            future.set_result(result)

    def abandon(self, future: asyncio.Future[Result] | asyncio.Future[object]) -> None:
        """Nobody waits for it any more."""
        _, pending = self._waiting.pop(future, (0.0, None))  # type: ignore[arg-type]
        if pending is not None:
            self._replica.abandon(pending)
        future.cancel()

    def answer(self, answers: Answers) -> None:
        """The replica has answers."""
        give = self.give
        for ticket, result in answers.results:
            give(ticket, result)
        for ticket in answers.reads:
            give(ticket, None)
        for ticket in answers.unknown:
            assert isinstance(ticket, asyncio.Future), "a ticket that is not ours"
            self._waiting.pop(ticket, None)
            if not ticket.done():
                ticket.set_exception(OutcomeHidden())

    def expire(self) -> None:
        """End the waiting of those whose time is over."""
        now = self._loop.time()
        over = [(future, pending) for future, (limit, pending) in self._waiting.items() if limit <= now]
        for future, pending in over:
            del self._waiting[future]
            unsent = not isinstance(pending, Pending) or pending.term == 0
            if pending is not None:
                self._replica.abandon(pending)
            kind = TimeoutKind.LEADER_FAILURE if self._leader() == 0 else TimeoutKind.GENERAL
            if not future.done():
                future.set_exception(RequestTimeout(kind, executed="no" if unsent else "unknown"))

    def limit(self, deadline: float | None) -> float:
        """Until when at most somebody with this deadline waits."""
        limit = self._loop.time() + self._timeout_s
        return limit if deadline is None else min(deadline, limit)
