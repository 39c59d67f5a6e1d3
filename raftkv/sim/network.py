"""A fake network: one stream for each ordered pair of nodes, and links that can be cut one way.

What is sent on a stream arrives in order. When a stream breaks, a suffix of what is under way is lost, the rest may
still arrive, late, even after the stream that follows it; each end notices in its own time, and a new stream is opened
when both directions work again. A cut link holds up what is under way until it heals or the stream breaks.

Consensus rests on less than that (R16), so each of its messages may also leave the stream and travel alone: late,
twice, or never.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from raftkv.raft.types import NodeId
from raftkv.replica.effects import Forward
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.sim.clock import TICK, Scheduler
from raftkv.sim.lease_port import NodeMessage

_BY_STREAM = (Forward, LeaseAsk, LeaseAnswer)  # these rest on the order of a stream, or might

Link = tuple[NodeId, NodeId]
"""Sender and receiver."""


class Endpoints(Protocol):
    """What the network tells the nodes."""

    def up(self, node: NodeId) -> bool:
        """Whether its process is there to accept a connection."""

    def arrived(self, sender: NodeId, receiver: NodeId, message: NodeMessage) -> None:
        """A message is there."""

    def connected(self, node: NodeId, peer: NodeId) -> None:
        """The stream of `node` to `peer` is new."""

    def broken(self, node: NodeId, peer: NodeId) -> None:
        """`node` notices that a stream between it and `peer` broke."""

    def refused(self, node: NodeId, peer: NodeId) -> None:
        """`node` tried to reconnect, and nobody listens at `peer`."""


@dataclass(slots=True)
class Weather:
    """How the network treats what is sent."""

    delay: int = TICK // 10
    """Units, on average."""
    loose: float = 0.0
    """Share of consensus messages that leave the stream; of these..."""
    lost: float = 0.0
    """...never arrive,"""
    doubled: float = 0.0
    """...arrive twice (so do forwarded commands, the second time late),"""
    late_ticks: int = 1
    """...and all are held up for up to so many ticks."""


@dataclass(slots=True, eq=False)
class _Flight:
    message: NodeMessage
    gone: bool = False  # lost, or arrived


@dataclass(slots=True, eq=False)
class _Stream:
    sender: NodeId
    receiver: NodeId
    open: bool = False
    life: int = 0  # which stream of this link it is
    last_at: int = 0  # when the last message sent arrives
    flights: deque[_Flight] = field(default_factory=deque)
    held: list[_Flight] = field(default_factory=list)  # by a cut link


class Network:
    """See the module."""

    BREAK_TICKS = 20
    """After so long a cut link has broken its streams (keepalive)."""
    RECONNECT_TICKS = 3
    ECHO_TICKS = 60
    """How late the copy of a message may come."""

    def __init__(self, scheduler: Scheduler, random: Random, nodes: Iterable[NodeId], endpoints: Endpoints) -> None:
        self._scheduler = scheduler
        self._random = random
        self._endpoints = endpoints
        self._nodes = tuple(nodes)
        self.weather = Weather()
        self.cut: set[Link] = set()
        self._streams = {(a, b): _Stream(a, b) for a in self._nodes for b in self._nodes if a != b}
        self.sent = 0

    # Sending.

    def send(self, sender: NodeId, receiver: NodeId, message: NodeMessage) -> None:
        """Send on the stream; without one the message is lost, and consensus or `connected` repeats it."""
        self.sent += 1
        stream = self._streams.get((sender, receiver))
        if stream is None:
            return  # no such node (any more)
        weather, random = self.weather, self._random
        if weather.loose and not isinstance(message, _BY_STREAM) and random.random() < weather.loose:
            self._send_alone(sender, receiver, message)
            return
        if not stream.open:
            return
        flight = _Flight(message)
        stream.flights.append(flight)
        delay = 1 + int(random.random() * 2 * weather.delay)
        stream.last_at = max(stream.last_at, self._scheduler.now + delay)
        self._plan(stream, flight, stream.last_at - self._scheduler.now)

    def _send_alone(self, sender: NodeId, receiver: NodeId, message: NodeMessage) -> None:
        weather, random = self.weather, self._random
        if random.random() < weather.lost:
            return
        for _ in range(2 if random.random() < weather.doubled else 1):
            delay = random.randint(1, max(1, weather.late_ticks * TICK))
            self._scheduler.after(delay, lambda: self._arrive_alone(sender, receiver, message))

    def _arrive_alone(self, sender: NodeId, receiver: NodeId, message: NodeMessage) -> None:
        if (sender, receiver) not in self.cut:
            self._endpoints.arrived(sender, receiver, message)

    def _plan(self, stream: _Stream, flight: _Flight, delay: int) -> None:
        self._scheduler.after(delay, lambda: self._arrive(stream, flight))

    def _arrive(self, stream: _Stream, flight: _Flight) -> None:
        if flight.gone:
            return
        if (stream.sender, stream.receiver) in self.cut or stream.held:
            stream.held.append(flight)
            return
        flight.gone = True
        flights = stream.flights
        while flights and flights[0].gone:
            flights.popleft()
        self._endpoints.arrived(stream.sender, stream.receiver, flight.message)
        random = self._random
        if isinstance(flight.message, Forward) and self.weather.doubled and random.random() < self.weather.doubled:
            # As if it had been sent again on a stream that was slow: perhaps the receiver leads another term by then.
            delay = random.randint(1, self.ECHO_TICKS * TICK)
            self._scheduler.after(delay, lambda: self._arrive_late(stream, flight.message))

    # Streams.

    def start(self) -> None:
        """Open all streams."""
        for stream in self._streams.values():
            self._reconnect_later(stream)

    def break_stream(self, sender: NodeId, receiver: NodeId) -> None:
        """A suffix of what is under way is lost; the rest may come late."""
        stream = self._streams[sender, receiver]
        if not stream.open:
            return
        random = self._random
        stream.open = False
        stream.life += 1
        rest = [flight for flight in stream.flights if not flight.gone]
        kept = 0 if stream.held else random.randint(0, len(rest))
        late = random.choice((0, TICK // 2, 10 * TICK, 50 * TICK))
        self._abandon(stream)
        at = 0
        for flight in rest[:kept]:
            at = max(at, random.randint(1, TICK // 2 + late))
            message = flight.message
            self._scheduler.after(at, lambda message=message: self._arrive_late(stream, message))  # type: ignore[misc]
        for node, peer in ((sender, receiver), (receiver, sender)):
            delay = random.randint(0, TICK)
            self._scheduler.after(delay, lambda node=node, peer=peer: self._endpoints.broken(node, peer))  # type: ignore[misc]
        self._reconnect_later(stream)

    def _arrive_late(self, stream: _Stream, message: NodeMessage) -> None:
        if (stream.sender, stream.receiver) not in self.cut:
            self._endpoints.arrived(stream.sender, stream.receiver, message)

    @staticmethod
    def _abandon(stream: _Stream) -> None:
        for flight in stream.flights:
            flight.gone = True
        stream.flights.clear()
        stream.held.clear()
        stream.last_at = 0

    def _reconnect_later(self, stream: _Stream) -> None:
        life = stream.life
        delay = self._random.randint(1, self.RECONNECT_TICKS * TICK)
        self._scheduler.after(delay, lambda: self._reconnect(stream, life))

    def _reconnect(self, stream: _Stream, life: int) -> None:
        sender, receiver = stream.sender, stream.receiver
        if stream.open or stream.life != life or not self._endpoints.up(sender):
            return  # a node that starts dials anew
        if (sender, receiver) in self.cut or (receiver, sender) in self.cut:
            self._reconnect_later(stream)
        elif not self._endpoints.up(receiver):
            self._endpoints.refused(sender, receiver)
            self._reconnect_later(stream)
        else:
            stream.open = True
            self._endpoints.connected(sender, receiver)

    # Faults.

    def node_up(self, node: NodeId) -> None:
        """A process has started: it dials everybody."""
        for (sender, _), stream in self._streams.items():
            if sender == node:
                stream.life += 1
                self._reconnect_later(stream)

    def node_down(self, node: NodeId) -> None:
        """A process is gone, and its streams break: what it had sent may still arrive, what is sent to it does not."""
        for (sender, receiver), stream in self._streams.items():
            if node in (sender, receiver):
                if receiver == node:
                    self._abandon(stream)
                self.break_stream(sender, receiver)

    def set_cut(self, cut: Iterable[Link]) -> None:
        """Cut just these links; the others work (again)."""
        self.cut = set(cut)
        for link in sorted(self.cut):
            stream = self._streams[link]
            life = stream.life
            delay = self._random.randint(1, self.BREAK_TICKS * TICK)
            self._scheduler.after(delay, lambda stream=stream, life=life: self._keepalive(stream, life))  # type: ignore[misc]
        for link, stream in self._streams.items():
            if link not in self.cut and stream.held:
                held, stream.held = stream.held, []
                for flight in held:
                    self._plan(stream, flight, 1)

    def _keepalive(self, stream: _Stream, life: int) -> None:
        link = (stream.sender, stream.receiver)
        if stream.life == life and (link in self.cut or link[::-1] in self.cut):
            self.break_stream(*link)
