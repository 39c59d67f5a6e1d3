"""Listings that are remembered are what the store has, whatever changed, was undone, or lies in two directories."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_driver import group

from raftkv._pb.kv_pb2 import DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv.state import attachments, directories
from raftkv.state.attachments import Attachments
from raftkv.state.directories import Directories
from raftkv.state.leases import keys_of
from raftkv.state.machine import StateMachine
from raftkv.state.store import MemoryStore

KEYS = (b"d/", b"d/a", b"d/b", b"d/b/c", b"d/b/d", b"d/b/d/e", b"d0", b"d", b"e/x", b"/", b"//")
RANGES = ((b"d/", b"d0"), (b"d/b/", b"d/b0"), (b"e/", b"e0"), (b"/", b"0"), (b"//", b"/0"), (b"d/b/d/", b"d/b/d0"))


def listed(machine: StateMachine, start: bytes, stop: bytes, *, from_store: bool) -> list[tuple[bytes, bytes, int]]:
    reader = machine.reader(machine.store.view() if from_store else None)
    return [(key, version, reader.revision) for key, version in reader.walk(start, stop, reader.revision)]


def some_request(random: random.Random) -> PutRequest | DeleteRangeRequest | TxnRequest | LeaseRevokeRequest:
    key = random.choice(KEYS)
    kind = random.randrange(6)
    if kind == 0:
        start, stop = random.choice(RANGES)
        return DeleteRangeRequest(key=start, range_end=stop)
    if kind == 1:
        return DeleteRangeRequest(key=key)
    if kind == 2:
        return LeaseRevokeRequest(ID=random.choice((1, 2)))
    if kind == 3:
        start, stop = random.choice(RANGES)
        put = RequestOp(request_put=PutRequest(key=key, value=b"in"))
        get = RequestOp(request_range=RangeRequest(key=start, range_end=stop))
        # A put that keeps a value which the transaction has deleted: it is undone as a whole.
        delete = RequestOp(request_delete_range=DeleteRangeRequest(key=b"d/a"))
        keep = RequestOp(request_put=PutRequest(key=b"d/a", ignore_value=True))
        return TxnRequest(success=random.choice(([put, get], [get, put], [put, get, delete, keep])))
    return PutRequest(key=key, value=b"v", lease=random.choice((0, 0, 1, 2)))


@given(st.integers(0, 2**32 - 1))
def test_a_listing_is_what_the_store_has(seed: int) -> None:
    chance = random.Random(seed)
    machine = StateMachine(MemoryStore())
    for index in range(1, 13):
        requests = [some_request(chance) for _ in range(chance.randrange(1, 5))]
        grants = [LeaseGrantRequest(ID=lease, TTL=9) for lease in (1, 2)]
        machine.apply(index, 1, [group(*grants, *requests)])
        for start, stop in RANGES:
            if chance.random() < 0.7:
                machine.range(RangeRequest(key=start, range_end=stop))  # and is remembered from here on
            assert listed(machine, start, stop, from_store=False) == listed(machine, start, stop, from_store=True)
        for lease in (1, 2):
            assert machine.lease_keys(lease) == keys_of(machine.store, lease)


def test_a_new_name_beside_known_ones_is_known_to_be_free() -> None:
    machine = StateMachine(MemoryStore())
    machine.apply(1, 1, [group(PutRequest(key=b"locks/a/1", value=b"1"), PutRequest(key=b"other/b", value=b"1"))])
    assert machine.range(RangeRequest(key=b"locks/b/", range_end=b"locks/b0")).count == 0

    def fail(*args: object) -> None:
        raise AssertionError("it was read again")

    machine.store.iterate = fail  # type: ignore[assignment, method-assign]
    assert machine.range(RangeRequest(key=b"locks/c/", range_end=b"locks/c0")).count == 0
    assert machine.range(RangeRequest(key=b"locks/a/", range_end=b"locks/a0")).count == 1
    with pytest.raises(AssertionError, match="read again"):
        machine.range(RangeRequest(key=b"other/b/", range_end=b"other/b0"))


def test_a_large_parent_is_listed_once_for_others_sake() -> None:
    machine = StateMachine(MemoryStore())
    machine.apply(1, 1, [group(*(PutRequest(key=b"d/%03d" % number, value=b"1") for number in range(200)))])
    iterate = machine.store.iterate
    scans = []

    def noting(start: bytes, stop: bytes | None) -> object:
        scans.append(start)
        return iterate(start, stop)

    machine.store.iterate = noting  # type: ignore[assignment, method-assign]
    for name in (b"x", b"y"):
        assert machine.range(RangeRequest(key=b"d/%s/" % name, range_end=b"d/%s0" % name)).count == 0
    assert scans == [b"cd/", b"cd/x/", b"cd/y/"]


def test_the_keys_of_a_lease_are_spared_the_store() -> None:
    machine = StateMachine(MemoryStore())
    grants = [LeaseGrantRequest(ID=lease, TTL=9) for lease in (1, 2)]
    puts = [PutRequest(key=b"a/%d" % number, value=b"v", lease=1 + number % 2) for number in range(6)]
    machine.apply(1, 1, [group(*grants, *puts, PutRequest(key=b"a/0", value=b"v", lease=2))])

    def fail(*args: object) -> None:
        raise AssertionError("it was read again")

    machine.store.iterate = fail  # type: ignore[assignment, method-assign]
    assert machine.lease_keys(1) == [b"a/2", b"a/4"]
    machine.apply(2, 1, [group(LeaseRevokeRequest(ID=1))])
    assert machine.lease_keys(2) == [b"a/0", b"a/1", b"a/3", b"a/5"]


def test_leases_with_many_keys_and_many_leases_are_read_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "LEASES_MAX", 2)
    monkeypatch.setattr(attachments, "KEYS_MAX", 2)
    known = Attachments()
    for lease in (1, 2, 3):
        known.granted(lease)
    assert [known.keys_of(lease) for lease in (1, 2, 3)] == [None, [], []]
    for key in (b"c", b"a", b"b"):
        known.attach(2, key)
        known.attach(1, key)
    assert [known.keys_of(lease) for lease in (1, 2, 3)] == [None, None, []]
    known.forget()
    assert known.keys_of(3) is None


def test_a_listing_is_spared_the_store() -> None:
    machine = StateMachine(MemoryStore())
    machine.apply(1, 1, [group(PutRequest(key=b"d/a", value=b"1"))])
    request = RangeRequest(key=b"d/", range_end=b"d0", keys_only=True)
    assert [kv.key for kv in machine.range(request).kvs] == [b"d/a"]
    machine.apply(2, 1, [group(PutRequest(key=b"d/b", value=b"1"), DeleteRangeRequest(key=b"d/a"))])

    def fail(*args: object) -> None:
        raise AssertionError("it was read again")

    machine.store.iterate = fail  # type: ignore[assignment, method-assign]
    assert [kv.key for kv in machine.range(request).kvs] == [b"d/b"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "DIRECTORIES_MAX", 2)
    monkeypatch.setattr(directories, "KEYS_MAX", 3)
    known = Directories()
    for name in (b"a/", b"b/", b"c/"):
        known.remember(name, name[:-1] + b"0", [(name + b"1", b"v")])
    assert [known.listing(name, name[:-1] + b"0") is not None for name in (b"a/", b"b/", b"c/")] == [False, True, True]
    for number in range(2, 4):
        known.put(b"b/%d" % number, b"v")
    assert known.listing(b"b/", b"b0") == [(b"b/%d" % number, b"v") for number in (1, 2, 3)]
    known.put(b"b/4", b"v")
    assert known.listing(b"b/", b"b0") is None
    known.remember(b"d/", b"d0", [(b"d/%d" % number, b"v") for number in range(4)])
    known.remember(b"e", b"f", [])
    known.remember(b"f/", b"f/5", [])
    assert [known.listing(*each) for each in ((b"d/", b"d0"), (b"e", b"f"), (b"f/", b"f/5"))] == [None] * 3
