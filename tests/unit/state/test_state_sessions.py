"""Exactly-once: a command of a session is done at most once over all time, and repeated it has the same answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_driver import KINDS, Driver, SessionCall, op

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    Compare,
    DeleteRangeRequest,
    PutRequest,
    PutResponse,
    RangeRequest,
    TxnRequest,
    TxnResponse,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.maintenance_pb2 import CORRUPT, NONE, NOSPACE, AlarmRequest, AlarmType
from raftkv._pb.state_pb2 import LeaseExpire, SessionExpire, SessionOpen, SessionOpened
from raftkv.state import sessions
from raftkv.state.attachments import Attachments
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.directories import Directories
from raftkv.state.keys import SESSION_ANSWERS, SESSION_ID, SESSION_RESULT, SESSIONS, SESSIONS_END
from raftkv.state.machine import StateMachine
from raftkv.state.overlay import Overlay
from raftkv.state.results import Done, PutDone, Refusal, RefusalCode, decode_result, encode_result
from raftkv.state.sessions import ANSWERS_BYTES_MAX, ANSWERS_MAX, TTL_MS_DEFAULT, TTL_MS_MAX, TTL_MS_MIN, SessionChange
from raftkv.state.store import MemoryStore
from raftkv.storage.state_store import StateStore


@pytest.fixture(params=["memory", "leveldb"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    if request.param == "memory":
        yield Driver()
        return
    store = StateStore.open(tmp_path / "state", create=True)
    yield Driver(store)
    store.close()


def opened(kv: Driver, ttl_ms: int = 0) -> int:
    response = kv.call(SessionOpen(ttl_ms=ttl_ms))
    assert isinstance(response, SessionOpened)
    return response.session


def call_of(session: int, seq: int, request: Any, done: int = 0) -> SessionCall:
    return SessionCall(
        session=session,
        seq=seq,
        first_incomplete=done,
        kind=KINDS[type(request)],
        payload=request.SerializeToString(),
    )


def call(kv: Driver, session: int, seq: int, request: Any, done: int = 0) -> Any:
    return kv.call(call_of(session, seq, request, done))


def code(result: Any) -> RefusalCode:
    assert isinstance(result, Refusal), result
    return result.code


def stored(kv: Driver) -> dict[bytes, bytes]:
    return dict(kv.store.iterate(SESSIONS, SESSIONS_END))


def kept(kv: Driver, session: int) -> list[int]:
    data = kv.store.get(SESSION_ANSWERS + SESSION_ID.pack(session))
    return [] if data is None else list(sessions.Kept.decode(session, data).records)


def test_ids_are_unique_and_made_of_the_log_alone(kv: Driver) -> None:
    first = [result.session for result in kv.apply(SessionOpen(), PutRequest(key=b"a"), SessionOpen()) if
             isinstance(result, SessionOpened)]  # fmt: skip
    second = [opened(kv), opened(kv)]
    assert first == [1 << 20, (1 << 20) + 1]
    assert second == [2 << 20, 3 << 20]
    kv.call(SessionExpire(sessions=first))
    assert opened(kv) not in first
    assert kv.machine.revision == 2


@pytest.mark.parametrize(
    ("asked", "given"),
    [(0, TTL_MS_DEFAULT), (-1, TTL_MS_MIN), (1, TTL_MS_MIN), (20_000, 20_000), (2**63 - 1, TTL_MS_MAX)],
)
def test_the_time_to_live_is_within_bounds(asked: int, given: int) -> None:
    kv = Driver()
    response = kv.call(SessionOpen(ttl_ms=asked))
    assert response.ttl_ms == given
    assert dict(kv.machine.sessions) == dict(StateMachine(kv.store).sessions) == {response.session: given}


@pytest.mark.parametrize("restart", [False, True])
def test_every_kind_of_answer_comes_back_as_it_was(kv: Driver, restart: bool) -> None:
    session = opened(kv)
    requests: list[Any] = [
        PutRequest(key=b"a", value=b"1"),
        PutRequest(key=b"a", value=b"2", prev_kv=True),
        PutRequest(key=b"a", lease=404),
        LeaseGrantRequest(ID=5, TTL=10),
        PutRequest(key=b"l", lease=5),
        TxnRequest(success=[op(RangeRequest(key=b"a")), op(PutRequest(key=b"a", value=b"3"))]),
        DeleteRangeRequest(key=b"a", prev_kv=True),
        CompactionRequest(revision=3),
        CompactionRequest(revision=3),
        LeaseRevokeRequest(ID=5),
        LeaseRevokeRequest(ID=5),
    ]
    first = [call(kv, session, seq, request) for seq, request in enumerate(requests, 1)]
    before = kv.machine.revision
    kv.put(b"between")
    if restart:
        kv.machine = StateMachine(kv.store)
    for seq in random.Random(1).sample(range(1, len(requests) + 1), len(requests)):
        again = call(kv, session, seq, requests[seq - 1])
        assert again == first[seq - 1]
        assert type(again) is type(first[seq - 1])
    assert kv.machine.revision == before + 1
    assert [isinstance(result, Refusal) for result in first].count(True) == 3


def test_row_73_a_repeated_transaction_is_done_once(kv: Driver) -> None:
    """Compare-and-set: the second try must not find its own first one and report that it failed (jetcd 0.8.2)."""
    session = opened(kv)
    kv.put(b"a", b"old")
    request = TxnRequest(
        compare=[Compare(key=b"a", target=Compare.VALUE, value=b"old")],
        success=[op(PutRequest(key=b"a", value=b"new"))],
    )
    first = call(kv, session, 1, request)
    assert first.succeeded
    revision = kv.machine.revision
    assert call(kv, session, 1, request) == first
    same_entry = kv.apply(call_of(session, 1, request), call_of(session, 1, request))
    assert same_entry == [first, first]
    assert kv.machine.revision == revision
    assert not call(kv, session, 2, request).succeeded


def test_row_71_a_repeated_unlock_never_takes_a_newer_lock(kv: Driver) -> None:
    """Unlock deletes what was created at its fence. Also without a session, where it is judged anew each time."""

    def unlock(fence: int) -> TxnRequest:
        return TxnRequest(
            compare=[Compare(key=b"lock", target=Compare.CREATE, create_revision=fence)],
            success=[op(DeleteRangeRequest(key=b"lock"))],
        )

    session = opened(kv)
    fence = kv.put(b"lock").header.revision
    first = call(kv, session, 1, unlock(fence))
    assert first.succeeded
    newer = kv.put(b"lock").header.revision
    assert newer > fence
    assert call(kv, session, 1, unlock(fence)) == first
    assert not kv.call(unlock(fence)).succeeded
    assert not call(kv, session, 2, unlock(fence)).succeeded
    assert kv.range(b"lock").kvs[0].create_revision == newer


def test_row_74_a_call_of_an_unknown_session_is_never_executed(kv: Driver) -> None:
    session = opened(kv)
    assert call(kv, session, 1, PutRequest(key=b"a", value=b"1")) == PutResponse(header={"revision": 2})  # type: ignore[arg-type]
    assert kv.call(SessionExpire(proposer_term=1, sessions=[session])) == Done(2)
    assert stored(kv) == {}
    for unknown in (session, session + 1, 0, 2**64 - 1):
        assert code(call(kv, unknown, 1, PutRequest(key=b"a", value=b"1"))) is RefusalCode.SESSION_EXPIRED
        assert code(call(kv, unknown, 2, PutRequest(key=b"b"))) is RefusalCode.SESSION_EXPIRED
    assert kv.machine.revision == 2
    assert stored(kv) == {}


def test_row_66_a_session_is_ended_by_its_client_or_by_the_leader_of_the_term(kv: Driver) -> None:
    one, two = opened(kv), opened(kv)
    kv.term = 5
    for term in (1, 4, 6):
        assert code(kv.call(SessionExpire(proposer_term=term, sessions=[one]))) is RefusalCode.STALE_TERM
    assert set(kv.machine.sessions) == {one, two}
    assert kv.call(SessionExpire(proposer_term=5, sessions=[one, 404, one])) == Done(1)
    assert kv.call(SessionExpire(sessions=[two])) == Done(1)
    assert not kv.machine.sessions


def test_what_is_acknowledged_is_forgotten_and_never_executed_again(kv: Driver) -> None:
    session = opened(kv)
    for seq in (1, 2, 4):
        call(kv, session, seq, PutRequest(key=b"a", value=b"%d" % seq))
    revision = kv.machine.revision
    call(kv, session, 9, PutRequest(key=b"b"), done=4)
    assert kept(kv, session) == [4, 9]
    for machine in (kv.machine, StateMachine(kv.store)):
        kv.machine = machine
        for seq in (1, 2, 3):  # 3 was never seen: the client gave it up
            again = call(kv, session, seq, PutRequest(key=b"a", value=b"again"))
            assert code(again) is RefusalCode.STALE_SEQUENCE
    assert code(call(kv, session, 7, PutRequest(key=b"a"), done=8)) is RefusalCode.STALE_SEQUENCE
    assert kv.machine.revision == revision + 1
    assert call(kv, session, 7, PutRequest(key=b"a", value=b"late"), done=2).header.revision == revision + 2
    assert call(kv, session, 4, PutRequest(key=b"a")).header.revision == revision


def test_acknowledging_far_ahead_costs_nothing_and_holds_after_a_restart(kv: Driver) -> None:
    session = opened(kv)
    for seq in (3, 1, 2):
        call(kv, session, seq, PutRequest(key=b"a"))
    call(kv, session, 2**64 - 1, PutRequest(key=b"a"), done=2**64 - 1)
    assert kept(kv, session) == [2**64 - 1]
    kv.machine = StateMachine(kv.store)
    assert code(call(kv, session, 2**64 - 2, PutRequest(key=b"a"))) is RefusalCode.STALE_SEQUENCE


def test_a_full_session_executes_nothing_until_answers_are_acknowledged(kv: Driver) -> None:
    session = opened(kv)
    for seq in range(1, ANSWERS_MAX + 1):
        call(kv, session, seq, PutRequest(key=b"a", value=b"%d" % seq))
    revision = kv.machine.revision
    request = PutRequest(key=b"b", value=b"late")
    full = call(kv, session, 100, request)
    assert code(full) is RefusalCode.SESSION_FULL
    assert kv.machine.revision == revision
    assert call(kv, session, 1, PutRequest(key=b"a")).header.revision == 2, "what was answered still is"
    kv.machine = StateMachine(kv.store)
    assert code(call(kv, session, 100, request)) is RefusalCode.SESSION_FULL
    done = call(kv, session, 100, request, done=2)
    assert done.header.revision == revision + 1
    assert call(kv, session, 100, request) == done


def test_a_full_session_remembers_what_a_refused_call_acknowledged(kv: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "ANSWERS_MAX", 3)
    session = opened(kv)
    for seq in (1, 7, 8, 9):
        call(kv, session, seq, PutRequest(key=b"a"), done=2 if seq == 9 else 0)
    assert code(call(kv, session, 20, PutRequest(key=b"b"), done=7)) is RefusalCode.SESSION_FULL
    for machine in (kv.machine, StateMachine(kv.store)):
        kv.machine = machine
        assert code(call(kv, session, 6, PutRequest(key=b"c"))) is RefusalCode.STALE_SEQUENCE
    assert kv.values().keys() == {b"a"}
    kv.call(SessionExpire(sessions=[session]))
    assert stored(kv) == {}


def test_a_session_keeps_bounded_bytes(kv: Driver) -> None:
    session = opened(kv)
    kv.put(b"big", b"x" * (ANSWERS_BYTES_MAX // 2))
    read = TxnRequest(success=[op(RangeRequest(key=b"big")), op(PutRequest(key=b"n"))])
    assert call(kv, session, 1, read).succeeded
    assert call(kv, session, 2, read).succeeded
    assert code(call(kv, session, 3, read)) is RefusalCode.SESSION_FULL
    assert call(kv, session, 3, read, done=3).succeeded
    assert sum(map(len, stored(kv).values())) < ANSWERS_BYTES_MAX


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("full_of", ["bytes", "answers"])
def test_a_full_session_still_executes_the_call_that_all_others_wait_for(
    kv: Driver, full_of: str, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls 2, 3, ... came through while call 1 had to wait: were it refused for their answers, it always would be."""
    monkeypatch.setattr(sessions, "ANSWERS_MAX", 4 if full_of == "answers" else ANSWERS_MAX)
    session = opened(kv)
    kv.put(b"big", b"x" * (ANSWERS_BYTES_MAX // 2 if full_of == "bytes" else 1))
    read = TxnRequest(success=[op(RangeRequest(key=b"big")), op(PutRequest(key=b"n"))])
    late = [seq for seq in range(2, 20) if isinstance(call(kv, session, seq, read, done=1), TxnResponse)]
    assert late == ([2, 3] if full_of == "bytes" else [2, 3, 4, 5])
    full = late[-1] + 1
    assert code(call(kv, session, full, read, done=1)) is RefusalCode.SESSION_FULL
    if restart:
        kv.machine = StateMachine(kv.store)
    first = call(kv, session, 1, read, done=1)
    assert first.succeeded
    assert call(kv, session, 1, read, done=1) == first
    assert code(call(kv, session, full, read, done=1)) is RefusalCode.SESSION_FULL, "the excess is one answer"
    assert call(kv, session, full, read, done=full).succeeded
    assert kept(kv, session) == [full]
    replayed = StateMachine(MemoryStore())
    for entry in kv.entries:
        replayed.apply(*entry)
    assert list(replayed.dump()) == list(kv.machine.dump())


def test_an_answer_too_large_to_keep_leaves_the_fact(kv: Driver) -> None:
    session = opened(kv)
    kv.put(b"big", b"x" * ANSWERS_BYTES_MAX)
    request = TxnRequest(success=[op(RangeRequest(key=b"big")), op(PutRequest(key=b"n", value=b"1"))])
    first = call(kv, session, 1, request)
    assert len(first.responses[0].response_range.kvs[0].value) == ANSWERS_BYTES_MAX
    again = call(kv, session, 1, request)
    assert again == Refusal(RefusalCode.RESULT_NOT_KEPT, first.header.revision, -1)
    assert kv.machine.revision == first.header.revision
    assert call(kv, session, 2, PutRequest(key=b"a")).header.revision == first.header.revision + 1


def test_large_answers_lie_apart_and_go_with_the_small_ones(kv: Driver) -> None:
    session = opened(kv)
    first = [call(kv, session, seq, PutRequest(key=b"a", value=b"x" * 255, prev_kv=True)) for seq in range(1, 6)]

    def large() -> list[bytes]:
        return [key[-1:] for key in stored(kv) if key.startswith(SESSION_RESULT)]

    assert large() == [b"\2", b"\3", b"\4", b"\5"], "the first had no value before it"
    for machine in (kv.machine, StateMachine(kv.store)):
        kv.machine = machine
        assert [call(kv, session, seq, PutRequest(key=b"b")) for seq in range(1, 6)] == first
    call(kv, session, 6, PutRequest(key=b"b"), done=4)
    assert large() == [b"\4", b"\5"]
    kv.call(SessionExpire(sessions=[session]))
    assert stored(kv) == {}


def test_sessions_beyond_those_in_memory_are_read_again(kv: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_LOADED_MAX", 2)
    ids = [opened(kv) for _ in range(5)]
    first = [call(kv, session, 3, PutRequest(key=b"%d" % session)) for session in ids]
    assert kv.apply(*(call_of(session, 3, PutRequest(key=b"again")) for session in ids)) == first
    for session in ids:
        call(kv, session, 4, PutRequest(key=b"%d" % session), done=4)
    assert [code(call(kv, session, 3, PutRequest(key=b"x"))) for session in ids] == [RefusalCode.STALE_SEQUENCE] * 5
    assert kept(kv, ids[0]) == [4]


def test_calls_of_many_sessions_in_one_write(kv: Driver) -> None:
    """Several calls of a session are one value in the store; a session may end in the entry of its calls."""
    one, two = opened(kv), opened(kv)
    requests = [call_of(session, seq, PutRequest(key=b"%d" % seq)) for seq in (2, 1, 3) for session in (one, two)]
    first = kv.apply(*requests, SessionExpire(sessions=[two]))
    assert kept(kv, one) == [1, 2, 3]
    assert kept(kv, two) == []
    assert kv.apply(*requests[::2]) == first[:-1:2]
    assert code(kv.call(requests[1])) is RefusalCode.SESSION_EXPIRED


def test_too_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 3)
    kv = Driver()
    ids = [opened(kv) for _ in range(3)]
    assert code(kv.call(SessionOpen())) is RefusalCode.TOO_MANY_SESSIONS
    assert set(kv.machine.sessions) == set(ids), "no living session makes room"
    kv.call(SessionExpire(sessions=ids[:1]))
    assert opened(kv) not in ids


@pytest.mark.parametrize("kind", [*(set(CommandKind) - sessions.CALLABLE), 0, 7, 255])
def test_what_is_no_call_is_refused_and_leaves_no_trace(kind: int) -> None:
    kv = Driver()
    session = opened(kv)
    before = stored(kv)
    inner = call_of(session, 5, PutRequest(key=b"a")).SerializeToString()
    result = kv.call(SessionCall(session=session, seq=1, kind=kind, payload=inner))
    assert code(result) is RefusalCode.MALFORMED
    assert stored(kv) == before
    assert kv.values() == {}
    assert code(call(kv, session, 0, PutRequest(key=b"a"))) is RefusalCode.MALFORMED


@pytest.mark.parametrize("size", [0, 1, 8, 24])
def test_a_call_that_is_cut_off_is_refused_and_leaves_no_trace(kv: Driver, size: int) -> None:
    """Short of its own numbers it names no session to keep anything in; with them, it is a request that is none."""
    session = opened(kv)
    before = stored(kv)
    whole = call_of(session, 1, PutRequest(key=b"a", value=b"1")).SerializeToString()
    entry = (kv.machine.applied_index + 1, 1, [Group(1, 1, (Command(1, CommandKind.SESSION_CALL, whole[:size]),))])
    ((result,),) = kv.machine.apply(*entry)
    assert result == Refusal(RefusalCode.MALFORMED, 1, -1)
    assert stored(kv) == before
    assert kv.values() == {}
    assert call(kv, session, 1, PutRequest(key=b"a", value=b"1")).header.revision == 2


def test_a_payload_that_is_no_request_is_refused_and_kept_as_such(kv: Driver) -> None:
    session = opened(kv)
    bad = SessionCall(session=session, seq=1, kind=CommandKind.PUT, payload=b"\xff")
    assert code(kv.call(bad)) is RefusalCode.MALFORMED
    assert code(call(kv, session, 1, PutRequest(key=b"a"))) is RefusalCode.MALFORMED
    assert kv.values() == {}


@pytest.mark.parametrize("kind", [NOSPACE, CORRUPT])
def test_an_alarm_refuses_new_calls_and_tells_of_old_ones(kv: Driver, kind: AlarmType.ValueType) -> None:
    session = opened(kv)
    first = call(kv, session, 1, PutRequest(key=b"a"))
    kv.call(AlarmRequest(action=AlarmRequest.ACTIVATE, memberID=1, alarm=kind))
    assert call(kv, session, 1, PutRequest(key=b"a")) == first
    expected = RefusalCode.NO_SPACE if kind == NOSPACE else RefusalCode.CORRUPT
    refused = call(kv, session, 2, PutRequest(key=b"b"))
    assert code(refused) is expected
    kv.call(AlarmRequest(action=AlarmRequest.DEACTIVATE, memberID=1, alarm=NONE))
    assert call(kv, session, 2, PutRequest(key=b"b")) == refused, "a number stands for one answer for ever"
    assert kv.values().keys() == {b"a"}


def test_events_are_gathered_from_the_first_question_on(kv: Driver) -> None:
    one = opened(kv)
    assert kv.machine.take_session_events() == []
    two = opened(kv)
    call(kv, two, 1, PutRequest(key=b"a"))
    call(kv, two, 1, PutRequest(key=b"a"))
    call(kv, 404, 1, PutRequest(key=b"a"))
    call(kv, one, 1, PutRequest(key=b"a"))
    kv.call(SessionExpire(sessions=[one]))
    assert kv.machine.take_session_events() == [
        (SessionChange.OPENED, two),
        (SessionChange.USED, two),
        (SessionChange.USED, one),
        (SessionChange.EXPIRED, one),
    ]
    assert kv.machine.take_session_events() == []
    call(kv, two, 2, PutRequest(key=b"a"))
    assert kv.machine.take_session_events() == [(SessionChange.USED, two)]


def test_sessions_count_in_the_hash_and_in_the_dump() -> None:
    def history(*requests: Any) -> StateMachine:
        driver = Driver()
        driver.apply(*requests)
        return driver.machine

    session = 1 << 20
    put = PutRequest(key=b"a")
    machines = [
        history(),
        history(SessionOpen()),
        history(SessionOpen(ttl_ms=20_000)),
        history(SessionOpen(), put),
        history(SessionOpen(), call_of(session, 1, put)),
        history(SessionOpen(), call_of(session, 2, put)),
        history(SessionOpen(), call_of(session, 2, put, done=1)),
        history(SessionOpen(), SessionExpire(sessions=[session])),
    ]
    assert len({machine.rolling_hash for machine in machines}) == len(machines)
    dumps = [[part for part in machine.dump() if part.startswith(b"session ")] for machine in machines]
    assert [len(dump) for dump in dumps] == [0, 1, 1, 1, 2, 2, 2, 0]


def test_the_answer_of_a_put_is_its_revision_and_comes_back_after_a_restart_and_from_a_snapshot() -> None:
    kv = Driver()
    session = opened(kv)
    request = call_of(session, 1, PutRequest(key=b"a", value=b"1"))
    group = Group(1, 1, (Command(1, CommandKind.SESSION_CALL, request.SerializeToString()),))
    elsewhere = MemoryStore()
    ((first,),) = kv.machine.apply(2, 1, [group])
    assert first == PutDone(2)
    elsewhere.write(kv.store.iterate(b"", None), ())
    kv.put(b"between")
    for machine in (kv.machine, StateMachine(kv.store), StateMachine(elsewhere)):
        assert machine.apply(machine.applied_index + 1, 1, [group]) == [[first]]
        assert machine.range(RangeRequest(key=b"a")).kvs[0].version == 1


@given(seq=st.integers(1, 2**64 - 1), revision=st.integers(2, 2**63 - 1))
def test_the_answer_of_a_put_is_kept_as_any_answer_would_be(seq: int, revision: int) -> None:
    """It is packed in one step, which must not show: what is on disk is the number, the size, the encoded result."""
    encoded = encode_result(PutDone(revision))
    kept = sessions.Kept(1)
    overlay = Overlay(MemoryStore(), 1, Directories(), Attachments())
    table = sessions.Sessions(MemoryStore())
    table._kept[1] = kept
    table.keep(overlay, 1, seq, PutDone(revision), -1)
    other = sessions.Kept(1)
    assert other.keep(seq, encoded) == kept.records[seq]
    assert (other.bytes, other.encode()) == (kept.bytes, kept.encode())
    again = sessions.Kept.decode(1, kept.encode())
    assert (again.records, again.bytes, again.large) == (kept.records, kept.bytes, kept.large)


@given(st.data())
def test_results_come_back_from_their_bytes(data: st.DataObject) -> None:
    numbers = st.integers(-1, 2**63 - 1)
    codes = st.sampled_from(RefusalCode)
    result = data.draw(
        st.builds(Refusal, codes, numbers, numbers) | st.builds(Done, numbers) | st.builds(PutDone, numbers)
    )
    assert decode_result(encode_result(result)) == result


SEED = st.integers(0, 2**32 - 1)


@given(seed=SEED, steps=st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_x1_x2_calls_are_done_at_most_once_and_answered_alike(seed: int, steps: int) -> None:
    """Lost answers, repeats, late arrivals, crashes, restarts: the version of a key tells of a second execution."""
    choose = random.Random(seed)
    kv = Driver()
    ids = [opened(kv) for _ in range(3)]
    ended: set[int] = set()
    answers: dict[tuple[int, int], Any] = {}
    acknowledged = dict.fromkeys(ids, 1)
    executed: dict[tuple[int, int], int] = {}
    for _ in range(steps):
        session = choose.choice(ids)
        seq = max(1, acknowledged[session] + choose.randint(-2, 6))
        done = choose.choice((0, acknowledged[session], min(seq, acknowledged[session] + 1)))
        request = PutRequest(key=b"%d/%d" % (session, seq), value=b"x", prev_kv=True)
        durable = kv.store.copy() if isinstance(kv.store, MemoryStore) else None
        before = kv.machine.revision
        result = call(kv, session, seq, request, done)
        if session in ended:
            assert code(result) is RefusalCode.SESSION_EXPIRED
        elif (session, seq) in answers and seq >= acknowledged[session]:
            assert result == answers[session, seq]
        elif seq < max(acknowledged[session], done):
            assert code(result) is RefusalCode.STALE_SEQUENCE
        else:
            assert isinstance(result, PutResponse)
            assert not result.HasField("prev_kv")
            answers[session, seq] = result
            executed[session, seq] = executed.get((session, seq), 0) + 1
            acknowledged[session] = max(acknowledged[session], done)
            before += 1
        assert kv.machine.revision == before
        if choose.random() < 0.15:
            hash_before = kv.machine.rolling_hash
            if durable is not None and choose.random() < 0.5:  # a crash: the last write is lost, the log is not
                kv.store = durable
                kv.machine = StateMachine(durable)
                kv.machine.apply(*kv.entries[-1])
            else:
                kv.machine = StateMachine(kv.store)
            assert kv.machine.rolling_hash == hash_before
        if choose.random() < 0.02:
            kv.call(SessionExpire(proposer_term=1, sessions=[session]))
            ended.add(session)
    assert all(count == 1 for count in executed.values())
    assert {kv_.version for kv_ in kv.range(b"\0", b"\0").kvs} <= {1}
    replayed = StateMachine(MemoryStore())
    for entry in kv.entries:
        replayed.apply(*entry)
    assert list(replayed.dump()) == list(kv.machine.dump())


def test_leases_within_sessions_and_expiry_in_one_entry() -> None:
    kv = Driver()
    session = opened(kv)
    results = kv.apply(
        call_of(session, 1, LeaseGrantRequest(ID=9, TTL=5)),
        call_of(session, 2, PutRequest(key=b"a", lease=9)),
        LeaseExpire(proposer_term=1, ids=[9]),
        call_of(session, 1, LeaseGrantRequest(ID=10, TTL=5)),  # asked through another node, which chose another id
        call_of(session, 2, PutRequest(key=b"a", lease=9)),
    )
    assert results[3] == results[0]
    assert results[4] == results[1]
    assert kv.values() == {}
    assert not kv.machine.leases


def test_the_groups_of_an_entry_share_the_numbering_of_sessions() -> None:
    machine = StateMachine(MemoryStore())
    opening = Command(1, CommandKind.SESSION_OPEN, b"")
    results = machine.apply(1, 1, [Group(1, 1, (opening,)), Group(2, 1, (opening, opening))])
    ids = [result.session for group in results for result in group if isinstance(result, SessionOpened)]
    assert ids == [1 << 20, 1 << 20 | 1, 1 << 20 | 2]
