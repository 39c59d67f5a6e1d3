"""`raftkv cluster`, as a person uses it: from several terminals, with real nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# More than twenty commands in a test, each a process: on a busy machine the start of one takes seconds.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


class Terminal:
    """Runs commands with one cluster directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))},
            "RAFTKV_CLUSTER_DIR": str(directory),
            "RAFTKV_TIMEOUT": "30s",  # what a call may take is not what is tested
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "raftkv", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0, stdin: str | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "raftkv", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=200,
            check=False,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.run("cluster", "status", "-o", "json"))
        return rows

    def one_with(self, role: str) -> str:
        """A node with this role, once there is one."""
        deadline = time.monotonic() + 60
        while not (found := [row["name"] for row in self.rows() if row["role"] == role]):
            assert time.monotonic() < deadline, f"no {role}"
        return str(found[0])

    def pids(self) -> list[int]:
        return [row["pid"] for row in self.rows() if row["pid"]]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path / "cluster")
    yield made
    state = made.directory / "cluster.json"
    if state.exists() and (json.loads(state.read_text())["supervisor"] or {}).get("socket"):
        subprocess.run(
            [sys.executable, "-m", "raftkv", "cluster", "down"], env=made.environment, capture_output=True, check=False
        )


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while running := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        states = [Path(f"/proc/{pid}/stat") for pid in running]
        if all(not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z" for path in states):
            return
        assert time.monotonic() < deadline, f"still there: {running}"
        time.sleep(0.05)


def test_a_detached_cluster_is_used_disturbed_and_ended_from_other_terminals(terminal: Terminal) -> None:
    shown = terminal.run("cluster", "up", "--nodes", "3", "--base-port", "0", "--detach")
    assert "export RAFTKV_ENDPOINTS=127.0.0.1:" in shown
    assert "already running" in terminal.run("cluster", "up", code=1)
    pids = terminal.pids()
    assert len(pids) == 3
    # Client commands find the running cluster by themselves.
    assert terminal.run("put", "greeting", "hello") == "OK\n"
    assert terminal.run("get", "greeting") == "greeting\nhello\n"
    assert terminal.run("put", "from-stdin", stdin="a\nb") == "OK\n"
    assert terminal.run("get", "from-stdin", "--print-value-only") == "a\nb\n"
    terminal.one_with("leader")
    leader = terminal.run("cluster", "kill", "leader").removeprefix("killed ").strip()
    assert "became_leader" in terminal.run("cluster", "logs", leader, "-n", "500")
    assert "SIGKILL" in terminal.run("cluster", "status")
    assert terminal.run("get", "greeting") == "greeting\nhello\n"
    assert "no such node" in terminal.run("cluster", "pause", "n9", code=1)
    assert terminal.run("cluster", "restart", leader) == f"restarted {leader}\n"
    follower = terminal.one_with("follower")
    assert terminal.run("cluster", "pause", follower) == f"paused {follower}\n"
    assert next(row["process"] for row in terminal.rows() if row["name"] == follower) == "paused"
    assert terminal.run("cluster", "resume", follower) == f"resumed {follower}\n"
    assert terminal.run("cluster", "stop", follower) == f"stopped {follower}\n"
    assert "not running" in terminal.run("cluster", "kill", follower, code=1)
    pids = terminal.pids()
    assert "the data stays in" in terminal.run("cluster", "down")
    wait_gone(pids)
    assert "no cluster is running" in terminal.run("cluster", "status", code=1)
    terminal.run("cluster", "up", "--detach")
    assert terminal.run("get", "greeting") == "greeting\nhello\n"
    terminal.run("cluster", "down", "--remove")
    assert not terminal.directory.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_the_foreground_ends(terminal: Terminal, number: signal.Signals) -> None:
    with terminal.start("cluster", "up", "-n", "3", "--base-port", "0") as launcher:
        try:
            assert launcher.stdout is not None
            for line in launcher.stdout:
                if line.startswith("n3"):
                    break
            pids = terminal.pids()
            assert len(pids) == 3
            terminal.run("cluster", "pause", "n2")
            launcher.send_signal(number)
            launcher.wait(60)
            wait_gone(pids)
        finally:
            launcher.kill()
            launcher.communicate()
    # And the directory can be taken up again.
    terminal.run("cluster", "up", "--detach")
    terminal.run("cluster", "down", "--remove")


def test_a_taken_port_is_named(terminal: Terminal) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for detach in ([], ["--detach"]):
            error = terminal.run("cluster", "up", "-n", "1", "--base-port", str(port), *detach, code=1)
            assert f"port {port} on 127.0.0.1 (n1, clients) is already in use" in error
            assert error.splitlines()[-1].startswith("Error: ")


def test_the_demo_loses_nothing_and_leaves_nothing(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    terminal.environment["TMPDIR"] = str(tmp_path / "tmp")
    shown = terminal.run("demo", "--nodes", "3", "--kills", "1")
    assert "SIGKILL to n" in shown
    assert "ms without a write" in shown
    assert "acknowledged writes found" in shown
    assert "leads" in shown
    assert not list((tmp_path / "tmp").glob("raftkv-*/"))


def test_the_demo_ends_clean_on_ctrl_c(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    terminal.environment["TMPDIR"] = str(tmp_path / "tmp")
    with terminal.start("demo", "--nodes", "3") as demo:
        try:
            assert demo.stdout is not None
            for line in demo.stdout:
                if line.startswith("Load:"):
                    break
            demo.send_signal(signal.SIGINT)
            _, error = demo.communicate(timeout=60)
            assert demo.returncode == 130
            assert "all nodes are ended" in error
            assert "Traceback" not in error
            assert not list((tmp_path / "tmp").glob("raftkv-*/"))
        finally:
            demo.kill()
