"""What is refused before it is proposed, with etcd's texts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_driver import op

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    Compare,
    DeleteRangeRequest,
    Guard,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest
from raftkv._pb.state_pb2 import SessionOpen
from raftkv.state.commands import CommandKind
from raftkv.state.validate import (
    InvalidCode,
    InvalidRequest,
    RequestLimits,
    _Spans,
    check_compaction,
    check_delete,
    check_lease_grant,
    check_put,
    check_range,
    check_session_call,
    check_session_open,
    check_size,
    check_txn,
)

LIMITS = RequestLimits(key_bytes_max=10, request_bytes_max=100, txn_ops_max=4, txn_depth_max=3)


def put(key: bytes, **fields: Any) -> PutRequest:
    return PutRequest(key=key, **fields)


def delete(key: bytes, range_end: bytes = b"") -> DeleteRangeRequest:
    return DeleteRangeRequest(key=key, range_end=range_end)


def txn(*success: Any, failure: Any = (), compare: Any = ()) -> TxnRequest:
    return TxnRequest(compare=compare, success=map(op, success), failure=map(op, failure))


def fault(check: Any, request: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as invalid:
        check(request, LIMITS)
    return invalid.value


@pytest.mark.parametrize(
    ("check", "request_type"),
    [(check_put, PutRequest), (check_range, RangeRequest), (check_delete, DeleteRangeRequest)],
)
def test_keys(check: Any, request_type: Any) -> None:
    assert fault(check, request_type()).text == "etcdserver: key is not provided"
    check(request_type(key=b"k" * 10), LIMITS)
    invalid = fault(check, request_type(key=b"k" * 11))
    assert (invalid.code, invalid.field, invalid.limit, invalid.actual) == (InvalidCode.KEY_TOO_LARGE, "key", 10, 11)
    assert invalid.text == "etcdserver: key is too large: key has 11 bytes, the limit is 10"
    if request_type is not PutRequest:
        check(request_type(key=b"k", range_end=b"k" * 11), LIMITS)
        assert fault(check, request_type(key=b"k", range_end=b"k" * 12)).field == "range_end"


def test_put_flags() -> None:
    check_put(put(b"k", ignore_value=True, ignore_lease=True))
    assert fault(check_put, put(b"k", value=b"v", ignore_value=True)).text == "etcdserver: value is provided"
    assert fault(check_put, put(b"k", lease=1, ignore_lease=True)).text == "etcdserver: lease is provided"


def test_sort_options() -> None:
    for order in range(3):
        for target in range(5):
            check_range(RangeRequest(key=b"k", sort_order=order, sort_target=target))
    for fields in ({"sort_order": 3}, {"sort_target": 5}, {"sort_order": -1}, {"sort_target": -1}):
        assert fault(check_range, RangeRequest(key=b"k", **fields)).text == "etcdserver: invalid sort option"


def test_size() -> None:
    check_size(100, LIMITS)
    assert fault(check_size, 101).text == "etcdserver: request is too large"
    check_size(1572864)
    with pytest.raises(InvalidRequest):
        check_size(1572865)


def test_a_compaction_is_judged_by_the_state_only() -> None:
    check_compaction(CompactionRequest(revision=-(2**63)))


@pytest.mark.parametrize("place", ["compare", "success", "failure"])
def test_number_of_operations(place: str) -> None:
    one: Any = Compare(key=b"a") if place == "compare" else op(RangeRequest(key=b"a"))
    check_txn(TxnRequest(**{place: [one] * 4}), LIMITS)
    assert fault(check_txn, TxnRequest(**{place: [one] * 5})).text == "etcdserver: too many operations in txn request"
    check_txn(TxnRequest(**{place: [one] * 128}))
    with pytest.raises(InvalidRequest):
        check_txn(TxnRequest(**{place: [one] * 129}))


def test_nested_ones_share_what_the_outer_left() -> None:
    get = RangeRequest(key=b"a")
    check_txn(txn(txn(get, get, get)), LIMITS)
    assert fault(check_txn, txn(txn(get, get, get, get))).code is InvalidCode.TOO_MANY_OPS
    assert fault(check_txn, txn(get, get, txn(get, get, get))).code is InvalidCode.TOO_MANY_OPS
    check_txn(txn(get, txn(get, get)), LIMITS)


def test_depth() -> None:
    check_txn(txn(txn(txn())), LIMITS)
    assert fault(check_txn, txn(txn(txn(txn())))).code is InvalidCode.TOO_MANY_OPS


def test_every_operation_is_checked() -> None:
    empty_key = "etcdserver: key is not provided"
    assert fault(check_txn, txn(compare=[Compare()])).text == empty_key
    for bad in (PutRequest(), RangeRequest(), DeleteRangeRequest(), txn(PutRequest())):
        assert fault(check_txn, txn(put(b"a"), bad)).text == empty_key
        assert fault(check_txn, txn(failure=[bad])).text == empty_key
    assert fault(check_txn, txn(RequestOp())).text == "etcdserver: key not found"
    assert fault(check_txn, txn(RangeRequest(key=b"a", sort_order=9))).code is InvalidCode.INVALID_SORT_OPTION


@pytest.mark.parametrize(
    "request_",
    [
        txn(put(b"a"), put(b"a")),
        txn(failure=[put(b"a"), put(b"a")]),
        txn(put(b"a"), delete(b"a")),
        txn(delete(b"a"), put(b"a")),
        txn(put(b"b"), delete(b"a", b"c")),
        txn(put(b"a"), txn(put(b"a"))),
        txn(txn(put(b"a")), put(b"a")),
        txn(txn(put(b"a")), txn(put(b"a"))),
        txn(txn(put(b"a")), txn(failure=[put(b"a")])),
        txn(delete(b"a"), txn(failure=[put(b"a")])),
        txn(txn(delete(b"a", b"c")), put(b"b")),
        txn(txn(delete(b"a", b"c")), txn(put(b"b"))),
        txn(txn(txn(put(b"a"))), put(b"a")),
    ],
)
def test_writing_a_key_twice(request_: TxnRequest) -> None:
    with pytest.raises(InvalidRequest, match="etcdserver: duplicate key given in txn request"):
        check_txn(request_)


@pytest.mark.parametrize(
    "request_",
    [
        txn(put(b"a"), put(b"b"), failure=[put(b"a"), put(b"b")]),
        txn(txn(put(b"a"), failure=[put(b"a")])),
        txn(txn(delete(b"a"), failure=[put(b"a")])),
        txn(delete(b"a", b"b"), put(b"b")),
        txn(delete(b"a"), delete(b"a")),
        txn(RangeRequest(key=b"a"), put(b"a")),
        txn(delete(b"c", b"a"), put(b"b")),
        # Where etcd does not look; the state machine runs these in their order.
        txn(txn(put(b"a")), txn(delete(b"a"))),
        txn(delete(b"a", b"\0"), put(b"b")),
    ],
)
def test_not_writing_a_key_twice(request_: TxnRequest) -> None:
    check_txn(request_)


@pytest.mark.parametrize(
    ("check", "request_type"), [(check_put, PutRequest), (check_delete, DeleteRangeRequest), (check_txn, TxnRequest)]
)
def test_guards(check: Any, request_type: Any) -> None:
    def guarded(*guards: Guard) -> Any:
        return request_type(guards=guards) if request_type is TxnRequest else request_type(key=b"k", guards=guards)

    good = Guard(key=b"k" * 10, token=1)
    check(guarded(*[good] * 8), LIMITS)
    for bad, code, field in (
        ([good] * 9, InvalidCode.TOO_MANY_GUARDS, "guards"),
        ([good, Guard(token=1)], InvalidCode.EMPTY_KEY, "guards.key"),
        ([Guard(key=b"k" * 11, token=1)], InvalidCode.KEY_TOO_LARGE, "guards.key"),
        ([Guard(key=b"k")], InvalidCode.GUARD_TOKEN, "guards.token"),
        ([Guard(key=b"k", token=-(2**63))], InvalidCode.GUARD_TOKEN, "guards.token"),
    ):
        invalid = fault(check, guarded(*bad))
        assert (invalid.code, invalid.field) == (code, field)


def test_guards_inside_a_transaction() -> None:
    guards = [Guard(key=b"g", token=1)]
    for inner in (put(b"a", guards=guards), DeleteRangeRequest(key=b"a", guards=guards), TxnRequest(guards=guards)):
        for request in (txn(inner), txn(failure=[inner]), txn(txn(failure=[inner]))):
            assert fault(check_txn, request).text == "raftkv: guards belong to the outermost request"


def test_lease_grants() -> None:
    for fields in ({}, {"TTL": -(2**63)}, {"ttl_ms": -1}, {"TTL": 9_000_000_000}, {"ID": 2**63 - 1}):
        check_lease_grant(LeaseGrantRequest(**fields))
    for fields, text in (
        ({"TTL": 9_000_000_001}, "etcdserver: too large lease TTL"),
        ({"ttl_ms": 2**63 - 1}, "etcdserver: too large lease TTL"),
        ({"ID": -1, "TTL": 5}, "etcdserver: lease ID is negative"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            check_lease_grant(LeaseGrantRequest(**fields))


def test_sessions() -> None:
    check_session_open(SessionOpen())
    check_session_open(SessionOpen(ttl_ms=2**63 - 1))
    with pytest.raises(InvalidRequest, match="time to live of a session is negative"):
        check_session_open(SessionOpen(ttl_ms=-1))
    good: dict[str, int] = {"session": 1, "seq": 2, "first_incomplete": 2, "kind": CommandKind.TXN}
    check_session_call(**good)
    for field, value in (
        ("session", 0),
        ("seq", 0),
        ("first_incomplete", 3),
        ("kind", CommandKind.SESSION_CALL),
        ("kind", CommandKind.ALARM),
        ("kind", 0),
    ):
        with pytest.raises(InvalidRequest) as invalid:
            check_session_call(**{**good, field: value})
        assert (invalid.value.code, invalid.value.field) == (InvalidCode.SESSION_CALL, field)


KEY = st.binary(max_size=2)


@given(st.lists(st.tuples(KEY, st.none() | KEY), max_size=8), st.lists(KEY, max_size=20))
def test_a_union_of_intervals(intervals: list[tuple[bytes, bytes | None]], keys: list[bytes]) -> None:
    spans = _Spans()
    for start, stop in intervals:
        spans.add(start, stop)
    for key in keys:
        expected = any(start <= key and (stop is None or key < stop) for start, stop in intervals)
        assert (key in spans) is expected
    assert spans.starts == sorted(spans.starts)
    assert all(stop is None or stop < start for stop, start in zip(spans.stops, spans.starts[1:], strict=False))
