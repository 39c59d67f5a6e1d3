"""A whole cluster in one thread, decided by one seed: nodes, network, clients, faults, and the checks on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from raftkv.raft.config import RaftConfig
from raftkv.raft.describe import event as describe_event
from raftkv.raft.describe import message as describe_message
from raftkv.raft.ready import Event
from raftkv.raft.types import ConfState, Index, NodeId, Role, SnapshotMeta
from raftkv.replica.effects import Apply, Forward, Persist
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.sim import operations
from raftkv.sim.checkers import Invariants
from raftkv.sim.clients import Coordination, CoordinationConfig
from raftkv.sim.clock import TICK, Scheduler
from raftkv.sim.coordination import CoordinationModel, Promises
from raftkv.sim.faults import FaultMix, Faults
from raftkv.sim.history import READS, Answer, History, Kind, Operation, Outcome, Violation
from raftkv.sim.lease_port import NodeMessage
from raftkv.sim.network import Network
from raftkv.sim.node import NodeOptions, SimNode
from raftkv.sim.requests import Call
from raftkv.sim.workload import Workload
from raftkv.state.commands import CommandKind
from raftkv.state.store import MemoryStore

TRACE_MAX = 4000


@dataclass(slots=True)
class SimConfig:
    """What a run is made of."""

    nodes: int
    """How many voters there are at first."""
    options: NodeOptions
    spares: int = 0
    """Nodes that are there, but no members until they are added."""
    faults: FaultMix = field(default_factory=FaultMix)
    call_interval_ticks: float = 3.0
    keys: int = 4
    progress_checks: bool = True
    """Whether to compare what the leader believes of its followers with their disks."""
    coordination: CoordinationConfig | None = None
    """Clients with sessions, leases and locks, if there are any."""

    @classmethod
    def drawn(cls, seed: int, nodes: int = 0, *, coordination: bool = False) -> SimConfig:
        """The run that belongs to `seed`; `nodes` 0: as many as it says; `coordination`: with such clients."""
        random = Random(f"{seed}/config")
        raft = RaftConfig(
            heartbeat_ticks=2,
            election_ticks=10,
            disk_stall_ticks=10,
            pre_vote=random.random() < 0.9,
            evidence_rank_ticks=random.choice((0, 1)),
            append_bytes_max=random.choice((100, 1000, 1 << 20)),
            inflight_appends_max=random.choice((1, 4, 256)),
            inflight_bytes_max=random.choice((200, 1 << 20)),
            uncommitted_bytes_max=random.choice((500, 1 << 20)),
            committed_bytes_max=random.choice((1, 300, 1 << 20)),
            cache_bytes_max=random.choice((0, 500, 1 << 20)),
            read_rounds_max=random.choice((1, 4)),
            lone_bytes_max=Random(f"{seed}/thrift").choice((0, 100, 4096)),  # apart: it came later than the seeds below
            read_retry_ticks=5,
        )
        options = NodeOptions(
            raft=raft,
            compact_entries=random.choice((3, 10, 1000)),
            keep_entries=random.choice((0, 2, 10)),
            read_retry_ticks=20,
            commands_good=random.choice((1, 1, 5, 256)),
            entry_bytes_max=random.choice((1, 200, 1 << 20)),
            lazy_turns=random.random() < 0.7,
        )
        faults = FaultMix.drawn(random)
        config = cls(
            nodes=nodes or random.choice((1, 2, 3, 3, 3, 4, 5, 5)),
            options=options,
            spares=random.choice((1, 2)) if faults.membership else 0,
            faults=faults,
            call_interval_ticks=random.choice((1.0, 3.0, 10.0)),
            keys=random.choice((1, 3, 8)),
        )
        if coordination:
            config.coordination = CoordinationConfig.drawn(random)
            config.options.tick_s = config.coordination.tick_s
            if raft.pre_vote and random.random() < 0.5:
                # A leader that was deposed believes in itself for longer: nothing about leases may rest on its doubts.
                # Not without pre-votes: then who was removed would disturb for ever.
                options.raft = replace(raft, check_quorum=False)
            config.call_interval_ticks = 30.0  # the other clients are company, and not the matter
            config.faults.interval_ticks *= 2  # a lock takes several calls, which are to come to something
        return config


class SimCluster:
    """See the module. It is the `World` of its nodes and the `Endpoints` of its network."""

    def __init__(self, seed: int, config: SimConfig, *, trace: bool = False) -> None:
        self.seed = seed
        self.config = config
        self.scheduler = Scheduler()
        self.trace: deque[str] = deque(maxlen=TRACE_MAX)
        self.tracing = trace
        conf = ConfState(voters=tuple(range(1, config.nodes + 1)))
        self.invariants = Invariants(conf)
        self.model = CoordinationModel()
        self.promises = Promises()
        self.history = History(self.model)
        clocks = Random(f"{seed}/clocks")
        self.nodes: dict[NodeId, SimNode] = {}
        node_ids = range(1, config.nodes + config.spares + 1)
        for node_id in node_ids:
            spread = 1 + config.faults.clock_spread * clocks.random()
            rate = spread if clocks.random() < 0.5 else 1 / spread
            chance = Random(f"{seed}/node/{node_id}")
            self.nodes[node_id] = SimNode(node_id, conf, config.options, self.scheduler, chance, self, rate)
        self.network = Network(self.scheduler, Random(f"{seed}/network"), node_ids, self)
        self.network.weather = config.faults.weather
        self.faults = Faults(self, Random(f"{seed}/faults"), config.faults)
        self.workload = Workload(self, Random(f"{seed}/workload"), config.call_interval_ticks, config.keys)
        self._random = Random(f"{seed}/cluster")
        self.coordination: Coordination | None = None
        if config.coordination is not None:
            chance = Random(f"{seed}/coordination")
            self.coordination = Coordination(self, chance, config.coordination)
            for node in self.nodes.values():
                node.seconds_rate = 1 + config.coordination.rate_error * chance.uniform(-1, 1)
                node.seconds_offset = chance.uniform(0, 1e6)
        self._by_payload: dict[bytes, Operation] = {}
        self._expected: dict[Index, list[tuple[Operation | None, Answer, bool]]] = {}
        self._turns = 0

    # Running.

    @property
    def now_ticks(self) -> float:
        """Virtual time."""
        return self.scheduler.now / TICK

    @property
    def now_s(self) -> float:
        """Virtual time as leases count it."""
        return self.now_ticks * self.config.options.tick_s

    def start(self) -> None:
        """Start all nodes."""
        for node_id in self.nodes:
            self.start_node(node_id)

    def run(self, ticks: float) -> None:
        """Let time pass."""
        until = self.scheduler.now + int(ticks * TICK)
        while self.scheduler.step(until):
            pass

    def run_until(self, condition: Callable[[], bool], ticks: float) -> bool:
        """Let time pass until `condition` holds; False when it never did in so many ticks."""
        until = self.scheduler.now + int(ticks * TICK)
        while not condition():
            if not self.scheduler.step(until):
                return condition()
        return True

    def leader(self) -> NodeId:
        """Who leads the latest term, as the nodes see it; 0: nobody."""
        leaders = [(node.raft.term, node.id) for node in self.nodes.values() if node.up and leads(node)]
        return max(leaders)[1] if leaders else 0

    def members(self) -> list[SimNode]:
        """Who takes part, as the leader sees it; nobody while there is none, or a change is under way."""
        leader = self.leader()
        if not leader:
            return []
        raft = self.nodes[leader].raft
        changing = raft.conf.joint or raft.pending_conf_index > raft.log.applied
        return [] if changing else [self.nodes[member] for member in raft.conf.members()]

    def note(self, text: str) -> None:
        """A line for the reader of a trace."""
        if self.tracing:
            self.trace.append(f"{self.now_ticks:9.2f} {text}")

    # Nodes.

    def start_node(self, node_id: NodeId) -> None:
        """Start a node, for the first time or again."""
        node = self.nodes[node_id]
        node.start()
        self.note(f"{node_id} starts, {describe(node)}")
        self.invariants.started(node)
        self.invariants.applied(node)
        self.network.node_up(node_id)
        node.wake()

    def crash_node(self, node_id: NodeId) -> None:
        """Cut the power of a node."""
        self.note(f"{node_id} crashes")
        self.nodes[node_id].crash()
        self.network.node_down(node_id)
        self.faults.crashed(node_id)

    # World: what a node does.

    def send(self, node: SimNode, receiver: NodeId, message: NodeMessage) -> None:
        if self.tracing:
            self.note(f"{node.id} -> {receiver}  {show(message)}")
        if not isinstance(message, LeaseAsk | LeaseAnswer):  # these promise nothing about the log
            self.invariants.sending(node, receiver, message)
        self.network.send(node.id, receiver, message)

    def send_snapshot(self, node: SimNode, receiver: NodeId, meta: SnapshotMeta, state: MemoryStore) -> None:
        self.note(f"{node.id} -> {receiver}  snapshot {meta.term}/{meta.index} begins")
        term, life, other = node.raft.term, node.life, self.nodes[receiver]
        receiver_life = other.life

        def arrive() -> None:
            same = other.up and other.life == receiver_life and node.life == life and node.up
            ok = same and (node.id, receiver) not in self.network.cut and self._random.random() < 0.9
            if ok:
                other.do(lambda: other.receive_snapshot(node.id, term, meta, state))
            if node.life == life:
                delay = self._random.randint(0, 2 * TICK)
                self.scheduler.after(delay, lambda: node.do(lambda: sent(ok)) if node.life == life else None)

        def sent(ok: bool) -> None:
            node.raft.snapshot_sent(receiver, meta.index, ok)

        self.scheduler.after(self._random.randint(1, 10 * TICK), arrive)

    def persisting(self, node: SimNode, persist: Persist) -> None:
        if self.tracing:
            entries = f"{persist.entries[0].index}..{persist.entries[-1].index}" if persist.entries else "no entries"
            install = f" install {persist.install.index}" if persist.install else ""
            self.note(f"{node.id} persist #{persist.number} {persist.hard_state} {entries}{install}")
        self.invariants.persisting(node, persist)

    def committing(self, node: SimNode) -> None:
        self.invariants.committing(node)

    def applying(self, node: SimNode, apply: Apply) -> None:
        if not self.invariants.applying(node, apply.entry):
            return
        entry, expected = apply.entry, []
        for group in apply.groups:
            for _, kind, payload in group.commands:
                operation = self._by_payload.get(payload)
                alive = True
                if operation is None:  # by the leader
                    answer = self.model.lead(kind, payload, entry.term)
                    stale = " of another term" if answer[1] is not None else ""
                    self.promises.count(f"{CommandKind(kind).name.lower()}{stale}")
                else:
                    if isinstance(operation.request, Call):
                        alive = operation.request.session in self.model.sessions
                    self.history.applied(entry.index, [operation])
                    assert operation.witness is not None, "what is replayed has an answer"
                    answer = operation.witness
                expected.append((operation, answer, alive))
        self._expected[entry.index] = expected
        ended, self.model.ended = self.model.ended, []
        for lease, expired in ended:
            self.note(f"lease    {lease} {'expires' if expired else 'is revoked'} in entry {entry.index}")
            self.promises.lease_ended(lease, expired, self.now_s)

    def executed(self, node: SimNode, apply: Apply, results: Sequence[Sequence[object]]) -> None:
        expected = self._expected.pop(apply.entry.index, None)
        if not expected:
            return  # it was not the first to apply this
        answers = [operations.answer(result) for group in results for result in group]
        for (operation, witness, alive), answer in zip(expected, answers, strict=True):
            if operation is not None and operation.request is not None:
                self.promises.executed(operation.request, answer, alive)
            if answer != witness:
                what = operation or f"what a leader proposed in entry {apply.entry.index}"
                raise Violation("K1", f"the log says {witness}, node {node.id} finds {answer}: {what}")

    def applied(self, node: SimNode) -> None:
        self.invariants.applied(node)

    def turn_done(self, node: SimNode) -> None:
        self.invariants.turn_done(node)
        self._turns += 1
        if self._turns % 16 == 0 and self.config.progress_checks and leads(node):
            self.invariants.check_progress(node)

    def told(self, operation: Operation, outcome: Outcome, answer: Answer | None) -> None:
        if operation.outcome is Outcome.UNKNOWN:
            return  # the client had gone
        if operation.kind is Kind.RENEW:
            operation.outcome, operation.answer = outcome, answer
        else:
            self._told(operation, outcome, answer)
        self.note(f"client   {operation}")
        if operation.then is not None:
            then = operation.then
            self.scheduler.after(0, lambda: then(operation))  # not within the turn of the node

    def _told(self, operation: Operation, outcome: Outcome, answer: Answer | None) -> None:
        if operation.index > self.invariants.committed_max:
            raise Violation("D1", f"entry {operation.index} is answered, but no leader has committed it: {operation}")
        self.history.returned(operation, outcome, answer)
        self.workload.saw(operation)

    def called(self, operation: Operation) -> None:
        """A client begins."""
        if operation.kind is not Kind.RENEW:
            if operation.kind not in READS:
                self._by_payload[operations.command(operation)[1]] = operation
            self.history.called(operation)
        self.note(f"client   {operation}")

    def happened(self, node: SimNode, event: Event) -> None:
        self.note(f"{node.id} event   {describe_event(event)}")
        if event.kind == "leader_doubted":
            self.refused(node.id, node.raft.leader)

    def crashed(self, node: SimNode) -> None:
        self.crash_node(node.id)

    # Endpoints: what the network tells.

    def up(self, node: NodeId) -> bool:
        return self.nodes[node].up

    def arrived(self, sender: NodeId, receiver: NodeId, message: NodeMessage) -> None:
        node = self.nodes[receiver]
        node.do(lambda: node.receive(sender, message))

    def connected(self, node: NodeId, peer: NodeId) -> None:
        self.note(f"{node} connected to {peer}")
        self.nodes[node].do(lambda: self.nodes[node].connected(peer))

    def broken(self, node: NodeId, peer: NodeId) -> None:
        self.nodes[node].do(lambda: self.nodes[node].replica.disconnected(peer))
        self.refused(node, peer)

    def refused(self, node: NodeId, peer: NodeId) -> None:
        prober = self.nodes[node]
        if peer == 0 or not prober.up or self.nodes[peer].up or peer != prober.raft.leader:
            return
        if self._random.random() < self.config.faults.evidence:
            delay = self._random.randint(1, TICK)  # long enough for the peer to come back, now and then
            self.scheduler.after(delay, lambda: prober.do(lambda: prober.replica.gone(peer)))


def leads(node: SimNode) -> bool:
    """Whether a node believes that it leads."""
    return node.raft.role is Role.LEADER


def describe(node: SimNode) -> str:
    """One node in a few words."""
    raft = node.raft
    return (
        f"{raft.role.value} term={raft.term} leader={raft.leader} commit={raft.commit} "
        f"applied={node.machine.applied_index} log={node.disk.visible.first_index()}..{node.disk.visible.last_index()}"
        f"{'' if node.up else ' DOWN'}{' PAUSED' if node.paused else ''} writes={node.disk.pending}"
    )


def show(message: NodeMessage) -> str:
    """One message in a few words."""
    if isinstance(message, Forward):
        numbers = ", ".join(str(command.seq) for command in message.commands)
        return f"Forward term={message.term} life={message.incarnation & 0xFFFF:x} [{numbers}]"
    if isinstance(message, LeaseAsk | LeaseAnswer):
        return str(message)
    return describe_message(message)
