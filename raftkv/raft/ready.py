"""What must happen next, and in which order.

A driver takes `Raft.ready()` and obeys it so:

    1. persist `install`, then `hard_state` and `entries`, as one atomic and synced write; `entries` replace whatever
       the log has from `entries[0].index` on. The write may run in the background; further Readys may be taken and
       written meanwhile, in order. Call `Raft.persisted(number)` when it is durable.
    2. send `messages`: at once, in parallel with the disk.
    3. send `messages_after` only when this Ready and all before it are durable. They rest on it: votes,
       acknowledgements, and everything said in a term that is not yet on disk (rule D1, R14). A Ready without
       anything to persist has some only while an earlier one is being written.
    4. apply `committed`, in order; for a CONF_CHANGE entry call `Raft.apply_conf_change`. Then `Raft.applied_to`.

The commit index is persisted with the next write that is needed anyway: after a restart it may be learnt anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from raftkv.raft.messages import Message
from raftkv.raft.types import Entry, HardState, Index, NodeId, SnapshotMeta, Term


@dataclass(frozen=True, slots=True)
class Event:
    """Something a log line is worth; `kind` is one of EVENT_KINDS."""

    kind: str
    term: Term
    leader: NodeId = 0
    by: NodeId = 0
    """The other node it is about."""
    detail: str = ""


EVENT_KINDS = frozenset(
    {
        "pre_campaign",  # asks whether it would be elected
        "campaign",  # asks for votes; detail: why
        "vote_granted",  # to `by`
        "became_leader",
        "stepped_down",  # from leader or candidate; detail: why
        "leader_changed",  # `leader` 0: lost
        "leader_doubted",  # `by` wants to replace `leader`, whom we still hear: probe it
        "quorum_lost",  # a leader hears no majority
        "disk_stalled",  # the own disk finishes nothing; detail: for how long
        "transfer_started",  # to `by`
        "transfer_aborted",  # to `by`
        "conf_changed",  # detail: the new conf state
        "snapshot_needed",  # `by` needs entries that are compacted
        "snapshot_accepted",  # a received snapshot replaces log and state
        "snapshot_ignored",  # we have what it holds
        "message_ignored",  # from `by`, impossible content; detail: what
    }
)


@dataclass(frozen=True, slots=True)
class Ready:
    """See the module."""

    number: int
    hard_state: HardState | None
    entries: tuple[Entry, ...]
    install: SnapshotMeta | None
    messages: tuple[tuple[NodeId, Message], ...]
    messages_after: tuple[tuple[NodeId, Message], ...]
    committed: tuple[Entry, ...]
    reads: tuple[tuple[int, Index], ...]
    """(context, read index): to be served once that index is applied."""
    dropped_reads: tuple[int, ...]
    """Contexts whose read must be asked for again: the leader changed."""
    send_snapshots: tuple[tuple[NodeId, Index], ...]
    """(peer, index): stream it a snapshot at least that new, in the name of the present term, then call
    `Raft.snapshot_sent`."""
    role_changed: bool
    events: tuple[Event, ...]
    must_sync: bool
    """Whether there is anything to persist; all of it is synced."""
