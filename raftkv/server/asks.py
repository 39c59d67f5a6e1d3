"""Questions about leases on their way from the node that was asked to the leader, which alone knows how long they have.

All questions that come while one message is under way share the next, so neither messages nor rounds grow with the
number of keepalives. A leader that is lost before it answered is asked no more: its successor is, about everything.

    waiting --leader known, nothing under way--> asked --answer--> told
       ^                                           |
       +------leader or stream lost, time-out------+
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raftkv.raft.types import NodeId
from raftkv.server.lessor import LeaseLeft

ASK_LEASES_MAX = 1_000
"""In one message: renewing so many takes the leader some milliseconds."""
CONTEXT_BITS = 63


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """To the leader of `term`: renew some leases, tell about others."""

    term: int
    context: int  # never used before, in no life of the sender
    renew: tuple[int, ...]
    look: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """About some leases of an ask, or all; the rest may come later."""

    term: int
    context: int
    leases: tuple[LeaseLeft, ...]


class _Question:
    __slots__ = ("renew", "tickets")

    def __init__(self) -> None:
        self.renew = False
        self.tickets: list[object] = []


class LeaseAsks:
    """Bookkeeping of the node that was asked; see the module."""

    def __init__(self, first_context: int, retry_ticks: int, gone: Callable[[object], bool]) -> None:
        """
        Args:
            first_context: far from what any other life of this node has used.
            gone: whether nobody waits for a ticket any more.
        """
        self._context = first_context
        self._retry_ticks = retry_ticks
        self._gone = gone
        self._waiting: dict[int, _Question] = {}
        self._asked: dict[int, _Question] = {}
        self._asked_to: tuple[NodeId, int] = (0, 0)  # leader and term
        self._asked_tick = 0

    def __len__(self) -> int:
        """How many tickets are kept."""
        return sum(len(question.tickets) for each in (self._waiting, self._asked) for question in each.values())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to ask, and nothing asked."""
        return not (self._waiting or self._asked)

    def add(self, lease: int, ticket: object, *, renew: bool) -> None:
        """Somebody asks."""
        question = self._waiting.get(lease)
        if question is None:
            question = self._waiting[lease] = _Question()
        question.renew |= renew  # who only looks then sees it renewed
        question.tickets.append(ticket)

    def take(self, leader: NodeId, term: int, tick: int) -> LeaseAsk | None:
        """What is to be asked of the leader now."""
        if self._asked and (self._asked_to != (leader, term) or tick - self._asked_tick > self._retry_ticks):
            self.ask_again()
        if self._asked or not self._waiting or not leader:
            return None
        renew: list[int] = []
        look: list[int] = []
        for lease in list(self._waiting)[:ASK_LEASES_MAX]:
            question = self._waiting.pop(lease)
            if self._is_wanted(question):
                self._asked[lease] = question
                (renew if question.renew else look).append(lease)
        if not self._asked:
            return None
        self._context = (self._context + 1) % (1 << CONTEXT_BITS)
        self._asked_to = (leader, term)
        self._asked_tick = tick
        return LeaseAsk(term, self._context, tuple(renew), tuple(look))

    def ask_again(self) -> None:
        """What is under way may be lost."""
        for lease, question in self._asked.items():
            waiting = self._waiting.get(lease)
            if waiting is None:
                self._waiting[lease] = question
            else:
                waiting.renew |= question.renew
                waiting.tickets[:0] = question.tickets
        self._asked.clear()

    def forget_gone(self) -> None:
        """Free what callers that have gone left: without a leader that answers, nothing else ever looks at it."""
        for questions in (self._waiting, self._asked):
            for lease in [lease for lease, question in questions.items() if not self._is_wanted(question)]:
                del questions[lease]

    def _is_wanted(self, question: _Question) -> bool:
        question.tickets = [ticket for ticket in question.tickets if not self._gone(ticket)]
        return bool(question.tickets)

    def answered(self, answer: LeaseAnswer) -> list[tuple[object, LeaseLeft]]:
        """The tickets that an answer is for."""
        if answer.context != self._context:
            return []
        told: list[tuple[object, LeaseLeft]] = []
        for left in answer.leases:
            question = self._asked.pop(left.lease, None)
            if question is not None:
                told.extend([(ticket, left) for ticket in question.tickets])
        return told
