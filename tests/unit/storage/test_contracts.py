"""LevelDB and its in-memory fakes obey the same contracts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from raftkv.sim.disk import SimLog
from raftkv.state.store import MemoryStore
from raftkv.storage.keys import Identity
from raftkv.storage.log_store import LogStore
from raftkv.storage.state_store import StateStore
from tests.unit.storage.contracts import CONF, check_key_value_store, check_log_store


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_log_on_leveldb(tmp_path: Path, resources: ExitStack) -> None:
    numbers = itertools.count()

    def make() -> LogStore:
        log = LogStore.open(tmp_path / f"log-{next(numbers)}", Identity(1, 2, "n1"), create=True)
        resources.enter_context(closing(log))
        log.bootstrap(CONF)
        return log

    check_log_store(make)


def test_log_of_the_simulator() -> None:
    check_log_store(lambda: SimLog(CONF))


@pytest.mark.parametrize("filtered", [b"", b"a"])
def test_state_on_leveldb(tmp_path: Path, resources: ExitStack, filtered: bytes) -> None:
    numbers = itertools.count()

    def make() -> StateStore:
        path = tmp_path / f"state-{next(numbers)}"
        return resources.enter_context(closing(StateStore.open(path, create=True, filtered=filtered)))

    check_key_value_store(make)


def test_state_in_memory() -> None:
    check_key_value_store(MemoryStore)
