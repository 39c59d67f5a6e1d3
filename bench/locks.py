"""Locks as a Python user gets them: pairs of lock and unlock that nobody contends for, and the way from hand to hand.

Ours by the SDK; on etcd by aetcd and, where it is installed, etcd3aio, and by our SDK as well. Both clusters run for
the whole time; rounds alternate, so that what the machine does otherwise meets all of them. Each round's client is a
process of its own: aetcd and etcd3aio cannot live in one interpreter. A hand-over is the time from the release being
asked for until the next one has the lock; each holder has a client of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from common import Report, arguments, cluster_of, cpu_s, kinds, spread

from raftkv import AsyncClient
from raftkv.local import AsyncLocalCluster

Lock = Callable[[str], contextlib.AbstractAsyncContextManager[object]]
"""A lock on a name; what it gives has a `fence` if it knows one."""
TTL_S = 30
RATIO_GOAL = 1.0
RATIO_AIM = 3.0
PARTS = ("alone", "contended")


# --- the ways to lock; the leader's endpoint is the first -------------------------------------------------------------


@contextlib.asynccontextmanager
async def by_sdk(endpoints: list[str]) -> AsyncIterator[Lock]:
    """As our users lock."""
    async with AsyncClient(endpoints) as client:
        yield lambda name: client.lock(name, ttl=TTL_S)


@contextlib.asynccontextmanager
async def by_aetcd(endpoints: list[str]) -> AsyncIterator[Lock]:
    """aetcd, connected to the leader, which is the best it can have."""
    host, port = endpoints[0].rsplit(":", 1)
    async with importlib.import_module("aetcd").Client(host, int(port)) as client:

        @contextlib.asynccontextmanager
        async def lock(name: str) -> AsyncIterator[object]:
            held = client.lock(name.encode(), TTL_S)
            assert await held.acquire(timeout=None)
            try:
                yield held
            finally:
                await held.release()

        yield lock


@contextlib.asynccontextmanager
async def by_etcd3aio(endpoints: list[str]) -> AsyncIterator[Lock]:
    """etcd3aio, connected to the leader."""
    async with importlib.import_module("etcd3aio").Etcd3Client(endpoints[:1]) as client:
        yield lambda name: client.lock(name, ttl=TTL_S)


WAYS = {"sdk": by_sdk, "aetcd": by_aetcd, "etcd3aio": by_etcd3aio}


# --- a round, in a process of its own ---------------------------------------------------------------------------------


async def alone(way: str, endpoints: list[str], seconds: float) -> dict[str, Any]:
    """One caller, a new name each time."""
    times = []
    async with WAYS[way](endpoints) as lock:
        for number in range(10):
            async with lock(f"warm/{way}/{number}"):
                pass
        cpu, begun = time.process_time(), time.monotonic()
        while (before := time.monotonic()) < begun + seconds:
            async with lock(f"alone/{way}/{before}"):
                pass
            times.append((time.monotonic() - before) * 1000)
        return {"times": times, "passed": time.monotonic() - begun, "cpu": time.process_time() - cpu, "overlaps": 0}


async def contended(way: str, endpoints: list[str], seconds: float, holders: int, hold_s: float) -> dict[str, Any]:
    """All holders want the same name."""
    name = f"contended/{way}/{time.time()}"
    times = []
    inside = overlaps = fence = 0
    released = until = 0.0
    async with contextlib.AsyncExitStack() as stack:
        locks = [await stack.enter_async_context(WAYS[way](endpoints)) for _ in range(holders)]
        for number, lock in enumerate(locks):
            async with lock(f"warm/{way}/{number}"):
                pass

        async def holder(lock: Lock) -> None:
            nonlocal inside, released, fence, overlaps
            while time.monotonic() < until:
                async with lock(name) as held:
                    if released:
                        times.append((time.monotonic() - released) * 1000)
                    inside += 1
                    token = getattr(held, "fence", fence + 1)
                    overlaps += inside > 1 or token <= fence
                    fence = token
                    if hold_s:
                        await asyncio.sleep(hold_s)
                    inside -= 1
                    released = time.monotonic()

        cpu, begun = time.process_time(), time.monotonic()
        until = begun + seconds
        async with asyncio.TaskGroup() as tasks:
            for lock in locks:
                tasks.create_task(holder(lock))
        passed, cpu = time.monotonic() - begun, time.process_time() - cpu
    return {"times": times, "passed": passed, "cpu": cpu, "overlaps": overlaps}


# --- all of it --------------------------------------------------------------------------------------------------------


class Side:
    """One way of locking on one cluster, and what was seen of it."""

    def __init__(self, name: str, way: str, cluster: AsyncLocalCluster, options: argparse.Namespace) -> None:
        self.name = name
        self.way = way
        self.cluster = cluster
        self.options = options
        self.rates: dict[str, list[float]] = {}
        self.times_ms: dict[str, list[float]] = {}
        self.cpu_us: dict[str, dict[str, list[float]]] = {}  # of a pair, by process
        self.overlaps = 0

    async def round(self, part: str) -> float:
        """One round of a part. Returns pairs, or hand-overs, a second."""
        leader = await self.cluster.wait_leader()
        names = [leader, *(name for name in self.cluster.names if name != leader)]
        pids = [row.pid for row in await self.cluster.status() if row.pid]
        options = self.options
        before = sum(map(cpu_s, pids))
        command = (
            *(sys.executable, __file__, "--round", part, "--way", self.way),
            *("--endpoints", ",".join(map(self.cluster.endpoint, names)), "--seconds", str(options.seconds)),
            *("--holders", str(options.holders), "--hold-ms", str(options.hold_ms)),
        )
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said, _ = await child.communicate()
        if child.returncode:
            raise SystemExit(f"{self.name}: the round failed")
        found = json.loads(said)
        times = found["times"]
        rate = len(times) / found["passed"]
        self.rates.setdefault(part, []).append(rate)
        self.times_ms.setdefault(part, []).extend(times)
        costs = self.cpu_us.setdefault(part, {})
        costs.setdefault("client", []).append(found["cpu"] * 1e6 / len(times))
        costs.setdefault("nodes", []).append((sum(map(cpu_s, pids)) - before) * 1e6 / len(times))
        self.overlaps += found["overlaps"]
        return rate

    def figures(self) -> dict[str, Any]:
        """What was found; `lost` counts the times when two held it at once, or a token did not grow."""
        found: dict[str, Any] = {"lost": self.overlaps}
        for part, rates in self.rates.items():
            found[part] = {
                "per_s": round(statistics.median(rates), 1),
                "rounds": [round(rate, 1) for rate in rates],
                "ms": spread(self.times_ms[part]),
                "cpu_us": {name: round(statistics.median(costs)) for name, costs in self.cpu_us[part].items()},
            }
        return found


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--holders", type=int, default=16, help="who contend for one lock")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a round")
    parser.add_argument("--hold-ms", type=float, default=0.0, help="how long each holds it")
    parser.add_argument("--round", choices=PARTS, help=argparse.SUPPRESS)  # the rest is for the process of a round
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--endpoints", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.round:
        endpoints = options.endpoints.split(",")
        if options.round == "alone":
            found = await alone(options.way, endpoints, options.seconds)
        else:
            found = await contended(options.way, endpoints, options.seconds, options.holders, options.hold_ms / 1000)
        print(json.dumps(found))
        return 0
    return await measure(options)


async def measure(options: argparse.Namespace) -> int:
    """All rounds."""
    report = Report("locks", options)
    async with contextlib.AsyncExitStack() as stack:
        sides: list[Side] = []
        for kind in kinds(options):
            cluster = await stack.enter_async_context(cluster_of(kind, options))
            ways = ["sdk"] if kind == "raftkv" else ["aetcd", "etcd3aio", "sdk"]
            there = [way for way in ways if way == "sdk" or importlib.util.find_spec(way) is not None]
            sides += [Side(f"{kind} by {way}", way, cluster, options) for way in there]
        for number in range(options.rounds):
            for part in PARTS:
                for side in sides if number % 2 == 0 else reversed(sides):
                    report.line(f"round {number + 1} {side.name:>16} {part:>9}: {await side.round(part):7.1f}/s")
        found = {side.name: side.figures() for side in sides}
    for name, figures in found.items():
        report.add(name, figures)
        for part in PARTS:
            report.line(f"{name} {part}: {figures[part]}")
    for part in PARTS:
        judge(report, found, part)
    return report.finish()


def judge(report: Report, found: dict[str, dict[str, Any]], part: str) -> None:
    """Compare with the better of the clients that etcd's users have: rounds that stood side by side; the median of
    their ratios does not mind a round that was disturbed."""
    theirs = {name: found[name][part]["per_s"] for name in found if name not in ("raftkv by sdk", "etcd by sdk")}
    if theirs:
        best = max(theirs, key=lambda name: theirs[name])
        ours, other = found["raftkv by sdk"][part]["rounds"], found[best][part]["rounds"]
        ratio = statistics.median(mine / its for mine, its in zip(ours, other, strict=True))
        report.add(f"{part}_ratio", round(ratio, 2))
        report.goal(
            f"{part}: at least as many a second as {best}, aim {RATIO_AIM:g} times: {ratio:.2f}", ratio >= RATIO_GOAL
        )


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
