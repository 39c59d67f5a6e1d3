"""Debian's etcdctl grants, keeps, looks at and revokes leases, and hangs keys on them."""

from __future__ import annotations

import re
import time

import pytest

from tests.compat.clusters import Cluster, Etcdctl, until
from tests.compat.running import running

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
    lease = grant(etcdctl, 6)
    etcdctl("put", f"{prefix}k", "v", f"--lease={lease}")
    for _ in range(4):
        time.sleep(2)
        renewed = time.monotonic()
        assert etcdctl("lease", "keep-alive", "--once", lease) == f"lease {lease} keepalived with TTL(6)\n"
    assert etcdctl("get", f"{prefix}k", "--print-value-only") == "v\n"
    until(lambda: etcdctl("get", f"{prefix}k") == "")
    assert 6 <= time.monotonic() - renewed < 12, "not before its time, and not after twice its time"


def test_keep_alive_goes_on_by_itself(cluster: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 6)
    etcdctl("put", f"{prefix}k", "v", f"--lease={lease}")
    with running(cluster, "lease", "keep-alive", lease) as keeper:
        keeper.wait(lambda lines: len(lines) >= 5)  # one every third of its time: longer than its time
        assert etcdctl("get", f"{prefix}k", "--print-value-only") == "v\n"
        keeper.process.kill()
    assert set(keeper.lines) == {f"lease {lease} keepalived with TTL(6)"}
    until(lambda: etcdctl("get", f"{prefix}k") == "")
    assert etcdctl("lease", "timetolive", lease) == f"lease {lease} already expired\n"


def test_a_put_without_lease_detaches_the_key(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 100)
    etcdctl("put", f"{prefix}kept", "v", f"--lease={lease}")
    etcdctl("put", f"{prefix}gone", "v", f"--lease={lease}")
    etcdctl("put", f"{prefix}kept", "w")
    etcdctl("put", f"{prefix}gone", "w", "--ignore-lease")
    etcdctl("lease", "revoke", lease)
    assert etcdctl("get", prefix, "--prefix", "--keys-only").split() == [f"{prefix}kept"]


def test_a_transaction_puts_under_a_lease(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 100)
    puts = f"put {prefix}a 1 --lease={lease}\nput {prefix}b 2 --lease={lease}\nput {prefix}free 3"
    assert etcdctl("txn", stdin=f'ver("{prefix}a") = "0"\n\n{puts}\n\n\n') == "SUCCESS\n\nOK\n\nOK\n\nOK\n"
    kvs = etcdctl.json("get", prefix, "--prefix")["kvs"]
    assert [pair.get("lease", 0) for pair in kvs] == [int(lease, 16), int(lease, 16), 0]
    assert len({pair["mod_revision"] for pair in kvs}) == 1
    assert len(etcdctl.json("lease", "timetolive", lease, "--keys")["keys"]) == 2
    etcdctl("txn", stdin=f'ver("{prefix}a") = "1"\n\nput {prefix}a 4\n\n\n')  # without a lease: detached
    etcdctl("lease", "revoke", lease)
    assert etcdctl("get", prefix, "--prefix", "--keys-only").split() == [f"{prefix}a", f"{prefix}free"]


def test_a_transaction_under_an_unknown_lease_does_nothing(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 100)
    before = etcdctl.json("get", f"{prefix}a")["header"]["revision"]
    story = f'ver("{prefix}a") = "0"\n\nput {prefix}a 1 --lease={lease}\nput {prefix}b 2 --lease=12345\n\n\n'
    assert "etcdserver: requested lease not found" in etcdctl.refused("txn", stdin=story)
    after = etcdctl.json("get", prefix, "--prefix")
    assert (after.get("count", 0), after["header"]["revision"]) == (0, before)
    assert etcdctl.json("lease", "timetolive", lease, "--keys")["keys"] is None
    # The branch that is not taken asks for no lease.
    other = f'ver("{prefix}a") > "0"\n\nput {prefix}b 2 --lease=12345\n\nput {prefix}a 1 --lease={lease}\n\n'
    assert etcdctl("txn", stdin=other) == "FAILURE\n\nOK\n"


def test_a_transaction_sees_the_keys_of_a_dead_lease_gone(etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 6)
    etcdctl("put", f"{prefix}k", "v", f"--lease={lease}")
    story = f'ver("{prefix}k") = "0"\n\nput {prefix}taken by-me\n\nget {prefix}k\n\n'
    assert etcdctl("txn", stdin=story).startswith("FAILURE")
    until(lambda: etcdctl("txn", stdin=story).startswith("SUCCESS"))
    assert etcdctl("get", f"{prefix}taken", "--print-value-only") == "by-me\n"


def test_leases_are_the_same_seen_from_every_member(etcdctl: Etcdctl, prefix: str) -> None:
    leases = [grant(Etcdctl((endpoint,)), 200) for endpoint in etcdctl.endpoints]
    for endpoint, lease in zip(etcdctl.endpoints, leases, strict=True):
        Etcdctl((endpoint,))("put", f"{prefix}{lease}", "v", f"--lease={lease}")
    for endpoint in etcdctl.endpoints:
        one = Etcdctl((endpoint,))
        one("get", f"{prefix}k")  # linearizable: this member has applied all of it now
        assert set(leases) <= set(one("lease", "list").split())
        ids = {entry["id"] for entry in one.json("lease", "list")["leases"]}
        assert {int(lease, 16) for lease in leases} <= ids
        for lease in leases:
            look = one.json("lease", "timetolive", lease, "--keys")
            assert (look["id"], look["granted-ttl"], len(look["keys"])) == (int(lease, 16), 200, 1)
            assert 150 < look["ttl"] <= 200
        assert one("lease", "keep-alive", "--once", leases[0]) == f"lease {leases[0]} keepalived with TTL(200)\n"
    Etcdctl(etcdctl.endpoints[:1])("lease", "revoke", leases[-1])
    assert "etcdserver: requested lease not found" in Etcdctl(etcdctl.endpoints[1:2]).refused(
        "put", f"{prefix}late", "v", f"--lease={leases[-1]}"
    )


def test_a_keeper_learns_that_its_lease_is_gone(etcdctl: Etcdctl, cluster: Cluster) -> None:
    lease = grant(etcdctl, 6)
    with running(cluster, "lease", "keep-alive", lease) as keeper:
        keeper.wait(lambda lines: lines)
        etcdctl("lease", "revoke", lease)
        keeper.wait(lambda lines: lines[-1] == f"lease {lease} expired or revoked.")
        assert keeper.process.wait(timeout=30) == 0
    gone = etcdctl.json("lease", "timetolive", lease)
    assert (gone["id"], gone["ttl"], gone["granted-ttl"]) == (int(lease, 16), -1, 0)
