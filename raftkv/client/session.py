"""Sessions as the client keeps them: which number each mutation has, and which the server may forget.

A mutation keeps its (session, number) through every repetition, so that the cluster does it once and gives the same
answer again. Pure: no I/O, no clock.

Invariants: every number under way is in [first_incomplete, first_incomplete + WINDOW), because so many answers, and no
more, the cluster keeps for a session; first_incomplete is the lowest of them, or next_seq where there is none.
See: Ongaro 6.3; reliability 5.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from raftkv._pb import session_pb2, state_pb2
from raftkv.client.methods import COMPACT, DELETE_RANGE, LEASE_GRANT, LEASE_REVOKE, PUT, TXN, Method

METHODS: Final[dict[Method[Any, Any], session_pb2.SessionMethod.ValueType]] = {
    PUT: session_pb2.SESSION_METHOD_PUT,
    DELETE_RANGE: session_pb2.SESSION_METHOD_DELETE_RANGE,
    TXN: session_pb2.SESSION_METHOD_TXN,
    COMPACT: session_pb2.SESSION_METHOD_COMPACT,
    LEASE_GRANT: session_pb2.SESSION_METHOD_LEASE_GRANT,
    LEASE_REVOKE: session_pb2.SESSION_METHOD_LEASE_REVOKE,
}
"""The mutations that can be made within a session."""
WINDOW: Final = 64
TTL_MS: Final = 10 * 60 * 1000
"""A client that was idle for longer begins a new session with its next mutation."""
SESSIONS_MAX: Final = 8  # each lets WINDOW mutations be under way
OPEN_TIMEOUT_MS: Final = 5_000


class ServerSession:
    """One session in the replicated state, as its client sees it."""

    __slots__ = ("_incomplete", "expired", "first_incomplete", "id", "next_seq")

    def __init__(self, id: int) -> None:
        self.id: Final = id
        self.next_seq = 1
        self.first_incomplete = 1
        """The cluster may forget the answers to everything below."""
        self.expired = False
        self._incomplete: set[int] = set()

    @property
    def under_way(self) -> int:
        """How many mutations have a number and no answer."""
        return len(self._incomplete)

    def has_room(self) -> bool:
        """Whether another mutation can be numbered now."""
        return not self.expired and self.next_seq < self.first_incomplete + WINDOW

    def take(self) -> int:
        """The number of the next mutation."""
        seq = self.next_seq
        assert seq < self.first_incomplete + WINDOW, "more mutations under way than the cluster keeps answers"
        self.next_seq = seq + 1
        self._incomplete.add(seq)
        return seq

    def complete(self, seq: int) -> None:
        """Its answer is here, or nobody waits for it any more."""
        incomplete = self._incomplete
        incomplete.discard(seq)
        if seq == self.first_incomplete:
            while seq < self.next_seq and seq not in incomplete:
                seq += 1
            self.first_incomplete = seq


class Sessions:
    """Those of one client: one more is opened whenever all others are full."""

    def __init__(self) -> None:
        self._open: list[ServerSession] = []
        self.opening: set[int] = set()  # ids of the requests that open one

    def __iter__(self) -> Iterator[ServerSession]:
        return iter(self._open)

    def with_room(self) -> ServerSession | None:
        """The first in which another mutation can be numbered."""
        for session in self._open:
            if session.has_room():
                return session
        return None

    def request(self, id: int) -> session_pb2.SessionRequest | None:
        """The request `id`, which opens one more; None while one is being opened, or there are enough."""
        if self.opening or len(self._open) >= SESSIONS_MAX:
            return None
        self.opening.add(id)
        payload = state_pb2.SessionOpen(ttl_ms=TTL_MS).SerializeToString()
        return session_pb2.SessionRequest(
            id=id, method=session_pb2.SESSION_METHOD_OPEN, payload=payload, timeout_ms=OPEN_TIMEOUT_MS
        )

    def opened(self, id: int, payload: bytes) -> None:
        """The request `id` was answered."""
        self.opening.discard(id)
        self._open.append(ServerSession(state_pb2.SessionOpened.FromString(payload).session))

    def expired(self, session: ServerSession) -> None:
        """The cluster does not know it any more."""
        session.expired = True
        if session in self._open:
            self._open.remove(session)

    def last_request(self, id: int) -> session_pb2.SessionRequest | None:
        """The request `id`, which ends those with nothing under way; None when there is none."""
        ids = [session.id for session in self._open if not session.under_way]
        if not ids:
            return None
        payload = state_pb2.SessionExpire(sessions=ids).SerializeToString()
        return session_pb2.SessionRequest(id=id, method=session_pb2.SESSION_METHOD_CLOSE, payload=payload)
