"""One seed, from its first event to its verdict.

faults on: safety is checked after each step  ->  faults off: the cluster must make progress  ->  all must agree
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from raftkv.raft.types import EntryKind
from raftkv.sim.clients import Coordination
from raftkv.sim.clock import TICK
from raftkv.sim.cluster import SimCluster, SimConfig, describe
from raftkv.sim.history import Kind, Outcome, Violation
from raftkv.state.commands import decode_batch
from raftkv.state.machine import StateMachine
from raftkv.state.store import MemoryStore

HEAL_TICKS = 300
"""Within so many ticks after the last fault (election timeouts are 10 to 20), and one more for each caller that waits
by then, every member must serve a write and a read, and every caller must have been answered."""
LEASE_TTLS = 2
"""A lease that nobody renews ends after its time, the grace, and a checkpoint's and an election's."""


class SeedFailed(AssertionError):
    """A seed found something; the text has the line that replays it."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a seed did; for the eye, and so that a run in which nothing happened is noticed."""

    seed: int
    nodes: int
    ticks: float
    events: int
    entries: int
    acknowledged: int
    unknown: int
    failed: int
    terms: int
    faults: dict[str, int]
    coordination: dict[str, int] = field(default_factory=dict)


def run_seed(
    seed: int, *, ticks: float = 200, nodes: int = 0, coordination: bool = False, trace: bool = False
) -> Report:
    """Run one seed.

    Args:
        seed: decides everything.
        ticks: how long faults go on.
        nodes: how many, 0 for what the seed says.
        coordination: with clients that have sessions, leases and locks.
        trace: keep the last events, to be part of the error.
    Raises:
        SeedFailed: an invariant broke, an assertion failed, or no progress was made.
    """
    cluster = SimCluster(seed, SimConfig.drawn(seed, nodes, coordination=coordination), trace=trace)
    try:
        drive(cluster, ticks)
    except Exception as fault:
        replay = f"python -m raftkv.sim --seed {seed} --ticks {ticks:g}" + (f" --nodes {nodes}" if nodes else "")
        replay += " --coordination" if coordination else ""
        status = "\n".join(f"    node {node.id}: {describe(node)}" for node in cluster.nodes.values())
        story = "".join(f"\n{line}" for line in cluster.trace)
        raise SeedFailed(
            f"{type(fault).__name__}: {fault}\n  at tick {cluster.now_ticks:.2f} of seed {seed}; replay it by\n"
            f"    {replay} --trace\n{status}{story}"
        ) from fault
    history = cluster.history
    return Report(
        seed=seed,
        nodes=len(cluster.nodes),
        ticks=cluster.now_ticks,
        events=cluster.scheduler.events,
        entries=len(cluster.invariants.log),
        acknowledged=history.count(Outcome.OK),
        unknown=history.count(Outcome.UNKNOWN),
        failed=history.count(Outcome.FAILED),
        terms=max(node.raft.term for node in cluster.nodes.values()),
        faults=dict(cluster.faults.counts),
        coordination=dict(cluster.promises.counts),
    )


def drive(cluster: SimCluster, ticks: float) -> None:
    """The three parts of a run."""
    cluster.start()
    cluster.workload.start()
    if cluster.coordination is not None:
        cluster.coordination.start()
    cluster.faults.start()
    cluster.run(ticks)
    cluster.workload.stop()
    if cluster.coordination is not None:
        cluster.coordination.stop()
    cluster.faults.stop()
    cluster.note("faults end")
    if cluster.coordination is not None:
        check_coordination(cluster, cluster.coordination)
    check_progress(cluster)
    check_agreement(cluster)
    if cluster.coordination is not None:
        cluster.coordination.check_ledgers(cluster.members()[0].machine)


def check_coordination(cluster: SimCluster, coordination: Coordination) -> None:
    """After the last fault: every call is answered, every lease ends, and all was done as often as was said."""
    # Some are with nodes that are no members any more; and of the answers, some are lost.
    calls_ticks = HEAL_TICKS + 10 * coordination.config.deadline_ticks
    if not cluster.run_until(lambda: not coordination.waiting, calls_ticks):
        raise Violation("V1", f"{coordination.waiting} calls are not answered long after the last fault")
    longest_s = LEASE_TTLS * max(coordination.config.ttls_ms) / 1000
    if not cluster.run_until(lambda: not cluster.model.leases, HEAL_TICKS + longest_s / coordination.config.tick_s):
        raise Violation("L4", f"leases {sorted(cluster.model.leases)} have not ended long after their last renewal")


def check_progress(cluster: SimCluster) -> None:
    """After the last fault: every member serves a write and a read, and nobody waits any more."""
    # What callers left behind is worked off first; with windows as narrow as some seeds have them, one by one.
    backlog = sum(len(node.calls) for node in cluster.nodes.values()) + max(
        node.raft.log.last - node.raft.commit for node in cluster.nodes.values()
    )
    limit = cluster.scheduler.now + (HEAL_TICKS + backlog) * TICK

    def left() -> float:
        return (limit - cluster.scheduler.now) / TICK

    if not cluster.run_until(lambda: bool(cluster.members()), left()):
        raise Violation("V1", "no leader long after the last fault")
    for node in cluster.members():
        for kind in (Kind.PUT, Kind.READ):
            _check_served(cluster, node.id, kind, left)

    def settled() -> bool:
        nodes = cluster.members()
        answered = not any(node.calls for node in nodes)
        return answered and len({node.machine.applied_index for node in nodes}) == 1

    if not cluster.run_until(settled, left()):
        calls = [str(operation) for node in cluster.members() for operation in node.calls]
        raise Violation("V1", f"not settled long after the last fault; unanswered: {calls}")


def _check_served(cluster: SimCluster, node_id: int, kind: Kind, left: Callable[[], float]) -> None:
    while True:
        operation = cluster.workload.make(kind, b"last")
        assert cluster.workload.call(node_id, operation, 10 * HEAL_TICKS), f"node {node_id} is not up"
        if not cluster.run_until(lambda: operation.outcome is not Outcome.PENDING, left()):  # noqa: B023, used at once
            raise Violation("V1", f"no progress long after the last fault; waiting: {operation}")
        if operation.outcome is Outcome.OK:
            return
        # A snapshot that this node needed has hidden what became of its command: rare, and never twice.
        if operation.outcome is not Outcome.UNKNOWN or kind is Kind.READ:
            raise Violation("V1", f"no fault any more, and yet {operation}")


def check_agreement(cluster: SimCluster) -> None:
    """All nodes have the same state, and it is the one that a fresh replay of the log gives (S1)."""
    fresh = StateMachine(MemoryStore())
    for entry in cluster.invariants.log:
        groups = decode_batch(entry.data) if entry.kind is EntryKind.NORMAL else []
        fresh.apply(entry.index, entry.term, groups)
    expected = list(fresh.dump())
    for node in cluster.members():
        if list(node.machine.dump()) != expected:
            raise Violation("S1", f"node {node.id} has another state than a replay of the log")
        model, machine = cluster.model, node.machine
        if (machine.leases.keys(), machine.sessions.keys()) != (model.leases.keys(), model.sessions.keys()):
            raise Violation("S1", f"node {node.id} has other leases or sessions than the log says")
