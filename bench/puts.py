"""What a foreign client gets: unary puts through aetcd, 100 concurrent callers, against raftkv and etcd in turn.

Both clusters run for the whole time; rounds alternate, so that what the machine does otherwise meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time

import aetcd
from common import Report, arguments, cluster_of, kinds, spread

from raftkv import AsyncClient
from raftkv.local import AsyncLocalCluster


class Callers:
    """Concurrent callers on one cluster, who remember what was promised."""

    def __init__(self, cluster: AsyncLocalCluster, options: argparse.Namespace) -> None:
        self.cluster = cluster
        self.options = options
        self.promised: dict[bytes, tuple[bytes, int]] = {}
        self.rates: list[float] = []
        self.latencies: list[float] = []
        self.errors = 0
        self._serial = 0

    async def round(self, seconds: float, *, count: bool) -> float:
        """Put for so long. Returns puts a second."""
        leader = await self.cluster.wait_leader()
        names = {"leader": [leader], "followers": [name for name in self.cluster.names if name != leader]}
        chosen = names.get(self.options.to, list(self.cluster.names))
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for name in chosen:
                host, port = self.cluster.endpoint(name).rsplit(":", 1)
                clients.append(await stack.enter_async_context(aetcd.Client(host, int(port))))
            for client in clients:  # connected, so that the first call is not a slow one
                await client.get(b"warm")
            before = time.monotonic()
            until = before + seconds
            done = await asyncio.gather(
                *(self._call(clients[n % len(clients)], until) for n in range(self.options.callers))
            )
            passed = time.monotonic() - before
        rate = sum(len(each) for each in done) / passed
        if count:
            self.rates.append(rate)
            self.latencies += [latency for each in done for latency in each]
        return rate

    async def _call(self, client: aetcd.Client, until: float) -> list[float]:
        latencies = []
        while (sent := time.monotonic()) < until:
            self._serial += 1
            key = b"puts/%08d" % self._serial
            value = (b"%d." % self._serial).ljust(self.options.value_bytes, b"v")
            try:
                answer = await client.put(key, value)
            except aetcd.ClientError:
                self.errors += 1
                continue
            latencies.append((time.monotonic() - sent) * 1000)
            self.promised[key] = (value, answer.header.revision)
        return latencies

    async def verify(self) -> int:
        """Read everything back; returns how many promises were not kept."""
        async with AsyncClient(self.cluster.endpoints) as client:
            there = {item.key: (item.value, item.mod_revision) async for item in client.scan("puts/", timeout=60.0)}
        return sum(there.get(key) != promise for key, promise in self.promised.items())


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--callers", type=int, default=100, help="concurrent callers")
    parser.add_argument("--rounds", type=int, default=3, help="rounds on each cluster")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a round")
    parser.add_argument("--value-bytes", type=int, default=128, help="length of a value")
    parser.add_argument("--to", choices=["leader", "followers", "all"], default="leader", help="whom the callers ask")
    options = parser.parse_args()
    report = Report("puts", options)
    async with contextlib.AsyncExitStack() as stack:
        callers = {}
        for kind in kinds(options):
            callers[kind] = Callers(await stack.enter_async_context(cluster_of(kind, options)), options)
        for each in callers.values():
            await each.round(1.0, count=False)
        for number in range(options.rounds):
            for kind, each in callers.items():
                report.line(
                    f"round {number + 1} {kind:>6}: {await each.round(options.seconds, count=True):8.0f} puts/s"
                )
        medians = {}
        for kind, each in callers.items():
            medians[kind] = statistics.median(each.rates)
            rows = await each.cluster.status()
            figures = {
                "puts_per_s": round(medians[kind]),
                "latency_ms": spread(each.latencies),
                "errors": each.errors,
                "acknowledged": len(each.promised),
                "lost": await each.verify(),
                "rss_mb": [round((row.rss_bytes or 0) / 1e6) for row in rows],
            }
            report.add(kind, figures)
            report.line(f"{kind}: {figures}")
    if "etcd" in medians:
        ratio = medians["raftkv"] / medians["etcd"]
        report.add("ratio", round(ratio, 3))
        report.goal(f"at least 0.45 of etcd's puts: {ratio:.2f}", ratio >= 0.45)
    return report.finish()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
