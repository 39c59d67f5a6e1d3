"""What the services need of the node they serve; `raftkv.server.runtime.Runtime` has it, and so has the tests' fake.

All of it belongs to the node's event loop, except what says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from raftkv._pb.common_pb2 import ResponseHeader
from raftkv.server.callers import Waiter
from raftkv.server.config import NodeConfig
from raftkv.server.lessor import LeaseLeft
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """One member of the cluster, as this node has applied it."""

    member_id: int
    name: str  # empty until it has started once
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]  # empty until it has started once
    is_learner: bool = False


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One look at a node, consistent in itself."""

    term: int
    leader: int  # 0: none is known
    commit: int
    applied: int  # applied <= commit
    last_index: int  # of the log; commit <= last_index
    is_learner: bool
    state_bytes: int  # the state on disk
    state_bytes_in_use: int  # what would be left of it after a defragmentation, about


class Mark(NamedTuple):
    """A moment, by the last entry that a leader had appended.

    Once a later entry of the same term is applied, the state is of a time after that moment, and whoever came before it
    may be answered from there, linearizably, without another round: that entry was appended after the moment and is
    committed, so all that was committed before the moment lies before it, whoever may lead by then (Ongaro 3.6.3).
    """

    term: int  # 0: this node did not lead, and no state proves anything
    last: int


class SpooledSnapshot(Protocol):
    """A consistent copy of the state in a file. Usable in any thread, by one reader."""

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Node(Protocol):
    """A node, as its services see it."""

    on_applied: Callable[[], None]
    """Called in the turn in which `machine` moved on or was replaced, before anybody else may look."""

    @property
    def config(self) -> NodeConfig: ...

    @property
    def node_id(self) -> int: ...

    @property
    def cluster_id(self) -> int: ...

    @property
    def machine(self) -> StateMachine:
        """The state; another one after a snapshot was installed, so never keep it across an await."""
        ...

    @property
    def leader(self) -> int:
        """The member that leads, as far as this node knows; 0 when it knows none."""
        ...

    @property
    def term(self) -> int: ...

    async def propose(self, kind: CommandKind, payload: bytes, deadline: float | None) -> Result:
        """Have a command committed and applied here. `deadline` as `loop.time()`; None: the configured time."""
        ...

    def submit_for(self, waiter: Waiter, kind: CommandKind, payload: bytes, deadline: float | None) -> None:
        """As `propose`, for a waiter that hears of it at once; when it no longer waits, say so by `abandon`."""
        ...

    def submit_read(self, deadline: float | None) -> asyncio.Future[object]:
        """As `read_barrier`, as a future; likewise."""
        ...

    def expect_news(self, expected: bool) -> None:
        """Whether somebody here waits to hear what is committed: then it comes at once, and else a little later."""
        ...

    def mark(self) -> Mark:
        """What this node has proposed so far, as a leader."""
        ...

    def is_after(self, mark: Mark) -> bool:
        """Whether `machine` is certainly of a time after `mark` was taken."""
        ...

    def ask_lease(self, lease: int, *, renew: bool, deadline: float | None) -> asyncio.Future[LeaseLeft]:
        """Have the leader renew a lease, or say how long it has, once it has proved that it leads; likewise."""
        ...

    def abandon(self, waiter: Waiter) -> None:
        """It, or this future, does not wait any more: what was not sent yet is dropped."""
        ...

    async def read_barrier(self, deadline: float | None) -> None:
        """Wait until all that was committed when this was called is applied here."""
        ...

    async def transfer_leadership(self, target: int, deadline: float | None) -> None:
        """Hand leadership to `target`, and wait until it leads."""
        ...

    def status(self) -> NodeStatus: ...

    def members(self) -> Sequence[MemberFacts]:
        """In the order of their ids."""
        ...

    def state_bytes(self) -> int:
        """The size of the state on disk; asked about once a second."""
        ...

    async def defragment(self) -> None:
        """Have the state give room back to the disk, while the node goes on serving."""
        ...

    async def spool_snapshot(self) -> SpooledSnapshot:
        """A copy of the state as of now, for a client to keep."""
        ...

    def fatal(self, fault: BaseException) -> None:
        """The node's own disk or state cannot be trusted any more: end the process, answer nobody (rule Z1)."""
        ...


def fill_header(node: Node, header: ResponseHeader) -> None:
    """Say who answers; the revision is there already."""
    header.cluster_id = node.cluster_id
    header.member_id = node.node_id
    header.raft_term = node.term
    header.leader = node.leader
