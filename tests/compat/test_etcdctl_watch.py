"""Debian's etcdctl watches, locks and elects; and shares its locks with the Lock service."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import grpc
import pytest

from raftkv._pb import election_pb2 as election
from raftkv._pb import lease_pb2 as lease
from raftkv._pb import lock_pb2 as lock
from tests.compat.clusters import Cluster, Etcdctl
from tests.compat.running import running

pytestmark = [pytest.mark.system, pytest.mark.integration]


def pairs(lines: list[str], prefix: str) -> list[tuple[str, ...]]:
    """What etcdctl prints of events: the type, the key, the value of those with a value."""
    kept = [line for line in lines if line]
    events: list[tuple[str, ...]] = []
    for line in kept:
        if line in ("PUT", "DELETE"):
            events.append((line,))
        elif events:
            events[-1] += (line.removeprefix(prefix),)
    return events


def test_watch_a_prefix_from_a_revision(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}a", "1")["header"]["revision"]
    etcdctl("put", f"{prefix}b", "2")
    etcdctl("put", f"{prefix}a", "3")
    etcdctl("del", f"{prefix}b")
    with running(cluster, "watch", prefix, "--prefix", f"--rev={first + 1}") as watch:
        lines = watch.wait(lambda lines: len(pairs(lines, prefix)) >= 3 and lines[-1] == "")
        etcdctl("put", f"{prefix}later", "4")
        lines = watch.wait(lambda lines: len(pairs(lines, prefix)) >= 4 and "4" in lines)
    assert pairs(lines, prefix) == [("PUT", "b", "2"), ("PUT", "a", "3"), ("DELETE", "b"), ("PUT", "later", "4")]


def test_watch_with_the_value_before(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}a", "old")["header"]["revision"]
    etcdctl("put", f"{prefix}a", "new")
    etcdctl("del", f"{prefix}a")
    with running(cluster, "watch", f"{prefix}a", f"--rev={first}", "--prev-kv", "-w", "json") as watch:
        watch.wait(lambda lines: sum(len(json.loads(line).get("Events", [])) for line in lines) >= 3)
        events = [event for line in watch.lines for event in json.loads(line)["Events"]]
    assert ["prev_kv" in event for event in events] == [False, True, True]
    assert [event.get("type", 0) for event in events] == [0, 0, 1]
    assert events[2]["prev_kv"]["mod_revision"] == events[1]["kv"]["mod_revision"]


def test_watch_interactively(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    with running(cluster, "watch", "-i") as watch:
        watch.say(f"watch {prefix}a")
        watch.say(f"watch {prefix}b --prefix")
        watch.settled()
        etcdctl("put", f"{prefix}a", "1")
        etcdctl("put", f"{prefix}b/x", "2")
        lines = watch.wait(lambda lines: len(pairs(lines, prefix)) >= 2 and "2" in lines)
        watch.say("progress")
        lines = watch.wait(lambda lines: any("progress notify" in line for line in lines))
    assert pairs(lines, prefix)[0] == ("PUT", "a", "1")
    assert "progress notify: 0" not in lines


def compact(etcdctl: Etcdctl, revision: int) -> None:
    """On every member: whichever serves a watch has done it, then."""
    etcdctl("compact", str(revision))
    for endpoint in etcdctl.endpoints:
        Etcdctl((endpoint,))("get", "anything")


def test_watch_a_compacted_revision(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}a", "1")["header"]["revision"]
    last = etcdctl.json("put", f"{prefix}a", "2")["header"]["revision"]
    compact(etcdctl, last)
    with running(cluster, "watch", f"{prefix}a", f"--rev={first}") as watch:
        watch.wait(lambda lines: any("required revision has been compacted" in line for line in lines))
        assert any(
            "watch was canceled (etcdserver: mvcc: required revision has been compacted)" in line
            for line in watch.lines
        )


def test_locks_of_etcdctl_exclude_each_other(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    with running(cluster, "lock", f"{prefix}l") as first:
        first.wait(lambda lines: lines)
        assert first.lines[0].startswith(f"{prefix}l/")
        with running(cluster, "lock", f"{prefix}l") as second:
            time.sleep(0.5)
            assert second.lines == []
            first.close()
            second.wait(lambda lines: lines)


async def call(endpoint: str, method: str, request: Any, answer: Any, timeout_s: float = 60.0) -> Any:
    """An RPC by its path, as any client in any language would."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        unary: Any = channel.unary_unary(method)
        return answer.FromString(await unary(request.SerializeToString(), timeout=timeout_s))


async def test_etcdctl_and_the_lock_service_exclude_each_other(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    name = f"{prefix}l".encode()
    granted = await call(
        cluster.endpoints[0],
        "/etcdserverpb.Lease/LeaseGrant",
        lease.LeaseGrantRequest(TTL=600),
        lease.LeaseGrantResponse,
    )
    request = lock.LockRequest(name=name, lease=granted.ID)
    held = await call(cluster.endpoints[1], "/v3lockpb.Lock/Lock", request, lock.LockResponse)
    assert held.key == name + b"/%x" % granted.ID
    with running(cluster, "lock", name.decode()) as other:
        await asyncio.sleep(0.5)
        assert other.lines == []
        unlock = lock.UnlockRequest(key=held.key)
        await call(cluster.endpoints[2], "/v3lockpb.Lock/Unlock", unlock, lock.UnlockResponse)
        await asyncio.to_thread(other.wait, lambda lines: lines)
        waiter = asyncio.ensure_future(call(cluster.endpoints[0], "/v3lockpb.Lock/Lock", request, lock.LockResponse))
        await asyncio.sleep(0.5)
        assert not waiter.done()
        await asyncio.to_thread(other.close)
        again = await asyncio.wait_for(waiter, 60)
        assert again.key == held.key
    if cluster.kind == "raftkv":
        assert again.fence > held.fence > 0


async def test_etcdctl_and_the_election_service_share_elections(
    etcdctl: Etcdctl, cluster: Cluster, prefix: str
) -> None:
    name = f"{prefix}e"
    request = election.CampaignRequest(name=name.encode(), value=b"service")
    won = await call(cluster.endpoints[0], "/v3electionpb.Election/Campaign", request, election.CampaignResponse)
    with running(cluster, "elect", "-l", name) as observer, running(cluster, "elect", name, "ctl") as candidate:
        await asyncio.to_thread(observer.wait, lambda lines: "service" in lines)
        await asyncio.sleep(0.3)
        assert "ctl" not in candidate.lines
        resign = election.ResignRequest(leader=won.leader)
        await call(cluster.endpoints[1], "/v3electionpb.Election/Resign", resign, election.ResignResponse)
        await asyncio.to_thread(candidate.wait, lambda lines: "ctl" in lines)
        await asyncio.to_thread(observer.wait, lambda lines: "ctl" in lines)
        told = await call(
            cluster.endpoints[2],
            "/v3electionpb.Election/Leader",
            election.LeaderRequest(name=name.encode()),
            election.LeaderResponse,
        )
        assert told.kv.value == b"ctl"


def test_watch_a_range(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}a", "1")["header"]["revision"]
    for key in "bcd":
        etcdctl("put", f"{prefix}{key}", "1")
    with running(cluster, "watch", f"{prefix}b", f"{prefix}d", f"--rev={first}") as watch:
        lines = watch.wait(lambda lines: lines.count("1") == 2)
        etcdctl("put", f"{prefix}d", "outside")
        etcdctl("put", f"{prefix}c", "2")
        lines = watch.wait(lambda lines: "2" in lines)
    assert pairs(lines, prefix) == [("PUT", "b", "1"), ("PUT", "c", "1"), ("PUT", "c", "2")]


def test_watch_runs_a_command_for_each_event(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    script = 'echo "$ETCD_WATCH_REVISION $ETCD_WATCH_EVENT_TYPE $ETCD_WATCH_KEY $ETCD_WATCH_VALUE"'
    first = etcdctl.json("put", f"{prefix}k", "1")["header"]["revision"]
    with running(cluster, "watch", f"{prefix}k", f"--rev={first}", "--", "sh", "-c", script) as watch:
        watch.wait(lambda lines: f'{first} "PUT" "{prefix}k" "1"' in lines)
        etcdctl("del", f"{prefix}k")
        watch.wait(lambda lines: f'{first + 1} "DELETE" "{prefix}k" ""' in lines)


def test_watch_of_a_future_revision(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    now = etcdctl.json("put", f"{prefix}k", "0")["header"]["revision"]
    with running(cluster, "watch", f"{prefix}k", f"--rev={now + 3}", "-w", "json") as watch:
        for number in range(1, 5):
            etcdctl("put", f"{prefix}k", str(number))
        watch.wait(lambda lines: sum(len(json.loads(line).get("Events") or []) for line in lines) >= 2)
        seen = [event["kv"]["mod_revision"] for line in watch.lines for event in json.loads(line).get("Events") or []]
    assert seen == [now + 3, now + 4]


def test_watch_interactively_with_flags_and_mistakes(etcdctl: Etcdctl, cluster: Cluster, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}a", "old")["header"]["revision"]
    etcdctl("put", f"{prefix}a", "new")
    last = etcdctl.json("put", f"{prefix}a", "newest")["header"]["revision"]
    with running(cluster, "watch", "-i") as watch:
        watch.say("nonsense")
        watch.wait(lambda lines: any(line.startswith("Invalid command nonsense") for line in lines))
        watch.say(f"watch {prefix}a --rev={first + 1} --prev-kv")
        lines = watch.wait(lambda lines: "newest" in lines)
        assert lines.count("old") == 1, "as the value before"
        compact(etcdctl, last)
        deadline = time.monotonic() + 60
        while not any("required revision has been compacted" in line for line in watch.lines):
            assert time.monotonic() < deadline, watch.lines
            watch.say(f"watch {prefix}a --rev={first}")  # again: the member it is at may not have compacted yet
            time.sleep(0.2)


def test_watch_before_a_compacted_revision_has_no_previous_value(
    etcdctl: Etcdctl, cluster: Cluster, prefix: str
) -> None:
    etcdctl("put", f"{prefix}a", "1")
    last = etcdctl.json("put", f"{prefix}a", "2")["header"]["revision"]
    etcdctl("put", f"{prefix}a", "3")
    compact(etcdctl, last)
    with running(cluster, "watch", f"{prefix}a", f"--rev={last}", "--prev-kv", "-w", "json") as watch:
        watch.wait(lambda lines: sum(len(json.loads(line).get("Events") or []) for line in lines) >= 2)
        events = [event for line in watch.lines for event in json.loads(line).get("Events") or []]
    assert ["prev_kv" in event for event in events] == [False, True]
