"""How a call is made: its time limits, where it goes, how consistent it reads."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from raftkv.client.errors import ConfigError

Consistency: TypeAlias = Literal["linearizable", "serializable"]
Routing: TypeAlias = Literal["auto", "leader", "any"]

CONSISTENCIES: Final[tuple[Consistency, ...]] = ("linearizable", "serializable")
ROUTINGS: Final[tuple[Routing, ...]] = ("auto", "leader", "any")


class Default(enum.Enum):
    """The type of `DEFAULT`, so that None can keep its own meaning (wait for ever)."""

    DEFAULT = "the client's default"


DEFAULT: Final = Default.DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """Time limits, in seconds. None is without limit.

    A call may give a plain number instead: that is `total`, the rest as in the client's default.
    """

    total: float | None = 5.0
    """A whole call with all its attempts and waits."""
    attempt: float | None = 0.5
    """One attempt of a read while another endpoint is ready: a frozen node is left behind after that. Doubles with
    each attempt, so that a read which takes long by nature still gets done. A write has one attempt: all of `total`."""
    connect: float | None = None
    """Waiting until any endpoint is connected, within `total`."""

    def __post_init__(self) -> None:
        for name in ("total", "attempt", "connect"):
            value = getattr(self, name)
            if value is not None:
                check_seconds(f"timeout.{name}", value)


TimeoutArg: TypeAlias = float | Timeout | Default | None


def check_seconds(field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number of seconds above zero."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ConfigError(field, f"{value!r} is not a number of seconds above 0")


def timeout_from(value: TimeoutArg, default: Timeout, field: str = "timeout") -> Timeout:
    """The time limits of one call."""
    if value is DEFAULT:
        return default
    if isinstance(value, Timeout):
        return value
    if value is not None:
        check_seconds(field, value)
        if value == default.total:
            return default
    return Timeout(total=value, attempt=default.attempt, connect=default.connect)
