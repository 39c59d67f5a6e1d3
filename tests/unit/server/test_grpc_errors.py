"""The table is complete, and its texts are those of etcd."""

from __future__ import annotations

import inspect

import pytest

from raftkv.raft import errors as raft
from raftkv.server import errors
from raftkv.server.grpc_errors import EXCEPTIONS, INVALID, REFUSALS, TIMEOUTS, answer_to
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.validate import InvalidCode, InvalidRequest

ABSTRACT = {errors.RequestError, errors.Unavailable, errors.Overloaded, errors.Refused, errors.RequestTimeout}


def test_nothing_is_missing_from_the_table() -> None:
    assert set(REFUSALS) == set(RefusalCode)
    assert set(INVALID) == set(InvalidCode)
    assert set(TIMEOUTS) == set(errors.TimeoutKind)
    own = {
        each
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, errors.RequestError) and each not in ABSTRACT
    }
    assert {each for each in EXCEPTIONS if issubclass(each, errors.RequestError)} == own


def test_names_are_upper_snake_and_texts_carry_a_prefix() -> None:
    for row in (*REFUSALS.values(), *EXCEPTIONS.values(), *TIMEOUTS.values()):
        assert row.name.replace("_", "A").isupper()
        # The words of etcd's own recipes, for Lock and Election, have prefixes of their own.
        assert not row.text or row.text.startswith(
            ("etcdserver: ", "raftkv: ", "mutex: ", "election: ", '"leader" field', "context deadline exceeded")
        )
    assert all(code.value.startswith(("etcdserver: ", "raftkv: ")) for code in INVALID)


@pytest.mark.parametrize("code", RefusalCode)
def test_a_refusal_by_the_data_was_never_executed(code: RefusalCode) -> None:
    answer = answer_to(Refused(Refusal(code, 9, 4)), method="Put", mutates=True)
    # But for the repetition of something done once, whose answer was not kept: it must not pass for undone.
    executed = "unknown" if code is RefusalCode.RESULT_NOT_KEPT else "no"
    assert (answer.code, answer.text, answer.executed) == (REFUSALS[code].code, REFUSALS[code].text, executed)
    assert (("raftkv-compact-revision", "4") in answer.trailers) == (code is RefusalCode.COMPACTED)


@pytest.mark.parametrize("code", InvalidCode)
def test_an_invalid_request_names_its_field(code: InvalidCode) -> None:
    answer = answer_to(InvalidRequest(code, "key", limit=5, actual=6), method="Put", mutates=True)
    assert answer.text.startswith(code.value)
    assert ("raftkv-field", "key") in answer.trailers
    assert ("raftkv-limit", "5") in answer.trailers


def test_what_consensus_says_has_an_answer() -> None:
    for fault, name in (
        (raft.NoLeader(), "NO_LEADER"),
        (raft.NotLeader(7), "NOT_LEADER"),
        (raft.InvalidTransferee(7), "BAD_TRANSFEREE"),
        (raft.Overloaded(5, 4), "TOO_MANY_REQUESTS"),
        (raft.TransferInProgress(7), "LEADER_CHANGED"),
    ):
        answer = answer_to(fault, method="Put", mutates=True)
        assert (answer.name, answer.executed) == (name, "no")


def test_a_deadline_that_has_passed_and_a_learner() -> None:
    late = answer_to(errors.DeadlineExceeded(), method="Put", mutates=True)
    assert (late.code.name, late.text) == ("DEADLINE_EXCEEDED", "context deadline exceeded")
    learner = answer_to(errors.LearnerRefused(), method="Put", mutates=True)
    assert (learner.code.name, learner.text) == ("FAILED_PRECONDITION", "etcdserver: rpc not supported for learner")
