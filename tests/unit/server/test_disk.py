"""The disk thread: order, group commit, and what a failed write means."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from raftkv.raft.types import ConfState, Entry, EntryKind, HardState, SnapshotMeta
from raftkv.replica.effects import Persist
from raftkv.server import disk
from raftkv.server.disk import Disk


class RecordingLog:
    """Notes each write; the first waits until the test lets it go on."""

    def __init__(self) -> None:
        self.writes: list[tuple[HardState | None, list[Entry], bool]] = []
        self.installs: list[tuple[SnapshotMeta, str]] = []
        self.gate = threading.Event()
        self.fault: BaseException | None = None
        self.closed = False

    def append(self, hard_state: HardState | None, entries: Sequence[Entry], *, sync: bool = True) -> None:
        assert self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        self.writes.append((hard_state, list(entries), sync))

    def install(self, meta: SnapshotMeta, hard_state: HardState | None, state_name: str) -> None:
        self.installs.append((meta, state_name))

    def close(self) -> None:
        self.closed = True


def entry(index: int, term: int = 1) -> Entry:
    return Entry(index, term, EntryKind.NORMAL, b"%d/%d" % (index, term))


def persist(number: int, *entries: Entry, hard_state: HardState | None = None) -> Persist:
    return Persist(number, hard_state, entries, None, True)


class Harness:
    def __init__(self) -> None:
        self.log = RecordingLog()
        self.done: asyncio.Queue[int] = asyncio.Queue()
        self.faults: list[BaseException] = []
        self.failed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_fatal(fault: BaseException) -> None:
            self.faults.append(fault)
            loop.call_soon_threadsafe(self.failed.set)

        self.disk = Disk(self.log, loop, self.done.put_nowait, on_fatal)  # type: ignore[arg-type]
        self.disk.start()


async def test_writes_that_gather_during_one_fsync_become_one_batch() -> None:
    h = Harness()
    h.disk.persist(persist(1, entry(1)))
    await asyncio.sleep(0)  # the thread may have taken the first one already: then the rest is one batch, else all is
    for number in range(2, 6):
        h.disk.persist(persist(number, entry(number), hard_state=HardState(number, 0, 0)))
    h.log.gate.set()
    while await asyncio.wait_for(h.done.get(), 10) != 5:
        pass
    h.disk.close()
    assert len(h.log.writes) <= 2
    assert [e.index for _, entries, _ in h.log.writes for e in entries] == [1, 2, 3, 4, 5]
    assert h.log.writes[-1][0] == HardState(5, 0, 0)
    assert all(sync for _, _, sync in h.log.writes)
    assert h.log.closed


async def test_a_later_turn_replaces_the_suffix_an_earlier_one_was_about_to_write() -> None:
    h = Harness()
    h.disk.persist(persist(1, entry(1), entry(2), entry(3)))
    h.disk.persist(persist(2, entry(2, term=2)))
    h.log.gate.set()
    while await asyncio.wait_for(h.done.get(), 10) != 2:
        pass
    h.disk.close()
    final: dict[int, int] = {}
    for _, entries, _ in h.log.writes:
        for each in entries:
            final = {index: term for index, term in final.items() if index < each.index}
            final[each.index] = each.term
    assert final == {1: 1, 2: 2}


async def test_an_install_keeps_its_place_between_writes() -> None:
    h = Harness()
    meta = SnapshotMeta(10, 3, ConfState((1,)))
    h.disk.persist(persist(1, entry(1)))
    h.disk.install(Persist(2, HardState(3, 0, 10), (entry(11, 3),), meta, True), "state-2")
    h.disk.persist(persist(3, entry(12, 3)))
    h.log.gate.set()
    numbers = [await asyncio.wait_for(h.done.get(), 10) for _ in range(3)]
    h.disk.close()
    assert numbers == [1, 2, 3]
    assert h.log.installs == [(meta, "state-2")]
    assert [[e.index for e in entries] for _, entries, _ in h.log.writes] == [[1], [11], [12]]
    assert h.log.writes[1][0] == HardState(3, 0, 10), "the commit index goes with the entries"


async def test_other_work_runs_in_its_place_and_answers() -> None:
    h = Harness()
    h.log.gate.set()
    h.disk.persist(persist(1, entry(1)))
    assert await asyncio.wait_for(h.disk.run(lambda: len(h.log.writes)), 10) == 1
    h.disk.close()


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("anything")])
async def test_after_a_failed_write_nothing_is_reported_and_nothing_more_is_written(fault: BaseException) -> None:
    """Rule Z1: no reply after the first failed write."""
    h = Harness()
    h.log.fault = fault
    h.disk.persist(persist(1, entry(1)))
    h.log.gate.set()
    await asyncio.wait_for(h.failed.wait(), 10)
    h.log.fault = None
    h.disk.persist(persist(2, entry(2)))
    await asyncio.sleep(0.05)
    assert h.faults == [fault]
    assert h.log.writes == []
    assert h.done.empty()


# --- writes on the loop -----------------------------------------------------------------------------------------------


class Timed:
    """A clock that stands, but for what a write takes."""

    def __init__(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.write_s = 0.0
        append = harness.log.append
        harness.log.gate.set()

        def timed(hard_state: HardState | None, entries: Sequence[Entry], *, sync: bool = True) -> None:
            self.now += self.write_s
            append(hard_state, entries, sync=sync)

        monkeypatch.setattr(harness.log, "append", timed)
        monkeypatch.setattr(disk.time, "perf_counter", lambda: self.now)


async def made_quick(h: Harness, monkeypatch: pytest.MonkeyPatch) -> Timed:
    clock = Timed(h, monkeypatch)
    number = 0
    while not h.disk.takes(persist(0, entry(1))):
        number += 1
        assert number < 10, "a disk that takes no time is quick"
        h.disk.persist(persist(number))
        assert await asyncio.wait_for(h.done.get(), 10) == number
    assert number, "nothing is known of a disk in the beginning"
    return clock


async def test_a_small_write_to_a_quick_disk_is_made_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness()
    await made_quick(h, monkeypatch)
    before = len(h.log.writes)
    h.disk.write(persist(9, entry(1)))
    assert [e.index for e in h.log.writes[before][1]] == [1]
    assert h.log.writes[before][2], "synced"
    assert h.done.empty()
    assert h.disk.busy_since is None
    assert not h.disk.takes(persist(10, Entry(2, 1, EntryKind.NORMAL, bytes(disk.SMALL_BYTES + 1))))
    assert not h.disk.takes(Persist(10, None, (), SnapshotMeta(10, 3, ConfState((1,))), True))
    h.disk.close()


async def test_one_slow_write_sends_the_next_ones_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness()
    clock = await made_quick(h, monkeypatch)
    clock.write_s = 0.1
    h.disk.write(persist(9, entry(1)))
    clock.write_s = 0.0
    by_thread = 0
    while not h.disk.takes(persist(10, entry(2))):
        by_thread += 1
        h.disk.persist(persist(10 + by_thread))
        await asyncio.wait_for(h.done.get(), 10)
    assert by_thread > disk.AVERAGE_OVER
    h.disk.close()


async def test_nothing_overtakes_what_the_thread_has(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness()
    await made_quick(h, monkeypatch)
    h.log.gate.clear()
    h.disk.persist(persist(9, entry(1)))
    assert not h.disk.takes(persist(10, entry(2)))
    h.log.gate.set()
    await asyncio.wait_for(h.done.get(), 10)
    assert h.disk.takes(persist(10, entry(2)))
    began, go = threading.Event(), threading.Event()

    def compaction() -> str:
        began.set()
        assert go.wait(10)
        return "done"

    compacted = h.disk.run(compaction)
    await asyncio.to_thread(began.wait, 10)
    assert not h.disk.takes(persist(10, entry(2))), "LevelDB has one writer at a time"
    go.set()
    assert await compacted == "done"
    assert h.disk.takes(persist(10, entry(2)))
    h.disk.close()


async def test_a_write_that_fails_on_the_loop_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness()
    await made_quick(h, monkeypatch)
    h.log.fault = OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        h.disk.write(persist(9, entry(1)))
    h.disk.close()
