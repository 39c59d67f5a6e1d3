"""Rows 73 and 74 of the catalogue in the state machine: a call is done once, whatever happens between its repetitions.

A mutant is our own code with the bug put in; it must fail the check that is named for the row.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from state_driver import SessionCall

from raftkv._pb.kv_pb2 import Compare, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, TxnResponse
from raftkv._pb.state_pb2 import SessionExpire, SessionOpen, SessionOpened
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.machine import StateMachine
from raftkv.state.results import PutDone, Refusal, RefusalCode, Result, encode_result
from raftkv.state.sessions import ANSWERS_MAX, Kept, Sessions
from raftkv.state.store import KeyValueStore, MemoryStore

Check = Callable[[], None]
Patch = Callable[[pytest.MonkeyPatch], None]
Request = PutRequest | DeleteRangeRequest | TxnRequest

KINDS: dict[type, CommandKind] = {
    PutRequest: CommandKind.PUT,
    DeleteRangeRequest: CommandKind.DELETE_RANGE,
    TxnRequest: CommandKind.TXN,
    SessionOpen: CommandKind.SESSION_OPEN,
    SessionExpire: CommandKind.SESSION_EXPIRE,
    SessionCall: CommandKind.SESSION_CALL,
}


class Replica:
    """A state machine that can be restarted, and replaced by a copy of another."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.machine = StateMachine(self.store)

    def apply(self, request: Request | SessionOpen | SessionExpire | SessionCall) -> Result:
        group = Group(1, 1, (Command(1, KINDS[type(request)], request.SerializeToString()),))
        return self.machine.apply(self.machine.applied_index + 1, 1, (group,))[0][0]

    def open(self) -> int:
        opened = self.apply(SessionOpen())
        assert isinstance(opened, SessionOpened)
        return opened.session

    def go_on(self) -> None:
        pass

    def restart(self) -> None:
        self.machine = StateMachine(self.store)

    def install_snapshot(self) -> None:
        """What is stored goes to another node, byte by byte."""
        self.store = self.store.copy()
        self.restart()


LATER: list[Callable[[Replica], None]] = [Replica.go_on, Replica.restart, Replica.install_snapshot]


def call_of(session: int, seq: int, request: Request, first_incomplete: int = 1) -> SessionCall:
    return SessionCall(
        session=session,
        seq=seq,
        first_incomplete=first_incomplete,
        kind=KINDS[type(request)],
        payload=request.SerializeToString(),
    )


def increment(old: int) -> TxnRequest:
    """Of the key `n`, whose value is its version."""
    return TxnRequest(
        compare=[Compare(key=b"n", target=Compare.VERSION, version=old)],
        success=[RequestOp(request_put=PutRequest(key=b"n"))],
    )


def repeated_calls_are_done_once() -> None:
    """Row 73, X1 and X2: repeated at random, late and in any order, over restarts and snapshots."""
    for seed in range(30):
        rng = random.Random(seed)
        replica = Replica()
        session = replica.open()
        answers: dict[int, bytes] = {}
        done = seq = 0
        first_incomplete = 1
        for _ in range(150):
            choice = rng.random()
            if choice < 0.05:
                replica.restart()
            elif choice < 0.1:
                replica.install_snapshot()
            elif choice < 0.15:
                first_incomplete = rng.randint(first_incomplete, seq + 1)
                answers = {each: answer for each, answer in answers.items() if each >= first_incomplete}
            elif choice < 0.5 and answers:
                again = rng.choice(sorted(answers))
                result = replica.apply(call_of(session, again, increment(rng.randint(0, done)), first_incomplete))
                assert encode_result(result) == answers[again], "another answer"
            elif len(answers) < ANSWERS_MAX:
                seq += 1
                result = replica.apply(call_of(session, seq, increment(done), first_incomplete))
                assert isinstance(result, TxnResponse)
                assert result.succeeded, "its own repetition was faster"
                done += 1
                answers[seq] = encode_result(result)
        assert replica.machine.revision == done + 1, "done more than once"


def calls_of_an_ended_session_are_never_done() -> None:
    """Row 74, X3: whatever it had done before, and after restarts and snapshots."""
    for happens in LATER:
        replica = Replica()
        session = replica.open()
        other = replica.open()
        replica.apply(call_of(session, 1, PutRequest(key=b"a")))
        replica.apply(call_of(other, 1, PutRequest(key=b"a")))
        revision = replica.machine.revision
        replica.apply(SessionExpire(proposer_term=1, sessions=[session]))
        happens(replica)
        for seq in (1, 2, 3):
            for request in (PutRequest(key=b"a"), DeleteRangeRequest(key=b"a"), increment(0)):
                result = replica.apply(call_of(session, seq, request))
                assert isinstance(result, Refusal)
                assert result.code is RefusalCode.SESSION_EXPIRED
        assert replica.machine.revision == revision
        assert isinstance(replica.apply(call_of(other, 2, PutRequest(key=b"a"))), PutDone)


def what_is_acknowledged_is_not_done_again() -> None:
    """A repetition so late that its answer has been forgotten."""
    for happens in LATER:
        replica = Replica()
        session = replica.open()
        for seq in range(1, 6):
            replica.apply(call_of(session, seq, PutRequest(key=b"a"), first_incomplete=seq))
        happens(replica)
        revision = replica.machine.revision
        for seq in range(1, 5):
            result = replica.apply(call_of(session, seq, PutRequest(key=b"a"), first_incomplete=1))
            assert isinstance(result, Refusal)
            assert result.code is RefusalCode.STALE_SEQUENCE
        assert replica.machine.revision == revision


def keeps_no_answers(patch: pytest.MonkeyPatch) -> None:
    """M-73: each attempt is executed."""
    patch.setattr(Sessions, "keep", lambda self, *arguments: None)


def keeps_answers_in_memory_only(patch: pytest.MonkeyPatch) -> None:
    """M-73 after a restart: the table is not stored with the effects."""
    patch.setattr(Sessions, "flush", lambda self, overlay: self.changed.clear())


class _Everybody(dict[int, int]):
    def __contains__(self, session: object) -> bool:
        return True


def knows_every_session(patch: pytest.MonkeyPatch) -> None:
    """M-74: whoever calls has a session."""
    original = Sessions.__init__

    def init(self: Sessions, store: KeyValueStore) -> None:
        original(self, store)
        self.ttls = _Everybody(self.ttls)

    patch.setattr(Sessions, "__init__", init)


def forgets_what_was_acknowledged(patch: pytest.MonkeyPatch) -> None:
    original = Kept.forget

    def forget(self: Kept, first_incomplete: int) -> list[int]:
        gone = original(self, first_incomplete)
        self.acknowledged = 0
        return gone

    patch.setattr(Kept, "forget", forget)


CHECKS: list[Check] = [
    repeated_calls_are_done_once,
    calls_of_an_ended_session_are_never_done,
    what_is_acknowledged_is_not_done_again,
]
MUTANTS: list[tuple[Patch, Check]] = [
    (keeps_no_answers, repeated_calls_are_done_once),
    (keeps_answers_in_memory_only, repeated_calls_are_done_once),
    (knows_every_session, calls_of_an_ended_session_are_never_done),
    (forgets_what_was_acknowledged, what_is_acknowledged_is_not_done_again),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound(check: Check) -> None:
    check()


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda each: each.__name__)
def test_mutant_is_found(mutant: Patch, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
