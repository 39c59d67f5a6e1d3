"""What nodes say to each other.

One frozen class a kind. `term` is the sender's, with one exception that is said where it is. Sender and
receiver are not in the message: they are given beside it. A message may arrive never, late, twice, or after a
restart of either side; no handler may rest on more than its fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from raftkv.raft.types import Entry, Index, SnapshotMeta, Term

__all__ = [
    "Append",
    "AppendReply",
    "Heartbeat",
    "HeartbeatReply",
    "InstallSnapshot",
    "Message",
    "PreVote",
    "PreVoteReply",
    "ReadIndex",
    "ReadIndexReply",
    "TimeoutNow",
    "Vote",
    "VoteReply",
]


@dataclass(frozen=True, slots=True)
class PreVote:
    """Would you vote for me? `term` is the one it would campaign in, not the sender's (Ongaro 9.6)."""

    term: Term
    last_index: Index
    last_term: Term


@dataclass(frozen=True, slots=True)
class PreVoteReply:
    """`term` is that of the request when granted, the voter's own when not.

    A refusal says how far the voter knows the log to be committed: a candidate that holds that entry may rely on it.
    """

    term: Term
    granted: bool
    commit: Index = 0
    commit_term: Term = 0


@dataclass(frozen=True, slots=True)
class Vote:
    """Vote for me (Ongaro 3.4). `transfer`: the leader asked me to, so do not stick to it (Ongaro 3.10)."""

    term: Term
    last_index: Index
    last_term: Term
    transfer: bool = False


@dataclass(frozen=True, slots=True)
class VoteReply:
    """Leaves only when the vote is durable. A refusal tells the commit index, as in `PreVoteReply`."""

    term: Term
    granted: bool
    commit: Index = 0
    commit_term: Term = 0


@dataclass(frozen=True, slots=True)
class Append:
    """Entries that follow (prev_index, prev_term); without entries it asks whether the logs meet there."""

    term: Term
    prev_index: Index
    prev_term: Term
    entries: tuple[Entry, ...]
    commit: Index


@dataclass(frozen=True, slots=True)
class AppendReply:
    """Accepted: everything up to `index` is durable here and as in the leader's log.

    Rejected: we have no entry like (`index`, prev_term). Our log may meet the leader's at `hint_index` at
    best, whose term here is `hint_term` (0: unknown).
    """

    term: Term
    index: Index
    rejected: bool = False
    hint_index: Index = 0
    hint_term: Term = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """I lead. `token` 0 is a mere notice of the commit index; any other is to be sent back."""

    term: Term
    commit: Index
    token: int


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """I follow you, and did so after you sent `token`; `eager`: somebody here waits to hear what is committed."""

    term: Term
    token: int
    eager: bool = False


@dataclass(frozen=True, slots=True)
class InstallSnapshot:
    """Stepped at the receiver once every byte of the snapshot is on its disk and verified."""

    term: Term
    meta: SnapshotMeta


@dataclass(frozen=True, slots=True)
class TimeoutNow:
    """Campaign at once, if you are still at `term` and your log ends at `last_index` (Ongaro 3.10)."""

    term: Term
    last_index: Index


@dataclass(frozen=True, slots=True)
class ReadIndex:
    """A follower's reads, all together as `context`, ask for a read index (Ongaro 6.4)."""

    term: Term
    context: int


@dataclass(frozen=True, slots=True)
class ReadIndexReply:
    """Whoever has applied `index` may serve the reads of `context`."""

    term: Term
    context: int
    index: Index


Message = (
    PreVote
    | PreVoteReply
    | Vote
    | VoteReply
    | Append
    | AppendReply
    | Heartbeat
    | HeartbeatReply
    | InstallSnapshot
    | TimeoutNow
    | ReadIndex
    | ReadIndexReply
)
