"""Debian's etcdctl goes on watching, locking, electing and keeping leases alive while members are killed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compat.clusters import Cluster, Etcdctl, put_surely, until
from tests.compat.running import Running, running
from tests.compat.test_etcdctl_lease import grant

pytestmark = [pytest.mark.system, pytest.mark.integration]


def events(watch: Running) -> list[dict[str, Any]]:
    """What a watch with `-w json` has printed."""
    return [event for line in list(watch.lines) for event in json.loads(line).get("Events") or []]


def test_a_watch_loses_and_repeats_nothing(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}k", "before")["header"]["revision"]
    with running(mortal, "watch", prefix, "--prefix", f"--rev={first}", "--prev-kv", "-w", "json") as watch:
        watch.wait(lambda _: len(events(watch)) == 1)
        for number in range(12):
            if number % 4 == 1:
                victim = mortal.leader()
                mortal.kill(victim)
            put_surely(etcdctl, f"{prefix}k", str(number))
            if number % 4 == 3:
                mortal.restart(victim)
        etcdctl("del", f"{prefix}k")
        watch.wait(lambda _: any(event.get("type") == 1 for event in events(watch)), 30)
        seen = events(watch)
    revisions = [event["kv"]["mod_revision"] for event in seen]
    assert revisions == sorted(set(revisions))
    versions = [event["kv"].get("version") for event in seen[:-1]]
    assert versions == list(range(1, len(versions) + 1)), "each write of the key, once"
    before = [event["prev_kv"]["mod_revision"] for event in seen[1:]]
    assert before == revisions[:-1]


def test_watches_of_one_stream_go_on(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    """Interactive mode: several watches, one stream."""
    with running(mortal, "watch", "-i") as watch:
        watch.say(f"watch {prefix}a")
        watch.say(f"watch {prefix}b --prefix --prev-kv")
        watch.settled()
        etcdctl("put", f"{prefix}b", "b-first")
        watch.wait(lambda lines: "b-first" in lines)
        mortal.kill_leaders(2)
        put_surely(etcdctl, f"{prefix}a", "a-last")
        put_surely(etcdctl, f"{prefix}b", "b-last")
        lines = watch.wait(lambda lines: "a-last" in lines and lines.count("b-last") >= 1)
        watch.say(f"watch {prefix}c")
        watch.settled()
        etcdctl("put", f"{prefix}c", "c-last")
        lines = watch.wait(lambda lines: "c-last" in lines)
    assert lines.count("b-first") == 2, "as the value, and as the value before"


def test_a_lease_is_kept_alive_and_then_runs_out(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    lease = grant(etcdctl, 9)
    etcdctl("put", f"{prefix}k", "v", f"--lease={lease}")
    with running(mortal, "lease", "keep-alive", lease) as keeper:
        keeper.wait(lambda lines: lines)
        for _ in range(2):
            mortal.kill_leaders(1)
            keeper.lines.clear()
            keeper.wait(lambda lines: len(lines) >= 2)
        assert etcdctl("get", f"{prefix}k", "--print-value-only") == "v\n"
        assert set(keeper.lines) == {f"lease {lease} keepalived with TTL(9)"}
    until(lambda: etcdctl("get", f"{prefix}k") == "", 30)


def test_leases_outlive_leaders_and_all_members_tell_the_same(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    lasting = grant(etcdctl, 500)
    etcdctl("put", f"{prefix}lasting", "v", f"--lease={lasting}")
    brief = grant(etcdctl, 6)
    etcdctl("put", f"{prefix}brief", "v", f"--lease={brief}")
    mortal.kill_leaders(2)
    for endpoint in mortal.endpoints:
        one = Etcdctl((endpoint,))
        assert f"{lasting}\n" in one("lease", "list")
        look = one.json("lease", "timetolive", lasting, "--keys")
        assert (look["granted-ttl"], len(look["keys"])) == (500, 1)
        assert 400 < look["ttl"] <= 500
    until(lambda: etcdctl("get", f"{prefix}brief") == "", 30)
    assert etcdctl("lease", "timetolive", brief) == f"lease {brief} already expired\n"
    assert etcdctl("get", f"{prefix}lasting", "--print-value-only") == "v\n"


def test_a_lock_stays_held(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    with running(mortal, "lock", f"{prefix}l") as holder:
        holder.wait(lambda lines: lines)
        with running(mortal, "lock", f"{prefix}l") as waiter:
            until(lambda: etcdctl.json("get", f"{prefix}l/", "--prefix").get("count") == 2)
            mortal.kill_leaders(2)
            assert waiter.lines == []
            assert holder.process.poll() is None
            holder.close()
            waiter.wait(lambda lines: lines, 30)
            assert waiter.lines[0].startswith(f"{prefix}l/")


def test_the_lock_of_a_dead_holder_passes_on(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    with running(mortal, "lock", "--ttl=3", f"{prefix}l") as holder:
        holder.wait(lambda lines: lines)
        with running(mortal, "lock", "--ttl=10", f"{prefix}l") as waiter:
            until(lambda: etcdctl.json("get", f"{prefix}l/", "--prefix").get("count") == 2)
            holder.process.kill()  # with no chance to revoke its lease
            mortal.kill_leaders(1)
            waiter.wait(lambda lines: lines, 30)
            assert etcdctl("get", f"{prefix}l/", "--prefix", "--keys-only").split() == [waiter.lines[0]]


def test_a_lock_around_a_command(cluster: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    done = etcdctl.run("lock", f"{prefix}l", "--", "sh", "-c", 'echo "$ETCD_LOCK_KEY $ETCD_LOCK_REV"; exit 7')
    assert (done.returncode, done.stderr) == (1, "Error: exit status 7\n")
    key, revision = done.stdout.split()
    assert key.startswith(f"{prefix}l/")
    assert int(revision) > 0
    assert etcdctl("get", f"{prefix}l/", "--prefix") == "", "and unlocked after it"


def test_an_election_outlives_leaders(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    name = f"{prefix}e"
    with (
        running(mortal, "elect", name, "first") as first,
        running(mortal, "elect", "-l", name) as observer,
    ):
        first.wait(lambda lines: "first" in lines)
        observer.wait(lambda lines: "first" in lines)
        with running(mortal, "elect", name, "second") as second:
            until(lambda: etcdctl.json("get", f"{name}/", "--prefix").get("count") == 2)
            mortal.kill_leaders(2)
            assert "second" not in second.lines
            first.close()
            second.wait(lambda lines: "second" in lines, 30)
            observer.wait(lambda lines: "second" in lines, 30)


def test_a_dead_candidate_is_followed_by_the_next(mortal: Cluster, etcdctl: Etcdctl, prefix: str) -> None:
    """etcdctl's candidates have a lease of 60 s: here it is revoked, as its expiry would do."""
    name = f"{prefix}e"
    with running(mortal, "elect", name, "first") as first, running(mortal, "elect", name, "second") as second:
        until(lambda: etcdctl.json("get", f"{name}/", "--prefix").get("count") == 2)
        leader, follower = (first, second) if "first" in first.lines else (second, first)
        leader.process.kill()
        oldest = etcdctl.json("get", f"{name}/", "--prefix", "--sort-by=CREATE", "--limit=1")["kvs"][0]
        mortal.kill_leaders(1)
        etcdctl("lease", "revoke", f"{oldest['lease']:x}")
        follower.wait(lambda lines: "first" in lines or "second" in lines, 30)
