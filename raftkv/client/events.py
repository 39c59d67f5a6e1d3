"""What a client tells the hooks of its user: one frozen class an event."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from raftkv.client.endpoints import nearest
from raftkv.client.errors import ConfigError

if TYPE_CHECKING:
    from raftkv.client.breaker import BreakerState
    from raftkv.client.pool import ConnectionState

LOG: Final = logging.getLogger("raftkv")


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """Event `attempt_failed`: one attempt of a call failed."""

    method: str
    endpoint: str
    code: str
    text: str
    attempt: int
    delay_s: float | None
    """Wait before the next attempt; None when there is none."""


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """Event `breaker`: the circuit breaker of an endpoint changed its state."""

    endpoint: str
    state: BreakerState


@dataclass(frozen=True, slots=True)
class LeaderSeen:
    """Event `leader`: a new leader became known."""

    member_id: int
    term: int
    endpoint: str | None
    """None when the leader is not among the client's endpoints."""


@dataclass(frozen=True, slots=True)
class ConnectionChanged:
    """Event `connection`: the state of the client as a whole changed."""

    state: ConnectionState


EVENTS: Final = ("attempt_failed", "breaker", "leader", "connection")

Hook = Callable[[Any], object]


class Hooks:
    """The user's callbacks by event name. They run in the event loop and must not block; what they raise is logged."""

    __slots__ = ("_by_event",)

    def __init__(self, hooks: Mapping[str, Hook | Sequence[Hook]] | None) -> None:
        self._by_event: dict[str, tuple[Hook, ...]] = {}
        for event, given in (hooks or {}).items():
            if event not in EVENTS:
                raise ConfigError("event_hooks", f"unknown event {event!r}{nearest(event, EVENTS)}")
            callbacks = tuple(given) if isinstance(given, Sequence) else (given,)
            for callback in callbacks:
                if not callable(callback):
                    raise ConfigError("event_hooks", f"{event}: {callback!r} cannot be called")
            self._by_event[event] = callbacks

    def fire(self, event: str, what: object) -> None:
        """Call the callbacks of `event`."""
        for callback in self._by_event.get(event, ()):
            try:
                callback(what)
            except Exception:
                LOG.exception("raftkv client: the hook for %r failed", event)
