"""Clusters that foreign clients are pointed at, real etcd and ours, and the etcdctl that is pointed at them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftkv.local import LocalCluster
from raftkv.local.supervisor import NODE_COMMAND

ETCD_COMMAND = (sys.executable, str(Path(__file__).parents[2] / "bench" / "etcd_node.py"))
SIZES = {"etcd": 3, "raftkv": 5}


@dataclass(frozen=True)
class Cluster:
    """A running cluster, whoever made it."""

    kind: str  # "etcd" or "raftkv"
    local: LocalCluster

    @property
    def endpoints(self) -> tuple[str, ...]:
        """host:port of each member's client port."""
        return self.local.endpoints

    def leader(self) -> str:
        """The leader's endpoint, once there is one."""
        return self.local.endpoint(self.local.wait_leader(timeout_s=20))

    def followers(self) -> list[str]:
        """The endpoints of the others."""
        leader = self.leader()
        return [endpoint for endpoint in self.endpoints if endpoint != leader]

    def kill(self, endpoint: str) -> None:
        """SIGKILL to the member there."""
        self.local.kill(self._name(endpoint))

    def restart(self, endpoint: str) -> None:
        """Start the member there again, and wait until the whole cluster follows one leader."""
        self.local.restart(self._name(endpoint))
        self.local.wait_healthy()

    def heal(self) -> None:
        """Start again whatever a test has killed."""
        for row in self.local.status():
            if row.process == "exited":
                self.local.restart(row.name, wait=False)
        self.local.wait_healthy()

    def kill_leaders(self, times: int, *, pause_s: float = 1.0) -> None:
        """Kill the leader and start it again, as often as said."""
        for _ in range(times):
            leader = self.leader()
            self.kill(leader)
            self.local.wait_leader(timeout_s=20, other_than=self._name(leader))
            time.sleep(pause_s)
            self.restart(leader)

    def _name(self, endpoint: str) -> str:
        return self.local.names[self.endpoints.index(endpoint)]


def etcdctl_environment(endpoints: Sequence[str]) -> dict[str, str]:
    """What a call may take is not what is tested: by itself etcdctl gives a connection two seconds, a call five."""
    return {
        "PATH": os.environ["PATH"],
        "ETCDCTL_API": "3",
        "ETCDCTL_ENDPOINTS": ",".join(endpoints),
        "ETCDCTL_DIAL_TIMEOUT": "20s",
        "ETCDCTL_COMMAND_TIMEOUT": "20s",
    }


@dataclass(frozen=True)
class Etcdctl:
    """Debian's etcdctl, as its users call it."""

    endpoints: tuple[str, ...]

    def run_bytes(
        self, *arguments: str, stdin: bytes = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, whatever its exit code."""
        command = ["etcdctl", *arguments]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env=etcdctl_environment(self.endpoints),
            check=False,
        )

    def run(self, *arguments: str, stdin: str = "", timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The same with text."""
        done = self.run_bytes(*arguments, stdin=stdin.encode(), timeout_s=timeout_s)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def __call__(self, *arguments: str, stdin: str = "", timeout_s: float = 60.0) -> str:
        """Run a command that must succeed; its stdout."""
        done = self.run(*arguments, stdin=stdin, timeout_s=timeout_s)
        assert done.returncode == 0, f"etcdctl {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def raw(self, *arguments: str) -> bytes:
        """Run a command that must succeed; the bytes of its stdout."""
        done = self.run_bytes(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *arguments: str, stdin: str = "") -> Any:
        """The same with `-w json`, parsed."""
        return json.loads(self(*arguments, "-w", "json", stdin=stdin))

    def refused(self, *arguments: str, stdin: str = "") -> str:
        """Run a command that must fail; the text of its error without the client's decoration."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode != 0, f"etcdctl {' '.join(arguments)} went through:\n{done.stdout}"
        return (done.stderr + done.stdout).strip()


@contextlib.contextmanager
def running_cluster(kind: str, folder: Path, size: int | None = None) -> Iterator[Cluster]:
    """Processes on loopback: real etcd, or our own nodes."""
    if kind == "etcd" and shutil.which("etcd") is None:
        raise FileNotFoundError("no etcd on PATH")
    command = ETCD_COMMAND if kind == "etcd" else NODE_COMMAND
    with LocalCluster(size or SIZES[kind], directory=folder, command=command) as local:
        yield Cluster(kind, local)


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> float:
    """Wait until it holds; the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - began


def put_surely(etcdctl: Etcdctl, key: str, value: str) -> None:
    """Again while the answer is an error: for keys of which only the last value counts."""
    until(lambda: etcdctl.run("put", key, value).returncode == 0, 60)
