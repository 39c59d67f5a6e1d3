"""Who takes part: changes of the conf state.

    plain --one change--> plain
    plain --several--> joint --leave (proposed by itself once joint is applied)--> plain

A change takes effect on each node when it is applied, not when it is appended as in Ongaro 4.1 (see
docs/divergence.md): so no truncation ever takes one back. A leader has at most one that is not applied, and
proposes none before it has committed an entry of its own term (the errata of Ongaro 4.1).

See: Ongaro 4.2, 4.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.raft import quorum, replication, transfer
from raftkv.raft.errors import ConfChangePending, InvalidConfChange
from raftkv.raft.progress import Inflights, Progress
from raftkv.raft.types import (
    NODE_ID_MAX,
    ConfChange,
    ConfChangeKind,
    ConfState,
    Entry,
    EntryKind,
    Index,
    LogReader,
    NodeId,
    Role,
)

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


def changed(conf: ConfState, change: ConfChange) -> ConfState:
    """`conf` after `change`.

    Raises:
        InvalidConfChange: it makes no sense there.
    """
    if not change.changes:
        if not conf.joint:
            raise InvalidConfChange("not in a joint conf state, there is nothing to leave")
        return ConfState(voters=conf.voters, learners=_sorted({*conf.learners, *conf.learners_next}))
    if conf.joint:
        raise InvalidConfChange("a joint conf state must be left before the next change")
    nodes = [node for _, node in change.changes]
    if len(set(nodes)) != len(nodes):
        raise InvalidConfChange("one node occurs twice")
    joint = len(nodes) > 1
    voters, learners = set(conf.voters), set(conf.learners)
    learners_next: set[NodeId] = set()
    for kind, node in change.changes:
        if not 0 < node <= NODE_ID_MAX:
            raise InvalidConfChange(f"{node} is no node id")
        if kind is ConfChangeKind.ADD_LEARNER and node not in learners:
            # While joint, whoever is an old voter still is one; it becomes a learner when the change ends.
            (learners_next if joint and node in conf.voters else learners).add(node)
        elif kind is not ConfChangeKind.ADD_LEARNER:
            learners.discard(node)
        if kind is ConfChangeKind.ADD_VOTER:
            voters.add(node)
        else:
            voters.discard(node)
    if not voters:
        raise InvalidConfChange("no voter would be left")
    if not joint:
        return ConfState(voters=_sorted(voters), learners=_sorted(learners))
    return ConfState(_sorted(voters), conf.voters, _sorted(learners), _sorted(learners_next), auto_leave=True)


def _sorted(nodes: set[NodeId]) -> tuple[NodeId, ...]:
    return tuple(sorted(nodes))


class ConfHistory:
    """The conf states since the compacted prefix, each with the index from which it holds."""

    __slots__ = ("_states",)

    def __init__(self, index: Index, conf: ConfState) -> None:
        self._states = [(index, conf)]

    def add(self, index: Index, conf: ConfState) -> None:
        """`conf` holds from `index` on."""
        assert index > self._states[-1][0], f"conf change at {index} after {self._states[-1][0]}"
        self._states.append((index, conf))

    @property
    def last(self) -> tuple[Index, ConfState]:
        """The newest, and its index."""
        return self._states[-1]

    def at(self, index: Index) -> ConfState:
        """The conf state as of `index`."""
        for start, conf in reversed(self._states):
            if start <= index:
                return conf
        raise LookupError(f"the conf state as of {index} is compacted")

    def compacted(self, index: Index) -> None:
        """Forget what only matters before `index`."""
        while len(self._states) > 1 and self._states[1][0] <= index:
            del self._states[0]


def recover(storage: LogReader, conf: ConfState, applied: Index) -> ConfHistory:
    """The conf state is a function of the log (C3): the snapshot's, and what was applied since."""
    low = storage.first_index()
    history = ConfHistory(low - 1, conf)
    while low <= applied:
        entries = storage.entries(low, applied + 1, 1 << 20)
        for entry in entries:
            if entry.kind is EntryKind.CONF_CHANGE:
                after = _after_entry(history.last[1], entry)
                if after is not None:
                    history.add(entry.index, after)
        low += len(entries)
    return history


def _after_entry(conf: ConfState, entry: Entry) -> ConfState | None:
    """The conf state after `entry`; None when it is void. Every node comes to the same answer."""
    try:
        return changed(conf, ConfChange.decode(entry.data))
    except (ValueError, InvalidConfChange):
        return None


def propose(raft: Raft, change: ConfChange) -> tuple[int, int]:
    """Append a conf change.

    Raises:
        InvalidConfChange, ConfChangePending: see `Raft.propose_conf_change`.
    """
    if raft.pending_conf_index > raft.log.applied:
        raise ConfChangePending(f"the change at index {raft.pending_conf_index} is not applied yet")
    if raft.log.commit < raft.term_start:
        raise ConfChangePending("this term has committed nothing yet")
    after = changed(raft.conf, change)
    if raft.config.strict_conf_change and change.changes:
        _check_quorum_answers(raft, after)
    return _append(raft, change)


def _append(raft: Raft, change: ConfChange) -> tuple[int, int]:
    assert raft.pending_conf_index <= raft.log.applied  # C2
    assert raft.log.commit >= raft.term_start  # C2
    entry = Entry(raft.log.last + 1, raft.term, EntryKind.CONF_CHANGE, change.encode())
    raft.pending_conf_index = entry.index
    raft.append_own([entry])
    return entry.term, entry.index


def _check_quorum_answers(raft: Raft, after: ConfState) -> None:
    """A change must not need voters that do not answer or have far less than what is committed (etcd #3477)."""
    answers = {raft.node_id: True}
    for peer, progress in raft.progress.items():
        active = raft.now - progress.active_tick < raft.config.election_ticks
        answers[peer] = active and progress.match >= raft.term_start
    if not quorum.has_quorum(ConfState(after.voters), answers):
        silent = [voter for voter in after.voters if not answers.get(voter)]
        raise InvalidConfChange(f"no majority would answer: {silent} are silent or behind; add them as learners first")


def apply(raft: Raft, entry: Entry) -> ConfState:
    """A CONF_CHANGE entry is applied; the conf state as of it."""
    if entry.index <= raft.conf_history.last[0]:
        return raft.conf  # a snapshot received meanwhile already holds it
    after = _after_entry(raft.conf, entry)
    if after is None:
        raft.event("conf_changed", detail="unchanged, the entry is void")
        return raft.conf
    raft.conf_history.add(entry.index, after)
    adopt(raft, after)
    return after


def adopt(raft: Raft, conf: ConfState) -> None:
    """`conf` holds from now on."""
    raft.conf = conf
    raft.event("conf_changed", detail=f"voters={conf.voters} outgoing={conf.outgoing} learners={conf.learners}")
    if raft.role is not Role.LEADER:
        return
    # Also those who are removed learn that it is committed; afterwards we do not know them any more.
    replication.notify_commit(raft, raft.progress)
    sync_progress(raft)
    if raft.lead_transferee and not conf.is_voter(raft.lead_transferee):
        transfer.abort(raft)
    if not conf.is_voter(raft.node_id):
        transfer.hand_over(
            raft, "removed from the voters"
        )  # Ongaro 4.2.2, and its last service: somebody takes over at once
        return
    replication.maybe_commit(raft)  # the new majority may be smaller
    raft.reads.check()
    raft.dirty = True


def sync_progress(raft: Raft) -> None:
    """Let the leader have a progress for exactly the other members."""
    config = raft.config
    progress = {}
    for member in raft.conf.members():
        if member == raft.node_id:
            continue
        known = raft.progress.get(member)
        if known is None:
            inflights = Inflights(config.inflight_appends_max, config.inflight_bytes_max)
            known = Progress(raft.log.last + 1, raft.now, inflights)
        progress[member] = known
    raft.progress = progress


def maybe_leave(raft: Raft) -> None:
    """A joint conf state that is applied is left by itself; whoever leads sees to it."""
    if (
        raft.conf.auto_leave
        and raft.role is Role.LEADER
        and raft.pending_conf_index <= raft.log.applied
        and raft.log.commit >= raft.term_start
        and not raft.lead_transferee
    ):
        _append(raft, ConfChange())
