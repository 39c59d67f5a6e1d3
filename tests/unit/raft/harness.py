"""A cluster of bare Raft nodes in memory: a disk that loses what was not synced, a network one can steer.

Everything happens when the test says so. `Cluster.settle` lets all writes and messages run their course;
`Cluster.tick` lets time pass. What a node does with a Ready is what `raftkv.raft.ready` asks of a driver.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.messages import InstallSnapshot, Message
from raftkv.raft.ready import Event, Ready
from raftkv.raft.types import (
    Compacted,
    ConfState,
    Entry,
    EntryKind,
    HardState,
    NodeId,
    Role,
    SnapshotMeta,
)

FAST = RaftConfig(heartbeat_ticks=1, election_ticks=10, disk_stall_ticks=10, read_retry_ticks=3, candidate_ticks=3)
"""Short times, so that tests are; the proportions are those of the defaults."""


class FakeDisk:
    """What one node has durably: a `LogReader`, and the state up to the last time it was synced."""

    def __init__(self, conf: ConfState) -> None:
        self.hard_state = HardState(0, 0, 0)
        self.meta = SnapshotMeta(0, 0, conf)
        self.log: list[Entry] = []
        self.state: list[Entry] = []  # what the state machine had applied when it was last made durable
        self.reads = 0  # how often entries were read back

    def initial_state(self) -> tuple[HardState, ConfState]:
        return self.hard_state, self.meta.conf

    def first_index(self) -> int:
        return self.meta.index + 1

    def last_index(self) -> int:
        return self.meta.index + len(self.log)

    def term(self, index: int) -> int:
        if index == self.meta.index:
            return self.meta.term
        if index < self.meta.index:
            raise Compacted(index)
        return self.log[index - self.first_index()].term

    def entries(self, low: int, high: int, bytes_max: int) -> list[Entry]:
        if low < self.first_index():
            raise Compacted(low)
        self.reads += 1
        found: list[Entry] = []
        size = 0
        for entry in self.log[low - self.first_index() : high - self.first_index()]:
            size += len(entry.data) + 32
            if found and size > bytes_max:
                break
            found.append(entry)
        return found

    def snapshot(self) -> SnapshotMeta:
        return self.meta

    def write(self, ready: Ready, states: dict[tuple[int, int], list[Entry]]) -> None:
        """One atomic, synced write of what a Ready asks for."""
        if ready.install is not None:
            self.meta = ready.install
            self.log = []
            self.state = list(states[ready.install.index, ready.install.term])
        if ready.entries:
            keep = ready.entries[0].index - self.first_index()
            assert 0 <= keep <= len(self.log), "a hole on disk"
            self.log = self.log[:keep] + list(ready.entries)
        if ready.hard_state is not None:
            assert ready.hard_state.term >= self.hard_state.term
            self.hard_state = ready.hard_state

    def compact(self, meta: SnapshotMeta) -> None:
        """Drop the entries up to `meta.index`."""
        self.log = self.log[meta.index - self.meta.index :]
        self.meta = meta


@dataclass
class Envelope:
    """A message on its way."""

    sender: NodeId
    to: NodeId
    message: Message


@dataclass
class Write:
    """A Ready on its way to the disk, and what waits for it."""

    ready: Ready
    messages_after: list[tuple[NodeId, Message]]


@dataclass
class Node:
    """One node: consensus, disk, state machine (the list of all entries applied)."""

    id: NodeId
    disk: FakeDisk
    raft: Raft
    cluster: Cluster
    writes: deque[Write] = field(default_factory=deque)
    state: list[Entry] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    dropped_reads: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    up: bool = True
    slow_disk: bool = False  # writes wait for `persist`
    slow_apply: bool = False  # committed entries wait for `apply`
    unapplied: list[Entry] = field(default_factory=list)

    @property
    def role(self) -> Role:
        return self.raft.role

    @property
    def data(self) -> list[bytes]:
        """The non-empty commands applied."""
        return [entry.data for entry in self.state if entry.kind is EntryKind.NORMAL and entry.data]

    def log(self) -> list[Entry]:
        """All entries this node has in memory or on disk, after the compacted prefix."""
        log = self.raft.log
        found: list[Entry] = []
        while log.first + len(found) <= log.last:
            found.extend(log.slice(log.first + len(found), log.last + 1, 1 << 30) or ())
        return found

    def take(self) -> bool:
        """Obey one Ready, but for the write; whether there was one."""
        if not (self.up and self.raft.has_ready()):
            return False
        ready = self.raft.ready()
        self.cluster.watch(self, ready)
        self.events.extend(ready.events)
        self.reads.extend(ready.reads)
        self.dropped_reads.extend(ready.dropped_reads)
        for to, message in ready.messages:
            self.cluster.send(self.id, to, message)
        if ready.must_sync:
            self.writes.append(Write(ready, list(ready.messages_after)))
        elif ready.messages_after:
            assert self.writes, "messages wait for a write that nobody makes"
            self.writes[-1].messages_after.extend(ready.messages_after)
        self.unapplied.extend(ready.committed)
        if not self.slow_apply:
            self.apply()
        for peer, index in ready.send_snapshots:
            self.cluster.send_snapshot(self, peer, index)
        return True

    def persist(self) -> bool:
        """Finish the oldest write; whether there was one."""
        if not (self.up and self.writes):
            return False
        write = self.writes.popleft()
        self.disk.write(write.ready, self.cluster.states)
        if write.ready.install is not None:
            self.state = list(self.disk.state)
            self.unapplied = [entry for entry in self.unapplied if entry.index > write.ready.install.index]
        self.raft.persisted(write.ready.number)
        for to, message in write.messages_after:
            self.cluster.send(self.id, to, message)
        return True

    def apply(self) -> None:
        """Apply what is committed."""
        entries, self.unapplied = self.unapplied, []
        for entry in entries:
            assert entry.index == (self.state[-1].index if self.state else 0) + 1, "applied out of order"
            self.state.append(entry)
            if entry.kind is EntryKind.CONF_CHANGE:
                self.raft.apply_conf_change(entry)
            self.raft.applied_to(entry.index)

    def compact(self, index: int | None = None) -> None:
        """Make the state durable and drop the log up to `index` (all that is applied)."""
        applied = self.state[-1].index if self.state else 0
        index = applied if index is None else index
        assert index <= applied
        if index > self.disk.meta.index:
            self.disk.state = list(self.state)
            self.disk.compact(SnapshotMeta(index, self.disk.term(index), self.raft.conf_at(index)))
            self.raft.compacted(index)

    def crash(self) -> None:
        """Lose everything that is not on disk."""
        self.up = False
        self.writes.clear()
        self.unapplied.clear()

    def restart(self) -> None:
        """Recover from the disk."""
        self.crash()
        self.state = list(self.disk.state)
        applied = self.state[-1].index if self.state else 0
        self.raft = Raft(self.id, self.raft.config, self.disk, applied, self.raft.random)
        self.up = True


class Cluster:
    """Nodes and the network between them."""

    def __init__(
        self,
        size: int = 3,
        *,
        learners: Iterable[NodeId] = (),
        config: RaftConfig = FAST,
        configs: dict[NodeId, RaftConfig] | None = None,
        seed: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.config = config
        self.nodes: dict[NodeId, Node] = {}
        self.wire: deque[Envelope] = deque()
        self.cuts: set[tuple[NodeId, NodeId]] = set()  # (sender, receiver)
        self.states: dict[tuple[int, int], list[Entry]] = {}  # the content of snapshots
        self.drop: Callable[[Envelope], bool] = lambda envelope: False
        self.watch: Callable[[Node, Ready], None] = lambda node, ready: None
        self.delivered: Callable[[Envelope, bool], None] = lambda envelope, ok: None
        learners = tuple(learners)
        voters = tuple(node for node in range(1, size + 1) if node not in learners)
        self.conf = ConfState(voters, learners=learners)
        for node in range(1, size + 1):
            self.add(node, self.conf, (configs or {}).get(node))

    def add(self, node_id: NodeId, conf: ConfState, config: RaftConfig | None = None) -> Node:
        """Start a node with an empty disk."""
        disk = FakeDisk(conf)
        raft = Raft(node_id, config or self.config, disk, 0, random.Random(self.random.getrandbits(32)))
        node = self.nodes[node_id] = Node(node_id, disk, raft, self)
        return node

    def __getitem__(self, node_id: NodeId) -> Node:
        return self.nodes[node_id]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    # The network.

    def send(self, sender: NodeId, to: NodeId, message: Message) -> None:
        """Put a message on the wire."""
        self.wire.append(Envelope(sender, to, message))

    def send_snapshot(self, node: Node, peer: NodeId, index: int) -> None:
        """Stream the sender's state; all of it arrives with the message that installs it."""
        applied = node.state[-1]
        assert applied.index >= index
        meta = SnapshotMeta(applied.index, applied.term, node.raft.conf_at(applied.index))
        self.states[meta.index, meta.term] = list(node.state)
        self.send(node.id, peer, InstallSnapshot(node.raft.term, meta))

    def deliver(self, envelope: Envelope) -> bool:
        """Hand over one message, unless it is lost; whether it arrived."""
        node = self.nodes.get(envelope.to)
        lost = (envelope.sender, envelope.to) in self.cuts or node is None or not node.up or self.drop(envelope)
        self.delivered(envelope, not lost)
        if node is not None and not lost:
            node.raft.step(envelope.sender, envelope.message)
        if isinstance(envelope.message, InstallSnapshot):
            sender = self.nodes[envelope.sender]
            if sender.up:
                sender.raft.snapshot_sent(envelope.to, envelope.message.meta.index, not lost)
        return not lost

    def cut(self, *groups: Iterable[NodeId]) -> None:
        """Only within a group do messages arrive."""
        of = {node: number for number, group in enumerate(groups) for node in group}
        self.cuts = {
            (a, b) for a in self.nodes for b in self.nodes if a != b and (a not in of or b not in of or of[a] != of[b])
        }

    def isolate(self, node: NodeId) -> None:
        """Nothing gets to or from `node`."""
        self.cut([node], [other for other in self.nodes if other != node])

    def block(self, sender: NodeId, to: NodeId) -> None:
        """Nothing gets from `sender` to `to`; the other way stays open."""
        self.cuts.add((sender, to))

    def heal(self) -> None:
        """All messages arrive again."""
        self.cuts.clear()
        self.drop = lambda envelope: False

    # Progress.

    def work(self) -> bool:
        """Let every node obey what it can without the network; whether anything was done."""
        done = False
        for node in self.nodes.values():
            while node.take() or (not node.slow_disk and node.persist()):
                done = True
        return done

    def settle(self) -> None:
        """Until nothing moves any more without time passing."""
        for _ in range(10_000):
            done = self.work()
            if not self.wire and not done:
                return
            for _ in range(len(self.wire)):
                self.deliver(self.wire.popleft())
        raise AssertionError("the cluster does not come to rest")

    def tick(self, ticks: int = 1, *, only: NodeId = 0) -> None:
        """Let time pass, settling after each tick."""
        for _ in range(ticks):
            for node in self.nodes.values():
                if node.up and only in (0, node.id):
                    node.raft.tick()
            self.settle()

    def elect(self, node: NodeId) -> Node:
        """Make `node` the leader; whoever leads hands over."""
        for _ in range(100):
            if self[node].role is Role.LEADER and self.leader() is self[node]:
                return self[node]
            leader = self.leader()
            if leader is not None and self[node].raft.leader == leader.id:
                leader.raft.transfer_leadership(node)
            else:
                self[node].raft.campaign()
            self.settle()
            if self[node].role is not Role.LEADER:
                self.tick()
        raise AssertionError(f"{node} is not elected")

    def leader(self) -> Node | None:
        """The leader of the latest term that has one."""
        leaders = [node for node in self.nodes.values() if node.up and node.role is Role.LEADER]
        return max(leaders, key=lambda node: node.raft.term, default=None)

    def wait_leader(self, ticks: int = 200, among: Iterable[NodeId] | None = None) -> Node:
        """Let time pass until there is a leader whose term has committed something."""
        for _ in range(ticks):
            leader = self.leader()
            if (
                leader is not None
                and leader.raft.commit >= leader.raft.term_start
                and (among is None or leader.id in among)
            ):
                return leader
            self.tick()
        raise AssertionError(f"no leader within {ticks} ticks: {[node.raft.status() for node in self.nodes.values()]}")

    def propose(self, data: str, node: NodeId = 0) -> int:
        """Propose on the leader (or `node`) and settle; the index."""
        leader = self[node] if node else self.leader()
        assert leader is not None
        _, index = leader.raft.propose([data.encode()])
        self.settle()
        return index
