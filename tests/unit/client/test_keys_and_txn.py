"""Keys, ranges, namespaces, and transactions as data."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv._pb import common_pb2, kv_pb2
from raftkv.client import (
    Closed,
    Compacted,
    ConfigError,
    DeadlineExceeded,
    Delete,
    Get,
    InvalidRequest,
    Key,
    KeyValue,
    NoLeaderInTime,
    OutcomeUnknown,
    Put,
    RaftkvError,
    Unavailable,
)
from raftkv.client.keys import FROM_KEY, Namespace, prefix_end
from raftkv.client.txn import Branches, TxnBuilder, txn_result


def in_range(key: bytes, start: bytes, end: bytes) -> bool:
    return key >= start and (end == FROM_KEY or key < end)


@given(st.binary(min_size=1), st.binary(min_size=1))
def test_a_prefix_range_holds_exactly_the_keys_with_that_prefix(prefix, key):
    for candidate in (key, prefix, prefix + key, prefix[:-1]):
        if candidate:
            assert in_range(candidate, prefix, prefix_end(prefix)) == candidate.startswith(prefix)


@given(st.binary(), st.binary(), st.binary(min_size=1))
def test_in_a_namespace_a_prefix_holds_the_same_keys_as_outside(namespace, prefix, key):
    start, end = Namespace(namespace).span(prefix, None, True)
    assert in_range(namespace + key, start, end) == key.startswith(prefix)


@given(st.binary(), st.binary(), st.binary(min_size=1), st.binary(min_size=1))
def test_in_a_namespace_a_range_holds_the_same_keys_as_outside(namespace, first, last, key):
    start, end = Namespace(namespace).span(first, last, False)
    assert in_range(namespace + key, start, end) == in_range(key, first or FROM_KEY, last)


def test_a_namespace_is_lost_again_in_answers():
    item = Namespace(b"ns/").item(common_pb2.KeyValue(key=b"ns/k", value=b"{}", mod_revision=3))
    assert item == KeyValue(b"k", b"{}", 0, 3, 0, 0)
    assert item.text == "{}"
    assert item.json() == {}


def test_comparisons_become_etcds():
    namespace = Namespace(b"ns/")
    cases = [
        (Key("k").version == 0, kv_pb2.Compare(result=0, target=0, key=b"ns/k", version=0)),
        (Key("k").create_revision > 5, kv_pb2.Compare(result=1, target=1, key=b"ns/k", create_revision=5)),
        (Key("k").mod_revision < 5, kv_pb2.Compare(result=2, target=2, key=b"ns/k", mod_revision=5)),
        (Key("k").value != "v", kv_pb2.Compare(result=3, target=3, key=b"ns/k", value=b"v")),
        (Key("k").lease == 9, kv_pb2.Compare(result=0, target=4, key=b"ns/k", lease=9)),
        (
            Key("k", prefix=True).version > 0,
            kv_pb2.Compare(result=1, target=0, key=b"ns/k", version=0, range_end=b"ns/l"),
        ),
    ]
    for comparison, expected in cases:
        assert comparison.to_pb(namespace) == expected


def test_a_comparison_cannot_be_mistaken_for_an_answer():
    with pytest.raises(TypeError, match="no truth value"):
        bool(Key("k").version == 0)
    with pytest.raises(TypeError):
        Key("k").version == "0"  # noqa: B015
    with pytest.raises(TypeError):
        Key("k").value == 5  # noqa: B015
    with pytest.raises(InvalidRequest):
        Key("k").version == 2**63  # noqa: B015
    builder = TxnBuilder(lambda branches, timeout: branches)
    with pytest.raises(TypeError):
        builder.when(True)
    with pytest.raises(TypeError):
        builder.then("put k v")


def test_a_transaction_knows_whether_it_writes():
    assert not Branches(then=(Get("k"),)).writes()
    assert Branches(otherwise=(Delete("k"),)).writes()
    assert Branches(then=(Branches(then=(Put("k", "v"),)),)).writes()
    assert not Branches(then=(Branches(then=(Get("k"),)),)).writes()


def test_a_nested_transaction_comes_back_typed():
    inner = TxnBuilder(lambda branches, timeout: branches).then(Put("a", "1", prev=True))
    outer = (
        TxnBuilder(lambda branches, timeout: branches).when(Key("a").version == 0).then(inner, Delete("b"), Get("c"))
    )
    request = outer.commit().to_pb(Namespace(b"ns/"))
    assert request.success[0].request_txn.success[0].request_put.key == b"ns/a"
    assert request.success[0].request_txn.success[0].request_put.prev_kv
    response = kv_pb2.TxnResponse(succeeded=True)
    response.responses.add().response_txn.responses.add().response_put.prev_kv.key = b"ns/a"
    response.responses.add().response_delete_range.deleted = 4
    response.responses.add().response_range.count = 2
    result = txn_result(response, Namespace(b"ns/"), 77)
    assert result
    nested, deleted, read = result.results
    assert nested.results[0].previous.key == b"a"
    assert (deleted.deleted, read.count, read.revision) == (4, 2, 77)


def test_the_error_tree_answers_what_to_do():
    assert issubclass(Unavailable, ConnectionError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(NoLeaderInTime, TimeoutError)
    assert not issubclass(OutcomeUnknown, Unavailable)
    for error in (Closed, Compacted, ConfigError, InvalidRequest, OutcomeUnknown, Unavailable):
        assert issubclass(error, RaftkvError)


def test_errors_survive_a_process_boundary():
    error = Compacted("gone", code="COMPACTED", endpoint="h:1", attempts=2)
    error.compact_revision = 8
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.compact_revision) == (str(error), "COMPACTED", 8)
    copy = pickle.loads(pickle.dumps(ConfigError("timeout", "is odd")))
    assert (copy.field, str(copy)) == ("timeout", "timeout: is odd")
    copy = pickle.loads(pickle.dumps(DeadlineExceeded("late", endpoint="h:1", attempts=1)))
    assert str(copy) == "late (h:1, 1 attempt)"
