"""The checks of what coordinating clients are promised are tested first: each breach is reported, by the right rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftkv._pb.state_pb2 import LeaseExpire, SessionExpire
from raftkv.sim.coordination import CoordinationModel, Held, Promises
from raftkv.sim.history import Answer, Kind, Operation, Violation
from raftkv.sim.requests import Body, Call, Close, Create, Grant, Open, Put, Remove, Request, Revoke
from raftkv.state.commands import CommandKind
from raftkv.state.results import RefusalCode

S = 1 << 20  # the first session of entry 1


def call(seq: int, body: Body, first_incomplete: int = 1, session: int = S) -> Call:
    return Call(session, seq, first_incomplete, body)


def write(value: bytes = b"1", token: int = 0) -> Put:
    return Put(b"a", value, (b"lock", token) if token else None)


# Good ones.


def test_holders_one_after_another() -> None:
    promises = Promises()
    promises.granted(1, 10.0, 2.0)
    promises.renewed(1, 11.0, 2.0, 11.5)
    first, second = Held(b"l", 1, 5), Held(b"l", 2, 7)
    promises.holds(first, 12.7, 11.5)
    promises.executed(call(1, write(token=5)), (6, None), alive=True)
    promises.lease_ended(1, True, 13.1)
    promises.renewed(1, 12.9, 0, 13.2)
    promises.granted(2, 11.0, 4.0)
    promises.holds(second, 14.8, 13.3)
    promises.holds(second, 15.8, 13.4)
    promises.executed(call(2, write(token=7)), (9, None), alive=True)
    promises.executed(call(3, write(token=5)), (9, RefusalCode.GUARD_FAILED), alive=True)
    promises.executed(call(1, write(token=5)), (6, None), alive=True)  # repeated, not done again
    promises.lease_ended(2, False, 14.0)  # revoked, as early as one likes


def test_calls_that_are_not_done() -> None:
    promises = Promises()
    promises.executed(call(1, write()), (2, None), alive=True)
    promises.executed(call(1, write()), (3, RefusalCode.STALE_SEQUENCE), alive=True)
    promises.executed(call(1, write()), (4, RefusalCode.SESSION_EXPIRED), alive=False)
    promises.acknowledged(S, 1, (2, None))
    promises.check_ledger(b"a", 3, 2, 1)


# Bad ones.


def done_again(promises: Promises) -> None:
    """X1"""
    promises.executed(call(1, write()), (2, None), alive=True)
    promises.executed(call(1, write()), (3, None), alive=True)


def two_calls_in_one_revision(promises: Promises) -> None:
    """X1"""
    promises.executed(call(1, write()), (2, None), alive=True)
    promises.executed(call(2, write()), (2, None), alive=True)


def done_more_often_than_asked(promises: Promises) -> None:
    """X1"""
    promises.check_ledger(b"a", 4, 2, 1)


def acknowledged_and_not_done(promises: Promises) -> None:
    """X1"""
    promises.check_ledger(b"a", 1, 2, 1)


def another_answer(promises: Promises) -> None:
    """X2"""
    promises.executed(call(1, Create(b"k", b"", 1)), (2, True), alive=True)
    promises.executed(call(1, Create(b"k", b"", 1)), (2, None), alive=True)


def acknowledged_otherwise(promises: Promises) -> None:
    """X2"""
    promises.executed(call(1, write()), (2, None), alive=True)
    promises.acknowledged(S, 1, (3, None))


def done_in_an_ended_session(promises: Promises) -> None:
    """X3"""
    promises.executed(call(1, write()), (2, None), alive=False)


def an_earlier_token_after_a_later_one(promises: Promises) -> None:
    """L1"""
    promises.holds(Held(b"l", 1, 5), 2.0, 1.0)
    promises.holds(Held(b"l", 2, 4), 4.0, 3.0)


def expired_before_its_time(promises: Promises) -> None:
    """L2"""
    promises.granted(1, 10.0, 2.0)
    promises.lease_ended(1, True, 11.9)


def expired_although_renewed(promises: Promises) -> None:
    """L2"""
    promises.granted(1, 10.0, 2.0)
    promises.renewed(1, 11.0, 2.0, 11.5)
    promises.lease_ended(1, True, 12.9)


def renewed_after_it_had_expired_too_early(promises: Promises) -> None:
    """L2"""
    promises.granted(1, 10.0, 2.0)
    promises.lease_ended(1, True, 12.5)
    promises.renewed(1, 11.0, 2.0, 13.5)


def renewed_although_it_is_gone(promises: Promises) -> None:
    """L3"""
    promises.granted(1, 10.0, 2.0)
    promises.lease_ended(1, False, 11.0)
    promises.renewed(1, 11.1, 2.0, 11.2)


def told_gone_while_it_lives(promises: Promises) -> None:
    """L5"""
    promises.granted(1, 10.0, 2.0)
    promises.renewed(1, 11.0, 0, 11.5)


def two_holders(promises: Promises) -> None:
    """L6"""
    promises.holds(Held(b"l", 1, 5), 4.0, 1.0)
    promises.holds(Held(b"l", 2, 6), 5.0, 3.0)


def a_holder_learns_that_it_still_holds_what_another_has(promises: Promises) -> None:
    """L6"""
    first = Held(b"l", 1, 5)
    promises.holds(first, 2.0, 1.0)
    promises.holds(Held(b"l", 2, 6), 5.0, 3.0)
    promises.holds(first, 4.0, 3.5)


def a_former_holder_writes(promises: Promises) -> None:
    """L7"""
    promises.executed(call(1, write(token=7)), (8, None), alive=True)
    promises.executed(call(2, write(token=5)), (9, None), alive=True)


BREACHES: list[Callable[[Promises], None]] = [
    done_again,
    two_calls_in_one_revision,
    done_more_often_than_asked,
    acknowledged_and_not_done,
    another_answer,
    acknowledged_otherwise,
    done_in_an_ended_session,
    an_earlier_token_after_a_later_one,
    expired_before_its_time,
    expired_although_renewed,
    renewed_after_it_had_expired_too_early,
    renewed_although_it_is_gone,
    told_gone_while_it_lives,
    two_holders,
    a_holder_learns_that_it_still_holds_what_another_has,
    a_former_holder_writes,
]


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_each_breach_is_reported(breach: Callable[[Promises], None]) -> None:
    with pytest.raises(Violation) as found:
        breach(Promises())
    assert found.value.rule == breach.__doc__


# The model, in sentences.


class Story:
    """A log told entry by entry."""

    def __init__(self) -> None:
        self.model = CoordinationModel()
        self._index = 0

    def does(self, request: Request) -> Answer:
        self._index += 1
        return self.model.apply(Operation(self._index, Kind.COMMAND, b"", request=request), self._index)


def test_a_call_is_done_once_until_its_client_has_the_answer() -> None:
    story = Story()
    assert story.does(Open(10_000)) == (0, (S, 10_000))
    assert story.does(call(1, write(b"1"))) == (2, None)
    assert story.does(call(2, write(b"2"))) == (3, None)
    assert story.does(call(1, write(b"1"))) == (2, None)
    assert story.does(call(3, write(b"3"), first_incomplete=2)) == (4, None)
    assert story.does(call(1, write(b"1"))) == (4, RefusalCode.STALE_SEQUENCE)
    assert story.model.lead(CommandKind.SESSION_EXPIRE, expire_session(2), 3) == (4, RefusalCode.STALE_TERM)
    assert story.does(call(2, write(b"2"))) == (3, None)
    assert story.does(Close(S)) == (4, None)
    assert story.does(call(2, write(b"2"))) == (4, RefusalCode.SESSION_EXPIRED)


def test_a_lease_takes_its_keys_along_and_guards_fall_with_them() -> None:
    story = Story()
    story.does(Open(10_000))
    assert story.does(call(1, Create(b"lock", b"", 1))) == (1, RefusalCode.LEASE_NOT_FOUND)
    assert story.does(call(2, Grant(1, 2000))) == (1, (1, 2000))
    assert story.does(call(3, Create(b"lock", b"", 1))) == (2, True)
    assert story.does(call(4, Create(b"lock", b"", 1))) == (2, (b"lock", b"", 2, 2, 1))
    assert story.does(call(5, write(token=2))) == (3, None)
    assert story.model.lead(CommandKind.LEASE_EXPIRE, expire_lease(1), 2) == (3, RefusalCode.STALE_TERM)
    assert story.model.lead(CommandKind.LEASE_EXPIRE, expire_lease(1), 1) == (4, None)
    assert story.model.ended == [(1, True)]
    assert story.does(call(6, write(token=2))) == (4, RefusalCode.GUARD_FAILED)
    assert story.does(call(7, Revoke(1))) == (4, RefusalCode.LEASE_NOT_FOUND)
    assert story.does(call(8, Grant(2, 2000))) == (4, (2, 2000))
    assert story.does(call(9, Create(b"lock", b"", 2))) == (5, True)
    assert story.does(call(10, Remove(b"lock", 2))) == (5, (b"lock", b"", 5, 5, 1))
    assert story.does(call(11, Remove(b"lock", 5))) == (6, True)
    assert story.does(call(12, Revoke(2))) == (6, None)


def expire_lease(lease: int) -> bytes:
    return LeaseExpire(proposer_term=1, ids=[lease]).SerializeToString()


def expire_session(term: int) -> bytes:
    return SessionExpire(proposer_term=term, sessions=[S]).SerializeToString()
