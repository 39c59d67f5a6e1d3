"""Clients that coordinate: exactly-once sessions, leases kept alive or not, locks by the key recipe, guarded writes.

They do what a careful client does: a mutation keeps its number and is sent again, to any node, until its answer is
there; a lease is trusted from the moment its renewal was *sent*; a lock is taken when a linearizable read shows the own
key first. And what clients suffer: answers are lost, the same call is under way twice, a holder is paused for longer
than its lease lives and then writes on.

Each client has two programs, generators that yield what they wait for: one writes a key of its own (the ledger, which
tells in the end how often it was done), the other takes locks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from raftkv._pb.kv_pb2 import RangeRequest
from raftkv.raft.types import NodeId
from raftkv.sim.clock import TICK
from raftkv.sim.coordination import Held, Promises
from raftkv.sim.history import Answer, Item, Kind, Operation, Outcome, Violation
from raftkv.sim.requests import Body, Call, Close, Create, Grant, KeepAlive, Open, Put, Remove, Request, Revoke
from raftkv.state.machine import StateMachine
from raftkv.state.results import RefusalCode

if TYPE_CHECKING:
    from raftkv.sim.cluster import SimCluster

RATE_ERROR = 0.01
GUARD_S, GUARD_SHARE = 0.2, 0.05
"""As in the SDK: how much earlier than the server a client takes its lease for over."""
CALLS_MAX = 8
"""Of one session under way; beyond it the ledger waits."""
_LEDGER = b"ledger/%d"


@dataclass(frozen=True, slots=True)
class CoordinationConfig:
    """How such clients behave in a run."""

    clients: int
    names: int
    """How many locks there are."""
    tick_s: float
    ttls_ms: tuple[int, ...]
    """Of leases; those of 10 s and more are checkpointed."""
    deadline_ticks: int
    """Of one sending of a call."""
    lost: float
    """Share of answers that do not reach the client."""
    doubled: float
    """Share of calls that are sent a second time before the first is answered."""
    pauses: float
    """Share of guarded writes before which the holder is paused."""
    rate_error: float
    """How far the clocks of nodes may go wrong, as a share: no further than what is promised rests on."""

    @classmethod
    def drawn(cls, random: Random) -> CoordinationConfig:
        """As the seed has it."""
        return cls(
            clients=random.choice((2, 3, 4)),
            names=random.choice((1, 1, 2)),
            tick_s=random.choice((0.05, 0.1, 0.2)),
            ttls_ms=random.choice(((2000,), (2000, 4000), (3000, 12_000), (12_000,))),
            deadline_ticks=random.choice((10, 30, 80)),
            lost=random.choice((0.0, 0.2)),
            doubled=random.choice((0.0, 0.2, 0.6)),
            pauses=random.choice((0.0, 0.3, 0.6)),
            rate_error=random.choice((0.0, RATE_ERROR)),
        )


@dataclass(slots=True, eq=False)
class _Session:
    id: int
    alive: bool = True  # as far as the client knows
    seq: int = 0  # the last that was used
    incomplete: dict[int, _Mutation] = field(default_factory=dict)  # in rising order


@dataclass(slots=True, eq=False)
class _Mutation:
    session: _Session
    seq: int
    body: Body
    floor: int  # the greatest revision that anybody had been told of when it began
    then: Callable[[Answer | None], None]
    done: bool = False


@dataclass(slots=True, eq=False)
class _Lease:
    id: int
    ttl_ms: int
    deadline_s: float  # until when its client trusts it
    kept: bool = True
    silent_until_s: float = 0.0  # its client is paused
    node: NodeId = 0  # whom to ask for renewals: the same one while it answers; 0: any
    held: Held | None = None

    def trust(self, sent_s: float, left_s: float) -> None:
        """A grant or renewal that was sent at `sent_s` is acknowledged."""
        until = sent_s + left_s * (1 - RATE_ERROR) - max(GUARD_S, GUARD_SHARE * left_s)
        self.deadline_s = max(self.deadline_s, until)


class _Scan:
    """A program waits for a look at all keys."""


Program = Generator["float | Body | _Lease | _Scan", Any, None]
"""What it yields: ticks to sleep (then gets None), a call (its answer; None: nobody knows, its session has ended), a
lease to renew (the milliseconds left; None: no answer), or a look (the items; None: no answer)."""


class Coordination:
    """All these clients, and what they share."""

    def __init__(self, cluster: SimCluster, random: Random, config: CoordinationConfig) -> None:
        self.cluster = cluster
        self.random = random
        self.config = config
        self.active = False
        self.waiting = 0
        """Mutations that have no answer yet."""
        self._leases = 0
        self.clients = [_Client(self, number) for number in range(config.clients)]

    @property
    def promises(self) -> Promises:
        return self.cluster.promises

    def start(self) -> None:
        """Begin."""
        self.active = True
        for client in self.clients:
            client.connect()

    def stop(self) -> None:
        """Begin nothing new, keep nothing alive; what is under way is sent until it is answered."""
        self.active = False

    def new_lease(self) -> int:
        """An id that nobody has used."""
        self._leases += 1
        return self._leases

    def after(self, ticks: float, call: Callable[[], None]) -> None:
        """Plan something."""
        self.cluster.scheduler.after(int(ticks * TICK), call)

    def some_node(self) -> NodeId:
        """Any; in the end only members, for who was removed does not answer any more."""
        members = [] if self.active else [node.id for node in self.cluster.members()]
        return self.random.choice(members or sorted(self.cluster.nodes))

    def ask(self, kind: Kind, request: Request | None, then: Callable[[Operation], None], node: NodeId = 0) -> None:
        """Ask a node, 0: any; `then` gets the operation with its outcome, also when nobody listens there."""
        operation = self.cluster.workload.make(kind, b"")
        operation.request, operation.then = request, then
        if not self.cluster.workload.call(node or self.some_node(), operation, self.config.deadline_ticks):
            operation.outcome = Outcome.FAILED
            self.after(self.random.uniform(1, 10), lambda: then(operation))

    def check_ledgers(self, machine: StateMachine) -> None:
        """In the end: the key of each client tells how often its writes were done."""
        for client in self.clients:
            key = _LEDGER % client.number
            kvs = machine.range(RangeRequest(key=key)).kvs
            self.promises.check_ledger(key, kvs[0].version if kvs else 0, client.acknowledged, client.unknown)


class _Client:
    """One client, through all of its sessions."""

    def __init__(self, shared: Coordination, number: int) -> None:
        self._shared = shared
        self.number = number
        self.acknowledged = 0
        self.unknown = 0
        """Puts of the ledger that were done, and that perhaps were."""
        self._puts_made = 0

    # Sessions.

    def connect(self) -> None:
        """Open a session, until one is there, and go to work."""
        shared = self._shared
        if not shared.active:
            return

        def opened(operation: Operation) -> None:
            if operation.outcome is not Outcome.OK:
                self.connect()
                return
            assert operation.answer is not None
            assert isinstance(operation.answer[1], tuple), f"a session is opened by {operation}"
            session = _Session(operation.answer[1][0])
            self._run(session, self._write_ledger(session))
            self._run(session, self._take_locks(session))
            if shared.random.random() < 0.3:
                shared.after(shared.random.uniform(20, 300), lambda: self._close(session))

        shared.ask(Kind.COMMAND, Open(shared.random.choice((10_000, 20_000))), opened)

    def _close(self, session: _Session) -> None:
        """End one's own session, whatever is under way; in the cluster it may end much later, or not at all."""
        if session.alive and self._shared.active:
            self._shared.ask(Kind.COMMAND, Close(session.id), lambda operation: None)

    def _end(self, session: _Session) -> None:
        """The cluster says that the session has ended: what has no answer will never have one."""
        if not session.alive:
            return
        session.alive = False
        for mutation in list(session.incomplete.values()):
            self._complete(mutation, None)
            self._send(mutation)  # a client that has gone mad: nothing of this may be done
        self.connect()

    # Mutations.

    def _mutate(self, session: _Session, body: Body, then: Callable[[Answer | None], None]) -> None:
        """Have something done just once; `then` gets the answer, None where nobody knows."""
        session.seq += 1
        self._shared.waiting += 1
        floor = self._shared.cluster.history.told
        mutation = session.incomplete[session.seq] = _Mutation(session, session.seq, body, floor, then)
        self._send(mutation)
        if self._shared.random.random() < self._shared.config.doubled:
            self._shared.after(self._shared.random.uniform(0, 20), lambda: self._send(mutation))

    def _send(self, mutation: _Mutation) -> None:
        session = mutation.session
        first_incomplete = min(session.incomplete, default=mutation.seq)
        call = Call(session.id, mutation.seq, min(first_incomplete, mutation.seq), mutation.body)
        self._shared.ask(Kind.COMMAND, call, lambda operation: self._answered(mutation, operation))

    def _answered(self, mutation: _Mutation, operation: Operation) -> None:
        shared = self._shared
        if mutation.done:
            return
        answer = operation.answer
        if operation.outcome is not Outcome.OK or shared.random.random() < shared.config.lost:
            shared.after(shared.random.uniform(0, 10), lambda: None if mutation.done else self._send(mutation))
            return
        assert answer is not None
        if answer[1] is RefusalCode.SESSION_EXPIRED:
            self._end(mutation.session)
            return
        if isinstance(answer[1], RefusalCode) and answer[1] in (RefusalCode.STALE_SEQUENCE, RefusalCode.SESSION_FULL):
            raise Violation("X2", f"{answer}, though its client has no answer yet: {operation}")
        if answer[0] < mutation.floor:
            raise Violation("K1", f"revision {mutation.floor} was told before it began: {operation}")
        shared.promises.acknowledged(mutation.session.id, mutation.seq, answer)
        self._complete(mutation, answer)

    def _complete(self, mutation: _Mutation, answer: Answer | None) -> None:
        mutation.done = True
        self._shared.waiting -= 1
        del mutation.session.incomplete[mutation.seq]
        mutation.then(answer)

    # Programs.

    def _run(self, session: _Session, program: Program, value: object = None) -> None:
        """Go on with a program until it waits for something."""
        try:
            step = program.send(value)
        except StopIteration:
            return
        shared = self._shared

        def resume(value: object = None) -> None:
            self._run(session, program, value)

        if isinstance(step, float):
            shared.after(step, resume)
        elif isinstance(step, _Lease):
            renewal = KeepAlive(step.id)
            shared.ask(Kind.RENEW, renewal, lambda renewed: resume(renewed.answer and renewed.answer[1]), step.node)
        elif isinstance(step, _Scan):
            shared.ask(Kind.SCAN, None, lambda operation: resume(operation.answer and operation.answer[1]))
        elif session.alive:
            self._mutate(session, step, resume)
        else:
            shared.after(0, resume)

    def _works(self, session: _Session) -> bool:
        return self._shared.active and session.alive

    def _write_ledger(self, session: _Session) -> Program:
        """Put after put, several under way."""
        random = self._shared.random

        def counted(answer: Answer | None) -> None:
            if answer is None:
                self.unknown += 1
            else:
                self.acknowledged += 1

        while self._works(session):
            if len(session.incomplete) < CALLS_MAX:
                self._puts_made += 1
                self._mutate(session, Put(_LEDGER % self.number, b"%d" % self._puts_made), counted)
            yield random.expovariate(1 / 15)

    def _take_locks(self, session: _Session) -> Program:
        while self._works(session):
            yield from self._take_lock(session)
            yield self._shared.random.uniform(0, 20)

    def _take_lock(self, session: _Session) -> Program:
        """From the grant of a lease to its end, one way or another."""
        shared, random, cluster = self._shared, self._shared.random, self._shared.cluster
        name = b"lock/%d/" % random.randrange(shared.config.names)
        lease = _Lease(shared.new_lease(), random.choice(shared.config.ttls_ms), 0.0)
        sent_s, ttl_s = cluster.now_s, lease.ttl_ms / 1000
        answer = yield Grant(lease.id, lease.ttl_ms)
        if answer is None:
            return
        shared.promises.granted(lease.id, sent_s, ttl_s)
        lease.trust(sent_s, ttl_s)
        self._run(session, self._keep_alive(lease))
        key = name + b"%x" % lease.id
        answer = yield Create(key, b"%d" % self.number, lease.id)
        if answer is not None and answer[1] is True:
            token: int = answer[0]
            is_first = yield from self._wait(name, key, lease)
            if is_first and cluster.now_s < lease.deadline_s:
                lease.held = Held(name, self.number, token)
                shared.promises.holds(lease.held, lease.deadline_s, cluster.now_s)
                yield from self._hold(name, key, token, lease)
                lease.held.deadline_s, lease.held = 0.0, None
                if random.random() < 0.5:
                    yield Remove(key, token)
        lease.kept = False
        if random.random() < 0.5:
            yield Revoke(lease.id)  # else it runs out

    def _wait(self, name: bytes, key: bytes, lease: _Lease) -> Generator[float | _Scan, Any, bool]:
        """Until the own key is the first; False when it is gone, or nobody waits any more."""
        while self._shared.active and lease.kept:
            items: tuple[Item, ...] | None = yield _Scan()
            queue = [(item[2], item[0]) for item in items or () if item[0].startswith(name)]
            if queue and min(queue)[1] == key:
                return True
            if items is not None and key not in [waiter for _, waiter in queue]:
                return False
            yield self._shared.random.uniform(2, 10)
        return False

    def _hold(self, name: bytes, key: bytes, token: int, lease: _Lease) -> Program:
        """Write under the lock; who was paused does not look at the clock, and writes all the same."""
        shared, random = self._shared, self._shared.random
        for number in range(random.randint(1, 4)):
            if random.random() < shared.config.pauses:
                pause_s = lease.ttl_ms / 1000 * random.uniform(0.3, 3)
                lease.silent_until_s = shared.cluster.now_s + pause_s
                yield pause_s / shared.config.tick_s
            answer = yield Put(b"data/" + name, b"%d %d" % (token, number), (key, token))
            if answer is None or answer[1] is RefusalCode.GUARD_FAILED or not shared.active:
                return
            yield random.uniform(0, 10)

    def _keep_alive(self, lease: _Lease) -> Program:
        shared, cluster = self._shared, self._shared.cluster
        while True:
            yield lease.ttl_ms / 1000 / 3 / shared.config.tick_s
            if not (lease.kept and shared.active):
                return
            if cluster.now_s < lease.silent_until_s:
                continue
            sent_s = cluster.now_s
            lease.node = lease.node or shared.some_node()
            left_ms = yield lease
            if left_ms is None:
                lease.node = 0
                continue
            shared.promises.renewed(lease.id, sent_s, left_ms / 1000, cluster.now_s)
            if not left_ms:
                lease.kept = False
                return
            lease.trust(sent_s, left_ms / 1000)
            if lease.held is not None:
                shared.promises.holds(lease.held, lease.deadline_s, cluster.now_s)
