"""One replica: obeys consensus, and keeps the promises made to callers.

It joins `raftkv.raft` (what is agreed) with the callers of this node (who asked for it). It has no clock, no
socket, no disk and no asyncio; the simulator runs this very file. Each public method but `take` is an event;
`take` is one turn and returns the effects, see `raftkv.replica.effects`.

What it owns is order:
  - a reply that promises durability leaves only after `persisted` of the write it rests on (rule D1);
  - a command is proposed in the term its sender believed in, or not at all (see `proposals`);
  - a read is served at an index whose round began after it arrived (see `reads`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeVar

from raftkv.raft.core import Raft
from raftkv.raft.errors import NoLeader
from raftkv.raft.messages import Message
from raftkv.raft.ready import Ready
from raftkv.raft.types import Entry, EntryKind, NodeId, Role, SnapshotMeta
from raftkv.replica.effects import Answers, Apply, Effects, Forward, PeerMessage, Persist
from raftkv.replica.proposals import Forwarded, Pending, Proposals
from raftkv.replica.reads import Reads, WaitingRead
from raftkv.state.commands import Command, CommandFields, Group, MalformedBatch, decode_batch, encode_batch

_Fields = TypeVar("_Fields", bound=CommandFields)

COMMANDS_GOOD = 256
"""So many commands are worth an entry, or a forwarded message, of their own while another is under way. Fewer wait for
it to end, and so gather: what costs is the message, not the byte. A single caller never waits: nothing is under way."""

ENTRIES_MAX = 8
"""Entries under way; beyond it even many commands wait."""

ENTRY_BYTES_MAX = 1 << 20
"""An entry, or a forwarded message, is cut before the first command beyond this, so that nothing blocks heartbeats for
long, and no message exceeds what a peer accepts. One command may be bigger."""

KIND_MAX = 255
"""What the encoding of a command has room for."""

FORGET_TICKS = 64
"""How often the queues are freed of callers that have gone."""


class Replica:
    """One member's share of the cluster; see the module."""

    def __init__(
        self,
        raft: Raft,
        incarnation: int,
        *,
        read_retry_ticks: int = 50,
        commands_good: int = COMMANDS_GOOD,
        entries_max: int = ENTRIES_MAX,
        entry_bytes_max: int = ENTRY_BYTES_MAX,
    ) -> None:
        """
        Args:
            raft: consensus, as recovered from the disk.
            incarnation: a number no earlier life of this node has used; 64 bits, random in production.
            read_retry_ticks: how long a read round may stay unanswered before it is asked again.
            commands_good, entries_max, entry_bytes_max: see the constants.
        """
        self.raft = raft
        self.incarnation = incarnation
        self._commands_good = commands_good
        self._entries_max = entries_max
        self._entry_bytes_max = entry_bytes_max
        self._proposals = Proposals(raft.node_id, incarnation)
        self._forwarded = Forwarded()
        self._reads = Reads(read_retry_ticks)
        self._groups: deque[Group] = deque()  # of other nodes, to be proposed by us, in the term below
        self._groups_term = 0
        self._outbox: list[tuple[NodeId, PeerMessage]] = []
        self._renewed: set[NodeId] = set()  # peers whose stream is new since we sent them everything of this term
        self._held: deque[tuple[int, tuple[tuple[NodeId, Message], ...]]] = (
            deque()
        )  # a write under way, what waits for it
        self._proposed: dict[int, tuple[int, Sequence[Group]]] = {}  # index -> (term, groups), saves a decode
        self._applied_term = 0
        self._applied = raft.status().applied
        self._ticks = 0
        self._commit = 0  # as of the last tick
        self._commit_is_news = False  # it rose in the tick before
        self._unknown: list[object] = []

    # Events.

    def propose(self, kind: int, payload: bytes, ticket: object, *, leading: bool = False) -> Pending:
        """A caller of this node wants one command committed; `ticket` comes back in `Answers`.

        Args:
            leading: it counts only while this node leads as it does now; see `proposals`.
        """
        return self._proposals.add(kind, payload, ticket, leading=leading)

    def read(self, ticket: object) -> WaitingRead:
        """A caller wants to read linearizably; `ticket` comes back in `Answers.reads`."""
        return self._reads.add(ticket)

    @staticmethod
    def abandon(pending: Pending | WaitingRead) -> None:
        """The caller has gone or run out of time: a command that was not sent yet is dropped before the log."""
        pending.abandoned = True

    @property
    def waiting(self) -> int:
        """How many callers' commands and reads are kept; of those that have gone, for `FORGET_TICKS` at most unless
        they are under way."""
        return len(self._proposals) + len(self._reads)

    def receive(self, sender: NodeId, message: PeerMessage) -> None:
        """A message from a peer; never raises on any content."""
        if isinstance(message, Forward):
            self._receive_forward(sender, message)
        else:
            self.raft.step(sender, message)

    def tick(self) -> None:
        """One tick of time has passed."""
        self._ticks += 1
        if self._ticks % FORGET_TICKS == 0:
            self._proposals.forget_abandoned()
            self._reads.forget_abandoned()
        self.raft.tick()
        self._tell_commit()

    def _tell_commit(self) -> None:
        """Followers learn of a commit with the next append. When none came for a whole tick they are told: what they
        apply, their watchers see, and a beat is a long time."""
        commit = self.raft.log.commit
        if commit > self._commit:
            self._commit, self._commit_is_news = commit, True
        elif self._commit_is_news:
            self._commit_is_news = False
            self.raft.notify_commit(self.raft.progress)

    def persisted(self, number: int) -> None:
        """The write `number`, and all before it, are on the disk."""
        self.raft.persisted(number)
        while self._held and self._held[0][0] <= number:
            self._outbox.extend(self._held.popleft()[1])

    def connected(self, peer: NodeId) -> None:
        """The stream to a peer is new: what was on the old one may be lost."""
        # Who leads may be unknown just now, and turn out to be this peer, in the same term: so remember it.
        self._renewed.add(peer)
        if peer == self.raft.leader:
            self._reads.ask_again()

    def disconnected(self, peer: NodeId) -> None:
        """The stream to a peer broke."""
        self.raft.peer_unreachable(peer)

    def gone(self, peer: NodeId) -> None:
        """Proof that the process of a peer is gone (its port refuses connections)."""
        self.raft.leader_unreachable(peer)

    def applied(self, applies: Sequence[Apply], results: Sequence[Sequence[Sequence[object]]]) -> Answers:
        """The driver has applied `applies`; `results` go by entry, group, command."""
        answers = Answers([], [], self._unknown)
        self._unknown = []
        for apply, by_group in zip(applies, results, strict=True):
            entry = apply.entry
            if entry.term > self._applied_term:
                self._applied_term = entry.term
                answers.unknown.extend(self._proposals.term_applied(entry.term))
            for group, group_results in zip(apply.groups, by_group, strict=True):
                self._proposals.applied(group, group_results, answers.results)
        if applies:
            self._applied = applies[-1].entry.index
            self.raft.applied_to(self._applied)
        self._reads.served(self._applied, answers.reads)
        return answers

    @property
    def has_answers(self) -> bool:
        """Whether somebody can be answered though nothing more was applied: `applied` without entries."""
        return bool(self._unknown) or self._reads.are_served(self._applied)

    def installed(self, meta: SnapshotMeta) -> None:
        """A received snapshot is now log and state of this node."""
        self._unknown.extend(self._proposals.lose(meta.term))
        self._applied = max(self._applied, meta.index)
        self._applied_term = max(self._applied_term, meta.term)
        for index in [index for index in self._proposed if index <= meta.index]:
            del self._proposed[index]

    # The turn.

    def take(self) -> Effects | None:
        """One turn: what must be done now, or None when there is nothing."""
        self._send_proposals()
        if self.raft.leader:  # else there is nobody to ask, and everything waits where it is
            self._reads.ask(self._ticks, self._read_index)
        raft = self.raft
        if raft.has_ready():
            return self._obey(raft.ready())
        if self._outbox:
            send, self._outbox = self._outbox, []
            return Effects(None, send, [], (), ())
        return None

    def _obey(self, ready: Ready) -> Effects:
        for context, index in ready.reads:
            self._reads.confirmed(context, index)
        for context in ready.dropped_reads:
            self._reads.dropped(context)
        persist = None
        if ready.hard_state is not None or ready.entries or ready.install is not None:
            persist = Persist(ready.number, ready.hard_state, ready.entries, ready.install, ready.must_sync)
            self._held.append((ready.number, ready.messages_after))
        else:
            # Nothing of its own to write, but it may rest on an earlier write that is under way.
            assert not ready.messages_after or self._held, "a reply waits for a write that nobody makes"
            if ready.messages_after:
                number, messages = self._held[-1]
                self._held[-1] = (number, messages + ready.messages_after)
        send, self._outbox = self._outbox, []
        send.extend(ready.messages)
        applies = [Apply(entry, self._groups_of(entry)) for entry in ready.committed]
        if applies and self.raft.role is Role.LEADER:
            self._notify(applies)
        return Effects(persist, send, applies, ready.send_snapshots, ready.events)

    # Proposals.

    def _receive_forward(self, sender: NodeId, forward: Forward) -> None:
        raft = self.raft
        if raft.role is not Role.LEADER or forward.term != raft.term:
            return  # the sender learns of the later term, and proposes anew when that term has shown what is lost
        if any(command.kind > KIND_MAX for command in forward.commands):
            return  # no node of ours sends that, and it could not be encoded
        commands = self._forwarded.fresh(forward.term, sender, forward.incarnation, forward.commands)
        if commands:
            if self._groups_term != raft.term:
                self._groups.clear()
                self._groups_term = raft.term
            self._groups.append(Group(sender, forward.incarnation, tuple(commands)))

    def _send_proposals(self) -> None:
        raft = self.raft
        leader = raft.leader
        if leader != raft.node_id:
            self._unknown.extend(self._proposals.drop_leading())
        if leader in self._renewed:
            self._renewed.discard(leader)
            self._forward(leader, self._proposals.send_again(raft.term))
        if leader == 0 or not (self._proposals.queued or self._groups):
            return
        if leader != raft.node_id:
            self._groups.clear()
            if self._proposals.queued >= self._commands_good or not self._proposals.sent(raft.term):
                self._forward(leader, self._proposals.take(raft.term))
            return
        under_way = raft.log.last - raft.log.commit
        if under_way == 0 or (under_way < self._entries_max and self._gathered() >= self._commands_good):
            self._propose()

    def _forward(self, leader: NodeId, commands: tuple[Command, ...]) -> None:
        for part in _cut(commands, self._entry_bytes_max):
            self._outbox.append((leader, Forward(self.raft.term, self.incarnation, part)))

    def _gathered(self) -> int:
        return self._proposals.queued + sum([len(group.commands) for group in self._groups])

    def _propose(self) -> None:
        """Make one entry (more only when they are big) of everything that waits here."""
        raft = self.raft
        if not raft.accepts_proposals():
            return  # a transfer is under way or too much is uncommitted: callers wait, nothing is lost
        groups: list[Group] = []
        # First, or a leader that is short of time would never come to end what holds others up (etcd #20492).
        leading = self._proposals.take_leading(raft.term)
        if leading:
            groups.append(Group(raft.node_id, self.incarnation, leading))
        if self._groups_term == raft.term:
            groups.extend(self._groups)
        self._groups.clear()
        own = self._proposals.take(raft.term)
        if own:
            groups.append(Group(raft.node_id, self.incarnation, own))
        batches = list(_batches(groups, self._entry_bytes_max))
        if batches:
            term, first = raft.propose([encode_batch(batch) for batch in batches], force=True)
            for offset, batch in enumerate(batches):
                self._proposed[first + offset] = (term, batch)
            for group in groups:
                if group.origin != raft.node_id:
                    raft.hurry(group.origin)

    def _groups_of(self, entry: Entry) -> Sequence[Group]:
        proposed = self._proposed.pop(entry.index, None)
        if proposed is not None and proposed[0] == entry.term:
            return proposed[1]
        if entry.kind is not EntryKind.NORMAL or not entry.data:
            return ()
        try:
            return decode_batch(entry.data)
        except MalformedBatch:
            return ()  # every replica finds the same, so all pass over it alike

    def _notify(self, applies: Sequence[Apply]) -> None:
        """Tell the nodes where somebody waits for these entries that they are committed, without waiting for a beat."""
        raft = self.raft
        waiting = {group.origin: None for apply in applies for group in apply.groups if group.origin != raft.node_id}
        for peer, progress in raft.progress.items():
            if progress.eager:
                waiting[peer] = None
        if waiting:
            raft.notify_commit(waiting)

    # Reads.

    def _read_index(self, context: int) -> None:
        try:
            self.raft.read_index(context)
        except NoLeader:
            self._reads.dropped(context)


def _cut(commands: tuple[_Fields, ...], bytes_max: int) -> Iterable[tuple[_Fields, ...]]:
    """Cut `commands` into runs of at most `bytes_max`; one command may exceed it."""
    start = size = 0
    for place, (_, _, payload) in enumerate(commands):
        command_bytes = len(payload)
        if place > start and size + command_bytes > bytes_max:
            yield commands[start:place]
            start, size = place, 0
        size += command_bytes
    if start < len(commands):
        yield commands[start:]


def _batches(groups: Sequence[Group], bytes_max: int) -> Iterable[Sequence[Group]]:
    """Cut `groups` into entries of at most `bytes_max`; one command may exceed it."""
    batch: list[Group] = []
    size = 0
    for origin, incarnation, commands in groups:
        for part in _cut(commands, bytes_max):
            part_bytes = sum([len(payload) for _, _, payload in part])
            if batch and size + part_bytes > bytes_max:
                yield batch
                batch, size = [], 0
            batch.append(Group(origin, incarnation, part))
            size += part_bytes
    if batch:
        yield batch
