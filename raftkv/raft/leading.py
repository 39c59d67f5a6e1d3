"""What time asks of a leader: heartbeats, and to stop leading when it cannot.

It steps down when its own disk gets nowhere, and when no majority was heard for an election timeout (check-quorum).

See: Ongaro 3.4, 6.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.raft import membership, quorum, transfer

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


def tick(raft: Raft) -> None:
    """One tick has passed."""
    config = raft.config
    if raft.disk_stalled:
        # It could go on for ever with the others' disks, or hang for ever when they need it (hashicorp/raft #503).
        transfer.hand_over(raft, "disk stalled")
        return
    transfer.tick(raft)
    raft.thrift.tick()
    raft.heartbeat_elapsed += 1
    if raft.heartbeat_elapsed < config.heartbeat_ticks:
        return
    raft.heartbeat_elapsed = 0
    if config.check_quorum and not _quorum_active(raft):
        raft.event("quorum_lost")
        raft.become_follower(raft.term, 0, "no quorum answers")
        return
    raft.beat_due = True
    transfer.remind(raft)
    membership.maybe_leave(raft)


def _quorum_active(raft: Raft) -> bool:
    since = raft.now - raft.config.election_ticks
    active = {peer: progress.active_tick > since for peer, progress in raft.progress.items()}
    active[raft.node_id] = True
    return quorum.has_quorum(raft.conf, active)
