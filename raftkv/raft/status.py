"""A frozen view of one node, for callers, logs and tests."""

from __future__ import annotations

from dataclasses import dataclass

from raftkv.raft.types import ConfState, Index, NodeId, Role, Term


@dataclass(frozen=True, slots=True)
class ProgressStatus:
    """What the leader knows about one follower."""

    match: Index
    next: Index
    state: str
    """"probe", "replicate" or "snapshot"."""
    paused: bool
    inflight_appends: int
    inflight_bytes: int
    pending_snapshot: Index
    active: bool
    """Heard within an election timeout."""
    learner: bool


@dataclass(frozen=True, slots=True)
class Status:
    """One node at one moment. Invariant: applied <= commit <= last."""

    id: NodeId
    role: Role
    term: Term
    vote: NodeId
    leader: NodeId
    commit: Index
    applied: Index
    first: Index
    last: Index
    last_term: Term
    stable: Index
    """What is durable here."""
    conf: ConfState
    lead_transferee: NodeId
    uncommitted_bytes: int
    disk_stalled: bool
    progress: dict[NodeId, ProgressStatus]
    """Of the other members; empty unless leader."""
