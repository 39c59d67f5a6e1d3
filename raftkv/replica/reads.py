"""Linearizable reads that wait for a read index (Ongaro 6.4).

All reads that arrive while one round is under way share the next round, so the number of rounds does not
grow with the number of readers. A read is served once this node has applied the index of a round which
*began* after the read had arrived.

    waiting --round begins--> asked --index known--> confirmed --applied--> served
       ^                        |
       +--leader lost, timeout--+
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class WaitingRead:
    """One read that a caller waits for; the caller's side keeps it only to hand it to `abandon`."""

    ticket: object
    abandoned: bool = False


class Reads:
    """Bookkeeping of one node's waiting reads."""

    def __init__(self, retry_ticks: int) -> None:
        self._retry_ticks = retry_ticks
        self._waiting: list[WaitingRead] = []
        self._asked: dict[int, list[WaitingRead]] = {}  # by context; at most one unless one is retried
        self._asked_tick = 0
        self._confirmed: deque[tuple[int, list[WaitingRead]]] = deque()  # by index, which rises
        self._next_context = 1

    def __len__(self) -> int:
        """How many wait, or have been abandoned and not been forgotten yet."""
        return (
            len(self._waiting) + sum(map(len, self._asked.values())) + sum(len(reads) for _, reads in self._confirmed)
        )

    def add(self, ticket: object) -> WaitingRead:
        """A caller wants to read what is committed by now."""
        read = WaitingRead(ticket)
        self._waiting.append(read)
        return read

    def ask(self, tick: int, read_index: Callable[[int], None]) -> None:
        """Begin a round for everything that waits, if none is under way."""
        if self._asked and tick - self._asked_tick > self._retry_ticks:
            self.ask_again()
        if self._waiting and not self._asked:
            context = self._next_context
            self._next_context += 1
            self._asked[context] = self._waiting
            self._waiting = []
            self._asked_tick = tick
            read_index(context)

    def ask_again(self) -> None:
        """The round under way may be lost; its reads wait for the next one. A late answer is ignored."""
        for reads in self._asked.values():
            reads += self._waiting
            self._waiting = reads
        self._asked.clear()

    def dropped(self, context: int) -> None:
        """Consensus has given up one round."""
        if context in self._asked:
            self.ask_again()

    def confirmed(self, context: int, index: int) -> None:
        """The round `context` found the read index `index`."""
        reads = self._asked.pop(context, None)
        if reads is not None:
            self._confirmed.append((index, reads))

    def are_served(self, applied: int) -> bool:
        """Whether some have had their index applied."""
        return bool(self._confirmed) and self._confirmed[0][0] <= applied

    def served(self, applied: int, out: list[object]) -> None:
        """Move to `out` the tickets of the reads whose index has been applied."""
        while self._confirmed and self._confirmed[0][0] <= applied:
            out.extend(read.ticket for read in self._confirmed.popleft()[1] if not read.abandoned)

    def forget_abandoned(self) -> None:
        """Free what callers that have gone left: without a leader, or a quorum, nothing else ever looks at it."""
        every: Iterable[list[WaitingRead]] = (
            self._waiting,
            *self._asked.values(),
            *(each for _, each in self._confirmed),
        )
        for reads in every:
            reads[:] = [read for read in reads if not read.abandoned]

    @property
    def idle(self) -> bool:
        """Whether no read waits at all."""
        return not (self._waiting or self._asked or self._confirmed)
