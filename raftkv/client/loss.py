"""`lost` as threads see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from raftkv.client.contender import LockState
from raftkv.client.lease import Lease

LOOK_S: Final = 0.01  # the least between two looks at the clock


class LossEvent(threading.Event):
    """Set when something is lost; also where only the clock can tell.

    raftkv's own thread sets it, and that may be held up (by a callback, by a process without processor time) past the
    deadline, while the thread that holds the lock goes on. So whoever asks, or waits, reads the clock as well.
    """

    def __init__(self, is_lost: Callable[[], bool], remaining: Callable[[], float]) -> None:
        """
        Args:
            is_lost: whether it is, by the clock.
            remaining: seconds until it will be, unless it is renewed; 0.0 where it cannot be any more.
        """
        super().__init__()
        self._is_lost = is_lost
        self._remaining = remaining

    def is_set(self) -> bool:
        """Whether it is lost."""
        if not super().is_set() and self._is_lost():
            self.set()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is lost, `timeout` seconds at most. Whether it is."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left_s = None if until is None else until - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            remaining_s = self._remaining()
            limits = [left_s] if left_s is not None else []
            if remaining_s > 0:
                limits.append(max(LOOK_S, remaining_s))
            super().wait(min(limits, default=None))
        return True


class Held(Protocol):
    """One acquisition, of a lock or of what recipes hold."""

    @property
    def lease(self) -> Lease:
        """What it lives by."""

    @property
    def state(self) -> LockState:
        """How it stands now."""


def loss_of(held: Held) -> LossEvent:
    """What tells threads of its loss. Giving it back is none."""

    def remaining() -> float:
        return held.lease.remaining() if held.state in (LockState.HELD, LockState.AT_RISK) else 0.0

    return LossEvent(lambda: held.state is LockState.LOST, remaining)
