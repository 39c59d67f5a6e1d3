"""Clusters that foreign clients are pointed at, real etcd and ours, and the etcdctl that is pointed at them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftkv.local import LocalCluster
from raftkv.local.ports import lease_free

START_S = 30.0


@dataclass(frozen=True)
class Cluster:
    """A running cluster, whoever made it."""

    kind: str  # "etcd" or "raftkv"
    endpoints: tuple[str, ...]  # host:port of each member's client port


@dataclass(frozen=True)
class Etcdctl:
    """Debian's etcdctl, as its users call it."""

    endpoints: tuple[str, ...]

    def run_bytes(
        self, *arguments: str, stdin: bytes = b"", timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, whatever its exit code."""
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": ",".join(self.endpoints)}
        command = ["etcdctl", *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout_s, env=environment, check=False
        )

    def run(self, *arguments: str, stdin: str = "", timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """The same with text."""
        done = self.run_bytes(*arguments, stdin=stdin.encode(), timeout_s=timeout_s)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def __call__(self, *arguments: str, stdin: str = "", timeout_s: float = 30.0) -> str:
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
def etcd_cluster(folder: Path, size: int) -> Iterator[Cluster]:
    """Real etcd processes on loopback."""
    if shutil.which("etcd") is None:
        raise FileNotFoundError("no etcd on PATH")
    lease = lease_free(2 * size)
    clients, peers = lease.ports[:size], lease.ports[size:]
    initial = ",".join(f"n{i + 1}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(size):
            client, peer = f"http://127.0.0.1:{clients[i]}", f"http://127.0.0.1:{peers[i]}"
            arguments = ["etcd", "--name", f"n{i + 1}", "--data-dir", str(folder / f"n{i + 1}")]
            arguments += ["--listen-client-urls", client, "--advertise-client-urls", client]
            arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            arguments += ["--initial-cluster", initial, "--initial-cluster-state", "new", "--logger", "zap"]
            with (folder / f"n{i + 1}.log").open("wb") as log:
                processes.append(subprocess.Popen(arguments, stdout=log, stderr=log))
        endpoints = tuple(f"127.0.0.1:{port}" for port in clients)
        wait_healthy(endpoints)
        yield Cluster("etcd", endpoints)
    finally:
        for process in processes:
            process.kill()  # a polite etcd takes seconds, and nothing of it is kept
        for process in processes:
            process.wait(timeout=10)
        lease.release()


def wait_healthy(endpoints: tuple[str, ...]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        done = Etcdctl(endpoints).run("endpoint", "health")
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"etcd was not healthy within {START_S} s:\n{done.stderr}")


@contextlib.contextmanager
def raftkv_cluster(folder: Path, size: int) -> Iterator[Cluster]:
    """Five of our own node processes."""
    with LocalCluster(size, directory=folder) as cluster:
        yield Cluster("raftkv", cluster.endpoints)
