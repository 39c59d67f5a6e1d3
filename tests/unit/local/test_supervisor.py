"""The supervisor, with a stand-in for the node: what it does with processes, files and ports."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from raftkv.local import (
    AsyncLocalCluster,
    ClusterRunning,
    LocalClusterError,
    NodeExited,
    NotReady,
    PortInUse,
    TopologyMismatch,
    UnknownNode,
    ports,
)
from raftkv.local.status import NodeRow

STANDIN = (sys.executable, str(Path(__file__).with_name("standin.py")))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A zombie whose new parent has not reaped it yet runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_gone(pids: list[int], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


def pids_of(rows: list[NodeRow]) -> list[int]:
    return [row.pid for row in rows if row.pid is not None]


async def test_a_cluster_comes_up_shows_its_table_and_leaves_nothing() -> None:
    async with AsyncLocalCluster(3, command=STANDIN) as cluster:
        rows = await cluster.status(timeout_s=20)
        directory, pids = cluster.directory, pids_of(rows)
        assert [row.name for row in rows] == ["n1", "n2", "n3"]
        assert [row.role for row in rows] == ["leader", "follower", "follower"]
        assert [row.lag for row in rows] == [1, 2, 3]
        assert {row.term for row in rows} == {7}
        assert all((row.rss_bytes or 0) > 1 << 20 for row in rows)
        assert len(pids) == 3
        assert cluster.log("n2").exists()
        assert len(set(cluster.endpoints)) == 3
    assert all(gone(pid) for pid in pids)
    assert not directory.exists()


async def test_kill_pause_resume_restart_by_name_list_and_role() -> None:
    async with AsyncLocalCluster(3, command=STANDIN) as cluster:
        assert await cluster.kill("leader") == ["n1"]
        assert await cluster.wait_leader(other_than="n1") == "n2"
        row = (await cluster.status())[0]
        assert (row.process, row.exit_code, row.pid) == ("exited", -signal.SIGKILL, None)
        assert await cluster.kill("n1") == []  # nothing left to kill is no error
        assert await cluster.pause("n3") == ["n3"]
        row = (await cluster.status())[2]
        assert (row.process, row.role) == ("paused", "silent")
        assert await cluster.resume("n3") == ["n3"]
        assert await cluster.restart("n1,n2") == ["n1", "n2"]
        assert [row.process for row in await cluster.status()] == ["running"] * 3
        assert [row.starts for row in await cluster.status()] == [2, 2, 1]
        assert await cluster.resolve("followers") == ["n2", "n3"]
        assert await cluster.resolve("all") == ["n1", "n2", "n3"]
        assert await cluster.stop("n3") == ["n3"]
        with pytest.raises(UnknownNode, match="'n9': no such node; the nodes are n1, n2, n3"):
            await cluster.kill("n1,n9")
        await cluster.kill("all")
        with pytest.raises(UnknownNode, match="no node leads now"):
            await cluster.pause("leader")


async def test_a_leader_is_waited_for_while_there_can_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look in an election, or at nodes that are slow to answer, finds none."""
    async with AsyncLocalCluster(3, command=STANDIN) as cluster:
        looks: list[str | None] = [None, None, "n2"]

        async def leader() -> str | None:
            return looks.pop(0)

        monkeypatch.setattr(cluster, "leader", leader)
        assert await cluster.resolve("leader") == ["n2"]
        await cluster.kill("n1,n3")
        looks.append(None)
        with pytest.raises(UnknownNode, match="no node leads now"):
            await cluster.kill("leader")
        assert looks == []


async def test_a_paused_node_is_ended_too() -> None:
    async with AsyncLocalCluster(2, command=STANDIN) as cluster:
        pids = pids_of(await cluster.status())
        await cluster.pause("n2")
        await cluster.close(grace_s=3)
        assert all(gone(pid) for pid in pids)


async def test_a_node_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    async with AsyncLocalCluster(1, command=STANDIN, environment={"STANDIN_DEAF": "1"}) as cluster:
        assert await cluster.stop("n1", grace_s=0.2) == ["n1"]
        assert cluster.process("n1").exit_code == -signal.SIGKILL


async def test_a_node_that_ends_at_start_gives_its_last_words_and_nothing_is_left(tmp_path: Path) -> None:
    cluster = AsyncLocalCluster(
        2, directory=tmp_path / "c", command=STANDIN, environment={"STANDIN_FAIL": "data directory is damaged"}
    )
    with pytest.raises(NodeExited, match=r"node n[12] exited with code 1: data directory is damaged"):
        await cluster.start()
    assert not (tmp_path / "c").exists()


async def test_what_never_gets_healthy_is_ended() -> None:
    cluster = AsyncLocalCluster(1, command=(sys.executable, "-c", "import time; time.sleep(60)"))
    starting = asyncio.create_task(cluster.start(timeout_s=0.5))
    await asyncio.sleep(0)
    pid = cluster.process("n1").pid
    assert pid is not None
    with pytest.raises(NotReady, match=r"not healthy .* after 0.5 s; last seen: n1 silent"):
        await starting
    assert gone(pid)


async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    cluster = AsyncLocalCluster(
        2, directory=tmp_path / "c", command=(sys.executable, "-c", "import time; time.sleep(60)")
    )
    task = asyncio.create_task(cluster.start())
    await asyncio.sleep(0.2)
    pids = [cluster.process(name).pid for name in cluster.names]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(pid is not None and gone(pid) for pid in pids)


async def test_a_kept_directory_is_taken_up_again_with_the_same_ports(tmp_path: Path) -> None:
    async with AsyncLocalCluster(2, directory=tmp_path / "c", command=STANDIN) as cluster:
        endpoints = cluster.endpoints
        with pytest.raises(ClusterRunning, match=rf"already running in .*c \(pid {os.getpid()}\)"):
            await AsyncLocalCluster(directory=tmp_path / "c", command=STANDIN).start()
    async with AsyncLocalCluster(directory=tmp_path / "c", command=STANDIN) as again:
        assert again.endpoints == endpoints
    with pytest.raises(TopologyMismatch, match="with nodes 2, not 3"):
        await AsyncLocalCluster(3, directory=tmp_path / "c", command=STANDIN).start()
    assert (tmp_path / "c" / "n1" / "node.log").exists()


async def test_a_fixed_port_that_is_taken_is_named_and_nothing_starts(tmp_path: Path) -> None:
    free = ports.lease_free(1)  # not an ephemeral port, which anybody's connection might have
    (port,) = free.ports
    free.release()
    with socket.create_server(("127.0.0.1", port)):
        cluster = AsyncLocalCluster(2, directory=tmp_path / "c", base_port=port - 1, command=STANDIN)
        with pytest.raises(PortInUse, match=rf"port {port} .*\(n1, peers\)"):
            await cluster.start()
    assert not list((tmp_path / "c").glob("n*"))


@pytest.mark.parametrize(
    ("nodes", "port", "text"), [(0, 0, "nodes: 0"), (100, 0, "nodes: 100"), (5, 65530, "base_port: 65530")]
)
def test_senseless_arguments_are_named(nodes: int, port: int, text: str) -> None:
    with pytest.raises(LocalClusterError, match=text):
        AsyncLocalCluster(nodes, base_port=port)


LAUNCHER = """
import asyncio, sys
from raftkv.local import AsyncLocalCluster

async def main():
    async with AsyncLocalCluster(3, command={command!r}) as cluster:
        await cluster.pause("n3")
        print(*(row.pid for row in await cluster.status()), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_node_outlives_its_launcher_not_even_a_paused_one(number: signal.Signals) -> None:
    code = textwrap.dedent(LAUNCHER.format(command=STANDIN))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as launcher:
        assert launcher.stdout is not None
        pids = [int(word) for word in launcher.stdout.readline().split()]
        assert len(pids) == 3
        assert not any(gone(pid) for pid in pids)
        launcher.send_signal(number)
        launcher.wait(30)
    wait_gone(pids)
