"""Fencing by the server: what is written under a lock is refused, whole, once the lock has moved on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_driver import Driver, op

from raftkv._pb.kv_pb2 import Compare, DeleteRangeRequest, Guard, PutRequest, RangeRequest, TxnRequest
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.state_pb2 import LeaseExpire
from raftkv.state.machine import StateMachine
from raftkv.state.results import Refusal, RefusalCode


def take(kv: Driver, lock: bytes = b"lock", **fields: Any) -> int:
    """The fencing token of a new holder."""
    return int(kv.put(lock, **fields).header.revision)


def guard(token: int, lock: bytes = b"lock") -> Guard:
    return Guard(key=lock, token=token)


def failed(result: Any) -> bool:
    return isinstance(result, Refusal) and result.code is RefusalCode.GUARD_FAILED


def guarded(*guards: Guard) -> list[Any]:
    """Each kind of request, under these guards."""
    return [
        PutRequest(key=b"a", value=b"1", guards=guards),
        PutRequest(key=b"a", guards=guards),
        PutRequest(key=b"a", value=b"x" * 20_000, guards=guards),
        PutRequest(key=b"a", value=b"1", prev_kv=True, guards=guards),
        DeleteRangeRequest(key=b"a", guards=guards),
        TxnRequest(success=[op(PutRequest(key=b"a"))], guards=guards),
        TxnRequest(success=[op(RangeRequest(key=b"a"))], guards=guards),
        TxnRequest(guards=guards),
    ]


def test_a_guard_holds_while_its_key_is_the_one_of_the_token() -> None:
    kv = Driver()
    token = take(kv)
    for request in guarded(guard(token)):
        assert not isinstance(kv.call(request), Refusal), request
    kv.put(b"lock", b"touched")
    for request in guarded(guard(token)):
        assert not isinstance(kv.call(request), Refusal), "a new value is not a new holder"


@pytest.mark.parametrize("how", ["deleted", "taken again", "revoked", "expired", "never there", "foreign token"])
def test_a_lost_lock_refuses_everything_and_changes_nothing(how: str) -> None:
    kv = Driver()
    kv.call(LeaseGrantRequest(ID=1, TTL=5))
    token = take(kv, lease=1)
    if how == "deleted":
        kv.delete(b"lock")
    elif how == "taken again":
        kv.delete(b"lock")
        assert take(kv) > token
    elif how == "revoked":
        kv.call(LeaseRevokeRequest(ID=1))
    elif how == "expired":
        kv.call(LeaseExpire(proposer_term=1, ids=[1]))
    lost = guard(token + 1) if how == "foreign token" else guard(token, b"no" if how == "never there" else b"lock")
    before = kv.machine.revision, kv.values()
    for machine in (kv.machine, StateMachine(kv.store)):
        kv.machine = machine
        for request in guarded(lost):
            assert failed(kv.call(request)), request
    assert (kv.machine.revision, kv.values()) == before


def test_all_guards_must_hold() -> None:
    kv = Driver()
    one, two = take(kv, b"1"), take(kv, b"2")
    assert not failed(kv.put(b"a", guards=[guard(one, b"1"), guard(two, b"2")]))
    for guards in ([guard(one, b"1"), guard(one, b"2")], [guard(two, b"1"), guard(two, b"2")], [guard(0, b"3")]):
        assert failed(kv.put(b"a", guards=guards))


def test_guards_come_before_everything_else() -> None:
    kv = Driver()
    token = take(kv)
    kv.delete(b"lock")
    assert failed(kv.put(b"a", lease=404, guards=[guard(token)]))
    assert failed(kv.put(b"a", ignore_value=True, guards=[guard(token)]))
    compare = [Compare(key=b"a", target=Compare.VERSION, version=0)]
    late = RangeRequest(key=b"a", revision=999)
    assert failed(kv.call(TxnRequest(compare=compare, success=[op(late)], guards=[guard(token)])))


def test_a_guard_sees_what_came_before_it_in_the_entry() -> None:
    kv = Driver()
    token = take(kv)
    results = kv.apply(
        PutRequest(key=b"a", value=b"1", guards=[guard(token)]),
        DeleteRangeRequest(key=b"lock", guards=[guard(token)]),
        PutRequest(key=b"a", value=b"2", guards=[guard(token)]),
        PutRequest(key=b"lock"),
        PutRequest(key=b"a", value=b"3", guards=[guard(token)]),
        PutRequest(key=b"a", value=b"4", guards=[guard(token + 3)]),
    )
    assert [failed(result) for result in results] == [False, False, True, False, True, False]
    assert kv.values()[b"a"] == b"4"  # type: ignore[index]


def test_guards_inside_a_transaction_are_not_looked_at() -> None:
    """Validation refuses them; what a faulty node has put into the log all the same means one thing everywhere."""
    kv = Driver()
    lost = [guard(1)]
    inner = TxnRequest(success=[op(PutRequest(key=b"b", guards=lost))], guards=lost)
    result = kv.txn([], [PutRequest(key=b"a", guards=lost), DeleteRangeRequest(key=b"c", guards=lost), inner])
    assert result.succeeded
    assert kv.values().keys() == {b"a", b"b"}  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 3)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_l1_l7_writes_of_holders_never_interleave(steps: list[tuple[int, bool, int]]) -> None:
    """Holders come and go and try to write at any later time; what gets through is in the order of tokens."""
    kv = Driver()
    tokens: list[int] = []
    current = 0
    through: list[int] = []
    for what, expire, back in steps:
        if what == 0 and not current:
            kv.call(LeaseGrantRequest(ID=len(tokens) + 1, TTL=5))
            current = take(kv, lease=len(tokens) + 1)
            tokens.append(current)
        elif what == 1 and current:
            if expire:
                kv.call(LeaseExpire(proposer_term=1, ids=[len(tokens)]))
            else:
                kv.delete(b"lock")
            current = 0
        elif tokens:
            token = tokens[max(0, len(tokens) - 1 - back)]
            result = kv.put(b"data", b"%d" % token, guards=[guard(token)])
            assert failed(result) == (token != current)
            if not failed(result):
                through.append(token)
    assert tokens == sorted(set(tokens))
    assert through == sorted(through)
