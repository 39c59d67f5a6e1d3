"""Resident memory of the nodes while 100,000 keys are put."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time

from common import Report, arguments, cluster_of, kinds

from raftkv import AsyncClient, RaftkvError


async def measure(kind: str, options: argparse.Namespace, report: Report) -> dict[str, object]:
    """Put everything, look at the memory on the way."""
    promised: dict[bytes, int] = {}
    errors = 0
    samples: list[dict[str, object]] = []
    async with cluster_of(kind, options) as cluster, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(cluster.endpoints)) for _ in range(options.nodes)]
        numbers = iter(range(options.puts))

        async def sample() -> None:
            rss = [round((row.rss_bytes or 0) / 1e6, 1) for row in await cluster.status()]
            samples.append({"puts": len(promised), "rss_mb": rss})
            report.line(f"{kind}: {len(promised):7d} puts, {rss} MB")

        async def caller(client: AsyncClient) -> None:
            nonlocal errors
            for number in numbers:
                if time.monotonic() > until:
                    return
                key = b"memory/%08d" % number
                try:
                    promised[key] = (await client.put(key, b"v" * options.value_bytes)).revision
                except RaftkvError:
                    errors += 1

        await sample()
        before = time.monotonic()
        until = before + options.limit_s
        callers = [asyncio.create_task(caller(clients[n % len(clients)])) for n in range(options.callers)]
        working = asyncio.gather(*callers)
        next_at = step = max(1, options.puts // 5)
        while not working.done():
            await asyncio.wait([working], timeout=0.2)
            if len(promised) >= next_at:
                await sample()
                next_at += step
        await working
        passed = time.monotonic() - before
        await asyncio.sleep(2.0)
        await sample()
        there = {item.key: item.mod_revision async for item in clients[0].scan("memory/", keys_only=True, timeout=60.0)}
    lost = sum(there.get(key) != revision for key, revision in promised.items())
    last = samples[-1]["rss_mb"]
    assert isinstance(last, list)
    return {
        "rss_mb_max": max(last),
        "puts_per_s": round(len(promised) / passed),
        "errors": errors,
        "acknowledged": len(promised),
        "lost": lost,
        "samples": samples,
    }


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__)
    parser.add_argument("--puts", type=int, default=100_000, help="how many keys")
    parser.add_argument("--value-bytes", type=int, default=256, help="length of a value")
    parser.add_argument("--callers", type=int, default=100, help="concurrent callers")
    parser.add_argument("--limit-s", type=float, default=240.0, help="no more puts after so long, per cluster")
    options = parser.parse_args()
    report = Report("memory", options)
    found = {}
    for kind in kinds(options):
        found[kind] = await measure(kind, options, report)
        report.add(kind, found[kind])
        report.line(f"{kind}: {found[kind]['rss_mb_max']} MB at most, {found[kind]['puts_per_s']} puts/s")
    if "etcd" in found:
        ratio = round(float(found["raftkv"]["rss_mb_max"]) / float(found["etcd"]["rss_mb_max"]), 2)
        report.add("ratio", ratio)
        report.line(f"ratio, raftkv to etcd: {ratio}")
    most = float(found["raftkv"]["rss_mb_max"])
    done = found["raftkv"]["acknowledged"]
    report.goal(f"at most 100 MB a node after {done} puts: {most}", most <= 100 and done == options.puts)
    return report.finish()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
