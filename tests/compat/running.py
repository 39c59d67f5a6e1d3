"""An etcdctl that goes on running: a watch, a lock, an election, a mirror."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

from tests.compat.clusters import Cluster, etcdctl_environment


class Running:
    """An etcdctl that goes on running, and the lines it has printed."""

    def __init__(self, endpoints: tuple[str, ...], *arguments: str) -> None:
        self.process = subprocess.Popen(
            ["etcdctl", *arguments],
            env=etcdctl_environment(endpoints),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def say(self, line: str) -> None:
        self.stdin.write(line + "\n")
        self.stdin.flush()

    def wait(self, condition: Callable[[list[str]], object], timeout_s: float = 30.0) -> list[str]:
        deadline = time.monotonic() + timeout_s
        while not condition(self.lines):
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)
        return self.lines

    def settled(self) -> None:
        """In interactive mode: wait until what was said before is done.

        It does one thing after the other, and does not say when it watches; but what it does not understand it says.
        """
        word = f"nothing-{len(self.lines)}"
        self.say(word)
        self.wait(lambda lines: any(line.startswith(f"Invalid command {word}") for line in lines))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def running(cluster: Cluster, *arguments: str) -> Iterator[Running]:
    """Run it against the whole cluster."""
    process = Running(cluster.endpoints, *arguments)
    try:
        yield process
    finally:
        process.close()
