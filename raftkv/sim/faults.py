"""What goes wrong, drawn from the seed.

Each run draws a random *subset* of the kinds of fault with random rates (a swarm): runs with all of them at once would
never get deep into any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from random import Random
from typing import TYPE_CHECKING

from raftkv.raft.describe import conf_change as describe_change
from raftkv.raft.errors import RaftRefused
from raftkv.raft.types import ConfChange, ConfChangeKind, NodeId, Role
from raftkv.sim.clock import TICK
from raftkv.sim.network import Link, Weather

if TYPE_CHECKING:
    from raftkv.sim.cluster import SimCluster


@dataclass(slots=True)
class FaultMix:
    """How often each kind happens, relative to the others; 0: never."""

    crash: float = 0.0
    """One node loses power, perhaps between two steps of a turn."""
    crash_leader: float = 0.0
    power_loss: float = 0.0
    """All nodes at one instant."""
    partition: float = 0.0
    """Links are cut: in two halves, one way, around one node, or at random (non-transitive)."""
    pause: float = 0.0
    slow_disk: float = 0.0
    stalled_disk: float = 0.0
    break_stream: float = 0.0
    transfer: float = 0.0
    campaign: float = 0.0
    """A node stands for election out of the blue."""
    false_evidence: float = 0.0
    """A node is told that its leader is gone, which is not so."""
    membership: float = 0.0
    """The leader is asked to add, demote or remove some nodes."""

    interval_ticks: float = 25.0
    """Time between two faults, on average."""
    weather: Weather = field(default_factory=Weather)
    clock_spread: float = 0.0
    """How far clocks are apart: each runs at 1/(1+x) to 1+x."""
    evidence: float = 1.0
    """How often a refused connection is noticed as the proof that it is."""

    @classmethod
    def drawn(cls, random: Random) -> FaultMix:
        """A swarm member."""
        mix = cls()
        kinds = [item.name for item in fields(cls) if item.name not in _SETTINGS]
        for kind in kinds:
            if random.random() < 0.45:
                setattr(mix, kind, random.choice((0.2, 1.0, 3.0)))
        mix.interval_ticks = random.choice((8.0, 20.0, 50.0))
        weather = mix.weather
        if random.random() < 0.5:
            weather.loose = random.choice((0.05, 0.3, 1.0))
            weather.lost = random.choice((0.0, 0.05, 0.3))
            weather.late_ticks = random.choice((1, 5, 30))
        weather.doubled = random.choice((0.0, 0.1, 0.5))
        weather.delay = random.choice((TICK // 20, TICK // 5, TICK, 2 * TICK))
        mix.clock_spread = random.choice((0.0, 0.0, 0.2, 1.0))
        mix.evidence = random.choice((0.0, 0.5, 1.0))
        return mix


_SETTINGS = {"interval_ticks", "weather", "clock_spread", "evidence"}


class Faults:
    """Lets them happen, and ends them."""

    def __init__(self, cluster: SimCluster, random: Random, mix: FaultMix) -> None:
        self._cluster = cluster
        self._random = random
        self.mix = mix
        self._active = True
        self.counts: dict[str, int] = {}
        self._kinds = [item.name for item in fields(mix) if item.name not in _SETTINGS and getattr(mix, item.name)]
        self._weights = [getattr(mix, kind) for kind in self._kinds]

    def start(self) -> None:
        """Plan the first."""
        if self._kinds:
            self._plan()

    def stop(self) -> None:
        """No more from now on, and all that is broken is mended."""
        self._active = False
        cluster = self._cluster
        cluster.network.weather = Weather()
        cluster.network.set_cut(())
        for node in cluster.nodes.values():
            node.crash_in = 0
            node.disk.delay_ticks = 0.1
            node.disk.stall(False)
            node.clock.rate = 1.0
            if not node.up:
                cluster.start_node(node.id)
            elif node.paused:
                node.resume()

    def _plan(self) -> None:
        self._after(self._random.expovariate(1 / self.mix.interval_ticks), self._fire)

    def _after(self, ticks: float, call: Callable[[], None]) -> None:
        """Plan something, unless the time of faults is over by then."""
        self._cluster.scheduler.after(int(ticks * TICK), lambda: call() if self._active else None)

    def _fire(self) -> None:
        (kind,) = self._random.choices(self._kinds, self._weights)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        getattr(self, f"_{kind}")()
        self._plan()

    def _some_node(self) -> NodeId:
        return self._random.choice(sorted(self._cluster.nodes))

    def _leader(self) -> NodeId:
        return self._cluster.leader() or self._some_node()

    def _duration(self) -> float:
        return self._random.choice((1.0, 5.0, 20.0, 60.0)) * (0.5 + self._random.random())

    def _note(self, text: str) -> None:
        self._cluster.note(f"fault    {text}")

    # The kinds.

    def _crash_node(self, node_id: NodeId) -> None:
        node = self._cluster.nodes[node_id]
        if not node.up:
            return
        if self._random.random() < 0.5:
            node.crash_in = self._random.randint(1, 12)
            return
        self._cluster.crash_node(node_id)

    def _crash(self) -> None:
        self._crash_node(self._some_node())

    def _crash_leader(self) -> None:
        self._crash_node(self._leader())

    def _power_loss(self) -> None:
        self._note("power loss everywhere")
        for node_id, node in self._cluster.nodes.items():
            if node.up:
                self._cluster.crash_node(node_id)

    def crashed(self, node_id: NodeId) -> None:
        """A node went down: plan its return."""
        node = self._cluster.nodes[node_id]

        def restart() -> None:
            if not node.up:
                self._cluster.start_node(node_id)

        self._after(self._duration(), restart)

    def _partition(self) -> None:
        cut = self._draw_cut()
        self._note(f"cut {', '.join(f'{a}->{b}' for a, b in sorted(cut))}")
        network = self._cluster.network
        network.set_cut(cut)

        def heal() -> None:
            if network.cut == cut:
                self._note("heal")
                network.set_cut(())

        self._after(self._duration(), heal)

    def _draw_cut(self) -> set[Link]:
        random, nodes = self._random, sorted(self._cluster.nodes)
        links = [(a, b) for a in nodes for b in nodes if a != b]
        shape = random.choice(("halves", "one way", "alone", "leader alone", "bridge", "any"))
        if shape in ("alone", "leader alone"):
            alone = self._leader() if shape == "leader alone" else random.choice(nodes)
            return {link for link in links if alone in link}
        if shape == "bridge":  # one node sees everybody, the others are in two halves
            bridge = random.choice(nodes)
            half = {node for node in nodes if random.random() < 0.5}
            return {(a, b) for a, b in links if bridge not in (a, b) and (a in half) != (b in half)}
        if shape == "any":
            return {link for link in links if random.random() < 0.4}
        half = {node for node in nodes if random.random() < 0.5}
        if shape == "halves":
            return {(a, b) for a, b in links if (a in half) != (b in half)}
        return {(a, b) for a, b in links if a in half and b not in half}

    def _pause(self) -> None:
        node = self._cluster.nodes[self._random.choice((self._leader(), self._some_node()))]
        if not node.up or node.paused:
            return
        self._note(f"pause {node.id}")
        node.pause()
        life = node.life

        def resume() -> None:
            if node.up and node.paused and node.life == life:
                self._note(f"resume {node.id}")
                node.resume()

        self._after(self._duration(), resume)

    def _slow_disk(self) -> None:
        disk = self._cluster.nodes[self._some_node()].disk
        disk.delay_ticks = self._random.choice((0.01, 1.0, 5.0))

        def end() -> None:
            disk.delay_ticks = 0.1

        self._after(self._duration(), end)

    def _stalled_disk(self) -> None:
        node = self._cluster.nodes[self._random.choice((self._leader(), self._some_node()))]
        self._note(f"stall the disk of {node.id}")
        node.disk.stall(True)
        self._after(self._duration(), lambda: node.disk.stall(False))

    def _break_stream(self) -> None:
        nodes = sorted(self._cluster.nodes)
        if len(nodes) == 1:
            return
        sender, receiver = self._random.sample(nodes, 2)
        self._note(f"break {sender}->{receiver}")
        self._cluster.network.break_stream(sender, receiver)

    def _transfer(self) -> None:
        leader, target = self._leader(), self._some_node()
        node = self._cluster.nodes[leader]

        def transfer() -> None:
            with contextlib.suppress(RaftRefused):  # it does not lead any more: the fault hits nobody
                node.raft.transfer_leadership(target)
                self._note(f"transfer {leader} => {target}")

        node.do(transfer)

    def _campaign(self) -> None:
        node = self._cluster.nodes[self._some_node()]
        node.do(lambda: node.raft.campaign())

    def _membership(self) -> None:
        node, nodes, random = self._cluster.nodes[self._leader()], sorted(self._cluster.nodes), self._random
        chosen = random.sample(nodes, min(len(nodes), random.choice((1, 1, 1, 2, 3))))
        change = ConfChange(tuple((random.choice(list(ConfChangeKind)), other) for other in chosen))

        def propose() -> None:
            with contextlib.suppress(RaftRefused):  # it makes no sense now, or comes too early
                node.raft.propose_conf_change(change)
                self._note(f"change {describe_change(change)}")

        node.do(propose)

    def _false_evidence(self) -> None:
        node = self._cluster.nodes[self._some_node()]

        def gone() -> None:
            if node.raft.leader and node.raft.role is not Role.LEADER:
                self._note(f"{node.id} is told that {node.raft.leader} is gone")
                node.replica.gone(node.raft.leader)

        node.do(gone)
