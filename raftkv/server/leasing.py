"""What a node does about leases and sessions: asks the leader, and as the leader keeps time and answers.

    keepalive at any node -> LeaseAsks -> LeaseAsk to the leader -> gathers with those of others, for some ticks at most
      -> a round that proves the leadership, begun then -> Lessor renews
      -> (a checkpoint undone in the log, where there is one) -> LeaseAnswer -> told

A node that leads asks itself, on the same way. Nothing here knows of sockets, tasks or real time: `Port` is what the
node offers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from raftkv._pb.state_pb2 import LeaseCheckpoints, LeaseExpire, LeaseRemaining, SessionExpire
from raftkv.raft.types import NodeId
from raftkv.server.asks import LeaseAnswer, LeaseAsk, LeaseAsks
from raftkv.server.lessor import LeaseLeft, Lessor
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.results import Refusal, Result

RETRY_TICKS = 50
FORGET_TICKS = 64
"""How often questions are freed of callers that have gone."""
GATHER_TICKS = 2
"""How long keepalives that follow a round gather for the next: a round costs messages to and from everybody, and many
clients on many nodes would have hundreds a second. Who comes after a quiet time does not wait, nor who only looks, nor
who is alone: when a round renewed one lease, waiting for more of them would only slow down whoever asks one by one."""


class Port(Protocol):
    """The node, as seen from here."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def machine(self) -> StateMachine: ...

    @property
    def leader(self) -> NodeId:
        """Who leads; 0 when that is not known."""
        ...

    @property
    def term(self) -> int: ...

    def send(self, peer: NodeId, message: LeaseAsk | LeaseAnswer) -> None:
        """Send to a peer; it may be lost."""
        ...

    def command(self, kind: CommandKind, payload: bytes, then: Callable[[Result | None], None]) -> None:
        """Propose, while this node leads as it does now and before what clients want; never forward.

        `then` gets the result, or None when it is not known. The order is kept.
        """
        ...

    def confirm(self, then: Callable[[], None]) -> None:
        """Call `then` once a round begun from now on has found that we are, or who else is, the leader, and we have
        applied what was committed when it began; never, when that cannot be found out in time."""
        ...

    def tell(self, ticket: object, left: LeaseLeft) -> None:
        """Answer who asked."""
        ...


class Leasing:
    """See the module."""

    def __init__(
        self, port: Port, clock: Callable[[], float], incarnation: int, gone: Callable[[object], bool]
    ) -> None:
        """
        Args:
            clock: seconds, only forward; it may stand still while the machine sleeps.
            incarnation: a number no earlier life of this node has used.
            gone: whether nobody waits for a ticket any more.
        """
        self._port = port
        self.lessor = Lessor(clock)
        self._asks = LeaseAsks(incarnation, RETRY_TICKS, gone)
        self._machine: StateMachine | None = None  # the one we heard of last
        self._ticks = 0
        self._gathered: list[tuple[NodeId, LeaseAsk]] = []  # of nodes who believe that we lead; no round begun for them
        self._confirmed_tick = -GATHER_TICKS
        self._alone = False  # the last round renewed one lease, and has ended

    # From callers of this node.

    def ask(self, lease: int, ticket: object, *, renew: bool) -> None:
        """Renew a lease, or look at it; `ticket` is told."""
        self._asks.add(lease, ticket, renew=renew)

    @property
    def asks(self) -> int:
        """How many tickets are kept; of those who have gone, for `FORGET_TICKS` at most."""
        return len(self._asks)

    # From the node.

    def turn(self) -> None:
        """Something has changed: who leads, what waits."""
        port = self._port
        if self.lessor.term and (port.leader != port.node_id or port.term != self.lessor.term):
            self.lessor.follow()
            self._gathered.clear()
        if self._asks.idle:
            return
        leader = port.leader
        ask = self._asks.take(leader, port.term, self._ticks)
        if ask is None:
            return
        if leader == port.node_id:
            self.on_ask(leader, ask)
        else:
            port.send(leader, ask)

    def applied(self) -> None:
        """Entries were applied."""
        port = self._port
        machine = port.machine
        leases, sessions = machine.take_lease_events(), machine.take_session_events()
        if machine is not self._machine:
            self._machine = machine
            self.lessor.restored()
        self.lessor.heard(machine.applied_term, leases, machine.leases)
        if self.lessor.term == port.term:
            self.lessor.applied(leases, sessions)
        elif port.leader == port.node_id and machine.applied_term == port.term:
            self.lessor.lead(port.term, machine.leases, machine.sessions)

    def connected(self, peer: NodeId) -> None:
        """The stream to a peer is new: what was on the old one may be lost."""
        if peer == self._port.leader:
            self._asks.ask_again()

    def tick(self) -> None:
        """A tick of time has passed."""
        self._ticks += 1
        if self._ticks % FORGET_TICKS == 0:
            self._asks.forget_gone()
        self._confirm()

    def work(self) -> None:
        """Do what time asks for; about ten times a second."""
        term, port = self.lessor.term, self._port
        if not term:
            return
        machine = port.machine
        work = self.lessor.work(lambda lease: len(machine.lease_keys(lease)))
        if work.expired:
            leases = work.expired
            payload = LeaseExpire(proposer_term=term, ids=leases).SerializeToString(deterministic=True)
            port.command(CommandKind.LEASE_EXPIRE, payload, lambda result: self._ended(term, result, leases, []))
        if work.checkpoints:
            self._propose_checkpoints(work.checkpoints, lambda result: None)
        if work.ended_sessions:
            sessions = work.ended_sessions
            ended = SessionExpire(proposer_term=term, sessions=sessions).SerializeToString(deterministic=True)
            port.command(CommandKind.SESSION_EXPIRE, ended, lambda result: self._ended(term, result, [], sessions))

    # From peers.

    def on_ask(self, sender: NodeId, ask: LeaseAsk) -> None:
        """A node asks us, believing that we lead."""
        port = self._port
        if port.leader == port.node_id and ask.term == port.term:
            self._gathered.append((sender, ask))
            self._confirm()

    def on_answer(self, answer: LeaseAnswer) -> None:
        """The leader has answered."""
        for ticket, left in self._asks.answered(answer):
            self._port.tell(ticket, left)

    # Leading.

    def _confirm(self) -> None:
        """Begin a round for what has gathered, if it is time."""
        asks = self._gathered
        is_time = self._alone or self._ticks - self._confirmed_tick >= GATHER_TICKS
        if not asks or not (is_time or any(ask.look for _, ask in asks)):
            return
        self._gathered = []
        self._confirmed_tick = self._ticks
        self._alone = False

        def answer() -> None:
            self._alone = sum(len(ask.renew) for _, ask in asks) == 1
            for sender, ask in asks:
                self._answer(sender, ask)
            self._confirm()

        self._port.confirm(answer)

    def _answer(self, sender: NodeId, ask: LeaseAsk) -> None:
        """A round begun since the question came has proved our leadership."""
        lessor = self.lessor
        if lessor.term != ask.term or self._port.term != ask.term:
            return  # the sender will find another leader
        now = [lessor.look(lease) for lease in ask.look]
        marks: dict[int, int] = {}
        for lease in ask.renew:
            left = lessor.renew(lease)
            mark = lessor.must_clear(lease)
            if mark:
                marks[lease] = mark
            else:
                now.append(left)
        if now:
            self._send(sender, LeaseAnswer(ask.term, ask.context, tuple(now)))
        if marks:

            def cleared(result: Result | None) -> None:
                if lessor.term == ask.term and result is not None and not isinstance(result, Refusal):
                    lessor.cleared(marks)
                    self._send(sender, LeaseAnswer(ask.term, ask.context, tuple(map(lessor.look, marks))))

            self._propose_checkpoints([(lease, 0) for lease in marks], cleared)

    def _send(self, receiver: NodeId, answer: LeaseAnswer) -> None:
        if receiver == self._port.node_id:
            self.on_answer(answer)
        else:
            self._port.send(receiver, answer)

    def _propose_checkpoints(self, leases: list[tuple[int, int]], then: Callable[[Result | None], None]) -> None:
        payload = LeaseCheckpoints(
            proposer_term=self.lessor.term,
            leases=[LeaseRemaining(id=lease, remaining_ms=left_ms) for lease, left_ms in leases],
        ).SerializeToString(deterministic=True)
        self._port.command(CommandKind.LEASE_CHECKPOINT, payload, then)

    def _ended(self, term: int, result: Result | None, leases: list[int], sessions: list[int]) -> None:
        if self.lessor.term == term and (result is None or isinstance(result, Refusal)):
            self.lessor.not_expired(leases, sessions)
