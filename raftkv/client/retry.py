"""Whether, when and where a failed request is tried again: decisions only, no I/O, no clock, no chance of its own.

Rules, in this order:
1. What can never succeed is raised.
2. A write whose outcome is unknown is never repeated (etcd #14890, #18424: such repeats lost updates). Those of a
   session are, but do not come here: see `pipeline`.
3. A fault of the *endpoint* moves the request to another one at once; each is tried once that way.
4. Everything else waits: bounded exponential, full jitter, and never less than the server asked for.
5. One deadline spans all of it: nothing starts that cannot end in time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from raftkv.client.errors import ConfigError
from raftkv.client.faults import Fault, FaultKind

OTHER_ATTEMPTS_MAX = 3  # an error nobody understands is not tried for ever: each node gets a chance, no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How long to wait between attempts. The call's time limit ends them in any case."""

    backoff_initial_s: float = 0.025
    """Upper bound of the first wait: etcd's Go client waits 25 ms too."""
    backoff_max_s: float = 1.0
    """Upper bound of every wait, so that a recovered cluster is found within a second."""
    backoff_factor: float = 2.0
    """Growth of the upper bound."""
    attempts_max: int | None = None
    """Attempts at most; None leaves it to the time limit."""

    def __post_init__(self) -> None:
        if not 0 < self.backoff_initial_s <= self.backoff_max_s:
            raise ConfigError("retry.backoff_initial_s", f"{self.backoff_initial_s} is not in (0, backoff_max_s]")
        if not 1 <= self.backoff_factor <= 100:
            raise ConfigError("retry.backoff_factor", f"{self.backoff_factor} is not in [1, 100]")
        if self.attempts_max is not None and self.attempts_max < 1:
            raise ConfigError("retry.attempts_max", f"{self.attempts_max} must be at least 1")


class Action(enum.Enum):
    """What to do about a failed attempt."""

    AGAIN = enum.auto()
    RAISE = enum.auto()  # it was not done and is not tried (any more)
    TIME_IS_UP = enum.auto()  # it was not done, and no further attempt fits into the time
    UNKNOWN = enum.auto()  # it was perhaps done


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one failed attempt."""

    action: Action
    delay_s: float = 0.0
    """Wait before AGAIN; 0 <= delay_s < what remained."""


_RAISE = Decision(Action.RAISE)
_UNKNOWN = Decision(Action.UNKNOWN)
_TIME_IS_UP = Decision(Action.TIME_IS_UP)


def decide(
    fault: Fault,
    *,
    mutation: bool,
    attempts: int,
    waits: int,
    elsewhere: bool,
    remaining_s: float | None,
    policy: Retry | None,
    uniform: Callable[[], float],
) -> Decision:
    """Decide about one failed attempt.

    Args:
        fault: what happened.
        mutation: whether the request changes anything.
        attempts: attempts made, this one included (>= 1).
        waits: how often this request has already waited; sets the size of the next wait.
        elsewhere: another endpoint is ready that this request has not tried yet.
        remaining_s: what is left of the call's time; None is without limit.
        policy: None tries everything just once.
        uniform: draws from [0, 1).
    """
    if mutation and not fault.not_executed:
        return _UNKNOWN
    if fault.kind.is_final or policy is None:
        return _RAISE
    if remaining_s is not None and remaining_s <= 0:
        return _TIME_IS_UP
    if policy.attempts_max is not None and attempts >= policy.attempts_max:
        return _RAISE
    if fault.kind is FaultKind.OTHER and attempts >= OTHER_ATTEMPTS_MAX:
        return _RAISE
    if elsewhere and fault.kind.moves_on:
        return Decision(Action.AGAIN, 0.0)
    delay_s = max(backoff_s(policy, waits, uniform()), fault.retry_after_s)
    if remaining_s is not None and delay_s >= remaining_s:
        return _TIME_IS_UP
    return Decision(Action.AGAIN, delay_s)


def backoff_s(policy: Retry, waits: int, chance: float) -> float:
    """Full jitter: a wait drawn from [0, bound), the bound growing from `backoff_initial_s` to `backoff_max_s`."""
    # The exponent is capped because the bound is: 2.0 ** 5000 would be an OverflowError after a long outage.
    bound = min(policy.backoff_max_s, policy.backoff_initial_s * policy.backoff_factor ** min(waits, 64))
    return bound * chance


def attempt_timeout_s(
    attempts: int, *, attempt_s: float | None, remaining_s: float | None, elsewhere: bool
) -> float | None:
    """How long the next attempt of a read may take before the request moves on to another endpoint.

    It doubles with every attempt, so that a read which simply takes long is not chased round the cluster for ever, and
    it does not apply where there is nowhere else to go.

    Args:
        attempts: attempts made before this one.
        attempt_s: `Timeout.attempt`.
        remaining_s: what is left of the call's time; None is without limit.
        elsewhere: another endpoint is ready.
    """
    if attempt_s is None or not elsewhere:
        return remaining_s
    bound = attempt_s * 2.0 ** min(attempts, 32)
    return bound if remaining_s is None else min(bound, remaining_s)
