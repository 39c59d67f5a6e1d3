"""Bugs of others' leases, rows 66 to 69 of the catalogue: ours must not have them, and the checks must see them.

Three nodes keep and ask about leases as they do in a cluster; a log that only grows, elections, rounds and delays are
played. What consensus guarantees is given here, and nothing more: a node that was deposed does not know it, what it
proposes may reach the new leader and be committed in the new term, and its rounds never end.

A mutant is our own code with the bug put in; it must fail the check that is named for the row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.server.leasing import Leasing
from raftkv.server.lessor import LeaseLeft, Lessor
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.leases import LeaseChange, LeaseEvent, LeaseRecord, Leases
from raftkv.state.machine import StateMachine
from raftkv.state.overlay import Overlay
from raftkv.state.results import RefusalCode, Result
from raftkv.state.sessions import SessionEvent
from raftkv.state.store import MemoryStore

Check = Callable[[], None]
Patch = Callable[[pytest.MonkeyPatch], None]
Then = Callable[[Result | None], None]

NODES = (1, 2, 3)
TICK_S = 0.1
TTLS_S = (2, 3, 12, 20)


class World:
    """What the nodes share: the log, time and who leads, and what a careful client may believe."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.log: list[tuple[int, CommandKind | None, bytes]] = []  # term, kind (None: a term's first), payload
        self.state = StateMachine(MemoryStore())  # with all of the log
        self.term = 0
        self.nodes = {node_id: Node(self, node_id) for node_id in NODES}
        self.under_way: list[tuple[float, Callable[[], None]]] = []  # messages, rounds and proposals
        self.safe_until: dict[int, float] = {}  # by lease, for whoever got an acknowledgement
        self.answered: dict[int, int] = {}  # what each keepalive was told last
        self.revoked: set[int] = set()
        self.born: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.elect(1)

    def later(self, call: Callable[[], None], at_most_s: float = 0.4) -> None:
        self.under_way.append((self.now + self.rng.random() * at_most_s, call))

    def append(self, kind: CommandKind | None, payload: bytes) -> int:
        """Commit in the term of now; its index."""
        self.log.append((self.term, kind, payload))
        return len(self.log)

    def elect(self, node_id: int) -> None:
        """Another leader. The one before learns of it later, or when it hears of the new one."""
        self.term += 1
        before = [node for node in self.nodes.values() if node.leader == node.node_id]
        winner = self.nodes[node_id]
        winner.follow(node_id, self.term)
        self.append(None, b"")
        winner.apply_to(len(self.log))
        for node in self.nodes.values():
            if node is not winner:
                delay_s = 8.0 if node in before else 0.5
                self.later(lambda node=node, term=self.term: node.follow(node_id, term), delay_s)  # type: ignore[misc]

    def pass_tick(self) -> None:
        self.now += TICK_S
        due = [call for at, call in self.under_way if at <= self.now]
        self.under_way = [each for each in self.under_way if each[0] > self.now]
        for call in due:
            call()
        for node in self.nodes.values():
            node.tick()
        for term, kind, payload in self.log[self.state.applied_index :]:
            self.state.apply(self.state.applied_index + 1, term, groups(kind, payload))
        for lease in [lease for lease in self.born if lease not in self.ended]:
            if lease not in self.state.leases:
                self.ended[lease] = self.now
                if lease not in self.revoked:
                    assert self.now >= self.safe_until[lease], f"lease {lease} ended early"

    # What clients do.

    def grant(self, lease: int, ttl_s: int) -> None:
        sent = self.now
        self.append(CommandKind.LEASE_GRANT, LeaseGrantRequest(ID=lease, TTL=ttl_s).SerializeToString())
        self.born[lease] = sent
        self.safe_until[lease] = sent + ttl_s

    def revoke(self, lease: int) -> None:
        self.revoked.add(lease)
        self.append(CommandKind.LEASE_REVOKE, LeaseRevokeRequest(ID=lease).SerializeToString())

    def keep_alive(self, node_id: int, lease: int) -> None:
        """Ask any node; it may take long."""
        self.nodes[node_id].leasing.ask(lease, (lease, self.now, lease in self.revoked), renew=True)


def groups(kind: CommandKind | None, payload: bytes) -> list[Group]:
    return [] if kind is None else [Group(1, 1, (Command(1, kind, payload),))]


class Node:
    """A replica; what `Leasing` sees of it."""

    def __init__(self, world: World, node_id: int) -> None:
        self.node_id = node_id
        self.machine = StateMachine(MemoryStore())
        self.leader = 0
        self.term = 0
        self.deaf_until = 0.0
        self._world = world
        self._waiting: list[tuple[int, Then]] = []  # by index, in the order of the log
        self.leasing = Leasing(self, lambda: world.now, 1 << 40, lambda ticket: False)

    def restart(self) -> None:
        """All that is not stored is lost."""
        assert isinstance(self.machine.store, MemoryStore)
        self.machine = StateMachine(self.machine.store.copy())
        self.leasing = Leasing(self, lambda: self._world.now, 1 << 40, lambda ticket: False)

    def install(self) -> None:
        """A snapshot takes the place of the state; what lies between is not heard of."""
        assert isinstance(self._world.state.store, MemoryStore)
        if not self.leads_truly() and self.machine.applied_index < self._world.state.applied_index:
            self.machine = StateMachine(self._world.state.store.copy())

    def leads_truly(self) -> bool:
        return self.leader == self.node_id and self.term == self._world.term

    def follow(self, leader: int, term: int) -> None:
        if term > self.term:
            self.leader, self.term = leader, term
            self.leasing.turn()
            waiting, self._waiting = self._waiting, []
            for _, then in waiting:
                then(None)

    def apply_to(self, index: int) -> None:
        while self.machine.applied_index < index:
            at = self.machine.applied_index
            term, kind, payload = self._world.log[at]
            results = self.machine.apply(at + 1, term, groups(kind, payload))
            self.leasing.applied()
            for _, then in [each for each in self._waiting if each[0] == at + 1]:
                then(results[0][0])
            self._waiting = [each for each in self._waiting if each[0] > at + 1]

    def tick(self) -> None:
        world = self._world
        if self.leads_truly() or (world.rng.random() < 0.3 and world.now >= self.deaf_until):
            behind = len(world.log) - self.machine.applied_index
            self.apply_to(len(world.log) - (world.rng.randrange(behind + 1) if behind else 0))
        self.leasing.tick()
        self.leasing.turn()
        self.leasing.work()

    # The port.

    def send(self, peer: int, message: LeaseAsk | LeaseAnswer) -> None:
        node = self._world.nodes[peer]
        if isinstance(message, LeaseAsk):
            self._world.later(lambda: node.leasing.on_ask(self.node_id, message))
        else:
            self._world.later(lambda: node.leasing.on_answer(message))

    def command(self, kind: CommandKind, payload: bytes, then: Then) -> None:
        """What a deposed leader proposes arrives at the new one and is committed there, as late as can be."""

        def propose() -> None:
            index = self._world.append(kind, payload)
            if self.machine.applied_index < index:
                self._waiting.append((index, then))

        self._world.later(propose, 0.2 if self.leads_truly() else 6.0)

    def confirm(self, then: Callable[[], None]) -> None:
        begun_at, term = len(self._world.log), self.term

        def end() -> None:
            if self.leads_truly() and self.term == term:
                self.apply_to(begun_at)
                then()

        if self.leads_truly():
            self._world.later(end)

    def tell(self, ticket: object, left: LeaseLeft) -> None:
        assert isinstance(ticket, tuple)
        lease, sent, was_revoked = ticket
        self._world.answered[lease] = left.granted_ms
        if left.granted_ms:
            assert not was_revoked, f"lease {lease} was revoked before its keepalive was sent"
            safe = self._world.safe_until
            safe[lease] = max(safe[lease], sent + left.remaining_ms / 1000)


def disturb(node: Node) -> None:
    """A restart, or a node that falls behind and gets a snapshot."""
    world = node._world
    choice = world.rng.random()
    if choice < 0.3:
        node.restart()
    else:
        node.deaf_until = world.now + world.rng.choice((3.0, 12.0, 25.0))
        world.under_way.append((node.deaf_until, node.install))


def no_lease_ends_early_and_none_that_is_gone_is_renewed() -> None:
    """Rows 66 and 67, L2 and L3: while leaders are deposed without knowing it."""
    for seed in range(12):
        world = World(seed)
        rng = world.rng
        kept: list[int] = []
        for step in range(900):
            choice = rng.random()
            if choice < 0.05:
                lease = len(world.born) + 1
                world.grant(lease, rng.choice(TTLS_S))
                if rng.random() < 0.7:
                    kept.append(lease)
            elif choice < 0.06 and kept:
                world.revoke(kept[0])
                gone = kept.pop(0)
                for node_id in NODES:
                    world.keep_alive(node_id, gone)
            elif choice < 0.08:
                node = world.nodes[rng.choice(NODES)]
                if not node.leads_truly():
                    disturb(node)
            elif choice < 0.095:
                world.elect(rng.choice([each for each in NODES if not world.nodes[each].leads_truly()]))
            if step % 5 == 0:
                for lease in [each for each in kept if each not in world.ended]:
                    # Every third is renewed late, so that it has been checkpointed.
                    if lease % 3 or world.safe_until[lease] - world.now < 5:
                        world.keep_alive(rng.choice(NODES), lease)
            world.pass_tick()
        assert len(world.ended) > 5
        assert world.term > 5


def leases_end_however_often_leaders_change() -> None:
    """Row 68, L4: nobody renews, and no leader stays for as long as the lease may live; some for moments only."""
    long = ((13, 24), (7, 12), (31, 60), (20, 30))
    short = ((4, 24), (3, 5), (1, 5), (1, 2), (0.8, 20), (2, 60), (25, 3600))
    for seed, (every_s, ttl_s) in enumerate(long + short):
        world = World(seed)
        world.grant(1, ttl_s)
        while 1 not in world.ended:
            assert world.now - world.born[1] < 3 * ttl_s, f"still there after three times {ttl_s} s"
            for _ in range(round(every_s / TICK_S)):
                world.pass_tick()
            world.elect(next(each for each in NODES if not world.nodes[each].leads_truly()))


def a_lease_can_be_kept_alive_by_any_node_as_soon_as_it_is_granted() -> None:
    """Row 69, L5: also by a leader that has not applied the grant."""
    for seed in range(10):
        world = World(seed)
        for lease in range(1, 40):
            world.grant(lease, 60)
            world.keep_alive(world.rng.choice(NODES), lease)
            if world.rng.random() < 0.1:
                world.elect(world.rng.choice([each for each in NODES if not world.nodes[each].leads_truly()]))
            world.pass_tick()
        for _ in range(300):
            world.pass_tick()
        assert world.answered == dict.fromkeys(range(1, 40), 60_000)


def expiry_counts_in_any_term(patch: pytest.MonkeyPatch) -> None:
    """M-66: what a deposed leader believes reaches its successor."""
    original = Leases.expire

    def expire(self: Leases, overlay: Overlay, request: Any, entry_term: int) -> RefusalCode | None:
        return original(self, overlay, request, request.proposer_term)

    patch.setattr(Leases, "expire", expire)


def answers_without_a_round(patch: pytest.MonkeyPatch) -> None:
    """M-66, the other half: who believes to lead acknowledges keepalives."""

    def on_ask(self: Leasing, sender: int, ask: LeaseAsk) -> None:
        if self._port.leader == self._port.node_id and ask.term == self._port.term:
            self._answer(sender, ask)

    patch.setattr(Leasing, "on_ask", on_ask)


def tells_before_the_checkpoint_is_undone(patch: pytest.MonkeyPatch) -> None:
    """A renewal that the next leader knows nothing of."""
    patch.setattr(Lessor, "must_clear", lambda self, lease: 0)


def counts_from_before_it_won(patch: pytest.MonkeyPatch) -> None:
    """A new leader that does not give leases their time anew."""
    original = Lessor.lead

    def lead(self: Lessor, term: int, leases: Mapping[int, LeaseRecord], sessions: Mapping[int, int]) -> None:
        original(self, term, leases, sessions)
        self._since -= 3.0

    patch.setattr(Lessor, "lead", lead)


def does_not_hear_of_revokes(patch: pytest.MonkeyPatch) -> None:
    """M-67."""
    original = Lessor.applied

    def applied(self: Lessor, leases: list[LeaseEvent], sessions: list[SessionEvent]) -> None:
        original(self, [each for each in leases if each[0] is not LeaseChange.REVOKED], sessions)

    patch.setattr(Lessor, "applied", applied)


def remembers_what_another_state_has_replaced(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint, undone and made anew while a node heard nothing, and which then gets a snapshot."""
    patch.setattr(Lessor, "restored", lambda self: None)


def never_checkpoints(patch: pytest.MonkeyPatch) -> None:
    """M-68: each leader gives each lease its whole time."""
    patch.setattr(Lessor, "_checkpoint", lambda self, now, work: None)


def does_not_look_at_checkpoints(patch: pytest.MonkeyPatch) -> None:
    """M-68: they are written, and nobody reads them."""
    original = Lessor._begin

    def begin(self: Lessor, lease: int, record: LeaseRecord, since: float, *, soon: bool) -> Any:
        return original(self, lease, LeaseRecord(record.ttl_ms, 0), self._clock(), soon=soon)

    patch.setattr(Lessor, "_begin", begin)


def waits_with_checkpoints_whoever_led_before(patch: pytest.MonkeyPatch) -> None:
    """Then there are none while no leader stays for long."""
    original = Lessor._begin

    def begin(self: Lessor, lease: int, record: LeaseRecord, since: float, *, soon: bool) -> Any:
        return original(self, lease, record, since, soon=False)

    patch.setattr(Lessor, "_begin", begin)


def time_does_not_run_while_others_lead(patch: pytest.MonkeyPatch) -> None:
    """Each leader begins with what the last checkpoint has left, and none stays until the next."""
    patch.setattr(Lessor, "heard", lambda self, term, events, leases: setattr(self, "_reign_s", 0.0))


def remembers_checkpoints_that_were_undone(patch: pytest.MonkeyPatch) -> None:
    """The time of a lease runs on from a checkpoint of long ago."""
    original = Lessor.heard

    def heard(self: Lessor, term: int, events: list[LeaseEvent], leases: Mapping[int, LeaseRecord]) -> None:
        before = dict(self._noted)
        original(self, term, events, leases)
        self._noted = self._noted | before

    patch.setattr(Lessor, "heard", heard)


def forgets_checkpoints_with_each_leader(patch: pytest.MonkeyPatch) -> None:
    """M-68: etcd's own first repair of it, which held for one change of leader only."""
    original = Lessor.lead

    def lead(self: Lessor, term: int, leases: Mapping[int, LeaseRecord], sessions: Mapping[int, int]) -> None:
        fresh = {
            lease: LeaseRecord(each.ttl_ms, 0 if term % 2 else each.remaining_ms) for lease, each in leases.items()
        }
        original(self, term, fresh, sessions)

    patch.setattr(Lessor, "lead", lead)


def knows_only_what_it_has_applied(patch: pytest.MonkeyPatch) -> None:
    """Row 69: the leader says of what it has not applied that it is not there."""

    def on_ask(self: Leasing, sender: int, ask: LeaseAsk) -> None:
        if self._port.leader == self._port.node_id and ask.term == self._port.term:
            self._port.confirm(lambda: None)
            self._answer(sender, ask)

    patch.setattr(Leasing, "on_ask", on_ask)


CHECKS: list[Check] = [
    no_lease_ends_early_and_none_that_is_gone_is_renewed,
    leases_end_however_often_leaders_change,
    a_lease_can_be_kept_alive_by_any_node_as_soon_as_it_is_granted,
]
MUTANTS: list[tuple[Patch, Check]] = [
    (expiry_counts_in_any_term, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (answers_without_a_round, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (tells_before_the_checkpoint_is_undone, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (counts_from_before_it_won, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (does_not_hear_of_revokes, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (remembers_what_another_state_has_replaced, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (remembers_checkpoints_that_were_undone, no_lease_ends_early_and_none_that_is_gone_is_renewed),
    (waits_with_checkpoints_whoever_led_before, leases_end_however_often_leaders_change),
    (time_does_not_run_while_others_lead, leases_end_however_often_leaders_change),
    (never_checkpoints, leases_end_however_often_leaders_change),
    (does_not_look_at_checkpoints, leases_end_however_often_leaders_change),
    (forgets_checkpoints_with_each_leader, leases_end_however_often_leaders_change),
    (knows_only_what_it_has_applied, a_lease_can_be_kept_alive_by_any_node_as_soon_as_it_is_granted),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound(check: Check) -> None:
    check()


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda each: each.__name__)
def test_mutant_is_found(mutant: Patch, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
