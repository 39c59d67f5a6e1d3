"""The clock by which leases are held: it goes on while the machine sleeps.

The server's clock may stand still in a suspend, ours must not: whoever was suspended must take its lease for lost
rather too early than too late (reliability: only the rates of the clocks enter, never their agreement).
"""

from __future__ import annotations

import time
from typing import Final

CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
RATE_ERROR: Final = 0.01  # how much faster than ours the server's clock may go
GUARD_MIN_S: Final = 0.2
GUARD_SHARE: Final = 0.05


def now() -> float:
    """Seconds since some moment, sleep included where the system can tell."""
    return time.clock_gettime(CLOCK)


def lease_deadline(sent: float, ttl_s: float) -> float:
    """Until when a lease is certainly alive at the server whose renewal was *sent* at `sent` and acknowledged."""
    return sent + ttl_s * (1 - RATE_ERROR) - max(GUARD_MIN_S, GUARD_SHARE * ttl_s)
