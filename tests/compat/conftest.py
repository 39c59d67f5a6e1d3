"""Every test here runs against real etcd, where it is installed, and against raftkv.

So what we expect of raftkv was seen to hold of etcd.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.compat.clusters import Cluster, Etcdctl, running_cluster


@pytest.fixture(scope="session", params=[pytest.param("etcd", marks=pytest.mark.system), "raftkv"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster under test, one for the whole session: tests keep to keys of their own."""
    with running_cluster(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture
def mortal(cluster: Cluster) -> Iterator[Cluster]:
    """The same cluster, for a test that kills its members: all live again when it ends."""
    yield cluster
    cluster.heal()


@pytest.fixture
def etcdctl(cluster: Cluster) -> Etcdctl:
    """etcdctl, given every endpoint."""
    return Etcdctl(cluster.endpoints)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Where this test keeps its keys."""
    return re.sub(r"\W+", "-", request.node.name) + "/"
