"""One node process: started, signalled, watched, reaped.

    absent --start--> running --pause--> paused --resume--> running
                      running, paused --kill, terminate, its own fault--> exited --start--> running

Only signals and wait: everything works without the node's help. Each node has its own session, so that Ctrl-C in
the launcher's terminal reaches the launcher only, which then stops the nodes in order.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from raftkv.local import lifeline

_POLL_S = 0.005
_PROC = Path("/proc")
_HAS_PROC = _PROC.exists()


class NodeProcess:
    """The process of one node. Not safe for use from several threads at once."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.command = tuple(command)
        self.log = log
        self.environment = environment or {}
        self.starts = 0
        self.started_at = 0.0  # time.monotonic() of the last start
        self.paused = False  # by us; a stop from outside shows in `is_stopped`
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None  # our end of the lifeline, where there is no PDEATHSIG
        self._log_offset = 0  # where the last start's output begins

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._popen.pid if self._popen is not None and self.alive else None

    @property
    def alive(self) -> bool:
        """Running or paused. Reaps the process if it has ended."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """As subprocess has it: negative for a signal; None while it runs or before the first start."""
        return None if self._popen is None else self._popen.poll()

    def start(self) -> None:
        """Start the process. It must not be running."""
        assert not self.alive, f"{self.name} is running"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        read_end: int | None = None
        if sys.platform != "linux":
            self._close_pipe()
            read_end, self._pipe = os.pipe()
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **self.environment,
            lifeline.VARIABLE: lifeline.describe(os.getpid(), read_end),
        }
        try:
            with self.log.open("ab") as log:
                self._log_offset = log.tell()
                self._popen = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                    pass_fds=() if read_end is None else (read_end,),
                )
        finally:
            if read_end is not None:
                os.close(read_end)
        self.paused = False
        self.starts += 1
        self.started_at = time.monotonic()

    def send(self, number: int) -> bool:
        """Send a signal. False when the process has ended already."""
        if not self.alive:
            return False
        assert self._popen is not None
        self._popen.send_signal(number)
        return True

    def kill(self) -> bool:
        """SIGKILL: works on a paused process too."""
        return self.send(signal.SIGKILL)

    def terminate(self) -> bool:
        """SIGTERM; a paused process is woken to hear it."""
        sent = self.send(signal.SIGTERM)
        if self.paused:
            self.resume()
        return sent

    def pause(self) -> bool:
        """SIGSTOP."""
        self.paused = self.send(signal.SIGSTOP) or self.paused
        return self.alive

    def resume(self) -> bool:
        """SIGCONT."""
        self.paused = False
        return self.send(signal.SIGCONT)

    async def wait_exit(self, timeout_s: float) -> bool:
        """Wait for the process to end. False when it still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        self._close_pipe()
        return True

    def kill_now(self) -> None:
        """SIGKILL and reap, without a loop: for the ways out where nothing else works any more."""
        if self.kill():
            assert self._popen is not None
            self._popen.wait()
        self._close_pipe()

    def is_stopped(self) -> bool:
        """Whether the process is stopped by a signal, ours or another's."""
        return self.alive and (self.paused or self._kernel_says_stopped())

    async def wait_stopped(self, timeout_s: float) -> bool:
        """Wait until SIGSTOP has taken effect: a busy machine takes its time."""
        deadline = time.monotonic() + timeout_s
        while self.alive and _HAS_PROC and not self._kernel_says_stopped():
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return self.alive

    def _kernel_says_stopped(self) -> bool:
        try:
            stat = (_PROC / str(self.pid) / "stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def rss_bytes(self) -> int | None:
        """Resident memory, or None when it is not known."""
        pid = self.pid
        if pid is None:
            return None
        try:
            if _HAS_PROC:
                return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
            return int(shown.stdout) * 1024
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return None

    def last_line(self, length_max: int = 400) -> str:
        """The last line that the process has written since its last start: mostly why it ended."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_offset, end - 16384))
                lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return lines[-1].strip()[:length_max] if lines else ""

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
