"""The pytest plugin: real clusters as fixtures.

    raftkv_cluster           one cluster for the whole session, healthy at the start of every test; keys are not cleared
    raftkv_client            a blocking client of it, whose keys live under a prefix of the test's own
    raftkv_async_client      the same for async tests (with pytest-asyncio or anyio)
    raftkv_fresh_cluster     a cluster of this test alone, for tests that destroy things
    raftkv_cluster_factory   make clusters of any size: `raftkv_cluster_factory(nodes=5)`

Option `--raftkv-nodes N` (default 3) sets the size of the first four. Processes and files are gone at the end,
however the tests ended. When a test fails, the last lines of the nodes' logs stand in its report.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from raftkv.client import AsyncClient, Client
    from raftkv.local import LocalCluster

T = TypeVar("T")

_LOG_LINES = 20
_clusters: pytest.StashKey[list[LocalCluster]] = pytest.StashKey()
_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--raftkv-nodes`."""
    parser.getgroup("raftkv").addoption(
        "--raftkv-nodes", type=int, default=3, metavar="N", help="nodes of the fixture clusters (default: 3)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Know which clusters live, for the reports of failed tests."""
    config.stash[_clusters] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the end of every node's log into the report of a failed test."""
    report = yield
    if report.failed:
        for cluster in item.config.stash.get(_clusters, []):
            for name in cluster.names:
                with contextlib.suppress(OSError):
                    lines = cluster.log(name).read_text(errors="replace").splitlines()[-_LOG_LINES:]
                    report.sections.append((f"raftkv {name} (last {len(lines)} log lines)", "\n".join(lines)))
    return report


@contextlib.contextmanager
def _running(config: pytest.Config, **settings: Any) -> Iterator[LocalCluster]:
    from raftkv.local import LocalCluster

    with LocalCluster(**settings) as cluster:
        config.stash[_clusters].append(cluster)
        try:
            yield cluster
        finally:
            config.stash[_clusters].remove(cluster)


@pytest.fixture(scope="session")
def _raftkv_session_cluster(pytestconfig: pytest.Config) -> Iterator[LocalCluster]:
    with _running(pytestconfig, nodes=pytestconfig.getoption("--raftkv-nodes")) as cluster:
        yield cluster


@pytest.fixture
def raftkv_cluster(_raftkv_session_cluster: LocalCluster) -> LocalCluster:
    """One cluster for the session. What an earlier test paused or killed runs again at the start of the next."""
    cluster = _raftkv_session_cluster
    for row in cluster.status():
        if row.process == "paused":
            cluster.resume(row.name)
        elif row.process == "exited":
            cluster.restart(row.name, wait=False)
    cluster.wait_healthy()
    return cluster


@pytest.fixture
def raftkv_fresh_cluster(pytestconfig: pytest.Config) -> Iterator[LocalCluster]:
    """A cluster of this test alone."""
    with _running(pytestconfig, nodes=pytestconfig.getoption("--raftkv-nodes")) as cluster:
        yield cluster


@pytest.fixture
def raftkv_cluster_factory(pytestconfig: pytest.Config) -> Iterator[Callable[..., LocalCluster]]:
    """Make clusters: takes `LocalCluster`'s arguments; all end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda nodes=None, **settings: stack.enter_context(_running(pytestconfig, nodes=nodes, **settings))


@pytest.fixture
def raftkv_namespace(request: pytest.FixtureRequest) -> str:
    """A key prefix of this test's own, so that tests on one cluster do not see each other's keys."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', request.node.name)}-{next(_numbers)}/"


@pytest.fixture
def raftkv_client(raftkv_cluster: LocalCluster, raftkv_namespace: str) -> Iterator[Client]:
    """A blocking client of the session's cluster, in a namespace of the test's own."""
    from raftkv.client import Client

    with Client(raftkv_cluster.endpoints, namespace=raftkv_namespace) as client:
        yield client


def _async_fixture(function: Callable[..., T]) -> Callable[..., T]:
    # pytest-asyncio in its strict mode wants async fixtures to be its own; anyio takes plain ones.
    home = "pytest_asyncio" if find_spec("pytest_asyncio") else "pytest"
    fixture: Any = import_module(home).fixture
    made: Callable[..., T] = fixture(function)
    return made


@_async_fixture
async def raftkv_async_client(raftkv_cluster: LocalCluster, raftkv_namespace: str) -> AsyncIterator[AsyncClient]:
    """An asyncio client of the session's cluster, in a namespace of the test's own."""
    from raftkv.client import AsyncClient

    async with AsyncClient(raftkv_cluster.endpoints, namespace=raftkv_namespace) as client:
        yield client
