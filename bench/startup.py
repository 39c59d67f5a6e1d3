"""From nothing to a cluster that has done its first write: five processes, empty directories."""

from __future__ import annotations

import asyncio
import sys
import time

from common import Report, arguments, cluster_of, kinds, spread

from raftkv import AsyncClient


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=5, help="starts of each")
    options = parser.parse_args()
    report = Report("startup", options)
    taken: dict[str, list[float]] = {kind: [] for kind in kinds(options)}
    lost = 0
    for number in range(options.times):
        for kind, times in taken.items():
            before = time.monotonic()
            async with cluster_of(kind, options) as cluster:
                healthy = time.monotonic() - before
                async with AsyncClient(cluster.endpoints, timeout=20.0) as client:
                    put = await client.put("first", "write")
                    times.append(time.monotonic() - before)
                    item = await client.get("first")
                    lost += item is None or item.mod_revision != put.revision
            report.line(f"{number + 1} {kind:>6}: healthy after {healthy:.2f} s, first write after {times[-1]:.2f} s")
    for kind, times in taken.items():
        report.add(kind, {"first_write_s": spread(times)})
        report.line(f"{kind}: first write {spread(times)} s")
    report.add("lost", lost)
    ours = spread(taken["raftkv"])
    if "etcd" in taken:
        report.add("ratio_p50", round(ours["p50"] / spread(taken["etcd"])["p50"], 2))
        report.line(f"ratio of the medians, raftkv to etcd: {report.content['ratio_p50']}")
    report.goal(f"five nodes up and first write done in at most 3 s: {ours['max']} at worst", ours["max"] <= 3)
    return report.finish()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
