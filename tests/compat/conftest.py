"""Every test here runs against real etcd, where it is installed, and against raftkv.

So what we expect of raftkv was seen to hold of etcd.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compat.clusters import Cluster, Etcdctl, etcd_cluster, raftkv_cluster


@pytest.fixture(scope="session", params=[pytest.param("etcd", marks=pytest.mark.system), "raftkv"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster under test, one for the whole session: tests keep to keys of their own."""
    make: Callable[[Path, int], contextlib.AbstractContextManager[Cluster]]
    make, size = {"etcd": (etcd_cluster, 3), "raftkv": (raftkv_cluster, 5)}[request.param]
    with make(tmp_path_factory.mktemp(request.param), size) as running:
        yield running


@pytest.fixture
def etcdctl(cluster: Cluster) -> Etcdctl:
    """etcdctl, given every endpoint."""
    return Etcdctl(cluster.endpoints)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Where this test keeps its keys."""
    return re.sub(r"\W+", "-", request.node.name) + "/"
