"""How long a cluster takes no writes when its leader goes away.

    python bench/failover.py --mode kill            SIGKILL, under load, 50 times
                             --mode stop            SIGSTOP: the process is frozen, its connections stay open
                             --mode term            SIGTERM: a planned stop, leadership is handed over
                             --mode rejoin          nobody leads worse for it: a killed follower comes back

The gap is the longest time without an acknowledged write around the event, seen by all callers together. Several
clients of the SDK write without pause, each with all endpoints. At the end every acknowledged write is read back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time

from common import Report, arguments, cluster_of, kinds, spread

from raftkv import AsyncClient
from raftkv.local import AsyncLocalCluster
from raftkv.local.load import Gap, Load

GOALS_MS = {"kill": (60, 150), "stop": (600, 1200), "term": (None, 100), "rejoin": (None, None)}
WINDOW_S = 0.5  # after the event is over, in which its gap may still show


async def measure(kind: str, options: argparse.Namespace, times: int, report: Report) -> dict[str, object]:
    """All events on one cluster."""
    gaps: list[Gap] = []
    calm: list[float] = []
    deadline = time.monotonic() + options.limit_s
    async with cluster_of(kind, options) as cluster, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(cluster.endpoints)) for _ in range(options.clients)]
        load = Load(*clients, writers=options.writers, readers=0, pause_s=options.pause_ms / 1000, prefix="bench/")
        async with load:
            await load.wait_writes(200, timeout_s=20)
            for number in range(times):
                if time.monotonic() > deadline:
                    report.line(f"{kind}: stopped after {number} of {times}: the time limit is reached")
                    break
                settled = time.monotonic()
                await asyncio.sleep(options.settle_s)
                calm.append(load.gap(settled, time.monotonic()).length_ms)
                gap = await EVENTS[options.mode](cluster, load)
                gaps.append(gap)
                report.line(f"{kind} {number + 1:3d}: {gap.length_ms:8.1f} ms")
        verdict = await load.verify(clients[0])
        latencies = [(done - sent) * 1000 for sent, done in load.writes]
    return {
        "gap_ms": spread([gap.length_ms for gap in gaps]),
        "calm_gap_ms": spread(calm),
        "write_latency_ms": spread(latencies),
        "writes": len(load.writes),
        "errors": dict(load.errors),
        "error_texts": load.error_texts[:5],
        "acknowledged": verdict.acknowledged,
        "found": verdict.found,
        "lost": len(verdict.lost),
        "lost_lines": verdict.lost[:20],
        "unknown": verdict.unknown,
        "gaps_ms": [round(gap.length_ms, 1) for gap in gaps],
    }


async def _over(cluster: AsyncLocalCluster, load: Load, since: float, gone: str) -> Gap:
    """Wait until writes flow again under another leader, and take the gap."""
    await cluster.wait_leader(other_than=gone, timeout_s=30)
    await load.wait_writes(30, timeout_s=30)
    await asyncio.sleep(WINDOW_S)
    return load.gap(since, time.monotonic())


async def kill(cluster: AsyncLocalCluster, load: Load) -> Gap:
    """SIGKILL the leader, restart it afterwards."""
    leader = await cluster.wait_leader()
    since = time.monotonic()
    cluster.process(leader).kill()
    gap = await _over(cluster, load, since, leader)
    await cluster.restart(leader)
    return gap


async def stop(cluster: AsyncLocalCluster, load: Load) -> Gap:
    """Freeze the leader, let it go on afterwards."""
    leader = await cluster.wait_leader()
    since = time.monotonic()
    await cluster.pause(leader)
    gap = await _over(cluster, load, since, leader)
    await cluster.resume(leader)
    await cluster.wait_healthy()
    return gap


async def term(cluster: AsyncLocalCluster, load: Load) -> Gap:
    """Ask the leader to end, restart it afterwards."""
    leader = await cluster.wait_leader()
    since = time.monotonic()
    await cluster.stop(leader)
    gap = await _over(cluster, load, since, leader)
    await cluster.restart(leader)
    return gap


async def rejoin(cluster: AsyncLocalCluster, load: Load) -> Gap:
    """Kill a follower; what is measured is its return."""
    follower = (await cluster.resolve("followers"))[0]
    await cluster.kill(follower)
    await asyncio.sleep(1.0)
    since = time.monotonic()
    await cluster.restart(follower)
    await asyncio.sleep(WINDOW_S)
    return load.gap(since, time.monotonic())


EVENTS = {"kill": kill, "stop": stop, "term": term, "rejoin": rejoin}


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=list(EVENTS), default="kill", help="what happens to the leader")
    parser.add_argument("--times", type=int, default=50, help="how often, for raftkv")
    parser.add_argument("--etcd-times", type=int, default=10, help="how often, for etcd")
    parser.add_argument("--writers", type=int, default=10, help="concurrent writers")
    parser.add_argument("--clients", type=int, default=5, help="clients the writers share")
    parser.add_argument("--pause-ms", type=float, default=5.0, help="between two writes of a writer")
    parser.add_argument("--settle-s", type=float, default=0.7, help="calm before each event")
    parser.add_argument("--limit-s", type=float, default=400.0, help="no new event after so long, per cluster")
    options = parser.parse_args()
    report = Report(f"failover, {options.mode}", options)
    found = {}
    for kind in kinds(options):
        found[kind] = await measure(kind, options, options.times if kind == "raftkv" else options.etcd_times, report)
        report.add(kind, found[kind])
    for kind, figures in found.items():
        report.line(f"{kind}: gap {figures['gap_ms']} ms; calm {figures['calm_gap_ms']} ms")
        report.line(f"{kind}: {figures['writes']} writes, latency {figures['write_latency_ms']} ms")
        report.line(f"{kind}: errors callers saw {figures['errors'] or 'none'}, lost {figures['lost']}")
    ours = found["raftkv"]["gap_ms"]
    if "etcd" in found:
        ratio = round(ours["p50"] / max(0.01, found["etcd"]["gap_ms"]["p50"]), 3)
        report.add("ratio_p50", ratio)
        report.line(f"ratio of the medians, raftkv to etcd: {ratio}")
    for name, goal in zip(("p50", "p99"), GOALS_MS[options.mode], strict=True):
        if goal is not None:
            report.goal(f"{name} of the gap at most {goal} ms: {ours[name]}", ours[name] <= goal)
    if options.mode == "rejoin":
        calm = found["raftkv"]["calm_gap_ms"]["max"]
        report.goal(f"no gap: {ours['p99']} ms at rejoin, {calm} ms at most in calm", ours["p99"] <= max(50, 2 * calm))
    report.goal("no acknowledged write lost", found["raftkv"]["lost"] == 0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
