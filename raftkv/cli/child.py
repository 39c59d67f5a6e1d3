"""A command that runs under a lock or for an event: started, signalled, ended.

Where we have a terminal to ourselves, the command stays in our process group, so that it can use the terminal; Ctrl-C
reaches it from there, other signals from us. Elsewhere it gets a group of its own, and every signal goes to the whole
group: a shell that is ended must not leave behind what it had started.

On Linux the kernel sends it SIGTERM when we die: a command whose lock nobody keeps alive must not go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

LOOK_S = 0.02

# Run between us and the command, in the command's own process. (A `preexec_fn` would run in a copy of a process that
# has gRPC's threads.) The command must get the signals as a shell would give them, not as Python has set them.
_LAUNCH = """
import os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
for name in ("SIGPIPE", "SIGXFSZ"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    os._exit(125)
try:
    os.execvp(command[0], command)
except OSError as error:
    print(f"Error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)
"""


class Child:
    """The command's process."""

    def __init__(self, process: asyncio.subprocess.Process, group: bool) -> None:
        self._process = process
        self._group = group

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], *, input: bool = True) -> Self:
        """Start it, with `environment` added to ours, and our stdin unless `input` is False."""
        group = not _owns_terminal()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-c", _LAUNCH, str(os.getpid())),
            *command,
            stdin=None if input else asyncio.subprocess.DEVNULL,
            env={**os.environ, **environment},
            process_group=0 if group else None,
        )
        return cls(process, group)

    def pass_on(self, number: int) -> None:
        """A signal that we got, unless it came from the terminal, which gave it to both of us."""
        if self._group or number == signal.SIGTERM:
            self.send(number)

    def send(self, number: int) -> None:
        """To the command; to its whole group where it has one."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._group:
                os.killpg(self._process.pid, number)
            elif self._process.returncode is None:
                self._process.send_signal(number)

    async def wait(self) -> int:
        """Its exit code, 128+N when signal N ended it."""
        code = await self._process.wait()
        return 128 - code if code < 0 else code

    async def end(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for what is still there after the grace."""
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # what is stopped takes no SIGTERM
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._process.wait()
                while self._is_there():  # noqa: ASYNC110 - nobody tells when a group has ended
                    await asyncio.sleep(LOOK_S)
        self.send(signal.SIGKILL)
        await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self._process.returncode is None:
            self.send(signal.SIGKILL)

    def _is_there(self) -> bool:
        """Whether anything of its group is left."""
        if not self._group:
            return False
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it runs as somebody else
        return True


def _owns_terminal() -> bool:
    """Whether our process group is the one in the foreground of a terminal."""
    try:
        with Path("/dev/tty").open("rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
