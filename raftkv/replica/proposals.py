"""The commands that callers of this node wait for, until the log has shown their fate.

A command is QUEUED until a leader is known, then SENT in the term of that leader: proposed here, or
forwarded. It ends when it is seen in an applied entry. When an entry of a *later* term than the one it
was sent in is applied first, it can never be committed (the terms of a log never fall), so it is queued
again under a new sequence number. That makes a leader's death a wait and not an unknown outcome.

    QUEUED --leader known--> SENT --applied--> answered
       ^                      |
       +--later term applied--+

A *leading* command (that a lease has ended, and the like) counts only in the term of the leader that proposes it. It
goes before what clients want, is never forwarded, and ends, undone, with the term or the office (reliability rule Z7).

Invariants: sequence numbers are never used twice in one incarnation; the leader takes those of one
(origin, incarnation) only in rising order, so re-sending after a broken stream repeats nothing.

The source is the argument of Ongaro 6.3 (clients must not re-send blindly), moved from the client to the
node that was asked; see docs/divergence.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raftkv.raft.types import NodeId
from raftkv.state.commands import Command, Group


@dataclass(slots=True)
class Pending:
    """One command that a caller waits for; the caller's side keeps it only to hand it to `abandon`."""

    kind: int
    payload: bytes
    ticket: object
    leading: bool = False
    term: int = 0  # the term it was sent in; 0 while queued
    abandoned: bool = False


class Proposals:
    """Bookkeeping of one node's own callers."""

    def __init__(self, origin: NodeId, incarnation: int) -> None:
        self._origin = origin
        self._incarnation = incarnation
        self._next_seq = 1
        self._pending: dict[int, Pending] = {}  # in rising order of seq
        self._queued: list[int] = []
        self._leading: list[int] = []  # queued too, and first
        self._sent_term = 0
        self._sent = 0  # of the pending commands, how many were sent in _sent_term

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def queued(self) -> int:
        """How many commands wait to be sent."""
        return len(self._queued) + len(self._leading)

    def sent(self, term: int) -> bool:
        """Whether something sent in `term` is still to be seen in the log."""
        return self._sent_term == term and self._sent > 0

    def add(self, kind: int, payload: bytes, ticket: object, *, leading: bool = False) -> Pending:
        """Queue one command."""
        pending = Pending(kind, payload, ticket, leading)
        (self._leading if leading else self._queued).append(self._number(pending))
        return pending

    def _number(self, pending: Pending) -> int:
        seq = self._next_seq
        self._next_seq = seq + 1
        self._pending[seq] = pending
        return seq

    def take(self, term: int) -> tuple[Command, ...]:
        """The queued commands, but for the leading ones, marked as sent in `term`; those whose caller has gone are
        dropped here."""
        return self._take(self._queued, term)

    def take_leading(self, term: int) -> tuple[Command, ...]:
        """The same of the leading ones: we lead in `term`."""
        return self._take(self._leading, term)

    def drop_leading(self) -> list[object]:
        """We do not lead: the tickets of the leading ones that were not sent, which are forgotten."""
        dropped = [self._pending.pop(seq) for seq in self._leading]
        self._leading.clear()
        return [pending.ticket for pending in dropped if not pending.abandoned]

    def _take(self, queue: list[int], term: int) -> tuple[Command, ...]:
        if term != self._sent_term:
            self._sent_term, self._sent = term, 0
        commands = []
        for seq in queue:
            pending = self._pending[seq]
            if pending.abandoned:
                del self._pending[seq]
            else:
                pending.term = term
                commands.append(Command(seq, pending.kind, pending.payload))
        queue.clear()
        self._sent += len(commands)
        return tuple(commands)

    def send_again(self, term: int) -> tuple[Command, ...]:
        """Everything sent in `term` and not seen yet, in the order it was sent: what a broken stream may have lost.

        What nobody waits for any more is forgotten instead; if it was not lost, it is applied all the same.
        """
        sent = [(seq, pending) for seq, pending in self._pending.items() if pending.term == term]
        for seq, pending in sent:
            if pending.abandoned:
                del self._pending[seq]
                self._sent -= 1
        return tuple(Command(seq, pending.kind, pending.payload) for seq, pending in sent if not pending.abandoned)

    def forget_abandoned(self) -> None:
        """Free what callers that have gone left in the queue: without a leader nothing else ever looks at it."""
        gone = {seq for seq in self._queued if self._pending[seq].abandoned}
        if gone:
            self._queued = [seq for seq in self._queued if seq not in gone]
            for seq in gone:
                del self._pending[seq]

    def applied(self, group: Group, results: Sequence[object], out: list[tuple[object, object]]) -> None:
        """Match one applied group with the callers that wait for it."""
        if group.origin != self._origin or group.incarnation != self._incarnation:
            return
        pop = self._pending.pop
        for (seq, _, _), result in zip(group.commands, results, strict=True):
            pending = pop(seq, None)
            if pending is None:
                continue
            if pending.term == self._sent_term:
                self._sent -= 1
            if not pending.abandoned:
                out.append((pending.ticket, result))

    def term_applied(self, term: int) -> list[object]:
        """An entry of `term` was applied: what was sent earlier and not seen is provably not in the log.

        Returns:
            The tickets of the leading commands among it, which end so.
        """
        stale = [(seq, pending) for seq, pending in self._pending.items() if 0 < pending.term < term]
        ended: list[object] = []
        # New numbers, because commands with higher ones may already have gone to the new leader,
        # and it takes ours in rising order only.
        for seq, pending in stale:
            del self._pending[seq]
            if pending.leading:
                ended.append(pending.ticket)
                continue
            pending.term = 0
            self._queued.append(self._number(pending))
        return ended

    def lose(self, term: int) -> list[object]:
        """A snapshot up to an entry of `term` hid part of the log: the tickets whose fate it hides."""
        lost = [(seq, pending) for seq, pending in self._pending.items() if 0 < pending.term <= term]
        for seq, pending in lost:
            del self._pending[seq]
            if pending.term == self._sent_term:
                self._sent -= 1
        return [pending.ticket for _, pending in lost if not pending.abandoned]


class Forwarded:
    """What the leader remembers of other nodes' commands: the last number seen of each life, in this term.

    Of each life, not only of the latest: what an earlier one has sent may come late, when the next has already spoken.
    """

    LIVES_MAX = 1024
    """Beyond it the life that was heard first is forgotten: nothing of it can be under way any more."""

    def __init__(self) -> None:
        self._term = 0
        self._seen: dict[tuple[NodeId, int], int] = {}  # (origin, incarnation) -> the last number

    def fresh(self, term: int, origin: NodeId, incarnation: int, commands: Sequence[Command]) -> Sequence[Command]:
        """Those of `commands` that did not arrive before, in this term of leadership."""
        if term != self._term:
            self._term = term
            self._seen.clear()
        if not commands:
            return commands
        life = (origin, incarnation)
        last = self._seen.get(life, 0)
        if commands[0].seq <= last:
            commands = [command for command in commands if command.seq > last]
            if not commands:
                return commands
        elif not last and len(self._seen) >= self.LIVES_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[life] = commands[-1].seq
        return commands
