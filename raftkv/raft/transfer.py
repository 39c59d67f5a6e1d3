"""Leadership that is given away: to a chosen voter, or to whoever can take over when the leader must go.

    leading --start--> waiting for the target to have the whole log --TimeoutNow--> a later term
       ^                     |
       +--election timeout---+

While it waits the leader takes no proposals, so that the target can catch up.    See: Ongaro 3.10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.raft.errors import InvalidTransferee, NotLeader
from raftkv.raft.messages import TimeoutNow
from raftkv.raft.progress import ProgressState
from raftkv.raft.types import Entry, EntryKind, NodeId, Role

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


def start(raft: Raft, target: NodeId) -> None:
    """Hand leadership to `target` as soon as it has the whole log.

    Raises:
        NotLeader, InvalidTransferee: see `Raft.transfer_leadership`.
    """
    if raft.role is not Role.LEADER:
        raise NotLeader(raft.leader)
    if not raft.conf.is_voter(target):
        raise InvalidTransferee(target)
    if target in (raft.node_id, raft.lead_transferee):
        return
    if raft.lead_transferee:
        abort(raft)
    raft.lead_transferee = target
    raft.transfer_elapsed = 0
    raft.event("transfer_started", by=target)
    if not remind(raft):
        raft.progress[target].paused = False
        raft.thrift.want_everybody()


def remind(raft: Raft) -> bool:
    """Tell the target to campaign if it has everything; also again, for that may be lost. Whether it has."""
    progress = raft.progress.get(raft.lead_transferee)
    if progress is None or progress.match != raft.log.last:
        return False
    raft.send(raft.lead_transferee, TimeoutNow(raft.term, raft.log.last))
    return True


def tick(raft: Raft) -> None:
    """Time passes for the leader."""
    if raft.lead_transferee:
        raft.transfer_elapsed += 1
        if raft.transfer_elapsed >= raft.config.election_ticks:
            abort(raft)


def abort(raft: Raft) -> None:
    """Lead on."""
    raft.event("transfer_aborted", by=raft.lead_transferee)
    raft.lead_transferee = 0
    # What was said to the target may still arrive. An entry that it was not told of makes that void: either its
    # log does not end there any more, or it lacks what a majority has.
    raft.append_own([Entry(raft.log.last + 1, raft.term, EntryKind.NORMAL, b"")])


def hand_over(raft: Raft, why: str) -> None:
    """Stop leading; who has most of the log is told to campaign at once, so nobody waits for a timeout."""
    heirs = [
        (progress.match, peer)
        for peer, progress in raft.progress.items()
        if peer in raft.conf.voters and progress.state is ProgressState.REPLICATE
    ]
    if heirs:
        match, heir = max(heirs)
        raft.send(heir, TimeoutNow(raft.term, match))
    raft.become_follower(raft.term, 0, why)
