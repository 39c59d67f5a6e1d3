"""What the two sides of a connection allow each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the other side of a connection may ask of this one."""

    message_bytes_max: int = 64 << 20
    call_window_bytes: int = 16 << 20
    """How much may be under way in a call before the receiver has looked at it."""
    window_bytes: int = 16 << 20
    """The same in all calls of a connection."""
    frame_bytes: int = 1 << 20
    calls_max: int = 16
    """Of one connection. A node needs one for its messages and one for a snapshot."""
    keepalive_s: float = 1.0
    """After so long without a sign of life it is asked whether it is there,"""
    answer_s: float = 1.0
    """and has so long to answer."""
    ping_every_s_min: float = 0.0
    """Who asks more often while he is sent nothing is told `too_many_pings` and sent away, as by any gRPC server."""
    gathers: bool = False
    """Whether what is sent in one round of the loop leaves as one write in the next, or each at once."""
    answers_first: bool = False
    """Whether nothing is read from it while it does not read what it is sent."""


BETWEEN_NODES: Final = Limits()
