"""V1: if a majority can talk pairwise both ways, a leader is elected and a write commits, whatever other links do.

Five nodes have ten links, so there are 1,024 sets of them; those that contain such a majority are tried from a
running cluster, each leader in turn. By default a sample; `RAFTKV_TEST_EXAMPLES=1024` tries all.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.unit.raft.harness import FAST, Cluster

NODES = range(1, 6)
LINKS = list(itertools.combinations(NODES, 2))
EXAMPLES = int(os.environ.get("RAFTKV_TEST_EXAMPLES", "30"))
BOUND_TICKS = 10 * FAST.election_ticks


def majorities(links: set[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Groups of three that all hear each other."""
    return [
        group
        for group in itertools.combinations(NODES, 3)
        if all(pair in links for pair in itertools.combinations(group, 2))
    ]


def link_sets() -> list[set[tuple[int, int]]]:
    every = [{link for at, link in enumerate(LINKS) if number >> at & 1} for number in range(1 << len(LINKS))]
    alive = [links for links in every if majorities(links)]
    return alive if len(alive) <= EXAMPLES else random.Random(0).sample(alive, EXAMPLES)


@pytest.mark.parametrize("links", link_sets(), ids=lambda links: "".join(f"{a}{b} " for a, b in sorted(links)).strip())
def test_some_majority_is_enough(links: set[tuple[int, int]]) -> None:
    both = links | {(b, a) for a, b in links}
    for first in NODES:
        writes_within_bound(first, both)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_other_links_may_work_one_way_only(seed: int) -> None:
    chance = random.Random(seed)
    group = chance.sample(NODES, 3)
    open_links = set(itertools.permutations(group, 2))
    open_links |= {link for link in itertools.permutations(NODES, 2) if chance.random() < 0.5}
    writes_within_bound(chance.choice(NODES), open_links)


def writes_within_bound(first: int, open_links: set[tuple[int, int]]) -> None:
    """From `first` leading, with these links (sender, receiver) left: something new is committed in time."""
    cluster = Cluster(5, seed=first)
    cluster.elect(first)
    cluster.propose("before")
    cluster.cuts = set(itertools.permutations(NODES, 2)) - open_links
    # Before a leader notices that its links are gone it may still look able.
    cluster.tick(FAST.election_ticks)
    for ticks in range(BOUND_TICKS):
        for node in cluster:
            if node.raft.accepts_proposals():
                _, index = node.raft.propose([b"%d" % ticks])
                cluster.settle()
                if node.raft.commit >= index:
                    return
        cluster.tick()
    raise AssertionError(f"no write from {first} within {BOUND_TICKS} ticks")
