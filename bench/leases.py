"""Leases: what 100,000 of them cost the leader while they are kept alive, and what puts feel when all of them end.

Granted over the SDK, kept alive by one plain gRPC stream of keepalives to each of some nodes, spread evenly over the
time to live as independent clients would do it. Then nobody renews them any more, and all run out together, while one
caller goes on putting. Every lease has a key, so that the end of a lease is seen: none too early, all in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from typing import Any

import grpc
import grpc.aio
from common import Report, arguments, cluster_of, cpu_s, kinds, spread

from raftkv import AsyncClient
from raftkv._pb import lease_pb2
from raftkv.local import AsyncLocalCluster

KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
CORE_SHARE = 0.5
"""Of a core, for the leader, with as many keepalives as 100,000 leases of 10 minutes need."""
STALL_MS = 1_000.0


class Granted:
    """The leases of one run."""

    def __init__(self, cluster: AsyncLocalCluster, options: argparse.Namespace) -> None:
        self.cluster = cluster
        self.options = options
        self.count: int = options.leases
        self.renewed = [0.0] * self.count  # when the last renewal that was confirmed was sent
        self.answers = 0
        self.gone = 0  # keepalives that were told so

    async def grant(self) -> float:
        """Grant all, with a key each. Returns how many a second."""
        numbers = iter(range(self.count))
        begun = time.monotonic()

        async def caller(client: AsyncClient) -> None:
            for number in numbers:
                self.renewed[number] = time.monotonic()
                await client.grant_lease(self.options.ttl_s, id=number + 1)
                await client.put(b"leases/%08d" % number, b"", lease=number + 1)

        async with AsyncClient(self.cluster.endpoints, timeout=60.0) as client, asyncio.TaskGroup() as tasks:
            for _ in range(100):
                tasks.create_task(caller(client))
        return self.count / (time.monotonic() - begun)

    async def keep(self, seconds: float, every_s: float) -> None:
        """Renew each every so many seconds, evenly spread over the nodes and the time."""
        names = self.cluster.names
        until = time.monotonic() + seconds
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            for place, name in enumerate(names):
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(self.cluster.endpoint(name)))
                mine = range(place, self.count, len(names))
                tasks.create_task(self._keep_at(channel, mine, until, every_s))

    async def _keep_at(self, channel: grpc.aio.Channel, mine: range, until: float, every_s: float) -> None:
        call = channel.stream_stream(
            KEEP_ALIVE,
            request_serializer=lease_pb2.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=lease_pb2.LeaseKeepAliveResponse.FromString,
        )()
        sent: dict[int, float] = {}
        begun = time.monotonic()
        asked = 0

        async def listen() -> None:
            while isinstance(response := await call.read(), lease_pb2.LeaseKeepAliveResponse):
                self.answers += 1
                if response.TTL > 0:
                    self.renewed[response.ID - 1] = sent[response.ID]
                else:
                    self.gone += 1

        listening = asyncio.create_task(listen())
        while (now := time.monotonic()) < until:
            due = int((now - begun) / every_s * len(mine))
            for turn in range(asked, due):
                lease = mine[turn % len(mine)] + 1
                sent[lease] = time.monotonic()
                await call.write(lease_pb2.LeaseKeepAliveRequest(ID=lease))
            asked = max(asked, due)
            await asyncio.sleep(0.02)
        await call.done_writing()
        await asyncio.wait_for(listening, 30)


async def alive(cluster: AsyncLocalCluster, options: argparse.Namespace, report: Report, kind: str) -> dict[str, Any]:
    """Grant, keep, let go."""
    granted = Granted(cluster, options)
    rate = await granted.grant()
    report.line(f"{kind}: {granted.count} leases of {options.ttl_s:g} s granted, {rate:.0f} a second")
    leader = await cluster.wait_leader()
    pids = {row.name: row.pid for row in await cluster.status() if row.pid}

    async def shares(during: float, keep: bool) -> dict[str, float]:
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        begun = time.monotonic()
        await (granted.keep(during, options.ttl_s / 3) if keep else asyncio.sleep(during))
        passed = time.monotonic() - begun
        spent = {name: (cpu_s(pid) - before[name]) / passed for name, pid in pids.items()}
        others = [share for name, share in spent.items() if name != leader]
        return {"leader": round(spent[leader], 3), "others": round(sum(others) / max(1, len(others)), 3)}

    idle = await shares(options.seconds / 2, keep=False)
    kept = await shares(options.seconds, keep=True)
    figures = {
        "granted_per_s": round(rate),
        "keepalives_per_s": round(granted.answers / options.seconds),
        "core_share_idle": idle,
        "core_share_kept": kept,
        "us_per_keepalive_on_leader": round(
            (kept["leader"] - idle["leader"]) * options.seconds * 1e6 / granted.answers
        ),
        "rss_mb": [round((row.rss_bytes or 0) / 1e6) for row in await cluster.status()],
        "lost": granted.gone,
    }
    report.line(f"{kind}: {figures}")
    return figures


async def ending(cluster: AsyncLocalCluster, options: argparse.Namespace, report: Report, kind: str) -> dict[str, Any]:
    """All leases run out together, while somebody puts."""
    granted = Granted(cluster, argparse.Namespace(leases=options.leases, ttl_s=options.end_ttl_s))
    left: list[tuple[float, int]] = []
    quiet: list[float] = []
    busy: list[float] = []
    async with AsyncClient(cluster.endpoints, timeout=60.0) as client:

        async def put(times: list[float]) -> None:
            before = time.monotonic()
            await client.put(b"beside", b"v" * 128)
            times.append((time.monotonic() - before) * 1000)
            await asyncio.sleep(0.01)

        for _ in range(200):
            await put(quiet)
        await granted.grant()
        early = 0
        ended = 0.0
        limit = max(granted.renewed) + options.end_ttl_s + options.leases / 200 + 60
        look_at = min(granted.renewed) + options.end_ttl_s - 1
        while time.monotonic() < limit:
            before = time.monotonic()
            if before > look_at:
                look_at = before + 1.0
                answer = await client.range("leases/", prefix=True, count_only=True)
                left.append((round(time.monotonic() - max(granted.renewed) - options.end_ttl_s, 1), answer.count))
                live = sum(sent + options.end_ttl_s > time.monotonic() for sent in granted.renewed)
                early = max(early, live - answer.count)
                if not answer.count:
                    ended = time.monotonic()
                    break
            await put(busy if left and left[-1][1] < granted.count else quiet)
    figures = {
        "ended_s_after_the_last_was_due": round(ended - max(granted.renewed) - options.end_ttl_s, 1) if ended else None,
        "put_ms_before": spread(quiet),
        "put_ms_during": spread(busy),
        "left": left[:: max(1, len(left) // 20)],
        "lost": early + (0 if ended else left[-1][1]),
    }
    report.line(f"{kind}: {figures}")
    return figures


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--leases", type=int, default=100_000, help="how many")
    parser.add_argument("--ttl-s", type=float, default=600.0, help="time to live of those that are kept alive")
    parser.add_argument("--end-ttl-s", type=float, default=120.0, help="time to live of those that run out")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long they are kept alive")
    options = parser.parse_args()
    report = Report("leases", options)
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds(options):
        found[kind] = {}
        for name, part in (("alive", alive), ("ending", ending)):
            async with cluster_of(kind, options) as cluster:
                found[kind][name] = await part(cluster, options, report, kind)
        report.add(kind, found[kind])
    ours = found["raftkv"]
    share = ours["alive"]["core_share_kept"]["leader"]
    report.goal(f"at most {CORE_SHARE:g} of a core on the leader: {share}", share <= CORE_SHARE)
    longest = ours["ending"]["put_ms_during"]["max"]
    report.goal(f"no put waits longer than {STALL_MS:g} ms while all end: {longest}", longest <= STALL_MS)
    return report.finish()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
