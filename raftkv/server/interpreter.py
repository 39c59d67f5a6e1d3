"""What a node process asks of its interpreter, of the C library's allocator and of the kernel. Each was measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys

SWITCH_INTERVAL_S = 1e-3
"""The disk thread must get the interpreter back soon after an fsync; at the default of 5 ms a busy loop starves it."""

TRIM_THRESHOLD_BYTES = 16 << 20
"""Freed memory up to this stays with the process. By default glibc gives back all above 128 KiB, and a node that takes
in and lets go of a batch fifty times a second spent a twentieth of its time on page faults."""
TOP_PAD_BYTES = 256 << 10
_M_TRIM_THRESHOLD, _M_TOP_PAD = -1, -2  # of <malloc.h>


def tune() -> None:
    """Set up this process for a node; once, when everything is imported."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # Whom a message wakes does not take the processor from its sender, who is about to wake others and to sleep itself.
    # Where nodes share processors that is one write in twenty; where they do not it makes no difference.
    with contextlib.suppress(OSError, AttributeError):  # another system, or not allowed
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # Requests leave no cycles behind; what does is rare. A full collection of a large heap stalls heartbeats, so it
    # has to be rare too, and what was loaded at start is never looked at again.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        mallopt(_M_TOP_PAD, TOP_PAD_BYTES)
