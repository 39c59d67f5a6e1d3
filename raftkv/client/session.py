"""Sessions as the client keeps them: which number each mutation has, and which the server may forget.

A mutation keeps its (session, number) through every repetition, so that the cluster does it once and gives the same
answer again. Pure: no I/O, no clock.

Invariant: every number under way is in [first_incomplete, first_incomplete + WINDOW), because so many answers, and no
more, the cluster keeps for a session.    See: Ongaro 6.3; reliability 5.5.
"""

from __future__ import annotations

from typing import Final

WINDOW: Final = 64
TTL_MS: Final = 10 * 60 * 1000
"""A client that was idle for longer begins a new session with its next mutation."""


class ServerSession:
    """One session in the replicated state, as its client sees it."""

    __slots__ = ("_incomplete", "expired", "id", "next_seq")

    def __init__(self, id: int) -> None:
        self.id: Final = id
        self.next_seq = 1
        self.expired = False
        self._incomplete: dict[int, None] = {}  # in rising order

    @property
    def first_incomplete(self) -> int:
        """The cluster may forget the answers to everything below."""
        return next(iter(self._incomplete), self.next_seq)

    @property
    def under_way(self) -> int:
        """How many mutations have a number and no answer."""
        return len(self._incomplete)

    def has_room(self) -> bool:
        """Whether another mutation can be numbered now."""
        return not self.expired and self.next_seq < self.first_incomplete + WINDOW

    def take(self) -> int:
        """The number of the next mutation."""
        assert self.has_room(), "more mutations under way than the cluster keeps answers"
        seq = self.next_seq
        self.next_seq += 1
        self._incomplete[seq] = None
        return seq

    def complete(self, seq: int) -> None:
        """Its answer is here, or nobody waits for it any more."""
        self._incomplete.pop(seq, None)
