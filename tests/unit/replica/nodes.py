"""Replicas on a table: the test hands every message over and says when each disk is done."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.types import ConfState, Entry, Role
from raftkv.replica.effects import Effects, Forward, PeerMessage, Persist
from raftkv.replica.replica import Replica
from raftkv.sim.disk import SimLog
from raftkv.state.commands import decode_batch

CONFIG = RaftConfig(heartbeat_ticks=1, election_ticks=10, disk_stall_ticks=1000)


class Node:
    """One replica; its state machine answers each command with `(index, payload)`."""

    def __init__(self, node_id: int, voters: Iterable[int], **options: int) -> None:
        self.id = node_id
        self.log = SimLog(ConfState(tuple(voters)))
        self.options = options
        self.out: list[tuple[int, PeerMessage]] = []
        self.writes: list[Persist] = []
        self.entries: list[Entry] = []  # applied
        self.results: list[tuple[object, object]] = []
        self.reads: list[object] = []
        self.unknown: list[object] = []
        self.lives = 0
        self.start()

    def start(self) -> None:
        self.lives += 1
        raft = Raft(self.id, CONFIG, self.log, len(self.entries), Random(self.id))
        self.replica = Replica(raft, 100 * self.id + self.lives, **self.options)

    @property
    def raft(self) -> Raft:
        return self.replica.raft

    def crash(self) -> None:
        """Lose all that is not on the disk, and start again."""
        self.out.clear()
        self.writes.clear()
        self.start()

    def turn(self) -> list[Effects]:
        """Take turns until there is nothing to do; writes are left under way."""
        taken = []
        while (effects := self.replica.take()) is not None:
            taken.append(effects)
            if effects.persist is not None:
                self.writes.append(effects.persist)
            self.out.extend(effects.send)
            results = []
            for apply in effects.apply:
                self.entries.append(apply.entry)
                results.append(
                    [[(apply.entry.index, payload) for _, _, payload in group.commands] for group in apply.groups]
                )
            answers = self.replica.applied(effects.apply, results)
            self.results.extend(answers.results)
            self.reads.extend(answers.reads)
            self.unknown.extend(answers.unknown)
        return taken

    def disk(self, count: int = 1000) -> None:
        """The disk finishes the oldest `count` writes."""
        for write in self.writes[:count]:
            if write.install is not None:
                self.log.install(write.install, write.hard_state, "state")
                self.replica.installed(write.install)
            self.log.append(None if write.install else write.hard_state, write.entries)
            self.replica.persisted(write.number)
        del self.writes[:count]

    def work(self) -> None:
        """Turn and write until nothing is left to do here."""
        while self.turn() or self.writes:
            self.disk()

    def propose(self, payload: bytes) -> object:
        """Propose; the ticket is the payload itself."""
        return self.replica.propose(1, payload, payload)

    def payloads(self) -> list[list[bytes]]:
        """What each applied entry carries; entries without commands are left out."""
        carried = [
            [payload for group in decode_batch(entry.data) for _, _, payload in group.commands]
            for entry in self.entries
        ]
        return [payloads for payloads in carried if payloads]

    def answered(self) -> list[object]:
        return [ticket for ticket, _ in self.results]

    def forwards(self) -> list[Forward]:
        return [message for _, message in self.out if isinstance(message, Forward)]


class Table:
    """Several of them."""

    def __init__(self, count: int, **options: int) -> None:
        voters = range(1, count + 1)
        self.nodes = {node_id: Node(node_id, voters, **options) for node_id in voters}
        self.cut: set[int] = set()  # nodes that nothing reaches and that reach nobody

    def __getitem__(self, node_id: int) -> Node:
        return self.nodes[node_id]

    def deliver(self, *kinds: type) -> bool:
        """Hand over what waits in the outboxes; only messages of `kinds`, if any are given."""
        some = False
        for node in self.nodes.values():
            chosen = [(to, message) for to, message in node.out if not kinds or isinstance(message, kinds)]
            node.out = [pair for pair in node.out if pair not in chosen]
            for to, message in chosen:
                if node.id not in self.cut and to not in self.cut:
                    self.nodes[to].replica.receive(node.id, message)
                    some = True
        return some

    def settle(self) -> None:
        """Let everything run its course, without time."""
        while True:
            for node in self.nodes.values():
                if node.id not in self.cut:
                    node.work()
            if not self.deliver():
                return

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            for node in self.nodes.values():
                if node.id not in self.cut:
                    node.replica.tick()
            self.settle()

    def elect(self, node_id: int) -> Node:
        """Let this one be the leader; whoever led it must have forgotten, or not hear it."""
        self.nodes[node_id].raft.campaign()
        self.settle()
        assert self.nodes[node_id].raft.role is Role.LEADER
        self.tick()
        return self.nodes[node_id]
