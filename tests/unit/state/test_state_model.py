"""The machine against a plain dict, through random histories with compactions, sweeps, restarts and batches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_driver import Driver, answer, attachments, group, op, stored_leases
from state_model import Model
from state_ops import KEYS, Chooser, Ops

from raftkv._pb.common_pb2 import Event, KeyValue
from raftkv._pb.kv_pb2 import RangeRequest, TxnRequest
from raftkv.state import sessions
from raftkv.state.commands import decode_batch, encode_batch
from raftkv.state.machine import StateMachine
from raftkv.state.ranges import read_range
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.store import MemoryStore

SEED = st.integers(0, 2**32 - 1)


def code_or_response(result: Any) -> Any:
    return result.code if isinstance(result, Refusal) else answer(result)


def is_large(answer: Any) -> bool:
    return not isinstance(answer, RefusalCode) and 1 + len(answer.SerializeToString()) > sessions._SMALL_BYTES_MAX


def check_history(model: Model, machine: StateMachine) -> None:
    """Every revision that can be read is what it was, and every event is there."""
    for revision in range(max(1, model.compact_revision), model.revision + 1):
        response = machine.range(RangeRequest(key=b"\0", range_end=b"\0", revision=revision))
        items = model.past[revision]
        assert list(response.kvs) == [items[key].message(key) for key in sorted(items)], revision
        for key in KEYS:
            single = machine.range(RangeRequest(key=key, revision=revision))
            assert list(single.kvs) == ([items[key].message(key)] if key in items else [])
    first = max(model.compact_revision, 1)
    expected: dict[int, list[Event]] = {}
    for revision, kind, key, item in model.events:
        if revision >= first:
            event = Event(kv=KeyValue(key=key, mod_revision=revision), type=Event.DELETE, expired=kind == "expire")
            if kind == "put":
                assert item is not None
                event = Event(kv=item.message(key))
            expected.setdefault(revision, []).append(event)
    assert dict(machine.changes(first, 1 << 30)) == expected
    assert list(machine.changes(first, 2)) == list(expected.items())[:2]
    for revision, events in machine.changes(first, 1 << 30, prev_kv=True):
        for event in events:
            before = model.past[revision - 1].get(event.kv.key) if revision - 1 >= model.compact_revision else None
            assert event.prev_kv == (KeyValue() if before is None else before.message(event.kv.key))


def check_leases_and_sessions(model: Model, machine: StateMachine) -> None:
    """Both directions of every attachment agree, and nothing is known that is not in the store (S6)."""
    assert attachments(machine.store) == {(item.lease, key) for key, item in model.items.items() if item.lease}
    assert {lease: tuple(record) for lease, record in machine.leases.items()} == model.leases
    assert dict(machine.leases) == stored_leases(machine.store)
    for lease in model.leases:
        assert machine.lease_keys(lease) == sorted(key for key, item in model.items.items() if item.lease == lease)
    assert set(machine.sessions) == set(model.sessions)
    assert machine.sessions == StateMachine(machine.store).sessions


def check_nothing_left(model: Model, store: MemoryStore) -> None:
    """A finished sweep leaves what can be read, and no more."""
    compacted = model.compact_revision
    at_compaction = model.past[compacted] if compacted > 0 else {}
    records = sum(item.mod_revision < compacted for item in at_compaction.values())
    records += sum(revision >= compacted for revision, *_ in model.events)
    # Every change later than the compaction has an entry of history, but for those that made a key.
    made = sum(revision > compacted and item is not None and item.version == 1 for revision, _, _, item in model.events)
    history = sum(revision > compacted for revision, *_ in model.events) - made
    kinds = [key[:1] for key, _ in store.iterate(b"", None)]
    assert kinds.count(b"c") == len(model.items)
    assert kinds.count(b"r") == records
    assert kinds.count(b"h") == history
    assert kinds.count(b"m") == 1
    assert kinds.count(b"l") == len(model.leases) + sum(bool(item.lease) for item in model.items.values())
    # Of a session: itself, its small answers together, and each large one.
    assert kinds.count(b"e") == sum(
        1 + bool(session.answers) + sum(map(is_large, session.answers.values())) for session in model.sessions.values()
    )


@given(seeds=st.lists(SEED, min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_one_command_an_entry(seeds: list[int]) -> None:
    model = Model()
    driver = Driver()
    driver.term = model.term
    for seed in seeds:
        choose = Chooser(seed)
        ops = Ops(choose)
        ops.revision, ops.compact_revision = model.revision, model.compact_revision
        request = ops.any_request(model.term, list(model.sessions))
        model.begin(driver.machine.applied_index + 1)
        assert code_or_response(driver.call(request)) == model.call(request)
        assert driver.machine.revision == model.revision
        assert driver.machine.compact_revision == model.compact_revision
        if choose.chance(20):
            driver.machine.sweep(choose.number(1, 4))
        if choose.chance(10):
            driver.machine = StateMachine(driver.store)
        check_leases_and_sessions(model, driver.machine)
    check_history(model, driver.machine)
    driver.sweep()
    check_history(model, driver.machine)
    if driver.machine.applied_index:
        check_nothing_left(model, driver.store)


def entries_of(seeds: list[list[int]], model: Model) -> tuple[list[Any], list[list[Any]]]:
    """Entries of several commands, and the model's answers."""
    entries: list[Any] = []
    expected: list[list[Any]] = []
    for index, entry_seeds in enumerate(seeds, 1):
        requests = []
        answers = []
        model.begin(index)
        for seed in entry_seeds:
            ops = Ops(Chooser(seed))
            ops.revision, ops.compact_revision = model.revision, model.compact_revision
            request = ops.any_request(model.term, list(model.sessions))
            if isinstance(request, RangeRequest):
                request = TxnRequest(success=[op(request), op(ops.put())])
            requests.append(request)
            answers.append(model.call(request))
        entries.append((index, 7, decode_batch(encode_batch([group(*requests)]))))
        expected.append(answers)
    return entries, expected


@given(seeds=st.lists(st.lists(SEED, max_size=12), min_size=1, max_size=8), seed=SEED)
@settings(max_examples=100, deadline=None)
def test_grouping_does_not_matter(seeds: list[list[int]], seed: int) -> None:
    """Many commands in an entry and many entries in a write: same answers, state and hash; also after a crash."""
    choose = Chooser(seed)
    model = Model()
    entries, expected = entries_of(seeds, model)
    plain = StateMachine(MemoryStore())
    for entry, answers in zip(entries, expected, strict=True):
        assert [code_or_response(result) for result in plain.apply(*entry)[0]] == answers
    check_history(model, plain)
    check_leases_and_sessions(model, plain)

    store = MemoryStore()
    machine = StateMachine(store)
    place = 0
    while place < len(entries):
        count = choose.number(1, len(entries) - place)
        durable = store.copy()
        results = machine.apply_many(entries[place : place + count])
        answers = [[code_or_response(result) for result in entry[0]] for entry in results]
        assert answers == expected[place : place + count]
        if choose.chance(30):  # a crash: the last write is lost, and the log is applied again from the applied index
            store = durable
            machine = StateMachine(store)
        place = machine.applied_index
        if choose.chance(30):
            machine.sweep(choose.number(1, 5))
    assert machine.rolling_hash == plain.rolling_hash
    assert list(machine.dump()) == list(plain.dump())
    while machine.sweep(3):
        pass
    assert list(machine.dump()) == list(plain.dump())
    for revision in range(max(1, model.compact_revision), model.revision + 1):
        assert machine.hash_kv(revision) == plain.hash_kv(revision)
    check_history(model, machine)
    check_leases_and_sessions(model, machine)


@given(seeds=st.lists(SEED, min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_reader_over_a_view_does_not_move(seeds: list[int]) -> None:
    driver = Driver()
    frozen: list[tuple[Any, RangeRequest, Any]] = []
    for seed in seeds:
        ops = Ops(Chooser(seed))
        ops.revision, ops.compact_revision = driver.machine.revision, driver.machine.compact_revision
        driver.call(ops.request())
        request = ops.range()
        reader = driver.machine.reader(driver.store.view())
        frozen.append((reader, request, code_or_response(driver.call(request))))
        driver.machine.sweep(2)
    for reader, request, expected in frozen:
        if isinstance(expected, RefusalCode):
            with pytest.raises(Refused) as refused:
                read_range(reader, request)
            assert refused.value.refusal.code == expected
        else:
            assert read_range(reader, request) == expected
