"""A circuit breaker: after so many failures in a row an endpoint is left alone for a while.

    CLOSED --failures_max in a row--> OPEN --reset_s passed, or connection_ready()--> HALF_OPEN
    HALF_OPEN --a trial failed--> OPEN            HALF_OPEN --trials_max successes--> CLOSED

It must never delay a recovery: a connection that was made anew is better evidence than any clock, so it half-opens at
once. Verdicts of calls that were sent over an older connection (another `epoch`) say nothing about the new one.

Pure but for the clock handed in. Invariant: 0 <= trials in flight <= trials_max.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from raftkv.client.errors import ConfigError


class BreakerState(enum.Enum):
    """What the breaker of one endpoint lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When an endpoint is left alone, and when it gets another chance."""

    failures_max: int = 5
    """Failures in a row that open it. Fewer would let one lost packet burst close off a healthy node."""
    reset_s: float = 30.0
    """How long it stays open unless the connection is made anew before that."""
    trials_max: int = 3
    """Calls let through while half-open, and successes needed to close."""

    def __post_init__(self) -> None:
        if self.failures_max < 1:
            raise ConfigError("breaker.failures_max", f"{self.failures_max} must be at least 1")
        if self.reset_s < 0:
            raise ConfigError("breaker.reset_s", f"{self.reset_s} must not be negative")
        if self.trials_max < 1:
            raise ConfigError("breaker.trials_max", f"{self.trials_max} must be at least 1")


class Breaker:
    """The breaker of one endpoint."""

    __slots__ = (
        "_clock",
        "_config",
        "_failures",
        "_on_change",
        "_opened_at",
        "_successes",
        "_trials",
        "epoch",
        "state",
    )

    def __init__(
        self, config: BreakerConfig, clock: Callable[[], float], on_change: Callable[[BreakerState], None]
    ) -> None:
        self.state = BreakerState.CLOSED
        self.epoch = 0
        self._config = config
        self._clock = clock
        self._on_change = on_change
        self._failures = 0  # in a row, while CLOSED
        self._trials = 0  # in flight, while HALF_OPEN
        self._successes = 0  # of trials, while HALF_OPEN
        self._opened_at = 0.0

    def would_admit(self) -> bool:
        """Whether `admit` would say yes now."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN:
            return self._clock() - self._opened_at >= self._config.reset_s
        return self._trials < self._config.trials_max

    def admit(self) -> bool:
        """Ask to send one call. After a yes exactly one of `succeeded`, `failed`, `released` must follow."""
        if self.state is BreakerState.CLOSED:
            return True
        if not self.would_admit():
            return False
        if self.state is BreakerState.OPEN:
            self._change(BreakerState.HALF_OPEN)
        self._trials += 1
        return True

    def succeeded(self, epoch: int) -> None:
        """A call sent in `epoch` was answered."""
        if epoch != self.epoch:
            return
        if self.state is BreakerState.HALF_OPEN:
            self._trials = max(0, self._trials - 1)
            self._successes += 1
            if self._successes >= self._config.trials_max:
                self._change(BreakerState.CLOSED)
        self._failures = 0

    def failed(self, epoch: int) -> None:
        """A call sent in `epoch` got no answer."""
        if epoch != self.epoch:
            return
        if self.state is BreakerState.HALF_OPEN:
            self._open()
        elif self.state is BreakerState.CLOSED:
            self._failures += 1
            if self._failures >= self._config.failures_max:
                self._open()

    def released(self, epoch: int) -> None:
        """A call sent in `epoch` ended without a verdict: its caller went away."""
        if epoch == self.epoch and self.state is BreakerState.HALF_OPEN:
            self._trials = max(0, self._trials - 1)

    def connection_ready(self) -> None:
        """The connection was made anew (or answered a probe): half-open at once, forget the calls of the old one."""
        self.epoch += 1
        self._failures = 0
        if self.state is not BreakerState.CLOSED:
            self._change(BreakerState.HALF_OPEN)

    def _open(self) -> None:
        self._opened_at = self._clock()
        self._change(BreakerState.OPEN)

    def _change(self, state: BreakerState) -> None:
        self._trials = 0
        self._successes = 0
        self._failures = 0
        if state is not self.state:
            self.state = state
            self._on_change(state)
