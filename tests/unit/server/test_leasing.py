"""Questions about leases across nodes: who may answer, what is asked again, and what must be in the log first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.state_pb2 import LeaseCheckpoints, LeaseExpire, SessionExpire, SessionOpen, SessionOpened
from raftkv.server.asks import ASK_LEASES_MAX, LeaseAnswer, LeaseAsk, LeaseAsks
from raftkv.server.leasing import FORGET_TICKS, GATHER_TICKS, RETRY_TICKS, Leasing
from raftkv.server.lessor import LeaseLeft
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result
from raftkv.state.store import MemoryStore


class Node:
    """A port whose peers, log and rounds the test moves by hand."""

    def __init__(self, node_id: int = 1) -> None:
        self.node_id = node_id
        self.machine = StateMachine(MemoryStore())
        self.leader = 0
        self.term = 1
        self.now = 100.0
        self.sent: list[tuple[int, LeaseAsk | LeaseAnswer]] = []
        self.commands: list[tuple[CommandKind, bytes, Callable[[Result | None], None]]] = []
        self.rounds: list[Callable[[], None]] = []
        self.told: list[tuple[object, LeaseLeft]] = []
        self.gone: set[object] = set()
        self.leasing = Leasing(self, lambda: self.now, 1 << 62, self.gone.__contains__)

    def send(self, peer: int, message: LeaseAsk | LeaseAnswer) -> None:
        self.sent.append((peer, message))

    def command(self, kind: CommandKind, payload: bytes, then: Callable[[Result | None], None]) -> None:
        self.commands.append((kind, payload, then))

    def confirm(self, then: Callable[[], None]) -> None:
        self.rounds.append(then)

    def tell(self, ticket: object, left: LeaseLeft) -> None:
        self.told.append((ticket, left))

    # What the test does.

    def apply(self, kind: CommandKind, payload: bytes, term: int | None = None) -> Result:
        machine = self.machine
        group = Group(self.node_id, 1, (Command(1, kind, payload),))
        result = machine.apply(machine.applied_index + 1, term or self.term, (group,))[0][0]
        self.leasing.applied()
        return result

    def grant(self, lease: int, ttl_s: int = 60) -> None:
        self.apply(CommandKind.LEASE_GRANT, LeaseGrantRequest(ID=lease, TTL=ttl_s).SerializeToString())

    def commit(self) -> None:
        """What was proposed is committed and applied."""
        proposed, self.commands = self.commands, []
        for kind, payload, then in proposed:
            then(self.apply(kind, payload))

    def confirm_all(self) -> None:
        rounds, self.rounds = self.rounds, []
        for then in rounds:
            then()

    def lead(self, term: int = 1) -> None:
        """Win, and apply the term's first entry."""
        self.leader, self.term = self.node_id, term
        self.leasing.turn()
        self.machine.apply(self.machine.applied_index + 1, term, ())
        self.leasing.applied()

    def work(self, seconds: float = 0.1) -> None:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.leasing.work()


def asks_of(node: Node) -> list[LeaseAsk]:
    return [message for _, message in node.sent if isinstance(message, LeaseAsk)]


def test_a_leader_asks_itself_and_answers_only_after_a_round() -> None:
    node = Node()
    node.lead()
    node.grant(7)
    node.work(5)
    node.leasing.ask(7, "renew", renew=True)
    node.leasing.ask(8, "unknown", renew=True)
    node.leasing.turn()
    assert node.told == []
    node.confirm_all()
    assert node.told == [("renew", LeaseLeft(7, 60_000, 60_000)), ("unknown", LeaseLeft(8, 0, 0))]
    assert node.sent == []


def test_a_follower_asks_the_leader_once_for_all_that_came() -> None:
    follower, leader = Node(1), Node(2)
    leader.lead()
    leader.grant(7)
    follower.leader = 2
    for ticket in ("a", "b"):
        follower.leasing.ask(7, ticket, renew=ticket == "b")
    follower.leasing.ask(9, "c", renew=False)
    follower.leasing.turn()
    ((receiver, ask),) = follower.sent
    assert receiver == 2
    assert isinstance(ask, LeaseAsk)
    assert (ask.term, ask.renew, ask.look) == (1, (7,), (9,))
    leader.leasing.on_ask(1, ask)
    assert leader.sent == []
    leader.confirm_all()
    ((receiver, answer),) = leader.sent
    assert receiver == 1
    assert isinstance(answer, LeaseAnswer)
    follower.leasing.on_answer(answer)
    assert sorted(follower.told) == [
        ("a", LeaseLeft(7, 60_000, 60_000)),
        ("b", LeaseLeft(7, 60_000, 60_000)),
        ("c", LeaseLeft(9, 0, 0)),
    ]
    follower.leasing.on_answer(answer)
    assert len(follower.told) == 3, "an answer counts once"


def test_keepalives_that_follow_a_round_gather_for_the_next_and_looks_do_not_wait() -> None:
    """Rounds cost everybody messages: their number must not grow with that of nodes and clients."""
    node = Node()
    node.lead()
    for lease in range(1, 20):
        node.grant(lease)
    node.leasing.on_ask(2, LeaseAsk(1, 1, (1, 2), ()))
    assert len(node.rounds) == 1, "the first does not wait"
    node.confirm_all()
    for sender in range(2, 12):
        node.leasing.on_ask(sender, LeaseAsk(1, sender, (sender,), ()))
    node.leasing.tick()
    assert node.rounds == []
    node.sent.clear()
    for _ in range(GATHER_TICKS):
        node.leasing.tick()
    assert len(node.rounds) == 1
    node.confirm_all()
    assert sorted(receiver for receiver, _ in node.sent) == list(range(2, 12))
    node.leasing.on_ask(2, LeaseAsk(1, 40, (1, 2), ()))
    assert node.rounds == []
    node.leasing.on_ask(3, LeaseAsk(1, 41, (), (2,)))
    assert len(node.rounds) == 1
    node.sent.clear()
    node.confirm_all()
    assert sorted(receiver for receiver, _ in node.sent) == [2, 3], "the round is good for those who waited, too"
    node.leasing.on_ask(2, LeaseAsk(1, 42, (1,), ()))
    node.leader = 3
    node.leasing.turn()
    for _ in range(GATHER_TICKS):
        node.leasing.tick()
    assert node.rounds == [], "who is deposed answers nobody"


def test_whoever_is_alone_waits_for_nobody() -> None:
    """A client that renews one lease after another was held up by gathering, 20 ms for each."""
    node = Node()
    node.lead()
    for lease in range(1, 9):
        node.grant(lease)
    for lease in range(1, 6):
        node.leasing.on_ask(2, LeaseAsk(1, lease, (lease,), ()))
        assert len(node.rounds) == 1
        node.confirm_all()
    node.leasing.on_ask(2, LeaseAsk(1, 10, (1,), ()))
    for lease in range(2, 9):  # while that round is under way
        node.leasing.on_ask(2, LeaseAsk(1, 10 + lease, (lease,), ()))
    assert len(node.rounds) == 1
    node.confirm_all()
    assert len(node.rounds) == 1, "for all of them"
    node.confirm_all()
    node.leasing.on_ask(3, LeaseAsk(1, 31, (1,), ()))
    assert node.rounds == [], "several came, so there may be more"


def test_what_comes_while_one_message_is_under_way_shares_the_next() -> None:
    node = Node()
    node.leader = 2
    node.leasing.ask(1, "a", renew=True)
    node.leasing.turn()
    for lease in range(2, 50):
        node.leasing.ask(lease, lease, renew=True)
        node.leasing.turn()
    assert len(node.sent) == 1
    first = asks_of(node)[0]
    node.leasing.on_answer(LeaseAnswer(1, first.context, (LeaseLeft(1, 5, 5),)))
    node.leasing.turn()
    assert len(node.sent) == 2
    assert asks_of(node)[1].renew == tuple(range(2, 50))
    assert asks_of(node)[1].context != first.context


def test_a_lost_leader_is_asked_no_more_but_its_successor_about_everything() -> None:
    node = Node()
    node.leader = 2
    node.leasing.ask(1, "a", renew=True)
    node.leasing.turn()
    first = asks_of(node)[0]
    node.leader, node.term = 0, 2
    node.leasing.ask(2, "b", renew=False)
    node.leasing.turn()
    assert len(node.sent) == 1
    node.leader = 3
    node.leasing.turn()
    assert node.sent[1][0] == 3
    second = asks_of(node)[1]
    assert (second.term, second.renew, second.look) == (2, (1,), (2,))
    node.leasing.on_answer(LeaseAnswer(1, first.context, (LeaseLeft(1, 5, 5),)))
    assert node.told == [], "what the old leader said late does not count"
    node.leasing.on_answer(LeaseAnswer(2, second.context, (LeaseLeft(1, 6, 6), LeaseLeft(2, 0, 0))))
    assert node.told == [("a", LeaseLeft(1, 6, 6)), ("b", LeaseLeft(2, 0, 0))]


@pytest.mark.parametrize("how", ["silence", "stream"])
def test_a_lost_message_is_sent_again(how: str) -> None:
    node = Node()
    node.leader = 2
    node.leasing.ask(1, "a", renew=True)
    node.leasing.turn()
    if how == "stream":
        node.leasing.connected(3)
        node.leasing.turn()
        assert len(node.sent) == 1
        node.leasing.connected(2)
    else:
        for _ in range(RETRY_TICKS):
            node.leasing.tick()
            node.leasing.turn()
        assert len(node.sent) == 1
        node.leasing.tick()
    node.leasing.turn()
    assert len(node.sent) == 2
    assert asks_of(node)[1].renew == (1,)


def test_nothing_is_asked_for_those_who_have_gone() -> None:
    node = Node()
    node.leasing.ask(1, "a", renew=True)
    node.leasing.ask(2, "b", renew=True)
    node.gone.add("a")
    node.leader = 2
    node.leasing.turn()
    assert asks_of(node)[0].renew == (2,)
    node.gone.add("b")
    node.leasing.connected(2)
    node.leasing.turn()
    assert len(node.sent) == 1


def test_a_message_has_a_bounded_number_of_leases() -> None:
    asks = LeaseAsks(1, 10, lambda ticket: False)
    for lease in range(2 * ASK_LEASES_MAX + 1):
        asks.add(lease, lease, renew=True)
    seen: list[int] = []
    while ask := asks.take(1, 1, 0):
        assert len(ask.renew) <= ASK_LEASES_MAX
        seen += ask.renew
        asks.answered(LeaseAnswer(1, ask.context, tuple(LeaseLeft(lease, 1, 1) for lease in ask.renew)))
    assert seen == list(range(2 * ASK_LEASES_MAX + 1))
    assert asks.idle


def test_who_does_not_lead_in_that_term_answers_nothing() -> None:
    node = Node(2)
    ask = LeaseAsk(1, 5, (7,), ())
    node.leasing.on_ask(1, ask)  # knows no leader
    node.lead(term=2)
    node.grant(7)
    node.leasing.on_ask(1, ask)  # of an earlier term
    assert node.rounds == []
    node.leasing.on_ask(1, LeaseAsk(2, 5, (7,), ()))
    node.leader = 3  # deposed while the round was under way
    node.leasing.turn()
    node.confirm_all()
    assert node.sent == []
    assert node.leasing.lessor.term == 0
    # And again, deposed and elected anew meanwhile: the round says nothing about the new term.
    node.lead(term=4)
    node.leasing.on_ask(1, LeaseAsk(4, 6, (7,), ()))
    node.lead(term=5)
    node.confirm_all()
    assert node.sent == []


def test_the_first_entry_of_the_term_must_be_applied() -> None:
    node = Node()
    node.grant(7)
    node.leader = node.node_id
    node.term = 2
    node.leasing.applied()
    assert node.leasing.lessor.term == 0, "what the earlier leader did may not all be applied"
    node.lead(term=2)
    assert node.leasing.lessor.term == 2
    assert node.leasing.lessor.look(7).granted_ms == 60_000


def test_what_runs_out_is_proposed_in_the_name_of_the_term() -> None:
    node = Node()
    node.lead(term=3)
    node.grant(7, 2)
    node.work(3)
    *checkpoints, (kind, payload, _) = node.commands
    assert {each for each, _, _ in checkpoints} == {CommandKind.LEASE_CHECKPOINT}
    assert kind is CommandKind.LEASE_EXPIRE
    assert LeaseExpire.FromString(payload) == LeaseExpire(proposer_term=3, ids=[7])
    node.commit()
    assert node.machine.leases == {}
    node.work(3)
    assert node.commands == []


def test_a_proposal_that_came_to_nothing_is_made_again() -> None:
    node = Node()
    node.lead()
    node.grant(7, 2)
    node.work(3)
    _, _, then = node.commands[-1]
    node.commands.clear()
    then(None)
    node.work(0.5)
    assert node.commands == []
    node.work(1)
    assert len(node.commands) == 1
    # Of another term it is not ours to try again.
    (_, _, then) = node.commands.pop()
    node.lead(term=2)
    then(None)
    node.work(0.5)
    assert node.commands == []


def test_a_checkpoint_is_undone_in_the_log_before_a_renewal_is_told() -> None:
    node = Node()
    node.lead()
    node.grant(7, 60)
    node.grant(8, 60)
    node.work(32)
    ((kind, payload, _),) = node.commands
    assert kind is CommandKind.LEASE_CHECKPOINT
    noted = LeaseCheckpoints.FromString(payload)
    assert noted.proposer_term == 1
    assert sorted(each.id for each in noted.leases) == [7, 8]
    # It is still on its way, and may be applied yet: that counts too.
    node.leasing.on_ask(2, LeaseAsk(1, 9, (7,), ()))
    node.confirm_all()
    assert node.sent == []
    node.commit()
    ((_, answer),) = node.sent
    assert isinstance(answer, LeaseAnswer)
    assert answer.leases == (LeaseLeft(7, 60_000, 60_000),)
    assert node.machine.leases[7].remaining_ms == 0
    assert node.machine.leases[8].remaining_ms > 0
    node.sent.clear()
    # Once undone, nothing is to be written.
    for _ in range(GATHER_TICKS):
        node.leasing.tick()
    node.leasing.on_ask(2, LeaseAsk(1, 10, (7, 8), ()))
    node.confirm_all()
    ((_, answer),) = node.sent
    assert isinstance(answer, LeaseAnswer)
    assert [left.lease for left in answer.leases] == [7]
    assert len(node.commands) == 1
    # A leader that lost its term meanwhile says nothing.
    (_, _, then) = node.commands.pop()
    node.sent.clear()
    node.lead(term=2)
    then(node.apply(CommandKind.LEASE_CHECKPOINT, LeaseCheckpoints(proposer_term=1).SerializeToString()))
    assert node.sent == []


def test_sessions_that_nobody_uses_are_ended() -> None:
    node = Node()
    node.lead()
    opened = node.apply(CommandKind.SESSION_OPEN, SessionOpen(ttl_ms=10_000).SerializeToString())
    assert isinstance(opened, SessionOpened)
    node.work(39)
    assert node.commands == []
    node.work(2)
    ((kind, payload, _),) = node.commands
    assert kind is CommandKind.SESSION_EXPIRE
    assert SessionExpire.FromString(payload) == SessionExpire(proposer_term=1, sessions=[opened.session])
    node.commit()
    assert node.machine.sessions == {}


def test_a_revoked_lease_is_not_told_alive() -> None:
    node = Node()
    node.lead()
    node.grant(7)
    node.leasing.ask(7, "a", renew=True)
    node.leasing.turn()
    node.apply(CommandKind.LEASE_REVOKE, LeaseRevokeRequest(ID=7).SerializeToString())
    node.confirm_all()
    assert node.told == [("a", LeaseLeft(7, 0, 0))]


@pytest.mark.parametrize("leader", [0, 2], ids=["no leader", "a leader that is silent"])
def test_those_who_come_and_go_leave_nothing(leader: int) -> None:
    node = Node(1)
    node.leader = leader
    for number in range(1000):
        node.leasing.ask(7, ticket := f"ticket {number}", renew=True)
        node.leasing.turn()
        node.gone.add(ticket)
    node.leasing.ask(7, "the last", renew=True)
    for _ in range(FORGET_TICKS):
        node.leasing.tick()
    assert node.leasing.asks == 1
