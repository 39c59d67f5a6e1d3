"""Python's other etcd clients, which know nothing of us, do what their READMEs show; also while members are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.clusters import Cluster

pytestmark = pytest.mark.integration

PROGRAMS = Path(__file__).parent / "clients"

STORIES = [
    *(("etcd3aio", story) for story in ("readme", "kv", "txn", "lease", "lock", "election", "watch")),
    *(("etcd_client_py", story) for story in ("readme", "kv", "txn", "lease", "lock", "watch")),
    *(("pyetcd", story) for story in ("readme", "kv", "lease", "lock", "watch")),
]


def start(client: str, story: str, prefix: str, endpoints: list[str]) -> subprocess.Popen[str]:
    """Let a client tell a story."""
    command = [sys.executable, str(PROGRAMS / f"with_{client}.py"), story, prefix, *endpoints]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )


def finish(telling: subprocess.Popen[str], said: str = "") -> None:
    """End its input, and wait for the end of the story."""
    try:
        out = said + telling.communicate(timeout=100)[0]
    finally:
        telling.kill()
        telling.wait()
    assert telling.returncode == 0, out
    assert out.splitlines()[-1] == "told", out


def tell_while_leaders_die(client: str, prefix: str, cluster: Cluster, endpoints: list[str], times: int) -> None:
    """The story `kills`, in which the client does all it can while that happens."""
    telling = start(client, "kills", prefix, endpoints)
    assert telling.stdout is not None
    said = telling.stdout.readline()
    if said == "ready\n":
        cluster.kill_leaders(times)
    finish(telling, said)


@pytest.mark.parametrize(("client", "story"), STORIES)
def test_stories(cluster: Cluster, client: str, story: str, prefix: str) -> None:
    finish(start(client, story, prefix, list(cluster.endpoints)))


@pytest.mark.parametrize("client", dict.fromkeys(client for client, _ in STORIES))
def test_the_leaders_death(mortal: Cluster, client: str, prefix: str) -> None:
    """The client knows the followers only: not all of these clients find another member when theirs is gone."""
    tell_while_leaders_die(client, prefix, mortal, mortal.followers(), 1)


def test_a_client_that_knows_all_members(mortal: Cluster, prefix: str) -> None:
    tell_while_leaders_die("etcd3aio", prefix, mortal, list(mortal.endpoints), 2)
