"""The least that must hold with every supported Python and both LevelDB bindings: real processes, a dead leader."""

from __future__ import annotations

import shutil
import sys

import pytest

import raftkv
from raftkv.local import LocalCluster
from raftkv.storage._leveldb import leveldb

pytestmark = [pytest.mark.integration, pytest.mark.smoke]


def test_a_cluster_outlives_its_leader_and_a_full_restart(raftkv_fresh_cluster: LocalCluster) -> None:
    cluster = raftkv_fresh_cluster
    with raftkv.Client(cluster.endpoints, timeout=20) as client:
        revisions = [client.put(f"k{i}", str(i)).revision for i in range(50)]
        assert revisions == list(range(revisions[0], revisions[0] + 50))

        (dead,) = cluster.kill("leader")
        found = client.range("k", prefix=True)
        assert {item.key.decode(): item.text for item in found} == {f"k{i}": str(i) for i in range(50)}
        client.put("after", "the kill")
        assert cluster.wait_leader(other_than=dead)
        cluster.restart(dead)

        for name in cluster.names:
            cluster.kill(name)
        for name in cluster.names:
            cluster.restart(name, wait=False)
        cluster.wait_healthy()
        assert client.get("after").text == "the kill"  # type: ignore[union-attr]
        assert client.range("k", prefix=True, count_only=True).count == 50


def test_the_database_is_the_one_meant_for_this_python() -> None:
    assert leveldb.__name__.split(".")[0] == ("plyvel_next" if sys.version_info >= (3, 12) else "plyvel")


def test_the_command_line_is_installed() -> None:
    assert shutil.which("raftkv", path=sys.prefix + "/bin")
