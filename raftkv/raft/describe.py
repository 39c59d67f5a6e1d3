"""One spelling of each value, for logs, transcripts and the dashboard.

An entry is `term/index` and its data; a node is its number.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftkv.raft.messages import (
    Append,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVote,
    PreVoteReply,
    ReadIndex,
    ReadIndexReply,
    TimeoutNow,
    Vote,
    VoteReply,
)
from raftkv.raft.ready import Event
from raftkv.raft.status import Status
from raftkv.raft.types import ConfChange, ConfChangeKind, ConfState, Entry, EntryKind, NodeId, SnapshotMeta

DATA_SHOWN_MAX = 24

_KIND_SIGN = {ConfChangeKind.ADD_VOTER: "+", ConfChangeKind.ADD_LEARNER: "~", ConfChangeKind.REMOVE: "-"}


def entry(value: Entry) -> str:
    """`3/7 "text"`, `3/7` for a no-op, `3/7 conf +4 -1`."""
    place = f"{value.term}/{value.index}"
    if value.kind is EntryKind.CONF_CHANGE:
        try:
            return f"{place} conf {conf_change(ConfChange.decode(value.data))}"
        except ValueError:
            return f"{place} conf (malformed)"
    if not value.data:
        return place
    text = value.data[:DATA_SHOWN_MAX].decode("utf-8", "backslashreplace")
    return f'{place} "{text}"' + ("…" if len(value.data) > DATA_SHOWN_MAX else "")


def entries(values: Iterable[Entry]) -> str:
    """`[3/7 "text", 3/8]`."""
    return "[" + ", ".join(map(entry, values)) + "]"


def conf_change(value: ConfChange) -> str:
    """`+4 ~5 -1`: voter, learner, removed; `leave` for leaving a joint conf state."""
    return " ".join(f"{_KIND_SIGN[kind]}{node}" for kind, node in value.changes) or "leave"


def nodes(values: Iterable[NodeId]) -> str:
    """`1 2 3`."""
    return " ".join(map(str, values))


def conf(value: ConfState) -> str:
    """`(1 2 3)`, `(1 2 4)&(1 2 3) learners=(5)`."""
    text = f"({nodes(value.voters)})"
    if value.outgoing:
        text += f"&({nodes(value.outgoing)})"
    if value.learners:
        text += f" learners=({nodes(value.learners)})"
    if value.learners_next:
        text += f" learners_next=({nodes(value.learners_next)})"
    return text


def snapshot(value: SnapshotMeta) -> str:
    """`3/7 (1 2 3)`."""
    return f"{value.term}/{value.index} {conf(value.conf)}"


def message(value: Message) -> str:
    """The kind, then every field but what goes without saying."""
    name = type(value).__name__
    match value:
        case Append():
            text = f"prev={value.prev_term}/{value.prev_index} commit={value.commit}"
            rest = f"{text} {entries(value.entries)}" if value.entries else text
        case AppendReply(rejected=True):
            rest = f"rejected {value.index} hint={value.hint_term}/{value.hint_index}"
        case AppendReply():
            rest = f"accepted {value.index}"
        case Heartbeat():
            rest = f"commit={value.commit}" + (f" token={value.token}" if value.token else "")
        case HeartbeatReply():
            rest = f"token={value.token}"
        case PreVote() | Vote():
            rest = f"last={value.last_term}/{value.last_index}"
            if isinstance(value, Vote) and value.transfer:
                rest += " transfer"
        case PreVoteReply() | VoteReply():
            rest = "granted" if value.granted else "refused"
        case InstallSnapshot():
            rest = snapshot(value.meta)
        case TimeoutNow():
            rest = f"last={value.last_index}"
        case ReadIndex():
            rest = ""
        case ReadIndexReply():
            rest = f"index={value.index}"
    return f"{name} term={value.term} {rest}".rstrip()


def event(value: Event) -> str:
    """The kind, then what it is about."""
    parts = [value.kind]
    if value.kind in ("leader_changed", "leader_doubted"):
        parts.append(f"leader={value.leader or 'none'}")
    if value.by:
        parts.append(f"by={value.by}")
    if value.detail:
        parts.append(f"({value.detail})")
    return " ".join(parts)


def status(value: Status) -> str:
    """`leader term=1 commit=2 last=3`."""
    text = f"{value.role.value} term={value.term} commit={value.commit} last={value.last}"
    if value.role.value == "follower":
        text += f" leader={value.leader or 'none'}"
    return text


def progress(value: Status) -> list[str]:
    """One line for each follower."""
    return [
        f"{peer}: {known.state} match={known.match} next={known.next}"
        + (" paused" if known.paused else "")
        + (f" inflight={known.inflight_appends}" if known.inflight_appends else "")
        + (" inactive" if not known.active else "")
        + (" learner" if known.learner else "")
        for peer, known in value.progress.items()
    ]
