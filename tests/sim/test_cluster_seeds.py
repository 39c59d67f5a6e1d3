"""Whole clusters under faults, one seed each.

RAFTKV_SIM_SEEDS=N runs N short seeds instead of the usual few, RAFTKV_SIM_FROM=M begins with another than the first.
A seed that fails says how to replay it. What it found gets a test of its own, where it can be told as a story; seeds
themselves go stale, because any change to the simulator makes them another run.
"""

from __future__ import annotations

import os
from dataclasses import fields

import pytest

from raftkv.sim.faults import FaultMix
from raftkv.sim.run import Report, run_seed

SEEDS = int(os.environ.get("RAFTKV_SIM_SEEDS", "240"))
FIRST = int(os.environ.get("RAFTKV_SIM_FROM", "0"))
LONG_SEEDS = 24
PARTS = 12
LONG_PARTS = 6


def seeds_of(part: int) -> range:
    return range(FIRST + part, FIRST + SEEDS, PARTS)


KINDS = {item.name for item in fields(FaultMix)} - {"interval_ticks", "weather", "clock_spread", "evidence"}


def check_that_something_happened(reports: list[Report]) -> None:
    """A run in which nothing was asked, nothing broke or nobody was answered proves nothing."""
    assert {kind for report in reports for kind in report.faults} == KINDS
    count = len(reports)
    assert sum(report.acknowledged for report in reports) > 30 * count
    assert sum(report.unknown for report in reports) > count
    assert sum(report.failed for report in reports) > count
    assert sum(report.terms for report in reports) > count
    assert len({report.nodes for report in reports}) > 1


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Of all seeds that held, in this process."""
    return []


@pytest.mark.parametrize("part", range(PARTS))
def test_short_seeds(part: int, reports: list[Report]) -> None:
    reports.extend(run_seed(seed, ticks=100) for seed in seeds_of(part))


def test_the_short_seeds_prove_something(reports: list[Report]) -> None:
    if len(reports) < 40:  # only some were run, or in other processes: some more, so that this says something
        reports.extend(run_seed(seed, ticks=100) for seed in range(FIRST, FIRST + 40))
    check_that_something_happened(reports)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(LONG_PARTS))
@pytest.mark.parametrize("nodes", [3, 5, 7])
def test_long_seeds(nodes: int, part: int) -> None:
    for seed in range(FIRST + part, FIRST + LONG_SEEDS, LONG_PARTS):
        run_seed(seed, ticks=1500, nodes=nodes)


def test_a_seed_decides_everything() -> None:
    for seed in (3, 4, 5):
        assert run_seed(seed, ticks=60) == run_seed(seed, ticks=60)
