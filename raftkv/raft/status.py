"""A frozen view of one node, for callers, logs and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raftkv.raft.types import ConfState, Index, NodeId, Role, Term

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


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


def status_of(raft: Raft) -> Status:
    """How `raft` stands now."""
    log = raft.log
    progress = {
        peer: ProgressStatus(
            match=known.match,
            next=known.next,
            state=known.state.value,
            paused=known.paused,
            inflight_appends=len(known.inflights),
            inflight_bytes=known.inflights.bytes,
            pending_snapshot=known.pending_snapshot,
            active=raft.now - known.active_tick < raft.config.election_ticks,
            learner=not raft.conf.is_voter(peer),
        )
        for peer, known in raft.progress.items()
    }
    return Status(
        id=raft.node_id,
        role=raft.role,
        term=raft.term,
        vote=raft.vote,
        leader=raft.leader,
        commit=log.commit,
        applied=log.applied,
        first=log.first,
        last=log.last,
        last_term=log.last_term,
        stable=log.stable,
        conf=raft.conf,
        lead_transferee=raft.lead_transferee,
        uncommitted_bytes=raft.uncommitted_bytes,
        disk_stalled=raft.disk_stalled,
        progress=progress,
    )
