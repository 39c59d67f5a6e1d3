"""Alarms are replicated state: what they stop is the same on every node, and a restart does not forget them."""

from __future__ import annotations

import pytest

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    CompactionResponse,
    DeleteRangeRequest,
    DeleteRangeResponse,
    PutRequest,
    RequestOp,
    TxnRequest,
    TxnResponse,
)
from raftkv._pb.maintenance_pb2 import CORRUPT, NONE, NOSPACE, AlarmRequest, AlarmType
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.machine import StateMachine
from raftkv.state.results import Done, PutDone, Refusal, RefusalCode, Result
from raftkv.state.store import MemoryStore

PUT = (CommandKind.PUT, PutRequest(key=b"k", value=b"v"))
DELETE = (CommandKind.DELETE_RANGE, DeleteRangeRequest(key=b"k"))
TXN_PUT = (
    CommandKind.TXN,
    TxnRequest(failure=[RequestOp(request_txn=TxnRequest(success=[RequestOp(request_put=PutRequest(key=b"t"))]))]),
)
TXN_DELETE = (CommandKind.TXN, TxnRequest(success=[RequestOp(request_delete_range=DeleteRangeRequest(key=b"k"))]))
COMPACT = (CommandKind.COMPACT, CompactionRequest(revision=1))

Message = PutRequest | DeleteRangeRequest | TxnRequest | CompactionRequest | AlarmRequest


def alarm(
    action: AlarmRequest.AlarmAction.ValueType, member: int, kind: AlarmType.ValueType
) -> tuple[CommandKind, Message]:
    return CommandKind.ALARM, AlarmRequest(action=action, memberID=member, alarm=kind)


def run(machine: StateMachine, *commands: tuple[CommandKind, Message]) -> list[Result]:
    batch = tuple(Command(seq, kind, message.SerializeToString()) for seq, (kind, message) in enumerate(commands))
    return machine.apply(machine.applied_index + 1, 1, (Group(7, 1, batch),))[0]


def code(result: Result) -> RefusalCode:
    assert isinstance(result, Refusal)
    return result.code


def test_no_space_refuses_what_needs_space_and_lets_room_be_made() -> None:
    machine = StateMachine(MemoryStore())
    _, done, put, txn_put, delete, txn_delete, compact = run(
        machine, PUT, alarm(AlarmRequest.ACTIVATE, 7, NOSPACE), PUT, TXN_PUT, DELETE, TXN_DELETE, COMPACT
    )
    assert isinstance(done, Done)
    assert code(put) is RefusalCode.NO_SPACE
    assert code(txn_put) is RefusalCode.NO_SPACE
    assert isinstance(delete, DeleteRangeResponse)
    assert delete.deleted == 1
    assert isinstance(txn_delete, TxnResponse)
    assert isinstance(compact, CompactionResponse)
    run(machine, alarm(AlarmRequest.DEACTIVATE, 7, NOSPACE))
    assert isinstance(run(machine, PUT)[0], PutDone)


def test_corrupt_refuses_everything_but_its_own_end() -> None:
    machine = StateMachine(MemoryStore())
    run(machine, alarm(AlarmRequest.ACTIVATE, 7, CORRUPT))
    assert {code(result) for result in run(machine, PUT, DELETE, TXN_PUT, TXN_DELETE, COMPACT)} == {RefusalCode.CORRUPT}
    assert machine.revision == 1
    run(machine, alarm(AlarmRequest.DEACTIVATE, 0, NONE))
    assert isinstance(run(machine, PUT)[0], PutDone)


def test_alarms_survive_a_restart_and_count_in_the_hash() -> None:
    store = MemoryStore()
    machine = StateMachine(store)
    other = StateMachine(MemoryStore())
    run(machine, alarm(AlarmRequest.ACTIVATE, 7, NOSPACE), alarm(AlarmRequest.ACTIVATE, 9, CORRUPT))
    run(other, alarm(AlarmRequest.ACTIVATE, 7, NOSPACE), alarm(AlarmRequest.ACTIVATE, 9, NOSPACE))
    assert StateMachine(store).alarms == machine.alarms == {(7, NOSPACE), (9, CORRUPT)}
    assert machine.rolling_hash != other.rolling_hash
    assert list(machine.dump()) != list(other.dump())


@pytest.mark.parametrize(
    ("member", "kind", "left"),
    [
        (7, NOSPACE, {(7, CORRUPT), (9, NOSPACE)}),
        (7, NONE, {(9, NOSPACE)}),
        (0, NOSPACE, {(7, CORRUPT)}),
        (0, NONE, set()),
        (5, NONE, {(7, NOSPACE), (7, CORRUPT), (9, NOSPACE)}),
    ],
)
def test_disarming_takes_all_that_match(member: int, kind: AlarmType.ValueType, left: set[tuple[int, int]]) -> None:
    machine = StateMachine(MemoryStore())
    on = AlarmRequest.ACTIVATE
    run(machine, alarm(on, 7, NOSPACE), alarm(on, 7, CORRUPT), alarm(on, 9, NOSPACE))
    run(machine, alarm(AlarmRequest.DEACTIVATE, member, kind))
    assert machine.alarms == left
    assert StateMachine(machine.store).alarms == left


def test_what_is_no_alarm_is_refused() -> None:
    machine = StateMachine(MemoryStore())
    results = run(
        machine,
        alarm(AlarmRequest.ACTIVATE, 7, NONE),
        (CommandKind.ALARM, AlarmRequest(action=9, alarm=NOSPACE)),  # type: ignore[arg-type]
        (CommandKind.ALARM, AlarmRequest(action=AlarmRequest.ACTIVATE, alarm=9)),  # type: ignore[arg-type]
    )
    assert {code(result) for result in results} == {RefusalCode.MALFORMED}
    assert machine.alarms == frozenset()
