"""Logical compaction is at once and replicated; the sweep behind it is neither, and nobody can see it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from state_driver import Driver

from raftkv._pb.kv_pb2 import CompactionRequest, PutRequest
from raftkv.state import hashing
from raftkv.state.machine import StateMachine
from raftkv.state.results import HashKVResult, Refusal, RefusalCode, Refused


@pytest.fixture
def kv() -> Driver:
    """Revision 7: a is written at 2, 3, 6, deleted at 7; b is written at 4, deleted at 5."""
    driver = Driver()
    driver.put(b"a", b"2")
    driver.put(b"a", b"3")
    driver.put(b"b", b"4")
    driver.delete(b"b")
    driver.put(b"a", b"6")
    driver.delete(b"a")
    return driver


def test_the_bounds_of_a_compaction(kv: Driver) -> None:
    assert kv.compact(8).code is RefusalCode.FUTURE_REVISION
    assert kv.compact(-1).code is RefusalCode.COMPACTED
    response = kv.compact(5)
    assert response.header.revision == 7
    refused = kv.compact(5)
    assert refused == Refusal(RefusalCode.COMPACTED, revision=7, compact_revision=5)
    assert kv.compact(4).code is RefusalCode.COMPACTED
    assert not isinstance(kv.compact(7), Refusal)


def test_the_compact_revision_can_still_be_read_and_nothing_before(kv: Driver) -> None:
    kv.compact(3)
    for _ in range(2):
        assert kv.values(revision=3) == {b"a": b"3"}
        assert kv.values(revision=2).code is RefusalCode.COMPACTED
        assert kv.values(revision=4) == {b"a": b"3", b"b": b"4"}
        assert kv.values() == {}
        kv.sweep()


@pytest.mark.parametrize("revision", range(2, 8))
def test_events_at_the_compact_revision_are_still_there(kv: Driver, revision: int) -> None:
    """Also where the compaction hits a tombstone (etcd #18089, #19179)."""
    expected = list(kv.machine.changes(revision, 99))
    kv.compact(revision)
    kv.sweep()
    assert list(kv.machine.changes(revision, 99)) == expected
    with pytest.raises(Refused) as refused:
        kv.machine.changes(revision - 1, 99)
    assert refused.value.refusal.code is RefusalCode.COMPACTED


def test_compaction_in_the_batch_that_it_follows(kv: Driver) -> None:
    results = kv.apply(PutRequest(key=b"z"), CompactionRequest(revision=8), CompactionRequest(revision=8))
    assert results[1].header.revision == 8
    assert results[2].code is RefusalCode.COMPACTED


def test_a_sweep_goes_in_steps_and_on_after_a_restart(kv: Driver) -> None:
    assert not kv.machine.sweeping
    assert not kv.machine.sweep(10)
    kv.compact(7)
    assert kv.machine.sweeping
    steps = 0
    while kv.machine.sweep(1):
        steps += 1
        kv.machine = StateMachine(kv.store)
        assert kv.machine.sweeping
    assert steps == 5
    assert not kv.machine.sweeping
    assert not StateMachine(kv.store).sweeping
    # What is left: the tombstone at the compact revision.
    assert [key[:1] for key, _ in kv.store.iterate(b"", None)] == [b"m", b"r"]
    kv.put(b"x")
    kv.compact(8)
    kv.sweep()
    assert [key[:1] for key, _ in kv.store.iterate(b"", None)] == [b"c", b"m", b"r"]


def test_a_compaction_during_a_sweep(kv: Driver) -> None:
    kv.compact(3)
    kv.machine.sweep(1)
    kv.compact(5)
    kv.machine.sweep(1)
    kv.compact(7)
    kv.sweep()
    assert [key[:1] for key, _ in kv.store.iterate(b"", None)] == [b"m", b"r"]


def test_a_sweep_step_is_bounded_in_bytes() -> None:
    driver = Driver()
    for _ in range(10):
        driver.put(b"a", b"x" * 500_000)
    driver.compact(11)
    steps = 1
    while driver.machine.sweep(1000):
        steps += 1
    assert steps >= 3
    assert driver.values() == {b"a": b"x" * 500_000}


def test_hash_kv_does_not_see_the_sweep_and_sees_everything_else(kv: Driver) -> None:
    seen = set()
    for revision in range(1, 8):
        result = kv.machine.hash_kv(revision)
        assert (result.hash_revision, result.compact_revision) == (revision, -1)
        seen.add(result.hash)
    assert len(seen) == 7
    assert kv.machine.hash_kv(0) == kv.machine.hash_kv(7)
    kv.compact(4)
    before = [kv.machine.hash_kv(revision) for revision in range(4, 8)]
    kv.machine.sweep(2)
    assert [kv.machine.hash_kv(revision) for revision in range(4, 8)] == before
    kv.sweep()
    assert [kv.machine.hash_kv(revision) for revision in range(4, 8)] == before
    assert before[0].compact_revision == 4
    for revision, code in ((3, RefusalCode.COMPACTED), (-1, RefusalCode.COMPACTED), (8, RefusalCode.FUTURE_REVISION)):
        with pytest.raises(Refused) as refused:
            kv.machine.hash_kv(revision)
        assert refused.value.refusal.code is code


def test_hash_kv_finds_a_changed_value_and_a_changed_index(kv: Driver) -> None:
    kv.put(b"k", b"v")
    good = kv.machine.hash_kv(0)
    for key, value in list(kv.store.view().iterate(b"", b"m")):
        if key[:1] == b"c":
            kv.store.write([(key, value[:-1] + b"\1")], ())
            assert kv.machine.hash_kv(0) != good
            kv.store.write([(key, value)], ())
    assert kv.machine.hash_kv(0) == good
    for key, value in list(kv.store.view().iterate(b"r", b"s")):
        kv.store.write([(key, value[:-1] + bytes([value[-1] ^ 1]))], ())
        assert kv.machine.hash_kv(0) != good
        kv.store.write([(key, value)], ())


def test_hash_kv_in_steps_over_a_view_while_writes_go_on(kv: Driver) -> None:
    for number in range(20):
        kv.put(b"k%d" % number)
    expected = kv.machine.hash_kv(0)
    view = kv.store.view()
    steps = hashing.hash_kv_steps(kv.machine.reader(view), 0, step=3)

    def compute() -> Iterator[None]:
        result = yield from steps
        results.append(result)

    results: list[HashKVResult] = []
    pauses = 0
    for _ in compute():
        pauses += 1
        kv.put(b"k1", b"%d" % pauses)
        kv.delete(b"k%d" % pauses)
        kv.compact(kv.machine.revision)
        kv.sweep()
    assert results == [expected]
    assert pauses >= 10
    view.close()
