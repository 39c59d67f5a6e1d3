"""`python -m raftkv.sim`: run seeds, or replay one that failed."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial

from raftkv.sim.run import Report, SeedFailed, run_seed


def main() -> int:
    """Exit code 0: all seeds hold; 1: one failed, its story is on stderr; 2: bad usage."""
    parser = argparse.ArgumentParser(prog="python -m raftkv.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run just this one")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of many seeds (default 0)")
    parser.add_argument("--count", type=int, default=100, help="how many seeds (default 100)")
    parser.add_argument("--ticks", type=float, default=200, help="how long faults go on in each (default 200)")
    parser.add_argument("--nodes", type=int, default=0, help="how many nodes (default: the seed decides)")
    parser.add_argument("--coordination", action="store_true", help="with sessions, leases, locks and guards")
    parser.add_argument("--trace", action="store_true", help="print the last events of a seed that fails")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    args = parser.parse_args()
    seeds = [args.seed] if args.seed is not None else range(args.first, args.first + args.count)
    failed = 0
    reports = []
    run = partial(run_seed, ticks=args.ticks, nodes=args.nodes, coordination=args.coordination, trace=args.trace)
    for seed in seeds:
        try:
            reports.append(run(seed))
        except SeedFailed as fault:
            failed += 1
            print(f"seed {seed} FAILED: {fault}", file=sys.stderr)
            if not args.keep_going:
                break
    _summary(reports, failed)
    return 1 if failed else 0


def _summary(reports: list[Report], failed: int) -> None:
    if len(reports) == 1:
        print(reports[0])
    faults: Counter[str] = Counter()
    coordination: Counter[str] = Counter()
    for report in reports:
        faults.update(report.faults)
        coordination.update(report.coordination)
    print(
        f"{len(reports)} seeds held, {failed} failed; {sum(r.events for r in reports)} events, "
        f"{sum(r.entries for r in reports)} entries, {sum(r.acknowledged for r in reports)} acknowledged, "
        f"{sum(r.unknown for r in reports)} unknown, {sum(r.failed for r in reports)} failed, "
        f"{sum(r.terms for r in reports)} terms; faults: {dict(sorted(faults.items()))}"
        + (f"; coordination: {dict(sorted(coordination.items()))}" if coordination else "")
    )


if __name__ == "__main__":
    sys.exit(main())
