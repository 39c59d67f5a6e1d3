"""The pytest plugin, as somebody else's project sees it: installed, unconfigured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROJECT = """
import pytest

PIDS = {pids!r}

def note(cluster):
    with open(PIDS, "a") as pids:
        pids.writelines(f"{{row.pid}}\\n" for row in cluster.status())

def test_put_and_get(raftkv_cluster, raftkv_client):
    note(raftkv_cluster)
    assert len(raftkv_cluster.names) == 2
    raftkv_client.put("k", "v")
    assert raftkv_client.get("k").text == "v"

def test_keys_are_ones_own(raftkv_client):
    assert raftkv_client.get("k") is None

def test_fresh(raftkv_fresh_cluster, raftkv_cluster):
    note(raftkv_fresh_cluster)
    assert raftkv_fresh_cluster.endpoints != raftkv_cluster.endpoints

@pytest.mark.asyncio
async def test_async(raftkv_async_client):
    await raftkv_async_client.put("k", "v")

def test_that_fails(raftkv_cluster_factory):
    note(raftkv_cluster_factory(nodes=1))
    raise RuntimeError("on purpose")
"""


def test_fixtures_work_in_a_project_of_its_own_and_leave_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "test_mine.py").write_text(PROJECT.format(pids=str(pids)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--raftkv-nodes",
            "2",
            "--rootdir",
            str(tmp_path),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    assert "4 passed, 1 failed" in done.stdout.replace("1 failed, 4 passed", "4 passed, 1 failed"), (
        done.stdout + done.stderr
    )
    assert "raftkv n1 (last" in done.stdout  # the failed test's report shows the logs
    noted = [int(line) for line in pids.read_text().split()]
    assert len(noted) == 5
    assert not [pid for pid in noted if Path(f"/proc/{pid}").exists()]
