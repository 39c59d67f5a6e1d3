"""The SDK's puts over its stream, 100 concurrent callers in one process; beside them aetcd's callers on etcd.

Ways of a put on the raftkv cluster: exactly once (numbered in a session, over the stream: what `put` does), the same
over a stream to the leader, the stream without sessions, and unary (`retry=None`). Both clusters run for the whole
time; rounds alternate, there and back, so that what the machine does otherwise meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aetcd
from common import Report, arguments, cluster_of, cpu_s, kinds, spread

from raftkv import AsyncClient, RaftkvError
from raftkv.client.pipeline import Pipeline
from raftkv.client.session import ServerSession, Sessions
from raftkv.local import AsyncLocalCluster

Put = Callable[[bytes, bytes], Awaitable[int]]
"""Put a value under a key; gives the revision."""
FAILURES = (RaftkvError, aetcd.ClientError)
RATIO_GOAL = 2.5
COST_GOAL = 0.10


class _NoSession(ServerSession):
    """Numbers that nobody looks at: the server executes whatever comes, as often as it comes."""

    def __init__(self) -> None:
        super().__init__(0)
        self.first_incomplete = 0

    def has_room(self) -> bool:
        return True

    def take(self) -> int:
        return 0

    def complete(self, seq: int) -> None:
        pass


class _NoSessions(Sessions):
    """Always room, and nothing is ever opened in the cluster."""

    def __init__(self) -> None:
        super().__init__()
        self._none = _NoSession()

    def with_room(self) -> ServerSession:
        return self._none


class Way:
    """One way to put, and what its callers were promised."""

    def __init__(self, name: str, cluster: AsyncLocalCluster, options: argparse.Namespace) -> None:
        self.name = name
        self.cluster = cluster
        self.options = options
        self.promised: dict[bytes, tuple[bytes, int]] = {}
        self.rates: list[float] = []
        self.latencies: list[float] = []
        self.cpu_us: dict[str, list[float]] = {}  # of a put, by process
        self.errors = 0
        self._serial = 0

    async def round(self, seconds: float, *, count: bool) -> float:
        """Put for so long. Returns puts a second."""
        leader = await self.cluster.wait_leader()
        pids = {row.name: row.pid for row in await self.cluster.status() if row.pid}
        async with contextlib.AsyncExitStack() as stack:
            put = await stack.enter_async_context(WAYS[self.name](self.cluster, leader))
            await put(b"warm", b"")
            nodes_before, own_before, before = _cpu_s(pids), time.process_time(), time.monotonic()
            until = before + seconds
            done = await asyncio.gather(*(self._call(put, until) for _ in range(self.options.callers)))
            passed = time.monotonic() - before
            own, nodes = time.process_time() - own_before, _cpu_s(pids)
        puts = sum(len(each) for each in done)
        if count and puts:
            self.rates.append(puts / passed)
            self.latencies += [latency for each in done for latency in each]
            costs = {"client": own, "leader": nodes[leader] - nodes_before[leader]}
            others = [nodes[name] - nodes_before[name] for name in pids if name != leader]
            costs |= {"follower": statistics.mean(others), "busiest follower": max(others)} if others else {}
            costs["all"] = own + sum(nodes.values()) - sum(nodes_before.values())
            for process, spent_s in costs.items():
                self.cpu_us.setdefault(process, []).append(spent_s * 1e6 / puts)
        return puts / passed

    async def _call(self, put: Put, until: float) -> list[float]:
        latencies = []
        while (sent := time.monotonic()) < until:
            self._serial += 1
            key = b"session/%s/%08d" % (self.name.encode(), self._serial)
            value = (b"%d." % self._serial).ljust(self.options.value_bytes, b"v")
            try:
                revision = await put(key, value)
            except FAILURES:
                self.errors += 1
                continue
            latencies.append((time.monotonic() - sent) * 1000)
            self.promised[key] = (value, revision)
        return latencies

    async def figures(self) -> dict[str, Any]:
        """What was found, everything promised read back."""
        prefix = b"session/%s/" % self.name.encode()
        async with AsyncClient(self.cluster.endpoints) as client:
            there = {item.key: (item.value, item.mod_revision) async for item in client.scan(prefix, timeout=60.0)}
        return {
            "puts_per_s": round(statistics.median(self.rates)),
            "rounds": [round(rate) for rate in self.rates],
            "latency_ms": spread(self.latencies),
            "cpu_us_per_put": {name: round(statistics.median(costs)) for name, costs in self.cpu_us.items()},
            "errors": self.errors,
            "acknowledged": len(self.promised),
            "lost": sum(there.get(key) != promise for key, promise in self.promised.items()),
        }


def _cpu_s(pids: dict[str, int]) -> dict[str, float]:
    return {name: cpu_s(pid) for name, pid in pids.items()}


@contextlib.asynccontextmanager
async def exactly_once(cluster: AsyncLocalCluster, leader: str) -> AsyncIterator[Put]:
    """As every user of the SDK puts."""
    async with AsyncClient(cluster.endpoints) as client:

        async def put(key: bytes, value: bytes) -> int:
            return (await client.put(key, value)).revision

        yield put


@contextlib.asynccontextmanager
async def direct(cluster: AsyncLocalCluster, leader: str) -> AsyncIterator[Put]:
    """Exactly once, over a stream to the leader: a hop less, and the failover is the client's to notice."""
    async with AsyncClient(cluster.endpoints, routing="leader") as client:

        async def put(key: bytes, value: bytes) -> int:
            return (await client.put(key, value)).revision

        yield put


@contextlib.asynccontextmanager
async def stream(cluster: AsyncLocalCluster, leader: str) -> AsyncIterator[Put]:
    """The same stream, but the requests are of no session: what exactly-once costs is the difference."""
    async with AsyncClient(cluster.endpoints) as client:
        pool = client._context.pool
        pipeline = pool.parts["pipeline"] = Pipeline(pool)
        pipeline._sessions = _NoSessions()

        async def put(key: bytes, value: bytes) -> int:
            return (await client.put(key, value)).revision

        yield put


@contextlib.asynccontextmanager
async def unary(cluster: AsyncLocalCluster, leader: str) -> AsyncIterator[Put]:
    """A gRPC call a put, nothing repeated."""
    async with AsyncClient(cluster.endpoints, retry=None) as client:

        async def put(key: bytes, value: bytes) -> int:
            return (await client.put(key, value)).revision

        yield put


@contextlib.asynccontextmanager
async def foreign(cluster: AsyncLocalCluster, leader: str) -> AsyncIterator[Put]:
    """What Python users of etcd have, connected to the leader: the quickest way."""
    host, port = cluster.endpoint(leader).rsplit(":", 1)
    async with aetcd.Client(host, int(port)) as client:

        async def put(key: bytes, value: bytes) -> int:
            revision: int = (await client.put(key, value)).header.revision
            return revision

        yield put


WAYS: dict[str, Callable[[AsyncLocalCluster, str], contextlib.AbstractAsyncContextManager[Put]]] = {
    "exactly-once": exactly_once,
    "direct": direct,
    "stream": stream,
    "unary": unary,
    "aetcd-etcd": foreign,
}


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--callers", type=int, default=100, help="concurrent callers")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a round")
    parser.add_argument("--value-bytes", type=int, default=128, help="length of a value")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only this way; may be given again")
    options = parser.parse_args()
    report = Report("session", options)
    async with contextlib.AsyncExitStack() as stack:
        clusters = {kind: await stack.enter_async_context(cluster_of(kind, options)) for kind in kinds(options)}
        ways = []
        for name in options.way or WAYS:
            kind = "etcd" if name == "aetcd-etcd" else "raftkv"
            if kind in clusters:
                ways.append(Way(name, clusters[kind], options))
        for way in ways:
            await way.round(1.0, count=False)
        for number in range(options.rounds):
            # There and back, or one of them would always come after what another leaves behind on the disk.
            for way in ways[:: -1 if number % 2 else 1]:
                rate = await way.round(options.seconds, count=True)
                report.line(f"round {number + 1} {way.name:>12}: {rate:8.0f} puts/s")
        for way in ways:
            figures = await way.figures()
            report.add(way.name, figures)
            report.line(f"{way.name}: {figures}")
    _judge(report, {way.name: way for way in ways})
    return report.finish()


def _judge(report: Report, ways: dict[str, Way]) -> None:
    """Ratios of rounds that stood side by side; their median does not mind a round that was disturbed."""
    ours = ways.get("exactly-once")
    if ours is None:
        return
    for name, way in ways.items():
        if way is not ours:
            ratio = statistics.median(mine / other for mine, other in zip(ours.rates, way.rates, strict=True))
            report.add(f"ratio to {name}", round(ratio, 3))
            report.line(f"exactly-once has {ratio:.2f} times the puts of {name}")
            if name == "aetcd-etcd":
                report.goal(f"at least {RATIO_GOAL} times what aetcd gets from etcd: {ratio:.2f}", ratio >= RATIO_GOAL)
            if name == "stream":
                report.goal(f"exactly-once costs at most {COST_GOAL:.0%}: {1 - ratio:.0%}", 1 - ratio <= COST_GOAL)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
