"""Reads that wait for a read index: which round they share, and what happens when one is lost."""

from __future__ import annotations

import pytest

from raftkv.replica.reads import Reads


class Asked:
    """Collects the contexts that are asked for."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.contexts: list[int] = []

    def ask(self, tick: int = 0) -> list[int]:
        before = len(self.contexts)
        self.reads.ask(tick, self.contexts.append)
        return self.contexts[before:]

    def served(self, applied: int) -> list[object]:
        out: list[object] = []
        self.reads.served(applied, out)
        return out


@pytest.fixture
def asked() -> Asked:
    return Asked(Reads(retry_ticks=5))


def test_all_that_wait_share_one_round(asked: Asked) -> None:
    for ticket in "abc":
        asked.reads.add(ticket)
    (context,) = asked.ask()
    asked.reads.confirmed(context, 4)
    assert asked.served(3) == []
    assert asked.served(4) == ["a", "b", "c"]
    assert asked.reads.idle


def test_a_read_never_joins_a_round_that_began_before_it(asked: Asked) -> None:
    asked.reads.add("a")
    (first,) = asked.ask()
    asked.reads.add("b")
    assert asked.ask() == []
    asked.reads.confirmed(first, 4)
    assert asked.served(100) == ["a"]
    (second,) = asked.ask()
    assert second != first
    asked.reads.confirmed(second, 5)
    assert asked.served(100) == ["b"]


def test_a_dropped_round_is_asked_again_in_the_old_order(asked: Asked) -> None:
    asked.reads.add("a")
    (first,) = asked.ask()
    asked.reads.add("b")
    asked.reads.dropped(first)
    (second,) = asked.ask()
    asked.reads.confirmed(second, 1)
    assert asked.served(1) == ["a", "b"]


def test_an_answer_that_comes_late_is_ignored(asked: Asked) -> None:
    asked.reads.add("a")
    (first,) = asked.ask()
    asked.reads.ask_again()
    (second,) = asked.ask()
    asked.reads.confirmed(first, 1)
    assert asked.served(100) == []
    asked.reads.dropped(first)
    asked.reads.confirmed(second, 2)
    assert asked.served(100) == ["a"]


def test_a_round_without_an_answer_is_asked_again(asked: Asked) -> None:
    asked.reads.add("a")
    assert len(asked.ask(tick=10)) == 1
    assert asked.ask(tick=15) == []
    assert len(asked.ask(tick=16)) == 1


def test_without_a_leader_reads_wait(asked: Asked) -> None:
    asked.reads.add("a")
    asked.reads.ask(0, asked.reads.dropped)  # what a replica does when nobody leads
    assert not asked.reads.idle
    (context,) = asked.ask()
    asked.reads.confirmed(context, 0)
    assert asked.served(0) == ["a"]


def test_a_read_that_is_abandoned_is_served_to_nobody_and_forgotten_wherever_it_is(asked: Asked) -> None:
    reads = [asked.reads.add(ticket) for ticket in "abcdef"]
    (first,) = asked.ask()
    asked.reads.confirmed(first, 9)
    reads += [asked.reads.add(ticket) for ticket in "gh"]
    asked.ask()
    reads += [asked.reads.add(ticket) for ticket in "ij"]
    for read in reads[::2]:
        read.abandoned = True
    assert len(asked.reads) == 10
    asked.reads.forget_abandoned()
    assert len(asked.reads) == 5
    reads[1].abandoned = True
    assert asked.served(9) == ["d", "f"]
