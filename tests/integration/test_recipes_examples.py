"""Every example is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raftkv import recipes
from raftkv.local import LocalCluster
from raftkv.recipes import blocking

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
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


def run(name: str, *arguments: str, timeout_s: float = 100, **variables: str) -> str:
    """Run to the end, must succeed; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr  # gRPC has its own words for connections that were stopped
    assert "Traceback" not in done.stderr
    return done.stdout


def test_every_example_is_meant_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ON_A_CLUSTER) | BY_ITSELF


def test_the_page_has_every_recipe_and_every_example() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    made = {name for name in recipes.__all__ if hasattr(blocking, name)} - {"Registration"}
    assert made == set(re.findall(r"^\| `(\w+)\(", page, flags=re.MULTILINE))
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(re.findall(r"\.\./examples/(\w+\.py)", page))


@pytest.mark.parametrize("name", ON_A_CLUSTER)
def test_example(name: str, raftkv_cluster: LocalCluster) -> None:
    out = run(name, RAFTKV_ENDPOINTS=",".join(raftkv_cluster.endpoints))
    assert out.splitlines()[-1] == ON_A_CLUSTER[name]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_stock_is_exact_while_nodes_and_sellers_die() -> None:
    out = run("stock", "--sellers", "6", "--stock", "100", "--kills", "3", timeout_s=280)
    assert out.splitlines()[-1] == "stock 100, left 0, receipts 100, each once: exact"
    assert out.count("holds the lock: True") == 2
    assert out.count("was killed, is back") == 3
