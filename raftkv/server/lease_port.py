"""The node as `Leasing` sees it: its callbacks on the runtime's futures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raftkv.raft.types import NodeId
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.server.lessor import LeaseLeft
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result

if TYPE_CHECKING:
    from raftkv.server.runtime import Runtime


class LeasePort:
    """What `Leasing` sees of this node."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.node_id = runtime.node_id

    @property
    def machine(self) -> StateMachine:
        return self._runtime.machine

    @property
    def leader(self) -> NodeId:
        return self._runtime.leader

    @property
    def term(self) -> int:
        return self._runtime.term

    def send(self, peer: NodeId, message: LeaseAsk | LeaseAnswer) -> None:
        self._runtime.peers.send(peer, message)

    def command(self, kind: CommandKind, payload: bytes, then: Callable[[Result | None], None]) -> None:
        future = self._runtime.callers.submit(kind, payload, None, leading=True)
        self._runtime._wake()
        future.add_done_callback(lambda done: self._run(lambda: then(done.result() if _is_good(done) else None)))

    def confirm(self, then: Callable[[], None]) -> None:
        future = self._runtime.submit_read(None)
        future.add_done_callback(lambda done: self._run(then) if _is_good(done) else None)

    def tell(self, ticket: object, left: LeaseLeft) -> None:
        self._runtime.callers.give(ticket, left)

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as fault:  # noqa: BLE001 - who keeps time for leases must not be left half way
            self._runtime.fatal(fault)


def _is_good(done: asyncio.Future[Any]) -> bool:
    return not done.cancelled() and done.exception() is None


def is_done(ticket: object) -> bool:
    """Whether nobody waits for this future any more."""
    assert isinstance(ticket, asyncio.Future), "a ticket that is not ours"
    return ticket.done()
