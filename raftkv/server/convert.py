"""Between the messages on the wire and those of consensus; nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from raftkv._pb import raft_pb2 as pb
from raftkv.raft import messages as m
from raftkv.raft.types import ConfState, Entry, EntryKind, SnapshotMeta
from raftkv.replica.effects import Forward
from raftkv.replica.effects import PeerMessage as ReplicaMessage
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.server.lessor import LeaseLeft
from raftkv.state.commands import Command

PeerMessage = ReplicaMessage | LeaseAsk | LeaseAnswer
"""Whatever nodes say to each other."""

_NORMAL = EntryKind.NORMAL


def _append(out: pb.PeerMessage, message: m.Append) -> None:
    append = out.append
    append.term = message.term
    append.prev_index = message.prev_index
    append.prev_term = message.prev_term
    append.commit = message.commit
    append.entries.extend([pb.RaftEntry(index=e.index, term=e.term, kind=e.kind, data=e.data) for e in message.entries])


def _append_reply(out: pb.PeerMessage, message: m.AppendReply) -> None:
    out.append_reply.CopyFrom(
        pb.RaftAppendReply(
            term=message.term,
            index=message.index,
            rejected=message.rejected,
            hint_index=message.hint_index,
            hint_term=message.hint_term,
        )
    )


def _heartbeat(out: pb.PeerMessage, message: m.Heartbeat) -> None:
    heartbeat = out.heartbeat
    heartbeat.term = message.term
    heartbeat.commit = message.commit
    heartbeat.token = message.token


def _heartbeat_reply(out: pb.PeerMessage, message: m.HeartbeatReply) -> None:
    out.heartbeat_reply.term = message.term
    out.heartbeat_reply.token = message.token
    if message.eager:
        out.heartbeat_reply.eager = True


def _pre_vote(out: pb.PeerMessage, message: m.PreVote) -> None:
    out.pre_vote.CopyFrom(pb.RaftPreVote(term=message.term, last_index=message.last_index, last_term=message.last_term))


def _pre_vote_reply(out: pb.PeerMessage, message: m.PreVoteReply) -> None:
    out.pre_vote_reply.CopyFrom(
        pb.RaftPreVoteReply(
            term=message.term, granted=message.granted, commit=message.commit, commit_term=message.commit_term
        )
    )


def _vote(out: pb.PeerMessage, message: m.Vote) -> None:
    out.vote.CopyFrom(
        pb.RaftVote(
            term=message.term,
            last_index=message.last_index,
            last_term=message.last_term,
            transfer=message.transfer,
        )
    )


def _vote_reply(out: pb.PeerMessage, message: m.VoteReply) -> None:
    out.vote_reply.CopyFrom(
        pb.RaftVoteReply(
            term=message.term, granted=message.granted, commit=message.commit, commit_term=message.commit_term
        )
    )


def _timeout_now(out: pb.PeerMessage, message: m.TimeoutNow) -> None:
    out.timeout_now.CopyFrom(pb.RaftTimeoutNow(term=message.term, last_index=message.last_index))


def _read_index(out: pb.PeerMessage, message: m.ReadIndex) -> None:
    out.read_index.CopyFrom(pb.RaftReadIndex(term=message.term, context=message.context))


def _read_index_reply(out: pb.PeerMessage, message: m.ReadIndexReply) -> None:
    out.read_index_reply.CopyFrom(
        pb.RaftReadIndexReply(term=message.term, context=message.context, index=message.index)
    )


def _forward(out: pb.PeerMessage, message: Forward) -> None:
    forward = out.forward
    forward.term = message.term
    forward.incarnation = message.incarnation
    forward.commands.extend([pb.ForwardedCommand(seq=c.seq, kind=c.kind, payload=c.payload) for c in message.commands])


def _lease_ask(out: pb.PeerMessage, message: LeaseAsk) -> None:
    ask = out.lease_ask
    ask.term = message.term
    ask.context = message.context
    ask.renew.extend(message.renew)
    ask.look.extend(message.look)


def _lease_answer(out: pb.PeerMessage, message: LeaseAnswer) -> None:
    answer = out.lease_answer
    answer.term = message.term
    answer.context = message.context
    answer.leases.extend(
        [
            pb.LeaseLeft(id=left.lease, remaining_ms=left.remaining_ms, granted_ms=left.granted_ms)
            for left in message.leases
        ]
    )


_TO_WIRE: dict[type, Callable[..., None]] = {
    m.Append: _append,
    m.AppendReply: _append_reply,
    m.Heartbeat: _heartbeat,
    m.HeartbeatReply: _heartbeat_reply,
    m.PreVote: _pre_vote,
    m.PreVoteReply: _pre_vote_reply,
    m.Vote: _vote,
    m.VoteReply: _vote_reply,
    m.TimeoutNow: _timeout_now,
    m.ReadIndex: _read_index,
    m.ReadIndexReply: _read_index_reply,
    Forward: _forward,
    LeaseAsk: _lease_ask,
    LeaseAnswer: _lease_answer,
}


def to_batch(messages: Sequence[PeerMessage]) -> pb.PeerBatch:
    """One message on the wire of everything that goes to a peer now."""
    batch = pb.PeerBatch()
    add = batch.messages.add
    for message in messages:
        _TO_WIRE[type(message)](add(), message)
    return batch


def _from_append(p: pb.RaftAppend) -> m.Append:
    entries = tuple([Entry(e.index, e.term, _NORMAL if e.kind == 0 else EntryKind(e.kind), e.data) for e in p.entries])
    return m.Append(p.term, p.prev_index, p.prev_term, entries, p.commit)


def _from_forward(p: pb.Forward) -> Forward:
    return Forward(p.term, p.incarnation, tuple([Command(c.seq, c.kind, c.payload) for c in p.commands]))


def _from_lease_answer(p: pb.LeaseAnswer) -> LeaseAnswer:
    leases = tuple([LeaseLeft(left.id, left.remaining_ms, left.granted_ms) for left in p.leases])
    return LeaseAnswer(p.term, p.context, leases)


_FROM_WIRE: dict[str, Callable[[pb.PeerMessage], PeerMessage]] = {
    "append": lambda p: _from_append(p.append),
    "append_reply": lambda p: m.AppendReply(
        p.append_reply.term,
        p.append_reply.index,
        p.append_reply.rejected,
        p.append_reply.hint_index,
        p.append_reply.hint_term,
    ),
    "heartbeat": lambda p: m.Heartbeat(p.heartbeat.term, p.heartbeat.commit, p.heartbeat.token),
    "heartbeat_reply": lambda p: m.HeartbeatReply(
        p.heartbeat_reply.term, p.heartbeat_reply.token, p.heartbeat_reply.eager
    ),
    "pre_vote": lambda p: m.PreVote(p.pre_vote.term, p.pre_vote.last_index, p.pre_vote.last_term),
    "pre_vote_reply": lambda p: m.PreVoteReply(
        p.pre_vote_reply.term, p.pre_vote_reply.granted, p.pre_vote_reply.commit, p.pre_vote_reply.commit_term
    ),
    "vote": lambda p: m.Vote(p.vote.term, p.vote.last_index, p.vote.last_term, p.vote.transfer),
    "vote_reply": lambda p: m.VoteReply(
        p.vote_reply.term, p.vote_reply.granted, p.vote_reply.commit, p.vote_reply.commit_term
    ),
    "timeout_now": lambda p: m.TimeoutNow(p.timeout_now.term, p.timeout_now.last_index),
    "read_index": lambda p: m.ReadIndex(p.read_index.term, p.read_index.context),
    "read_index_reply": lambda p: m.ReadIndexReply(
        p.read_index_reply.term, p.read_index_reply.context, p.read_index_reply.index
    ),
    "forward": lambda p: _from_forward(p.forward),
    "lease_ask": lambda p: LeaseAsk(
        p.lease_ask.term, p.lease_ask.context, tuple(p.lease_ask.renew), tuple(p.lease_ask.look)
    ),
    "lease_answer": lambda p: _from_lease_answer(p.lease_answer),
}


def from_batch(batch: pb.PeerBatch) -> list[PeerMessage]:
    """The messages of one batch, in order; kinds that this version does not know are passed over.

    Raises:
        ValueError: an entry of a kind that this version does not know: it may not be stored or skipped.
    """
    messages = []
    for message in batch.messages:
        kind = message.WhichOneof("kind")
        convert = _FROM_WIRE.get(kind) if kind else None
        if convert is not None:
            messages.append(convert(message))
    return messages


def size_hint(message: PeerMessage) -> int:
    """About how many bytes a message takes, for limits."""
    if isinstance(message, m.Append):
        return 32 + sum([len(entry.data) + 16 for entry in message.entries])
    if isinstance(message, Forward):
        return 32 + sum([len(command.payload) + 16 for command in message.commands])
    if isinstance(message, LeaseAsk):
        return 32 + 10 * (len(message.renew) + len(message.look))
    if isinstance(message, LeaseAnswer):
        return 32 + 24 * len(message.leases)
    return 32


def conf_to_wire(conf: ConfState) -> pb.ConfState:
    """Of a configuration."""
    return pb.ConfState(
        voters=conf.voters,
        outgoing=conf.outgoing,
        learners=conf.learners,
        learners_next=conf.learners_next,
        auto_leave=conf.auto_leave,
    )


def conf_from_wire(p: pb.ConfState) -> ConfState:
    """Of a configuration."""
    return ConfState(
        voters=tuple(p.voters),
        outgoing=tuple(p.outgoing),
        learners=tuple(p.learners),
        learners_next=tuple(p.learners_next),
        auto_leave=p.auto_leave,
    )


def meta_to_wire(meta: SnapshotMeta) -> pb.SnapshotMeta:
    """Of what a snapshot stands for."""
    return pb.SnapshotMeta(index=meta.index, term=meta.term, conf=conf_to_wire(meta.conf))


def meta_from_wire(p: pb.SnapshotMeta) -> SnapshotMeta:
    """Of what a snapshot stands for."""
    return SnapshotMeta(p.index, p.term, conf_from_wire(p.conf))
