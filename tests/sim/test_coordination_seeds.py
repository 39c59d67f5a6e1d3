"""Clusters under faults with clients that coordinate: sessions, leases, locks and guarded writes, one seed each.

RAFTKV_SIM_COORDINATION_SEEDS=N runs N short seeds instead of the usual few. See `test_cluster_seeds`.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from raftkv.sim.run import Report, run_seed

SEEDS = int(os.environ.get("RAFTKV_SIM_COORDINATION_SEEDS", "60"))
FIRST = int(os.environ.get("RAFTKV_SIM_FROM", "0"))
PARTS = 6
LONG_SEEDS = 30
LONG_PARTS = 6


def check_that_something_happened(reports: list[Report]) -> None:
    """Every promise was put to the test, often."""
    happened: Counter[str] = Counter()
    for report in reports:
        happened.update(report.coordination)
    for what in (
        "calls repeated",
        "calls session_expired",
        "calls stale_sequence",
        "calls lease_not_found",
        "calls guard_failed",
        "guarded writes",
        "leases granted",
        "leases expired",
        "leases revoked",
        "locks taken",
        "renewals",
        "renewals refused",
        "lease_checkpoint",
    ):
        assert happened[what] >= len(reports) / 4, f"{what}: {happened[what]} times in {len(reports)} seeds"


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Of all seeds that held, in this process."""
    return []


@pytest.mark.parametrize("part", range(PARTS))
def test_short_seeds(part: int, reports: list[Report]) -> None:
    seeds = range(FIRST + part, FIRST + SEEDS, PARTS)
    reports.extend(run_seed(seed, ticks=300, coordination=True) for seed in seeds)


def test_the_short_seeds_prove_something(reports: list[Report]) -> None:
    if len(reports) < 12:  # only some were run, or in other processes: some more, so that this says something
        reports.extend(run_seed(seed, ticks=300, coordination=True) for seed in range(FIRST, FIRST + 12))
    check_that_something_happened(reports)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(LONG_PARTS))
@pytest.mark.parametrize("nodes", [3, 5])
def test_long_seeds(nodes: int, part: int) -> None:
    for seed in range(FIRST + part, FIRST + LONG_SEEDS, LONG_PARTS):
        run_seed(seed, ticks=1500, nodes=nodes, coordination=True)


def test_a_seed_decides_everything() -> None:
    for seed in (1, 2):
        first, second = (run_seed(seed, ticks=150, coordination=True) for _ in range(2))
        assert first == second
