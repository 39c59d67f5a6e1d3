"""The invariants of consensus and durability, checked after every step.

Names are those of reliability.md section 3. Each check costs little: what was ever true is remembered (who led a
term, who got a vote, what an index was committed with), and each step is compared with that.

The content of a log prefix is one number, its *link*: equal links mean equal prefixes. A node's `_Ghost` is the log as
consensus handed it out, so truncations are seen even where the disk has not followed yet.
"""

from __future__ import annotations

from typing import Protocol

from raftkv.raft.core import Raft
from raftkv.raft.messages import AppendReply, PreVote, PreVoteReply, VoteReply
from raftkv.raft.types import ConfState, Entry, EntryKind, Index, LogReader, NodeId, Role, Term
from raftkv.replica.effects import Forward, PeerMessage, Persist
from raftkv.sim.disk import SimLog
from raftkv.sim.history import Violation
from raftkv.state.machine import StateMachine

_BYTES_MAX = 1 << 40


class Node(Protocol):
    """What the checks look at."""

    @property
    def id(self) -> NodeId: ...
    @property
    def raft(self) -> Raft: ...
    @property
    def machine(self) -> StateMachine: ...
    @property
    def durable(self) -> SimLog: ...


class _Ghost:
    """A log by its links."""

    def __init__(self, base: Index, link: int, term: Term) -> None:
        self.base = base
        self.links = [link]  # of base, base + 1, ...
        self.terms = [term]
        self.led: Term = 0  # the term it led at the end of the last turn
        self.commit: Index = 0

    @property
    def last(self) -> Index:
        return self.base + len(self.links) - 1

    def link(self, index: Index) -> int | None:
        place = index - self.base
        return self.links[place] if 0 <= place < len(self.links) else None

    def truncate(self, last: Index) -> None:
        place = last - self.base + 1
        del self.links[place:]
        del self.terms[place:]


class Invariants:
    """All that was ever true, and the checks against it."""

    def __init__(self, conf: ConfState) -> None:
        self._nodes: dict[NodeId, Node] = {}
        self._ghosts: dict[NodeId, _Ghost] = {}
        self._leaders: dict[Term, NodeId] = {}
        self._votes: dict[tuple[NodeId, Term], NodeId] = {}
        self._terms: dict[NodeId, Term] = {}
        self._numbers: dict[tuple[int, Term, EntryKind, bytes], int] = {}
        self._links: dict[tuple[Index, Term], int] = {(0, 0): 0}
        self._committed: dict[Index, int] = {0: 0}
        self.committed_max: Index = 0
        self.log: list[Entry] = []
        """Every entry that was ever applied, in order: the log on which the cluster has agreed."""
        self._hashes: dict[Index, int] = {}
        self._confs: dict[Index, ConfState] = {0: conf}

    # Life.

    def started(self, node: Node) -> None:
        """A node has recovered from its disk."""
        self._nodes[node.id] = node
        log = node.durable
        hard_state, meta = log.hard_state, log.snapshot()
        if hard_state.term < self._terms.get(node.id, 0):
            raise Violation("R11", f"node {node.id} woke in term {hard_state.term}, was in {self._terms[node.id]}")
        promised = self._votes.get((node.id, hard_state.term))
        if promised not in (None, hard_state.vote):
            raise Violation("R12", f"node {node.id} forgot its vote for {promised} in term {hard_state.term}")
        link = self._links.get((meta.index, meta.term))
        if link is None:
            raise Violation("R10", f"node {node.id} begins with a prefix {meta.term}/{meta.index} nobody ever had")
        self._ghosts[node.id] = _Ghost(meta.index, link, meta.term)
        self._extend(node, log.entries(log.first_index(), log.last_index() + 1, _BYTES_MAX))
        self._ghosts[node.id].commit = node.raft.commit

    # Steps of a turn.

    def persisting(self, node: Node, persist: Persist) -> None:
        """A write was handed to the disk."""
        ghost = self._ghosts[node.id]
        if persist.install is not None:
            meta = persist.install
            link = self._links.get((meta.index, meta.term))
            if link is None or self._committed.get(meta.index, link) != link:
                raise Violation("R10", f"node {node.id} installs {meta.term}/{meta.index}, which was not agreed")
            if meta.index <= ghost.commit:
                raise Violation("R10", f"node {node.id} goes back from {ghost.commit} to snapshot {meta.index}")
            led = ghost.led
            self._ghosts[node.id] = ghost = _Ghost(meta.index, link, meta.term)
            ghost.led, ghost.commit = led, meta.index
        if persist.entries:
            first = persist.entries[0].index
            if first <= ghost.last:
                if node.raft.role is Role.LEADER and ghost.led == node.raft.term:
                    raise Violation("R2", f"leader {node.id} overwrites {first}..{ghost.last} of its own log")
                if first <= ghost.commit:
                    raise Violation("R7", f"node {node.id} overwrites {first}, committed is {ghost.commit}")
                ghost.truncate(first - 1)
            self._extend(node, persist.entries)

    def _extend(self, node: Node, entries: list[Entry] | tuple[Entry, ...]) -> None:
        ghost = self._ghosts[node.id]
        for entry in entries:
            if entry.index != ghost.last + 1 or entry.term < ghost.terms[-1]:
                raise Violation("R6", f"node {node.id} puts {entry.term}/{entry.index} after {ghost.last}")
            key = (ghost.links[-1], entry.term, entry.kind, entry.data)
            link = self._numbers.setdefault(key, len(self._numbers) + 1)
            if self._links.setdefault((entry.index, entry.term), link) != link:
                raise Violation("R3", f"node {node.id} has another {entry.term}/{entry.index} than somebody before")
            ghost.links.append(link)
            ghost.terms.append(entry.term)

    def sending(self, node: Node, receiver: NodeId, message: PeerMessage) -> None:
        """A message leaves."""
        if isinstance(message, Forward):
            return  # promises nothing
        durable = node.durable.hard_state
        asks_ahead = isinstance(message, PreVote) or (isinstance(message, PreVoteReply) and message.granted)
        if message.term > durable.term and not asks_ahead:
            raise Violation("R14", f"node {node.id} says {message} to {receiver}, durable is term {durable.term}")
        if isinstance(message, VoteReply) and message.granted:
            if self._votes.setdefault((node.id, message.term), receiver) != receiver:
                raise Violation("R12", f"node {node.id} votes twice in term {message.term}")
            if durable.term == message.term and durable.vote != receiver:
                raise Violation("D1", f"node {node.id} grants {receiver} a vote that is not durable")
        # A promise of an earlier term may leave late, when a later leader has overwritten what it was about.
        if isinstance(message, AppendReply) and not message.rejected and durable.term == message.term:
            self._check_acknowledged(node, message)

    def _check_acknowledged(self, node: Node, message: AppendReply) -> None:
        index, log = message.index, node.durable
        if index > log.last_index():
            raise Violation("D1", f"node {node.id} acknowledges {index}, durable is {log.last_index()}")
        leader = self._leaders.get(message.term)
        ghost = self._ghosts.get(leader) if leader else None
        if ghost is None or ghost.led != message.term or index < max(log.first_index(), ghost.base):
            return
        if log.term(index) != ghost.terms[index - ghost.base]:
            raise Violation("D1", f"node {node.id} acknowledges {index}, but has it of term {log.term(index)}")

    def applying(self, node: Node, entry: Entry) -> bool:
        """An entry is about to be applied; whether it is the first time anywhere."""
        position = entry.index - 1
        if position < len(self.log):
            agreed = self.log[position]
            if agreed is not entry and agreed != entry:
                raise Violation("R5", f"node {node.id} applies {entry}, somebody else applied {agreed}")
            return False
        if position > len(self.log):
            raise Violation("R5", f"node {node.id} applies {entry.index}, but nobody has applied {len(self.log) + 1}")
        self.log.append(entry)
        return True

    def applied(self, node: Node) -> None:
        """A node has applied some entries, or installed a snapshot."""
        machine = node.machine
        expected = self._hashes.setdefault(machine.applied_index, machine.rolling_hash)
        if expected != machine.rolling_hash:
            raise Violation("S1", f"node {node.id} has another state at {machine.applied_index} than somebody before")
        if node.raft.log.first > machine.applied_index + 1:
            return  # a later snapshot is on its way to the disk, and consensus goes by its conf state already
        own = node.raft.conf_at(machine.applied_index)
        conf = self._confs.setdefault(machine.applied_index, own)
        if conf != own:
            raise Violation("C3", f"node {node.id} has {own} at {machine.applied_index}, agreed is {conf}")

    def turn_done(self, node: Node) -> None:
        """A turn is over: which term it is, and who leads."""
        raft, ghost = node.raft, self._ghosts[node.id]
        if raft.term < self._terms.get(node.id, 0):
            raise Violation("R11", f"node {node.id} went back to term {raft.term}")
        self._terms[node.id] = node.durable.hard_state.term
        leads = raft.role is Role.LEADER
        if leads:
            if self._leaders.setdefault(raft.term, node.id) != node.id:
                raise Violation("R1", f"nodes {self._leaders[raft.term]} and {node.id} lead term {raft.term}")
            if ghost.led != raft.term:
                self._check_complete(node, ghost)
        ghost.led = raft.term if leads else 0

    def _check_complete(self, node: Node, ghost: _Ghost) -> None:
        index = self.committed_max
        if index >= ghost.base and ghost.link(index) != self._committed[index]:
            raise Violation("R4", f"node {node.id} leads term {node.raft.term} without the committed entry {index}")

    def committing(self, node: Node) -> None:
        """A turn has handed out its write, and applied nothing yet: what is committed, by the present conf state."""
        raft, ghost = node.raft, self._ghosts[node.id]
        commit = raft.commit
        if commit == ghost.commit:
            return
        if commit < ghost.commit:
            raise Violation("R7", f"commit of node {node.id} fell from {ghost.commit} to {commit}")
        link = ghost.link(commit)
        if link is None:
            raise Violation("R7", f"node {node.id} commits {commit}, its log is {ghost.base}..{ghost.last}")
        if self._committed.setdefault(commit, link) != link:
            raise Violation("R7", f"node {node.id} commits another entry {commit} than somebody before")
        term = ghost.terms[commit - ghost.base]
        if term == ghost.led:  # it may have stepped down since, in this very turn
            self._check_durable(raft.conf, commit, term)
            self.committed_max = max(self.committed_max, commit)
        elif raft.role is Role.LEADER and ghost.led == raft.term:
            raise Violation("R8", f"leader {node.id} commits {commit}, which is not of its term")
        elif commit > self.committed_max:
            raise Violation("R9", f"node {node.id} commits {commit}, leaders have committed {self.committed_max}")
        ghost.commit = commit

    def _check_durable(self, conf: ConfState, index: Index, term: Term) -> None:
        """Whether an entry would survive a loss of power of all nodes at this moment (D1)."""
        for voters in (conf.voters, conf.outgoing):
            having = [voter for voter in voters if _has(self._nodes[voter].durable, index, term)]
            if voters and len(having) <= len(voters) // 2:
                raise Violation("D1", f"{term}/{index} is committed, but durable on {having} of {voters} only")

    def check_progress(self, node: Node) -> None:
        """What a leader believes of the others (R15)."""
        for peer, known in node.raft.status().progress.items():
            if not 0 <= known.match < known.next:
                raise Violation("R15", f"leader {node.id} has match {known.match}, next {known.next} of {peer}")
            other = self._nodes[peer].durable
            if other.hard_state.term == node.raft.term and known.match > other.last_index():
                raise Violation("R15", f"leader {node.id} believes {peer} has {known.match}, not {other.last_index()}")


def _has(log: LogReader, index: Index, term: Term) -> bool:
    if index < log.first_index():
        return True  # a compacted prefix was applied, so it was committed
    return index <= log.last_index() and log.term(index) == term
