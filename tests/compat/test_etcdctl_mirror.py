"""Debian's etcdctl mirrors one cluster into another: ours into etcd, etcd into ours, also while leaders die."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.compat.clusters import Cluster, Etcdctl, put_surely, running_cluster, until
from tests.compat.running import running

pytestmark = [pytest.mark.system, pytest.mark.integration]


@pytest.fixture(scope="module", params=["etcd", "raftkv"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcdctl]:
    """What is mirrored into: a cluster of one, and its etcdctl."""
    with running_cluster(request.param, tmp_path_factory.mktemp(f"{request.param}-target"), 1) as cluster:
        yield Etcdctl(cluster.endpoints)


def contents(etcdctl: Etcdctl, prefix: str) -> dict[str, str]:
    """The pairs under a prefix; keys without it."""
    lines = etcdctl("get", prefix, "--prefix").splitlines()
    return {key.removeprefix(prefix): value for key, value in zip(lines[::2], lines[1::2], strict=True)}


def put_many(etcdctl: Etcdctl, prefix: str, numbers: range) -> None:
    """In transactions, of at most 128 operations each."""
    for start in range(numbers.start, numbers.stop, 128):
        batch = range(start, min(start + 128, numbers.stop))
        puts = "".join(f"put {prefix}{number:05d} {number}\n" for number in batch)
        etcdctl("txn", stdin=f"\n{puts}\n\n")


def test_what_is_there_and_what_comes(cluster: Cluster, etcdctl: Etcdctl, target: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}old", "1")
    etcdctl("put", f"other/{prefix}", "not mirrored")
    with running(cluster, "make-mirror", f"--prefix={prefix}", *target.endpoints):
        until(lambda: contents(target, prefix) == {"old": "1"})
        etcdctl("put", f"{prefix}new", "2")
        etcdctl("put", f"{prefix}old", "3")
        etcdctl("put", f"{prefix}gone", "4")
        until(lambda: contents(target, prefix) == {"old": "3", "new": "2", "gone": "4"})
        etcdctl("del", f"{prefix}gone")
        etcdctl("txn", stdin=f'ver("{prefix}old") > "0"\n\nput {prefix}both 5\nput {prefix}too 5\n\n\n')
        until(lambda: contents(target, prefix) == {"old": "3", "new": "2", "both": "5", "too": "5"})
        pairs = {pair["key"]: pair for pair in target.json("get", prefix, "--prefix")["kvs"]}
        assert len({pair["mod_revision"] for pair in pairs.values()}) == 3, "one transaction stays one revision"
    assert target("get", f"other/{prefix}") == ""


def test_under_another_prefix(cluster: Cluster, etcdctl: Etcdctl, target: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}a", "1")
    with running(cluster, "make-mirror", f"--prefix={prefix}", f"--dest-prefix=copy/{prefix}", *target.endpoints):
        until(lambda: contents(target, f"copy/{prefix}") == {"a": "1"})
        etcdctl("put", f"{prefix}b", "2")
        etcdctl("del", f"{prefix}a")
        until(lambda: contents(target, f"copy/{prefix}") == {"b": "2"})
    assert contents(target, prefix) == {}
    with running(cluster, "make-mirror", f"--prefix={prefix}", "--no-dest-prefix", *target.endpoints):
        until(lambda: contents(target, "b") == {"": "2"})
    target("del", "b")


def test_more_keys_than_one_page(cluster: Cluster, etcdctl: Etcdctl, target: Etcdctl, prefix: str) -> None:
    """The first pass reads a thousand keys at a time, all at the revision of the first page."""
    put_many(etcdctl, prefix, range(2500))
    with running(cluster, "make-mirror", f"--prefix={prefix}", *target.endpoints):
        until(lambda: len(contents(target, prefix)) == 2500, 60)
        etcdctl("del", f"{prefix}00100", f"{prefix}00200")
        until(lambda: len(contents(target, prefix)) == 2400, 60)
    assert "00099" in contents(target, prefix)


def test_nothing_is_lost_when_leaders_die(mortal: Cluster, etcdctl: Etcdctl, target: Etcdctl, prefix: str) -> None:
    written: dict[str, str] = {}

    def write(count: int) -> None:
        for _ in range(count):
            put_surely(etcdctl, f"{prefix}{len(written)}", str(len(written)))
            written[str(len(written))] = str(len(written))

    with running(mortal, "make-mirror", f"--prefix={prefix}", *target.endpoints) as mirror:
        write(5)
        until(lambda: contents(target, prefix) == written)
        for _ in range(2):
            leader = mortal.leader()
            mortal.kill(leader)
            write(5)
            time.sleep(1)
            write(5)
            mortal.restart(leader)
            until(lambda: contents(target, prefix) == written, 30)
        etcdctl("del", f"{prefix}0")
        del written["0"]
        until(lambda: contents(target, prefix) == written, 30)
        assert mirror.process.poll() is None
