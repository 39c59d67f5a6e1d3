"""From a failed RPC to what it means."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.client import (
    Compacted,
    ConditionFailed,
    DeadlineExceeded,
    FutureRevision,
    InvalidRequest,
    LeaderChanged,
    LeaseNotFound,
    NoLeader,
    Overloaded,
    RequestTooLarge,
    Unavailable,
)
from raftkv.client.faults import FaultKind, error_of, outcome_unknown, understand

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "text", "error", "not_executed"),
    [
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Compacted, True),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", FutureRevision, True),
        (Code.INVALID_ARGUMENT, "etcdserver: key is not provided", InvalidRequest, True),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", InvalidRequest, True),
        (Code.INVALID_ARGUMENT, "etcdserver: request is too large", RequestTooLarge, True),
        (Code.NOT_FOUND, "etcdserver: requested lease not found", LeaseNotFound, True),
        (Code.INVALID_ARGUMENT, "etcdserver: key not found", ConditionFailed, True),
        (Code.UNAVAILABLE, "etcdserver: no leader", NoLeader, True),
        (Code.UNAVAILABLE, "etcdserver: leader changed", LeaderChanged, False),
        (Code.FAILED_PRECONDITION, "etcdserver: not leader", LeaderChanged, True),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Overloaded, True),
        (Code.UNKNOWN, "etcdserver: too many requests", Overloaded, True),  # as etcd really sends it
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Unavailable, True),
        (Code.UNAVAILABLE, "etcdserver: request timed out", DeadlineExceeded, False),
        (Code.UNAVAILABLE, "etcdserver: server stopped", Unavailable, False),
        (Code.UNAVAILABLE, "Socket closed", Unavailable, False),
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Unavailable, False),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded", DeadlineExceeded, False),
        (Code.UNKNOWN, "etcdserver: request timed out, leader transfer took too long", Unavailable, False),
        (Code.INTERNAL, "boom", Unavailable, False),
        (Code.UNIMPLEMENTED, "unknown method", InvalidRequest, True),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", InvalidRequest, True),
        (Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 4)", RequestTooLarge, True),
        (Code.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 4)", RequestTooLarge, False),
    ],
)
def test_a_real_etcd_is_understood_by_code_and_text(code, text, error, not_executed):
    fault = understand(code, text, ())
    assert type(error_of(fault, endpoint="e:1", attempts=2)) is error
    assert fault.not_executed is not_executed


def test_what_was_done_is_no_invalid_request_because_its_answer_is_lost():
    trailers = (("raftkv-error", "RESULT_NOT_KEPT"), ("raftkv-executed", "unknown"))
    fault = understand(Code.FAILED_PRECONDITION, "raftkv: done before", trailers)
    assert (fault.kind, fault.kind.is_final, fault.not_executed) == (FaultKind.ANSWER_LOST, True, False)
    assert "was done once" in str(outcome_unknown(fault, endpoint="e:1", attempts=2))


def test_the_trailers_of_a_node_decide_whatever_the_text_says():
    trailers = (("raftkv-error", "NO_LEADER"), ("raftkv-executed", "no"))
    fault = understand(Code.UNAVAILABLE, "etcdserver: leader changed", trailers)
    assert (fault.kind, fault.code, fault.not_executed) == (FaultKind.NO_LEADER, "NO_LEADER", True)


def test_an_unknown_outcome_named_by_the_node_stays_unknown_even_for_a_code_that_looks_harmless():
    trailers = (("raftkv-error", "SOMETHING_NEW"), ("raftkv-executed", "unknown"))
    assert not understand(Code.INVALID_ARGUMENT, "", trailers).not_executed


def test_a_node_that_names_its_error_is_not_unreachable():
    """UNAVAILABLE with a code of its own comes from a node that talks: no reason to suspect its connection."""
    for code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
        fault = understand(code, "", (("raftkv-error", "SOMETHING_NEW"), ("raftkv-executed", "no")))
        assert not fault.kind.blames_endpoint


def test_errors_carry_what_the_trailers_say():
    trailers = (("raftkv-error", "COMPACTED"), ("raftkv-executed", "no"), ("raftkv-compact-revision", "41"))
    error = error_of(understand(Code.OUT_OF_RANGE, "compacted", trailers), endpoint="e:1", attempts=3)
    assert isinstance(error, Compacted)
    assert (error.compact_revision, error.endpoint, error.attempts, error.code) == (41, "e:1", 3, "COMPACTED")
    assert str(error) == "compacted (e:1, 3 attempts)"

    trailers = (
        ("raftkv-error", "TOO_MANY_REQUESTS"),
        ("raftkv-executed", "no"),
        ("raftkv-limit", "proposals_max"),
        ("grpc-retry-pushback-ms", "250"),
    )
    error = error_of(understand(Code.RESOURCE_EXHAUSTED, "busy", trailers), endpoint=None, attempts=1)
    assert isinstance(error, Overloaded)
    assert (error.retry_after_s, error.limit) == (0.25, "proposals_max")

    trailers = (("raftkv-error", "KEY_TOO_LARGE"), ("raftkv-executed", "no"), ("raftkv-field", "key"))
    error = error_of(understand(Code.INVALID_ARGUMENT, "key too large", trailers), endpoint=None, attempts=1)
    assert isinstance(error, RequestTooLarge)
    assert error.field == "key"


@given(
    st.sampled_from(Code),
    st.text(),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["raftkv-error", "raftkv-executed", "raftkv-compact-revision", "grpc-retry-pushback-ms", "x"]
            ),
            st.text() | st.binary(),
        )
    ),
    st.booleans(),
)
def test_no_answer_however_odd_breaks_the_client(code, text, trailers, time_is_up):
    fault = understand(code, text, trailers)
    error_of(fault, endpoint="e:1", attempts=1, time_is_up=time_is_up)
    if fault.not_executed and "raftkv-error" in dict(trailers) and isinstance(dict(trailers)["raftkv-error"], str):
        assert ("raftkv-executed", "no") in trailers
