"""Each rule of etcd's transactions by itself."""

from __future__ import annotations

from typing import Any

import pytest
from state_driver import Driver, op

from raftkv._pb.kv_pb2 import Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.txn import is_read_only, is_serializable

EQUAL, GREATER, LESS, NOT_EQUAL = Compare.EQUAL, Compare.GREATER, Compare.LESS, Compare.NOT_EQUAL


@pytest.fixture
def kv() -> Driver:
    return Driver()


def holds(kv: Driver, **fields: Any) -> bool:
    response = kv.txn(compare=[Compare(**fields)])
    assert response.header.revision == kv.machine.revision
    succeeded: bool = response.succeeded
    return succeeded


def get(key: bytes, range_end: bytes = b"", **fields: Any) -> RangeRequest:
    return RangeRequest(key=key, range_end=range_end, **fields)


def put(key: bytes, value: bytes = b"", **fields: Any) -> PutRequest:
    return PutRequest(key=key, value=value, **fields)


def txn(compare: Any = (), success: Any = (), failure: Any = ()) -> TxnRequest:
    return TxnRequest(compare=compare, success=map(op, success), failure=map(op, failure))


def test_compare_every_target_with_every_result(kv: Driver) -> None:
    kv.put(b"x")
    kv.put(b"a", b"m")
    kv.put(b"a", b"m")  # create 3, mod 4, version 2, lease 0
    numbers = [
        (Compare.VERSION, "version", 2),
        (Compare.CREATE, "create_revision", 3),
        (Compare.MOD, "mod_revision", 4),
        (Compare.LEASE, "lease", 0),
    ]
    for target, field, actual in numbers:
        for wanted in (actual - 1, actual, actual + 1):
            fields: dict[str, Any] = {"key": b"a", "target": target, field: wanted}
            assert holds(kv, result=EQUAL, **fields) is (actual == wanted)
            assert holds(kv, result=NOT_EQUAL, **fields) is (actual != wanted)
            assert holds(kv, result=GREATER, **fields) is (actual > wanted)
            assert holds(kv, result=LESS, **fields) is (actual < wanted)
    for value in (b"", b"l", b"m", b"m\0"):
        fields = {"key": b"a", "target": Compare.VALUE, "value": value}
        assert holds(kv, result=EQUAL, **fields) is (value == b"m")
        assert holds(kv, result=NOT_EQUAL, **fields) is (value != b"m")
        assert holds(kv, result=GREATER, **fields) is (value < b"m")
        assert holds(kv, result=LESS, **fields) is (value > b"m")


def test_a_missing_key_compares_as_zero_and_its_value_never_holds(kv: Driver) -> None:
    for target in (Compare.VERSION, Compare.CREATE, Compare.MOD, Compare.LEASE):
        assert holds(kv, key=b"a", target=target, result=EQUAL)
        assert not holds(kv, key=b"a", target=target, result=GREATER)
    for result in (EQUAL, NOT_EQUAL, LESS, GREATER):
        assert not holds(kv, key=b"a", target=Compare.VALUE, result=result, value=b"")
        assert not holds(kv, key=b"a", range_end=b"b", target=Compare.VALUE, result=result, value=b"")


def test_a_compare_of_a_range_must_hold_for_every_key(kv: Driver) -> None:
    kv.put(b"a", b"1")
    kv.put(b"b", b"1")
    assert holds(kv, key=b"a", range_end=b"c", target=Compare.VALUE, value=b"1")
    assert not holds(kv, key=b"a", range_end=b"c", target=Compare.MOD, result=LESS, mod_revision=3)
    assert holds(kv, key=b"a", range_end=b"\0", target=Compare.MOD, result=LESS, mod_revision=4)
    assert holds(kv, key=b"x", range_end=b"y", target=Compare.CREATE, create_revision=0)
    assert not holds(kv, key=b"x", range_end=b"y", target=Compare.CREATE, result=GREATER, create_revision=0)
    assert holds(kv, key=b"b", range_end=b"a", target=Compare.VERSION, version=0)


def test_the_value_of_another_target_counts_as_zero(kv: Driver) -> None:
    kv.put(b"a", b"1")
    assert not holds(kv, key=b"a", target=Compare.VERSION, create_revision=1)
    assert holds(kv, key=b"a", target=Compare.VERSION, result=GREATER, create_revision=5)
    assert holds(kv, key=b"a", target=Compare.VALUE, result=GREATER, version=5)


def test_numbers_from_the_future_are_taken_as_etcd_does(kv: Driver) -> None:
    kv.put(b"a", b"1")
    assert holds(kv, key=b"a", target=17, result=EQUAL)
    assert not holds(kv, key=b"a", target=17, result=GREATER)
    assert holds(kv, key=b"a", target=Compare.VERSION, result=17, version=99)


def test_all_compares_must_hold(kv: Driver) -> None:
    kv.put(b"a", b"1")
    yes = Compare(key=b"a", target=Compare.VALUE, value=b"1")
    no = Compare(key=b"a", target=Compare.VALUE, value=b"2")
    assert kv.txn([yes, yes], [put(b"b", b"then")], [put(b"b", b"else")]).succeeded
    assert not kv.txn([yes, no], [put(b"b", b"then")], [put(b"b", b"else")]).succeeded
    assert kv.values(b"b", b"c") == {b"b": b"else"}
    assert kv.txn([], [put(b"b", b"always")]).succeeded


def test_one_revision_however_many_writes(kv: Driver) -> None:
    kv.put(b"old", b"1")
    response = kv.txn([], [put(b"a"), put(b"b"), DeleteRangeRequest(key=b"old")])
    assert response.header.revision == 3
    assert [(item.key, item.mod_revision) for item in kv.range(b"a", b"c").kvs] == [(b"a", 3), (b"b", 3)]
    assert [len(events) for _, events in kv.machine.changes(3, 1)] == [3]


def test_a_transaction_that_writes_nothing_makes_no_revision(kv: Driver) -> None:
    kv.put(b"a")
    assert kv.txn([], [DeleteRangeRequest(key=b"x")]).header.revision == 2
    assert kv.txn([], [get(b"a")], [put(b"b")]).header.revision == 2
    assert kv.txn([], []).header.revision == 2
    assert kv.machine.revision == 2


def test_operations_see_those_before_them(kv: Driver) -> None:
    kv.put(b"a", b"0")
    response = kv.txn(
        [],
        [
            get(b"a", b"\0"),
            put(b"b", b"1", prev_kv=True),
            get(b"a", b"\0"),
            DeleteRangeRequest(key=b"a", range_end=b"\0", prev_kv=True),
            get(b"a", b"\0", count_only=True),
            get(b"a", b"\0", revision=2),
            get(b"a", revision=2),
        ],
    )
    answers = response.responses
    assert [item.value for item in answers[0].response_range.kvs] == [b"0"]
    assert answers[0].response_range.header.revision == 2
    assert answers[1].response_put.header.revision == 3
    assert [item.value for item in answers[2].response_range.kvs] == [b"0", b"1"]
    assert answers[2].response_range.header.revision == 3
    assert [item.mod_revision for item in answers[3].response_delete_range.prev_kvs] == [2, 3]
    assert answers[4].response_range.count == 0
    assert [item.value for item in answers[5].response_range.kvs] == [b"0"]
    assert [item.value for item in answers[6].response_range.kvs] == [b"0"]
    assert response.header.revision == 3


def test_nested_compares_are_judged_before_anything_is_written(kv: Driver) -> None:
    """As etcd: the inner transaction does not see the outer's put in its compare, but does in its operations."""
    missing = Compare(key=b"a", target=Compare.VERSION, version=0)
    response = kv.txn([], [put(b"a", b"1"), txn([missing], [get(b"a")], [put(b"b")])])
    inner = response.responses[1].response_txn
    assert inner.succeeded
    assert inner.responses[0].response_range.kvs[0].value == b"1"
    assert inner.HasField("header")
    assert inner.header.revision == 0
    assert kv.values() == {b"a": b"1"}


def test_a_refused_transaction_changes_nothing(kv: Driver) -> None:
    kv.put(b"a", b"1")
    for bad, code in [
        (put(b"b", lease=5), RefusalCode.LEASE_NOT_FOUND),
        (put(b"b", ignore_value=True), RefusalCode.KEY_NOT_FOUND),
        (put(b"b", ignore_lease=True), RefusalCode.KEY_NOT_FOUND),
        (get(b"a", revision=9), RefusalCode.FUTURE_REVISION),
        (txn([], [put(b"b", lease=5)]), RefusalCode.LEASE_NOT_FOUND),
    ]:
        result = kv.txn([], [put(b"c"), DeleteRangeRequest(key=b"a"), bad])
        assert isinstance(result, Refusal)
        assert result.code is code
        assert (kv.machine.revision, kv.values()) == (2, {b"a": b"1"})
    assert kv.txn([], [put(b"c")], [put(b"b", lease=5)]).succeeded


def test_a_revision_made_by_the_transaction_itself_is_in_the_future(kv: Driver) -> None:
    result = kv.txn([], [put(b"a"), get(b"a", revision=2)])
    assert result.code is RefusalCode.FUTURE_REVISION


def test_puts_are_checked_before_ranges(kv: Driver) -> None:
    assert kv.txn([], [get(b"a", revision=9), put(b"b", lease=5)]).code is RefusalCode.LEASE_NOT_FOUND


def test_keeping_a_value_that_the_transaction_deleted_is_refused_whole(kv: Driver) -> None:
    """Validation forbids most of these; what is in the log all the same must not be done by half (etcd panics)."""
    kv.put(b"a", b"1")
    results = kv.apply(
        put(b"x", b"before"),
        txn([], [put(b"b"), DeleteRangeRequest(key=b"a", range_end=b"\0"), put(b"a", ignore_value=True)]),
        put(b"y", b"after"),
    )
    assert isinstance(results[1], Refusal)
    assert results[1].code is RefusalCode.KEY_NOT_FOUND
    assert kv.values() == {b"a": b"1", b"x": b"before", b"y": b"after"}
    assert [revision for revision, _ in kv.machine.changes(1, 9)] == [2, 3, 4]


def test_a_key_may_be_written_twice_where_validation_lets_it_pass(kv: Driver) -> None:
    kv.put(b"a", b"0")
    kv.apply(txn([], [DeleteRangeRequest(key=b"a"), put(b"a", b"1")]))
    assert kv.range(b"a").kvs[0].version == 1
    kv.apply(txn([], [put(b"a", b"2"), DeleteRangeRequest(key=b"a")]))
    assert [kv.values(revision=revision) for revision in (2, 3, 4)] == [{b"a": b"0"}, {b"a": b"1"}, {}]
    kv.compact(4)
    kv.sweep()
    assert kv.values() == {}
    assert [len(events) for _, events in kv.machine.changes(4, 1)] == [2]


def test_read_only_transactions(kv: Driver) -> None:
    kv.put(b"a", b"1")
    request = txn(
        [Compare(key=b"a", target=Compare.VERSION, version=1)], [get(b"a"), txn([], [get(b"b")])], [get(b"c")]
    )
    assert is_read_only(request)
    response = kv.machine.read_txn(request)
    assert response.succeeded
    assert response.header.revision == 2
    assert response.responses[0].response_range.kvs[0].value == b"1"
    assert response.responses[1].response_txn.succeeded
    assert response == kv.apply(request)[0]
    assert kv.machine.applied_index == 2
    with pytest.raises(Refused):
        kv.machine.read_txn(txn([], [get(b"a", revision=77)]))


def test_what_writes_is_not_read_only() -> None:
    assert is_read_only(txn())
    for write in (put(b"a"), DeleteRangeRequest(key=b"a"), txn([], [], [put(b"a")])):
        assert not is_read_only(txn([], [get(b"a"), write]))
        assert not is_read_only(txn([], [], [write]))
    with pytest.raises(ValueError, match="writes"):
        Driver().machine.read_txn(txn([], [put(b"a")]))


def test_a_transaction_is_serializable_if_all_its_ranges_are() -> None:
    assert is_serializable(txn())
    assert is_serializable(txn([], [get(b"a", serializable=True)], [txn([], [get(b"a", serializable=True)])]))
    assert not is_serializable(txn([], [get(b"a", serializable=True)], [txn([], [get(b"a")])]))


def test_an_operation_that_is_none_answers_nothing(kv: Driver) -> None:
    (response,) = kv.apply(TxnRequest(success=[RequestOp()]))
    assert response.responses[0].WhichOneof("response") is None
