"""One simulated node: the real `Replica`, `Raft` and `StateMachine`, obeyed as `raftkv.server.runtime` does.

A process that is paused gets nothing done, but what arrives for it waits; its disk goes on. A crash may come between
any two steps of a turn (`crash_in`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.messages import InstallSnapshot
from raftkv.raft.ready import Event
from raftkv.raft.types import ConfState, Entry, EntryKind, Index, NodeId, Role, SnapshotMeta, Term
from raftkv.replica.effects import Answers, Apply, Persist
from raftkv.replica.proposals import Pending
from raftkv.replica.replica import Replica
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.server.leasing import Leasing
from raftkv.server.lessor import LeaseLeft
from raftkv.sim import operations
from raftkv.sim.clock import TICK, NodeClock, Scheduler
from raftkv.sim.disk import SimDisk, SimLog, SimState
from raftkv.sim.history import READS, Answer, Kind, Operation, Outcome
from raftkv.sim.lease_port import NodeMessage, SimPort, Waiting
from raftkv.sim.requests import KeepAlive
from raftkv.state.machine import StateMachine
from raftkv.state.results import Done
from raftkv.state.store import MemoryStore

TICKS_AT_ONCE_MAX = 5
"""As in the runtime: a process that was paused catches up with so many ticks at most."""
WORK_S = 0.1
"""As in the runtime: how often the leader looks which leases have run out."""


class PowerCut(Exception):
    """The node stops between two steps of a turn."""


@dataclass(slots=True)
class NodeOptions:
    """What a node is configured with; the same for all nodes of a run."""

    raft: RaftConfig
    compact_entries: int
    """The log is cut when so many more entries have been applied..."""
    keep_entries: int
    """...and so many are kept for followers that lag a little."""
    read_retry_ticks: int
    commands_good: int
    """So many commands do not wait for those under way; 1: everything is pipelined."""
    entry_bytes_max: int
    lazy_turns: bool
    """Whether several events may share a turn."""
    tick_s: float = 0.01
    """How long a tick is for leases and sessions: the longer, the more of an election fits into the life of one."""


class World(Protocol):
    """What a node does to the rest."""

    def send(self, node: SimNode, receiver: NodeId, message: NodeMessage) -> None: ...
    def send_snapshot(self, node: SimNode, receiver: NodeId, meta: SnapshotMeta, state: MemoryStore) -> None: ...
    def persisting(self, node: SimNode, persist: Persist) -> None: ...
    def committing(self, node: SimNode) -> None: ...
    def applying(self, node: SimNode, apply: Apply) -> None: ...
    def executed(self, node: SimNode, apply: Apply, results: Sequence[Sequence[object]]) -> None: ...
    def applied(self, node: SimNode) -> None: ...
    def turn_done(self, node: SimNode) -> None: ...
    def told(self, operation: Operation, outcome: Outcome, answer: Answer | None) -> None: ...
    def happened(self, node: SimNode, event: Event) -> None: ...
    def crashed(self, node: SimNode) -> None: ...


class SimNode:
    """See the module. Its disk outlives its lives."""

    def __init__(
        self,
        node_id: NodeId,
        conf: ConfState,
        options: NodeOptions,
        scheduler: Scheduler,
        random: Random,
        world: World,
        clock_rate: float,
    ) -> None:
        self.id = node_id
        self.options = options
        self._scheduler = scheduler
        self._random = random
        self._world = world
        self.clock = NodeClock(scheduler, self._tick, clock_rate)
        self.disk = SimDisk(scheduler, random, conf)
        self._directories: dict[str, MemoryStore] = {}  # states received, durable; the log says which is current
        self._state = SimState(random, MemoryStore())
        self._state_name = self.disk.durable.state_name
        self.machine = StateMachine(self._state.store)
        self.up = False
        self.paused = False
        self.life = 0
        self.crash_in = 0  # steps until the power is cut; 0: never
        self._inbox: list[Callable[[], None]] = []
        self._turn_due = False
        self.calls: dict[Operation, Pending | None] = {}
        self._received: dict[Index, str] = {}
        self._names = 1
        self._compacting = False
        self._ticks = 0
        self.seconds_rate = 1.0
        """The clock by which it keeps the time of leases, against true time; clocks agree about nothing else."""
        self.seconds_offset = 0.0
        self.replica: Replica
        self.raft: Raft
        self.leasing: Leasing

    @property
    def durable(self) -> SimLog:
        """The log as a crash at the worst moment would leave it."""
        return self.disk.durable

    # Life.

    def start(self) -> None:
        """Recover from the disk and go on."""
        assert not self.up
        self.up, self.paused = True, False
        self.life += 1
        log = self.disk.visible
        self.machine = StateMachine(self._state.store)
        random = Random(self._random.getrandbits(64))
        self.raft = Raft(self.id, self.options.raft, log, self.machine.applied_index, random)
        incarnation = self._random.getrandbits(64)
        options = self.options
        self.replica = Replica(
            self.raft,
            incarnation,
            read_retry_ticks=options.read_retry_ticks,
            commands_good=options.commands_good,
            entry_bytes_max=options.entry_bytes_max,
        )
        self.leasing = Leasing(SimPort(self), self._seconds, incarnation, lambda ticket: ticket not in self.calls)
        self._turn_due = self._compacting = False
        self._received.clear()
        self.clock.start()

    def crash(self) -> None:
        """The power is cut."""
        assert self.up
        self.up = self.paused = False
        self.crash_in = 0
        self.clock.stop()
        self._inbox.clear()
        self.disk.crash()
        name = self.disk.durable.state_name
        if name == self._state_name:
            self._state = self._state.crash()
        else:  # a snapshot was installed, but this life had not turned to it yet
            self._turn_to(name)
        calls, self.calls = self.calls, {}
        for operation in calls:
            self._world.told(operation, Outcome.UNKNOWN, None)

    def pause(self) -> None:
        """Freeze the process."""
        self.paused = True
        self.clock.stop()

    def resume(self) -> None:
        """Thaw it: what waited is handled, then time goes on, after catching up with some of what was missed."""
        self.paused = False
        for _ in range(self._random.randint(0, TICKS_AT_ONCE_MAX)):
            self._inbox.insert(self._random.choice((0, len(self._inbox))), self._tick)
        inbox, self._inbox = self._inbox, []
        life = self.life
        for call in inbox:
            if self.life == life and self.up:
                call()
        if self.up and self.life == life:
            self.clock.start()
            self.wake()

    def do(self, call: Callable[[], None], *, at_once: bool = False) -> None:
        """Let something happen to the process, if it is there; a turn follows."""
        if not self.up:
            return
        if self.paused:
            self._inbox.append(lambda: self.do(call, at_once=at_once))
            return
        call()
        if at_once:
            self.turn()
        else:
            self.wake()

    def after(self, delay: int, call: Callable[[], None]) -> None:
        """Let something happen later, to whatever life there is then."""
        self._scheduler.after(delay, lambda: self.do(call))

    def _seconds(self) -> float:
        return self.seconds_offset + self._scheduler.now / TICK * self.options.tick_s * self.seconds_rate

    def _tick(self) -> None:
        self.do(self._pass_tick, at_once=True)

    def _pass_tick(self) -> None:
        self.replica.tick()
        self.leasing.tick()
        self._ticks += 1
        if self._ticks % max(1, round(WORK_S / self.options.tick_s)) == 0:
            self.leasing.work()

    def wake(self) -> None:
        """Take a turn soon: everything that arrives until then shares it."""
        if self._turn_due:
            return
        self._turn_due = True
        delay = self._random.choice((0, 0, 1, 5)) if self.options.lazy_turns else 0
        life = self.life
        self._scheduler.after(delay, lambda: self._due(life))

    def _due(self, life: int) -> None:
        if self.up and self.life == life and self._turn_due:
            if self.paused:
                self._inbox.append(self.turn)
            else:
                self.turn()

    # The turn: the order is the one of raftkv.replica.effects.

    def turn(self) -> None:
        """Do what the replica wants done."""
        self._turn_due = False
        try:
            self._turn()
        except PowerCut:
            if self.raft.role is Role.LEADER:
                self._world.committing(self)  # it may have told others of it
            self._world.crashed(self)

    def _turn(self) -> None:
        replica, world, leasing = self.replica, self._world, self.leasing
        leasing.turn()
        while (effects := replica.take()) is not None:
            self._step()
            if effects.persist is not None:
                self._persist(effects.persist)
                self._step()
            world.committing(self)
            for receiver, message in effects.send:
                world.send(self, receiver, message)
                self._step()
            results = self._apply(effects.apply) if effects.apply else ()
            self._step()
            if effects.apply:
                leasing.applied()
            self._answer(replica.applied(effects.apply, results))
            leasing.turn()
            for peer, _ in effects.send_snapshots:
                self._send_snapshot(peer)
            world.turn_done(self)
            for event in effects.events:
                world.happened(self, event)

    def _step(self) -> None:
        if self.crash_in:
            self.crash_in -= 1
            if self.crash_in == 0:
                raise PowerCut

    def _persist(self, persist: Persist) -> None:
        self._world.persisting(self, persist)
        number, life = persist.number, self.life
        hard_state, entries, meta = persist.hard_state, persist.entries, persist.install
        if meta is None:
            self.disk.write(
                lambda log: log.append(hard_state, entries, sync=persist.must_sync),
                lambda: self._written(life, number, None, ""),
                sync=persist.must_sync,
            )
            return
        name = self._received.pop(meta.index)

        def install(log: SimLog) -> None:
            log.install(meta, hard_state, name)
            if entries:
                log.append(hard_state, entries)

        self.disk.write(install, lambda: self._written(life, number, meta, name))

    def _written(self, life: int, number: int, meta: SnapshotMeta | None, name: str) -> None:
        if life == self.life:
            self.do(lambda: self._persisted(number, meta, name), at_once=True)

    def _persisted(self, number: int, meta: SnapshotMeta | None, name: str) -> None:
        if meta is not None:
            self._turn_to(name)
            self.machine = StateMachine(self._state.store)
            assert (self.machine.applied_index, self.machine.applied_term) == (meta.index, meta.term)
            self.replica.installed(meta)
            self._world.applied(self)
        self.replica.persisted(number)

    def _turn_to(self, name: str) -> None:
        self._state_name = name
        self._state = SimState(self._random, self._directories.pop(name))

    def _apply(self, applies: Sequence[Apply]) -> Sequence[Sequence[Sequence[object]]]:
        for apply in applies:
            self._world.applying(self, apply)
            if apply.entry.kind is EntryKind.CONF_CHANGE:
                self.raft.apply_conf_change(apply.entry)
        results = self.machine.apply_many([(apply.entry.index, apply.entry.term, apply.groups) for apply in applies])
        self._state.written()
        for apply, by_group in zip(applies, results, strict=True):
            self._world.executed(self, apply, by_group)
        self._world.applied(self)
        self._compact_if_due()
        return results

    # Callers.

    def call(self, operation: Operation) -> None:
        """A client asks this node."""
        if operation.kind in READS:
            self.calls[operation] = None
            self.replica.read(operation)
        elif operation.kind is Kind.RENEW:
            assert isinstance(operation.request, KeepAlive)
            self.calls[operation] = None
            self.leasing.ask(operation.request.lease, operation, renew=True)
        else:
            kind, payload = operations.command(operation)
            self.calls[operation] = self.replica.propose(kind, payload, operation)

    def expire(self, operation: Operation) -> None:
        """The client's deadline has passed."""
        if operation not in self.calls:
            return
        pending = self.calls.pop(operation)
        failed = pending is None or pending.term == 0
        if pending is not None:
            self.replica.abandon(pending)
        self._world.told(operation, Outcome.FAILED if failed else Outcome.UNKNOWN, None)

    def _answer(self, answers: Answers) -> None:
        for ticket, result in answers.results:
            if isinstance(ticket, Waiting):
                ticket.end(result)  # type: ignore[arg-type]  # a ticket and its result are one of each other's
                continue
            assert isinstance(ticket, Operation)
            self._tell(ticket, Outcome.OK, operations.answer(result))
        for ticket in answers.reads:
            if isinstance(ticket, Waiting):
                ticket.end(Done(self.machine.revision))
                continue
            assert isinstance(ticket, Operation)
            if ticket in self.calls:  # a read whose caller has gone is still served
                self._tell(ticket, Outcome.OK, operations.read(self.machine, ticket))
        for ticket in answers.unknown:
            if isinstance(ticket, Waiting):
                ticket.end(None)
                continue
            assert isinstance(ticket, Operation)
            self._tell(ticket, Outcome.UNKNOWN, None)

    def send(self, peer: NodeId, message: LeaseAsk | LeaseAnswer) -> None:
        """Send what the replica knows nothing of."""
        self._world.send(self, peer, message)

    def receive(self, sender: NodeId, message: NodeMessage) -> None:
        """A message of a peer."""
        if isinstance(message, LeaseAsk):
            self.leasing.on_ask(sender, message)
        elif isinstance(message, LeaseAnswer):
            self.leasing.on_answer(message)
        else:
            self.replica.receive(sender, message)

    def connected(self, peer: NodeId) -> None:
        """The stream to a peer is new."""
        self.replica.connected(peer)
        self.leasing.connected(peer)

    def renewed(self, operation: Operation, left: LeaseLeft) -> None:
        """The leader has answered about a lease."""
        if operation in self.calls:
            self._tell(operation, Outcome.OK, (0, left.remaining_ms if left.granted_ms else 0))

    def _tell(self, operation: Operation, outcome: Outcome, answer: Answer | None) -> None:
        if self.calls.pop(operation, False) is not False:
            self._world.told(operation, outcome, answer)
        elif outcome is Outcome.OK:
            raise AssertionError(f"an answer for nobody: {operation}")

    # Compaction and snapshots.

    def _compact_if_due(self) -> None:
        options, log = self.options, self.disk.visible
        applied = self.machine.applied_index
        if self._compacting or applied - log.first_index() + 1 < options.compact_entries + options.keep_entries:
            return
        self._compacting = True
        state, life, image = self._state, self.life, self._state.begin_sync()
        delay = self._random.randint(1, 3 * TICK)

        def synced() -> None:
            if life != self.life:
                return
            state.synced(image)
            self.do(lambda: self._cut(state, applied - options.keep_entries))

        self._scheduler.after(delay, synced)

    def _cut(self, state: SimState, index: Index) -> None:
        self._compacting = False
        log, life = self.disk.visible, self.life
        if state is not self._state or index < self.raft.status().first:
            return  # a snapshot was received meanwhile, and brings its own beginning of the log
        meta = SnapshotMeta(index, log.term(index), self.raft.conf_at(index))

        def done() -> None:
            if life == self.life:
                self.do(lambda: self.raft.compacted(index))

        self.disk.write(lambda log: log.compact(meta), done)

    def _send_snapshot(self, peer: NodeId) -> None:
        index, term = self.machine.applied_index, self.machine.applied_term
        meta = SnapshotMeta(index, term, self.raft.conf_at(index))
        self._world.send_snapshot(self, peer, meta, self._state.store.copy())

    def receive_snapshot(self, sender: NodeId, term: Term, meta: SnapshotMeta, store: MemoryStore) -> None:
        """All of a snapshot is on our disk and verified."""
        self._names += 1
        name = f"state-{self._names}"
        self._directories[name] = store
        self._received[meta.index] = name
        self.replica.receive(sender, InstallSnapshot(term, meta))

    def applied_entries(self) -> Sequence[Entry]:
        """Entries of the log that are applied and not compacted."""
        log = self.disk.visible
        return log.entries(log.first_index(), self.machine.applied_index + 1, 1 << 40)
