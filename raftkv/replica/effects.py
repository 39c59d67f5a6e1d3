"""What a replica asks its driver to do.

The driver (`raftkv.server.runtime` with a disk and sockets, `raftkv.sim` with fakes) takes one
`Effects` a turn and carries it out in this order:

    1. hand `persist` to the disk (it may still run while the rest is done);
    2. send `send`: everything in it is allowed to leave now, whatever the disk does;
    3. apply `apply` to the state machine, then tell `Replica.applied`;
    4. start `send_snapshots`.

What must not leave before a write is durable is *not* in `send`: the replica keeps it and hands it
out in a later turn, after `Replica.persisted`. So a driver cannot break the order of persist and send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raftkv.raft.messages import Message
from raftkv.raft.ready import Event
from raftkv.raft.types import Entry, HardState, NodeId, SnapshotMeta
from raftkv.state.commands import Command, Group


@dataclass(frozen=True, slots=True)
class Forward:
    """Commands on their way from the node that was asked to the node that leads.

    Invariant: `term` is the term in which the receiver was known to lead. It proposes them only
    while it leads in just that term, so once an entry of a later term has been applied a command
    that was not seen in the log can never get into it.
    """

    term: int
    incarnation: int
    commands: tuple[Command, ...]  # seq strictly rises within a stream


PeerMessage = Message | Forward


@dataclass(frozen=True, slots=True)
class Persist:
    """One atomic, synced write: hard state, truncation of the old suffix, entries (rule Z4)."""

    number: int
    hard_state: HardState | None
    entries: tuple[Entry, ...]
    install: SnapshotMeta | None
    must_sync: bool


@dataclass(frozen=True, slots=True)
class Apply:
    """One committed entry with its commands already taken apart."""

    entry: Entry
    groups: Sequence[Group]


@dataclass(slots=True)
class Effects:
    """One turn's work; see the module for the order."""

    persist: Persist | None
    send: list[tuple[NodeId, PeerMessage]]
    apply: list[Apply]
    send_snapshots: tuple[tuple[NodeId, int], ...]
    events: tuple[Event, ...]


@dataclass(slots=True)
class Answers:
    """What waiting callers get to hear; `ticket` is whatever the driver handed in."""

    results: list[tuple[object, object]]  # (ticket, Result of the state machine)
    reads: list[object]  # tickets of reads that may now be served
    unknown: list[object]  # of commands whose fate a snapshot has hidden from this node, or that ended with its office
