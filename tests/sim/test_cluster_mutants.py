"""The simulator must find what it is there for: each mutant breaks one rule of ours, and some seed must notice.

A mutant that survives means that the promise it breaks is not checked, or that the situation never comes up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raftkv.raft import core, replication
from raftkv.raft.core import Raft
from raftkv.raft.log import Log
from raftkv.raft.messages import Append
from raftkv.raft.reads import Reads
from raftkv.raft.types import HardState
from raftkv.replica.effects import Forward
from raftkv.replica.proposals import Forwarded, Proposals
from raftkv.replica.replica import Replica
from raftkv.sim.disk import SimLog, SimState
from raftkv.sim.history import Operation
from raftkv.sim.node import SimNode
from raftkv.sim.run import SeedFailed, run_seed

Patch = Callable[[pytest.MonkeyPatch], None]


def own_write_counts_before_it_is_done(patch: pytest.MonkeyPatch) -> None:
    original = replication.maybe_commit

    def maybe_commit(raft: Raft) -> bool:
        stable, raft.log.stable = raft.log.stable, raft.log.last
        try:
            return original(raft)
        finally:
            raft.log.stable = stable

    patch.setattr(replication, "maybe_commit", maybe_commit)


def acknowledges_before_the_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Raft, "send_after", Raft.send)


def holds_nothing_back(patch: pytest.MonkeyPatch) -> None:
    original = Replica._obey

    def obey(self: Replica, ready: Any) -> Any:
        effects = original(self, ready)
        if ready.messages_after:
            effects.send.extend(ready.messages_after)
        return effects

    patch.setattr(Replica, "_obey", obey)


def commits_entries_of_earlier_terms(patch: pytest.MonkeyPatch) -> None:
    original = replication.maybe_commit

    def maybe_commit(raft: Raft) -> bool:
        start, raft.term_start = raft.term_start, 0
        try:
            return original(raft)
        finally:
            raft.term_start = start

    patch.setattr(replication, "maybe_commit", maybe_commit)


def votes_for_any_log(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "up_to_date", lambda self, last_index, last_term: True)


def forgets_its_vote_in_a_crash(patch: pytest.MonkeyPatch) -> None:
    original = SimLog._set

    def keep(self: SimLog, hard_state: HardState | None) -> None:
        original(self, hard_state)
        self.hard_state = HardState(self.hard_state.term, 0, self.hard_state.commit)

    patch.setattr(SimLog, "_set", keep)


def reads_without_asking_a_quorum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("raftkv.raft.reads.quorum.agreed_value", lambda conf, tokens: max(tokens.values()))


def reads_before_its_term_has_committed(patch: pytest.MonkeyPatch) -> None:
    original = Reads.begin_round

    def begin_round(self: Reads, token: int) -> None:
        start, self._raft.term_start = self._raft.term_start, 0
        try:
            original(self, token)
        finally:
            self._raft.term_start = start

    patch.setattr(Reads, "begin_round", begin_round)


def takes_what_was_sent_again_as_new(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Forwarded, "fresh", lambda self, term, origin, incarnation, commands: commands)


def proposes_in_another_term_than_it_was_sent_in(patch: pytest.MonkeyPatch) -> None:
    original = Replica._receive_forward

    def receive_forward(self: Replica, sender: int, forward: Forward) -> None:
        original(self, sender, Forward(self.raft.term, forward.incarnation, forward.commands))

    patch.setattr(Replica, "_receive_forward", receive_forward)


def proposes_anew_while_the_first_may_still_come(patch: pytest.MonkeyPatch) -> None:
    original = Proposals.term_applied
    patch.setattr(Proposals, "term_applied", lambda self, term: original(self, term + 1))


def proposes_anew_what_a_snapshot_hides(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Proposals, "lose", lambda self, term: [])


def does_not_send_again_on_a_new_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Replica, "connected", lambda self, peer: None)


def calls_what_was_sent_failed(patch: pytest.MonkeyPatch) -> None:
    original = SimNode.expire

    def expire(self: SimNode, operation: Operation) -> None:
        pending = self.calls.get(operation)
        if pending is not None:
            pending.term = 0
        original(self, operation)

    patch.setattr(SimNode, "expire", expire)


def cuts_the_log_behind_a_state_that_is_not_durable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimState, "synced", lambda self, store: None)


def believes_an_append_without_looking_where_it_joins(patch: pytest.MonkeyPatch) -> None:
    original = replication.on_append

    def on_append(raft: Raft, sender: int, message: Append) -> None:
        if message.prev_index <= raft.log.last:
            message = Append(
                message.term,
                message.prev_index,
                raft.log.term(message.prev_index) or 0,
                message.entries,
                message.commit,
            )
        original(raft, sender, message)

    _handle(patch, Append, on_append)


def _handle(patch: pytest.MonkeyPatch, kind: type, handler: Callable[[Any, Any, Any], None]) -> None:
    patch.setitem(core._HANDLERS, kind, handler)


MUTANTS: list[Patch] = [
    own_write_counts_before_it_is_done,
    acknowledges_before_the_disk,
    holds_nothing_back,
    commits_entries_of_earlier_terms,
    votes_for_any_log,
    forgets_its_vote_in_a_crash,
    reads_without_asking_a_quorum,
    takes_what_was_sent_again_as_new,
    proposes_anew_while_the_first_may_still_come,
    proposes_anew_what_a_snapshot_hides,
    does_not_send_again_on_a_new_stream,
    calls_what_was_sent_failed,
    cuts_the_log_behind_a_state_that_is_not_durable,
]
RARE: list[Patch] = [
    reads_before_its_term_has_committed,
    proposes_in_another_term_than_it_was_sent_in,
    believes_an_append_without_looking_where_it_joins,
]
"""These need many seeds."""


def named(mutant: Patch) -> str:
    return mutant.__name__


@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_some_seed_finds_it(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    find(mutant, monkeypatch, 150)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", RARE, ids=named)
def test_some_seed_finds_even_this(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    find(mutant, monkeypatch, 1500)


def find(mutant: Patch, monkeypatch: pytest.MonkeyPatch, seeds_max: int) -> None:
    mutant(monkeypatch)
    for seed in range(seeds_max):
        try:
            run_seed(seed, ticks=150)
        except SeedFailed as found:
            print(f"seed {seed}: {str(found).splitlines()[0]}")
            return
    pytest.fail(f"{mutant.__name__}: {seeds_max} seeds noticed nothing")
