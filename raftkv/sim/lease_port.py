"""The simulated node as `raftkv.server.leasing` sees it: the twin of `raftkv.server.lease_port`.

The time of leases and sessions is kept by the very code of a real node; only its clock, its messages and its proposals
go through the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from raftkv.raft.types import NodeId
from raftkv.replica.effects import PeerMessage
from raftkv.replica.proposals import Pending
from raftkv.replica.reads import WaitingRead
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.server.lessor import LeaseLeft
from raftkv.sim.clock import TICK
from raftkv.sim.history import Operation
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result

if TYPE_CHECKING:
    from raftkv.sim.node import SimNode

Then = Callable[[Result | None], None]
NodeMessage = PeerMessage | LeaseAsk | LeaseAnswer
"""What goes from node to node."""


class Waiting:
    """Something the node itself has asked its replica for; the ticket of it."""

    __slots__ = ("then",)

    def __init__(self, then: Then) -> None:
        self.then: Then | None = then

    def end(self, result: Result | None) -> None:
        """Once: what came of it, None where that is not known."""
        then, self.then = self.then, None
        if then is not None:
            then(result)


class SimPort:
    """What `Leasing` sees of a node, in one of its lives."""

    TIMEOUT_TICKS = 200
    """What is not done by then is given up, as by the runtime."""

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._life = node.life

    @property
    def node_id(self) -> NodeId:
        return self._node.id

    @property
    def machine(self) -> StateMachine:
        return self._node.machine

    @property
    def leader(self) -> NodeId:
        return self._node.raft.leader

    @property
    def term(self) -> int:
        return self._node.raft.term

    def send(self, peer: NodeId, message: LeaseAsk | LeaseAnswer) -> None:
        self._node.send(peer, message)

    def command(self, kind: CommandKind, payload: bytes, then: Then) -> None:
        waiting = Waiting(then)
        self._limit(waiting, self._node.replica.propose(kind, payload, waiting, leading=True))

    def confirm(self, then: Callable[[], None]) -> None:
        def confirmed(result: Result | None) -> None:
            if result is not None:
                then()

        waiting = Waiting(confirmed)
        self._limit(waiting, self._node.replica.read(waiting))

    def tell(self, ticket: object, left: LeaseLeft) -> None:
        assert isinstance(ticket, Operation)
        self._node.renewed(ticket, left)

    def _limit(self, waiting: Waiting, pending: Pending | WaitingRead) -> None:
        node = self._node

        def give_up() -> None:
            if node.life == self._life and waiting.then is not None:
                node.replica.abandon(pending)
                waiting.end(None)

        node.after(self.TIMEOUT_TICKS * TICK, give_up)
