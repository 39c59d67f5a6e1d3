"""Debian's etcdctl grants, keeps, looks at and revokes leases, and hangs keys on them."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from tests.compat.clusters import Cluster, Etcdctl, until

pytestmark = [pytest.mark.system, pytest.mark.integration]


def grant(etcdctl: Etcdctl, ttl_s: int) -> str:
    found = re.fullmatch(
        rf"lease ([0-9a-f]{{1,16}}) granted with TTL\({ttl_s}s\)\n", etcdctl("lease", "grant", str(ttl_s))
    )
    assert found
    return found[1]


def test_grant_look_revoke(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 100)
    for key in ("b", "a"):
        assert etcdctl("put", f"{prefix}{key}", "v", f"--lease={lease}") == "OK\n"
    look = etcdctl("lease", "timetolive", lease, "--keys")
    told = re.fullmatch(
        rf"lease {lease} granted with TTL\(100s\), remaining\(\d\ds\), attached keys\(\[(.*)\]\)\n", look
    )
    assert told
    assert sorted(told[1].split()) == [f"{prefix}a", f"{prefix}b"]  # etcd gives them in any order
    assert f"{lease}\n" in etcdctl("lease", "list")
    assert etcdctl.json("get", f"{prefix}a")["kvs"][0]["lease"] == int(lease, 16)
    before = etcdctl.json("get", f"{prefix}a")["header"]["revision"]
    assert etcdctl("lease", "revoke", lease) == f"lease {lease} revoked\n"
    after = etcdctl.json("get", prefix, "--prefix")
    assert after.get("count", 0) == 0
    assert after["header"]["revision"] == before + 1, "all in one revision"
    assert etcdctl("lease", "timetolive", lease) == f"lease {lease} already expired\n"
    assert lease not in etcdctl("lease", "list")


def test_unknown_leases(etcdctl: Etcdctl, prefix: str) -> None:
    assert "etcdserver: requested lease not found" in etcdctl.refused("lease", "revoke", "123456789")
    assert "etcdserver: requested lease not found" in etcdctl.refused("put", f"{prefix}k", "v", "--lease=123456789")
    assert etcdctl("lease", "timetolive", "123456789") == "lease 0000000123456789 already expired\n"
    kept = etcdctl.run("lease", "keep-alive", "--once", "123456789")
    assert "expired or revoked" in kept.stdout + kept.stderr or "requested lease not found" in kept.stdout + kept.stderr


def test_times_out_of_bounds(etcdctl: Etcdctl) -> None:
    granted = etcdctl.json("lease", "grant", "1")
    assert granted["TTL"] == 2, "raised to the least"
    assert "etcdserver: too large lease TTL" in etcdctl.refused("lease", "grant", "9000000001")


def test_a_lease_that_is_kept_alive_lives(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 2)
    etcdctl("put", f"{prefix}k", "v", f"--lease={lease}")
    for _ in range(5):
        time.sleep(1)
        assert etcdctl("lease", "keep-alive", "--once", lease) == f"lease {lease} keepalived with TTL(2)\n"
    assert etcdctl("get", f"{prefix}k", "--print-value-only") == "v\n"
    assert 1.5 < until(lambda: etcdctl("get", f"{prefix}k") == "", 10) < 6


def test_keep_alive_goes_on_by_itself(cluster: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 3)
    etcdctl("put", f"{prefix}k", "v", f"--lease={lease}")
    command = ["etcdctl", f"--endpoints={','.join(cluster.endpoints)}", "lease", "keep-alive", lease]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as keeper:
        try:
            time.sleep(7)
            assert etcdctl("get", f"{prefix}k", "--print-value-only") == "v\n"
        finally:
            keeper.kill()
        assert keeper.stdout is not None
        lines = keeper.stdout.read().splitlines()
    assert len(lines) >= 4
    assert set(lines) == {f"lease {lease} keepalived with TTL(3)"}
    until(lambda: etcdctl("get", f"{prefix}k") == "", 10)
    assert etcdctl("lease", "timetolive", lease) == f"lease {lease} already expired\n"


def test_a_put_without_lease_detaches_the_key(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 100)
    etcdctl("put", f"{prefix}kept", "v", f"--lease={lease}")
    etcdctl("put", f"{prefix}gone", "v", f"--lease={lease}")
    etcdctl("put", f"{prefix}kept", "w")
    etcdctl("put", f"{prefix}gone", "w", "--ignore-lease")
    etcdctl("lease", "revoke", lease)
    assert etcdctl("get", prefix, "--prefix", "--keys-only").split() == [f"{prefix}kept"]
