"""Clients: they ask any node, concurrently, on few keys so that they get into each other's way."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from raftkv.sim.clock import TICK
from raftkv.sim.history import Kind, Operation, Outcome

if TYPE_CHECKING:
    from raftkv.sim.cluster import SimCluster


_DRAWN = (Kind.PUT, Kind.DELETE, Kind.SWAP, Kind.READ, Kind.SCAN)


class Workload:
    """Draws operations, lets them be called, and lets their deadlines pass."""

    def __init__(self, cluster: SimCluster, random: Random, interval_ticks: float, keys: int) -> None:
        self._cluster = cluster
        self._random = random
        self._interval_ticks = interval_ticks
        self._keys = [b"k%d" % number for number in range(keys)]
        self._versions: dict[bytes, int] = {}  # what clients last saw of each key
        self._next_id = 1
        self._active = False
        self.burst_max = random.choice((1, 4, 20))
        self.deadline_ticks = random.choice((20, 60, 400))

    def start(self) -> None:
        """Begin to call."""
        self._active = True
        self._plan()

    def stop(self) -> None:
        """Call no more."""
        self._active = False

    def _plan(self) -> None:
        delay = int(self._random.expovariate(1 / (self._interval_ticks * TICK)))
        self._cluster.scheduler.after(delay, self._fire)

    def _fire(self) -> None:
        if not self._active:
            return
        nodes = sorted(self._cluster.nodes)
        for _ in range(self._random.randint(1, self.burst_max)):
            self.call(self._random.choice(nodes), self.draw(), self.deadline_ticks)
        self._plan()

    def draw(self) -> Operation:
        """A new operation."""
        random = self._random
        kind = random.choices(_DRAWN, (5, 1, 3, 3, 1))[0]
        key = random.choice(self._keys)
        return self.make(kind, key)

    def make(self, kind: Kind, key: bytes) -> Operation:
        """A new operation of this kind; every value is unlike any other."""
        operation = Operation(self._next_id, kind, key)
        self._next_id += 1
        if kind in (Kind.PUT, Kind.SWAP):
            operation.value = b"v%d" % operation.id + b"." * self._random.choice((0, 0, 0, 50))
        if kind is Kind.PUT:
            operation.wants_previous = self._random.random() < 0.5
        if kind is Kind.SWAP:
            operation.expected = self._versions.get(key, 0)
        return operation

    def call(self, node_id: int, operation: Operation, deadline_ticks: int) -> bool:
        """Ask a node; False when nobody listens there."""
        node = self._cluster.nodes[node_id]
        if not node.up:
            return False
        operation.node = node_id
        self._cluster.called(operation)
        life = node.life

        def call() -> None:
            # A process that was paused finds requests that are too old already, and callers that have gone.
            if operation.outcome is Outcome.PENDING:
                node.call(operation)

        def expire() -> None:
            if operation.outcome is not Outcome.PENDING:
                return
            if node.life == life and node.up and not node.paused and operation in node.calls:
                node.do(lambda: node.expire(operation), at_once=True)
            else:  # nothing answers; it was called before the end of that life, so nobody knows
                self._cluster.told(operation, Outcome.UNKNOWN, None)

        node.do(call)
        jitter = 0.5 + self._random.random()
        self._cluster.scheduler.after(int(deadline_ticks * TICK * jitter), expire)
        return True

    def saw(self, operation: Operation) -> None:
        """An answer came: what the next transaction builds on."""
        if operation.answer is None:
            return
        seen = operation.answer[1]
        if operation.kind in (Kind.READ, Kind.SWAP):
            if seen is True:
                self._versions[operation.key] = operation.expected + 1
            elif isinstance(seen, tuple):
                self._versions[operation.key] = seen[4]
            else:
                self._versions[operation.key] = 0
