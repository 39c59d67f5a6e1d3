"""Seeds with coordinating clients must find what breaks a promise to these: each mutant, and by the rule it breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.replica.replica import Replica
from raftkv.server.leasing import Leasing
from raftkv.server.lessor import LeaseLeft, Lessor, _Live
from raftkv.sim.clients import _Client
from raftkv.sim.coordination import CoordinationModel
from raftkv.sim.history import Violation
from raftkv.sim.lease_port import SimPort
from raftkv.sim.run import SeedFailed, run_seed
from raftkv.state import txn
from raftkv.state.leases import Leases
from raftkv.state.sessions import Kept, Sessions

Patch = Callable[[pytest.MonkeyPatch], None]


def repeated_calls_are_done_again(patch: pytest.MonkeyPatch) -> None:
    """X1 X2"""
    original = Sessions.admit

    def admit(self: Sessions, overlay: Any, session: int, seq: int, first_incomplete: int, kind: int) -> Any:
        if session in self.ttls and seq in self._kept_of(overlay, session).records:
            return None
        return original(self, overlay, session, seq, first_incomplete, kind)

    patch.setattr(Sessions, "admit", admit)


def answers_are_forgotten_in_a_restart(patch: pytest.MonkeyPatch) -> None:
    """X1 X2 S1"""
    patch.setattr(Kept, "decode", classmethod(lambda cls, session, data: cls(session)))


def an_ended_session_goes_on(patch: pytest.MonkeyPatch) -> None:
    """X3"""
    original = Sessions.admit

    def admit(self: Sessions, overlay: Any, session: int, seq: int, first_incomplete: int, kind: int) -> Any:
        if session not in self.ttls:
            self.ttls[session] = 10_000
            self._kept[session] = Kept(session)
        return original(self, overlay, session, seq, first_incomplete, kind)

    patch.setattr(Sessions, "admit", admit)


def renewals_are_told_without_a_round(patch: pytest.MonkeyPatch) -> None:
    """L2 L3 L5"""
    patch.setattr(SimPort, "confirm", lambda self, then: then())


def renewals_are_not_remembered(patch: pytest.MonkeyPatch) -> None:
    """L2 L5"""
    patch.setattr(_Live, "renew", lambda self, now: None)


def a_new_leader_gives_leases_less_than_their_time(patch: pytest.MonkeyPatch) -> None:
    """L2"""
    original = Lessor.lead

    def lead(self: Lessor, *args: Any) -> None:
        original(self, *args)
        self._since -= 1.5

    patch.setattr(Lessor, "lead", lead)


def a_checkpoint_outlives_a_renewal(patch: pytest.MonkeyPatch) -> None:
    """L2"""
    patch.setattr(Lessor, "must_clear", lambda self, lease: 0)


def leases_that_are_gone_are_renewed(patch: pytest.MonkeyPatch) -> None:
    """L2 L3"""
    original = Lessor.renew

    def renew(self: Lessor, lease: int) -> LeaseLeft:
        left = original(self, lease)
        return left if left.granted_ms else LeaseLeft(lease, 2000, 2000)

    patch.setattr(Lessor, "renew", renew)


def nothing_expires(patch: pytest.MonkeyPatch) -> None:
    """L4"""
    patch.setattr(Leasing, "work", lambda self: None)


def expiry_counts_in_any_term(patch: pytest.MonkeyPatch) -> None:
    """K1 L2"""
    original = Leases.expire

    def expire(self: Leases, overlay: Any, request: Any, entry_term: int) -> Any:
        return original(self, overlay, request, request.proposer_term)

    patch.setattr(Leases, "expire", expire)
    # And what a deposed leader says of leases goes to the next one, as what clients want does.
    propose = Replica.propose
    patch.setattr(Replica, "propose", lambda self, *args, leading=False: propose(self, *args))


def guards_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """L7"""
    patch.setattr(txn, "guards_hold", lambda reader, guards: True)
    patch.setattr(CoordinationModel, "guard_holds", lambda self, key, token: True)


def whoever_stands_in_the_queue_believes_it_holds(patch: pytest.MonkeyPatch) -> None:
    """L1 L6"""

    def wait(self: _Client, *args: Any) -> Any:
        return True
        yield  # a program, as the original is

    patch.setattr(_Client, "_wait", wait)


MUTANTS: list[Patch] = [
    repeated_calls_are_done_again,
    answers_are_forgotten_in_a_restart,
    an_ended_session_goes_on,
    renewals_are_not_remembered,
    a_new_leader_gives_leases_less_than_their_time,
    leases_that_are_gone_are_renewed,
    nothing_expires,
    guards_are_not_looked_at,
    whoever_stands_in_the_queue_believes_it_holds,
]
RARE: list[Patch] = [
    renewals_are_told_without_a_round,
    a_checkpoint_outlives_a_renewal,
    expiry_counts_in_any_term,
]
"""These need long runs."""


def named(mutant: Patch) -> str:
    return mutant.__name__


@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_some_seed_finds_it(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    find(mutant, monkeypatch, 60, ticks=300)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", RARE, ids=named)
def test_some_seed_finds_even_this(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    find(mutant, monkeypatch, 300, ticks=1000, nodes=3)


def find(mutant: Patch, monkeypatch: pytest.MonkeyPatch, seeds_max: int, **run: int) -> None:
    mutant(monkeypatch)
    found = first_failure(seeds_max, **run)
    assert found is not None, f"{mutant.__name__}: {seeds_max} seeds noticed nothing"
    print(str(found).splitlines()[0])
    assert re.search(r"python -m raftkv.sim --seed \d+ --ticks \d+ .*--coordination", str(found)), "how to replay it"
    broken = found.__cause__
    assert isinstance(broken, Violation), found
    assert broken.rule in (mutant.__doc__ or "").split(), found


def first_failure(seeds_max: int, *, ticks: int, nodes: int = 0) -> SeedFailed | None:
    for seed in range(seeds_max):
        try:
            run_seed(seed, ticks=ticks, nodes=nodes, coordination=True)
        except SeedFailed as found:
            return found
    return None
