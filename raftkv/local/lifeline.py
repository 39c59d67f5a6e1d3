"""A node started by a supervisor does not outlive it, however the supervisor ends.

On Linux the kernel sends SIGKILL when the parent dies (PR_SET_PDEATHSIG), which works on a stopped process too.
Elsewhere the node reads a pipe that only the supervisor holds open, and ends at its end of file.
The supervisor says so in the environment (`RAFTKV_LIFELINE=parent=PID[,fd=N]`); `attach` runs first thing in
`python -m raftkv`. Standard library only, nothing slow: it is on the way of every start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import MutableMapping

VARIABLE = "RAFTKV_LIFELINE"
_PR_SET_PDEATHSIG = 1


def describe(parent: int, descriptor: int | None = None) -> str:
    """The value of the environment variable for a child of process `parent`."""
    return f"parent={parent}" if descriptor is None else f"parent={parent},fd={descriptor}"


def attach(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Tie this process to its supervisor, if it was started by one.

    Returns:
        True when tied. Does not return when the supervisor is already gone.
    """
    value = environment.pop(VARIABLE, "")  # popped: what this process may start is no affair of the supervisor
    if not value:
        return False
    fields = dict(part.partition("=")[::2] for part in value.split(","))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if "fd" in fields:
        threading.Thread(target=_end_with, args=(int(fields["fd"]),), name="lifeline", daemon=True).start()
    # The parent may have died before the signal was set: then we were already handed to another parent.
    if os.getppid() != int(fields["parent"]):
        os._exit(0)
    return True


def _end_with(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
