"""The fakes do what they say: a disk keeps what was synced and a prefix of the rest, a stream keeps its order."""

from __future__ import annotations

from random import Random

import pytest

from raftkv.raft.messages import Heartbeat
from raftkv.raft.types import ConfState, Entry, EntryKind, HardState
from raftkv.replica.effects import Forward, PeerMessage
from raftkv.sim.clock import TICK, NodeClock, Scheduler
from raftkv.sim.disk import SimDisk, SimLog, SimState
from raftkv.sim.network import Network, Weather
from raftkv.state.commands import Command
from raftkv.state.store import MemoryStore

CONF = ConfState((1, 2))


def run(scheduler: Scheduler, ticks: float) -> None:
    until = scheduler.now + int(ticks * TICK)
    while scheduler.step(until):
        pass


# The disk.


def write(disk: SimDisk, index: int, done: list[int], *, sync: bool = True) -> None:
    def change(log: SimLog) -> None:
        if sync:
            log.append(HardState(1, 0, 0), [Entry(index, 1, EntryKind.NORMAL, b"")])
        else:
            log.append(HardState(1, 0, index), (), sync=False)

    disk.write(change, lambda: done.append(index), sync=sync)


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_keeps_what_is_done_and_a_prefix_of_the_rest(seed: int) -> None:
    scheduler, done = Scheduler(), list[int]()
    disk = SimDisk(scheduler, Random(seed), CONF)
    for index in range(1, 9):
        write(disk, index, done)
    run(scheduler, 0.2)
    count = len(done)
    assert done == list(range(1, count + 1))
    assert disk.durable.last_index() == disk.visible.last_index() == count
    disk.crash()
    kept = disk.visible.last_index()
    assert count <= kept <= 8
    run(scheduler, 100)
    assert len(done) == count  # nothing of an earlier life is reported


def test_every_prefix_comes_up() -> None:
    kept = set()
    for seed in range(200):
        disk = SimDisk(Scheduler(), Random(seed), CONF)
        for index in (1, 2, 3):
            write(disk, index, [])
        disk.crash()
        kept.add(disk.visible.last_index())
    assert kept == {0, 1, 2, 3}


def test_what_is_not_synced_is_seen_but_may_be_lost_until_a_later_sync() -> None:
    outcomes = set()
    for seed in range(50):
        scheduler, done = Scheduler(), list[int]()
        disk = SimDisk(scheduler, Random(seed), CONF)
        write(disk, 1, done)
        run(scheduler, 10)
        write(disk, 1, done, sync=False)
        run(scheduler, 10)
        assert disk.visible.hard_state.commit == 1
        assert disk.durable.hard_state.commit == 0
        disk.crash()
        outcomes.add(disk.visible.hard_state.commit)
    assert outcomes == {0, 1}


def test_a_stalled_disk_finishes_nothing_until_it_goes_on() -> None:
    scheduler, done = Scheduler(), list[int]()
    disk = SimDisk(scheduler, Random(0), CONF)
    write(disk, 1, done)
    disk.stall(True)
    run(scheduler, 100)
    assert (done, disk.pending) == ([], 1)
    disk.stall(False)
    run(scheduler, 10)
    assert done == [1]


def test_the_state_goes_back_to_a_whole_write_not_before_the_last_sync() -> None:
    found = set()
    for seed in range(100):
        state = SimState(Random(seed), MemoryStore())
        for number in range(10):
            state.store.write([(b"n", b"%d" % number)], ())
            state.written()
            if number == 4:
                state.synced(state.begin_sync())
        after = state.crash().store.get(b"n")
        assert after is not None
        found.add(int(after))
    assert min(found) == 4
    assert max(found) == 9
    assert len(found) > 3


# The network.


class Ends:
    """Notes what the network tells."""

    def __init__(self) -> None:
        self.arrivals: list[PeerMessage] = []
        self.connections: list[tuple[int, int]] = []
        self.breaks: list[tuple[int, int]] = []
        self.refusals: list[tuple[int, int]] = []
        self.down: set[int] = set()

    def up(self, node: int) -> bool:
        return node not in self.down

    def arrived(self, sender: int, receiver: int, message: PeerMessage) -> None:
        self.arrivals.append(message)

    def connected(self, node: int, peer: int) -> None:
        self.connections.append((node, peer))

    def broken(self, node: int, peer: int) -> None:
        self.breaks.append((node, peer))

    def refused(self, node: int, peer: int) -> None:
        self.refusals.append((node, peer))


class Wire:
    """Two nodes."""

    def __init__(self, seed: int = 0) -> None:
        self.scheduler = Scheduler()
        self.ends = Ends()
        self.network = Network(self.scheduler, Random(seed), (1, 2), self.ends)
        self.network.start()
        self.run(10)

    def run(self, ticks: float) -> None:
        run(self.scheduler, ticks)

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.network.send(1, 2, Forward(1, 1, (Command(number, 1, b""),)))

    def numbers(self) -> list[int]:
        return [message.commands[0].seq for message in self.ends.arrivals if isinstance(message, Forward)]


def test_a_stream_keeps_its_order() -> None:
    wire = Wire()
    wire.network.weather = Weather(delay=5 * TICK, loose=1.0, lost=0.5, late_ticks=50)
    wire.send(*range(50))
    wire.run(100)
    assert wire.numbers() == list(range(50))


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_that_breaks_loses_a_suffix_and_is_made_anew(seed: int) -> None:
    wire = Wire(seed)
    wire.send(*range(10))
    wire.network.break_stream(1, 2)
    assert wire.ends.connections.count((1, 2)) == 1
    wire.run(100)
    assert wire.numbers() == list(range(len(wire.numbers())))
    assert wire.ends.connections.count((1, 2)) == 2
    assert sorted(wire.ends.breaks) == [(1, 2), (2, 1)]


def test_without_a_stream_nothing_is_sent() -> None:
    wire = Wire()
    wire.network.break_stream(1, 2)
    wire.send(1)
    wire.run(100)
    assert wire.numbers() == []


def test_a_short_cut_holds_messages_up_and_a_long_one_breaks_the_stream() -> None:
    wire = Wire()
    wire.network.set_cut({(1, 2)})
    wire.send(1, 2)
    wire.run(0.5)
    assert wire.numbers() == []
    wire.network.set_cut(())
    wire.run(1)
    assert wire.numbers() == [1, 2]
    wire.network.set_cut({(2, 1)})  # acknowledgements do not come back, so the stream is given up too
    wire.network.set_cut({(1, 2), (2, 1)})
    wire.run(50)
    assert (1, 2) in wire.ends.breaks
    assert wire.ends.connections.count((1, 2)) == 1
    wire.network.set_cut(())
    wire.run(10)
    assert wire.ends.connections.count((1, 2)) == 2


def test_a_node_that_is_gone_refuses_and_loses_what_was_on_its_way_to_it() -> None:
    wire = Wire()
    wire.send(1, 2, 3)
    wire.ends.down = {2}
    wire.network.node_down(2)
    wire.run(20)
    assert wire.numbers() == []
    assert (1, 2) in wire.ends.refusals
    wire.ends.down = set()
    wire.network.node_up(2)
    wire.run(20)
    assert wire.ends.connections.count((1, 2)) == wire.ends.connections.count((2, 1)) == 2


def test_loose_messages_are_lost_doubled_and_out_of_order() -> None:
    wire = Wire()
    wire.network.weather = Weather(loose=1.0, lost=0.3, doubled=0.3, late_ticks=20)
    for number in range(1, 101):
        wire.network.send(1, 2, Heartbeat(1, 0, number))
    wire.run(100)
    tokens = [message.token for message in wire.ends.arrivals if isinstance(message, Heartbeat)]
    assert 40 < len(set(tokens)) < 100
    assert len(tokens) > len(set(tokens))
    assert tokens != sorted(tokens)


# Time.


def test_clocks_run_at_their_own_rate_and_stop() -> None:
    scheduler, beats = Scheduler(), list[str]()
    fast = NodeClock(scheduler, lambda: beats.append("fast"), 2.0)
    slow = NodeClock(scheduler, lambda: beats.append("slow"), 0.5)
    fast.start()
    slow.start()
    run(scheduler, 10)
    assert (beats.count("fast"), beats.count("slow")) == (20, 5)
    fast.stop()
    run(scheduler, 10)
    assert (beats.count("fast"), beats.count("slow")) == (20, 10)
    fast.start()
    run(scheduler, 1)
    assert beats.count("fast") == 22
