"""Every example is run as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raftkv.local import LocalCluster

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ON_A_CLUSTER = {
    "semaphore": "7 workers are done; at most 3 were inside at a time",
    "read_write_lock": "20 reads, none of them saw half an edition",
    "barrier": "worker 2 found schema 2",
    "double_barrier": "3 parties, 2 rounds: 6 turns",
    "work_queue": "12 jobs done, 12 results, 0 left",
    "priority_queue": "password reset, first invoice, second invoice, newsletter",
    "counter": "7 of 10 buyers got a seat, 0 are left",
    "leader_task": "9 ticks, each once",
    "service_registry": "billing: nobody",
}
BY_ITSELF = {"stock"}


def run(name: str, *arguments: str, **variables: str) -> str:
    """Run to the end, must succeed; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_every_example_is_meant_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ON_A_CLUSTER) | BY_ITSELF


@pytest.mark.parametrize("name", ON_A_CLUSTER)
def test_example(name: str, raftkv_cluster: LocalCluster) -> None:
    out = run(name, RAFTKV_ENDPOINTS=",".join(raftkv_cluster.endpoints))
    assert out.splitlines()[-1] == ON_A_CLUSTER[name]


@pytest.mark.slow
def test_the_stock_is_exact_while_nodes_and_sellers_die() -> None:
    out = run("stock", "--sellers", "6", "--stock", "150", "--kills", "3")
    assert out.splitlines()[-1] == "stock 150, left 0, receipts 150, each once: exact"
    assert out.count("holds the lock: True") == 2
    assert out.count("was killed, is back") == 3
