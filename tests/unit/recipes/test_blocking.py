"""The recipes for threads have what those for asyncio have."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from raftkv import recipes
from raftkv.recipes import blocking
from raftkv.recipes.holding import Holding
from tests.unit.client.twins import check_twins

LINE = {"claim_of", "item", "obtain"}  # between a queue and its claims


@pytest.mark.parametrize(
    ("ours", "twin", "left_out"),
    [
        (blocking.Barrier, recipes.Barrier, ()),
        (blocking.BlockingClaim, recipes.Claim, ()),
        (blocking.BlockingHolding, Holding, ()),
        (blocking.BlockingHolding, recipes.Permit, ()),
        (blocking.BlockingHolding, recipes.ReadLock, ()),
        (blocking.BlockingHolding, recipes.WriteLock, ()),
        (blocking.Counter, recipes.Counter, ()),
        (blocking.DoubleBarrier, recipes.DoubleBarrier, ()),
        (blocking.LeaderTask, recipes.LeaderTask, ()),
        (blocking.PriorityQueue, recipes.PriorityQueue, LINE),
        (blocking.Queue, recipes.Queue, LINE),
        (blocking.ReadWriteLock, recipes.ReadWriteLock, ()),
        (blocking.Registration, recipes.Registration, ()),
        (blocking.Registry, recipes.Registry, ()),
        (blocking.Semaphore, recipes.Semaphore, {"agree", "places"}),  # between it and its permits
    ],
)
def test_whatever_is_public_has_a_twin_with_the_same_parameters(
    ours: type, twin: type, left_out: Collection[str]
) -> None:
    check_twins(ours, twin, left_out)
