"""Which endpoint a request goes to.

What can be repeated freely, linearizable reads and the writes of a session, goes to the leader when it is known: no
forwarding hop (ADR 0014). Other writes go to a healthy member that is *not* the leader: it outlives the leader's death,
learns from its own log whether the command was committed, and answers; so killing the leader makes callers wait a
little instead of leaving them with an unknown outcome (ADR 0010). Each choice is sticky; it is made anew when its
reason is gone.

Leader knowledge is (term, leader). A term has at most one leader, so knowledge of a newer term replaces older, and
within a term "unknown" never replaces a known leader: a node that lost sight of its leader proves nothing.

What takes writes besides the leader needs recent evidence that it answers. Whenever something happened to the cluster
(another leader, a broken or silent node) a new *generation* begins, in which every node has to be heard of again: the
leader of before may be frozen with all its connections open, and a write sent there would be lost from sight. Until
another node has been heard of in this generation, the leader itself takes the writes.

In a cluster of etcd writes go to the leader as well: its followers go on handing writes to a leader that is gone until
they miss it, and say nothing of them for seconds. While the leader is gone, writes are held back for the next one.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Sequence
from typing import Final

from raftkv.client.breaker import BreakerState
from raftkv.client.connection import Connection
from raftkv.client.health import Health
from raftkv.client.options import Routing


class Purpose(enum.Enum):
    """What a request needs of the node that gets it."""

    READ = enum.auto()  # linearizable
    WRITE = enum.auto()  # which must not be repeated
    SESSION = enum.auto()  # writes which may be
    STALE_READ = enum.auto()  # serializable: any node answers by itself
    LEADER = enum.auto()  # only the leader can do it


class Router:
    """Chooses among the connections of one client."""

    __slots__ = (
        "_chosen",
        "_connections",
        "_etcd",
        "_leader_preferred",
        "_random",
        "_routing",
        "_unheld",
        "generation",
        "leader_gone",
        "leader_id",
        "term",
    )

    def __init__(self, connections: Sequence[Connection], routing: Routing, chance: random.Random) -> None:
        self._connections: Final = tuple(connections)
        self._routing: Final = routing
        self._random: Final = chance
        self._chosen: dict[Purpose, Connection] = {}
        # True: prefer the leader; False: prefer others; None: do not care.
        self._leader_preferred: Final[dict[Purpose, bool | None]] = {
            Purpose.READ: {"auto": True, "leader": True, "any": None}[routing],
            Purpose.WRITE: {"auto": False, "leader": True, "any": None}[routing],
            Purpose.SESSION: {"auto": True, "leader": True, "any": None}[routing],
            Purpose.STALE_READ: {"auto": False, "leader": True, "any": None}[routing],
            Purpose.LEADER: True,
        }
        self.term = 0
        self.leader_id = 0
        self.generation = 0  # never below any connection's `heard_in`
        self.leader_gone = False  # etcd's, and the next is not known yet: writes wait for it
        self._etcd = False
        self._unheld = (0, 0)  # (term, leader) for whose successor nobody waits any more

    def observe(self, term: int, leader_id: int) -> bool:
        """Take note of what an answer said. Returns whether the leader is news."""
        if term < self.term or (term == self.term and (leader_id in (0, self.leader_id))):
            return False
        changed = leader_id != self.leader_id
        if leader_id:
            self.leader_gone = False
        self.generation += 1
        self.term = term
        self.leader_id = leader_id
        if changed:
            self._chosen.clear()
        return changed and leader_id != 0

    def forget_choices(self) -> None:
        """Something about a connection changed (health, member id, a break): choose anew."""
        self._chosen.clear()

    def doubt(self) -> None:
        """Something happened to a node: what was known of the others has to be proven anew."""
        self.generation += 1
        self._chosen.clear()
        self.must_wait()

    def must_wait(self) -> bool:
        """Whether writes have to wait for the leader that follows one which is gone."""
        if self._etcd and not self.leader_gone and self._unheld != (self.term, self.leader_id):
            leader = self.leader()
            # One of whom we do not know yet who it is may be the leader.
            perhaps = [leader] if leader is not None else [c for c in self._connections if not c.member_id]
            self.leader_gone = not self.leader_id or any(c.suspect or not c.is_ready() for c in perhaps)
        return self.leader_gone

    def is_etcd(self, etcd: bool) -> None:
        """Whether these nodes are etcd's."""
        if etcd is not self._etcd and self._routing == "auto":
            self._etcd = etcd
            self._leader_preferred[Purpose.WRITE] = etcd
            self._chosen.clear()

    def hold_no_more(self) -> None:
        """The leader is still the same: whoever waits for another goes on as if it were alive, out of our sight."""
        self.leader_gone = False
        self._unheld = (self.term, self.leader_id)

    def heard(self, connection: Connection) -> None:
        """The node behind `connection` gave a sign of life now."""
        if connection.heard_in != self.generation:
            connection.heard_in = self.generation
            self._chosen.clear()
        if self.leader_gone and connection is self.leader() and connection.is_ready() and not connection.suspect:
            self.leader_gone = False

    def leader(self) -> Connection | None:
        """The leader's connection, if the leader is known and among the endpoints."""
        if self.leader_id:
            for connection in self._connections:
                if connection.member_id == self.leader_id:
                    return connection
        return None

    def pick(self, purpose: Purpose, avoid: Collection[Connection] = ()) -> Connection | None:
        """The connection to use now, its breaker asked; None while nothing is connected.

        Args:
            purpose: what the request needs.
            avoid: connections that already failed this request; used only when there is nothing else.
        """
        connection = self._chosen.get(purpose)
        if (
            connection is not None
            and not avoid
            and connection.breaker.state is BreakerState.CLOSED
            and not connection.suspect
            and connection.is_ready()
        ):
            return connection
        return self._choose(purpose, avoid)

    def misplaced(self, purpose: Purpose, connection: Connection) -> bool:
        """Whether what lasts at `connection` had better go elsewhere: the leader is another, or has become this one."""
        preferred, leader = self._leader_preferred[purpose], self.leader()
        if preferred is None or leader is None or (connection is leader) is preferred:
            return False
        if preferred:
            return self._is_proven(leader)
        return any(c is not leader and self._is_proven(c) for c in self._connections)

    def better_than(self, connection: Connection) -> bool:
        """Whether another node serves, and has been heard of in this generation."""
        return any(c is not connection and self._is_proven(c) for c in self._connections)

    def _is_proven(self, connection: Connection) -> bool:
        return (
            connection.heard_in == self.generation
            and not connection.foreign
            and not connection.is_learner
            and _is_well(connection)
        )

    def elsewhere(self, avoid: Collection[Connection]) -> bool:
        """Whether an endpoint is ready that is not in `avoid`."""
        return any(c not in avoid and not c.foreign and c.is_ready() for c in self._connections)

    def _choose(self, purpose: Purpose, avoid: Collection[Connection]) -> Connection | None:
        preferred = self._leader_preferred[purpose]
        best: list[Connection] = []
        best_rank: tuple[int, ...] = ()
        troubled = any(c.health is Health.NOT_SERVING and c.heard_in == self.generation for c in self._connections)
        for connection in self._connections:
            if connection.foreign or not connection.is_ready():
                continue
            is_leader = connection.member_id != 0 and connection.member_id == self.leader_id
            # Sorted by how much each is worth. A breaker that says no is obeyed only while somebody else says yes:
            # a cluster of which every node misbehaves is still asked, within the caller's time.
            rank = (
                connection in avoid,
                not connection.breaker.would_admit(),
                connection.suspect,
                connection.is_learner,
                self._service(connection, troubled),
                self._standing(connection, is_leader, preferred),
            )
            if not best or rank < best_rank:
                best, best_rank = [connection], rank
            elif rank == best_rank:
                best.append(connection)
        if not best:
            return None
        sticky = self._chosen.get(purpose)
        choice = sticky if sticky in best and sticky is not None else self._random.choice(best)
        if not avoid:
            self._chosen[purpose] = choice
        choice.breaker.admit()
        return choice

    def _service(self, connection: Connection, troubled: bool) -> int:
        """How likely the node can serve, 0 the best.

        While one that answers says that it cannot, what another said before that counts for less than nothing.
        """
        if connection.health is Health.NOT_SERVING:
            return 1
        return 2 if troubled and connection.heard_in != self.generation else 0

    def _standing(self, connection: Connection, is_leader: bool, preferred: bool | None) -> int:
        """How well the node's place in the cluster suits, 0 the best."""
        unproven = connection.heard_in != self.generation
        if preferred is False and self.leader_id:
            return 1 if is_leader else 2 * unproven
        return 2 * (preferred is not None and is_leader is not preferred) + unproven


def _is_well(connection: Connection) -> bool:
    return (
        connection.is_ready()
        and not connection.suspect
        and connection.health is not Health.NOT_SERVING
        and connection.breaker.state is BreakerState.CLOSED
    )
