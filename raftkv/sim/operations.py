"""Client operations as the state machine knows them: requests out of operations, comparable answers out of results."""

from __future__ import annotations

from raftkv._pb.common_pb2 import KeyValue
from raftkv._pb.kv_pb2 import (
    Compare,
    DeleteRangeRequest,
    DeleteRangeResponse,
    PutRequest,
    PutResponse,
    RangeRequest,
    RequestOp,
    TxnRequest,
    TxnResponse,
)
from raftkv._pb.lease_pb2 import LeaseGrantResponse, LeaseRevokeResponse
from raftkv._pb.state_pb2 import SessionOpened
from raftkv.sim.history import Answer, Item, Kind, Operation
from raftkv.sim.requests import encode
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.results import Done, PutDone, Refusal

_COMMAND = {Kind.PUT: CommandKind.PUT, Kind.DELETE: CommandKind.DELETE_RANGE, Kind.SWAP: CommandKind.TXN}


def command(operation: Operation) -> tuple[CommandKind, bytes]:
    """The command that a write becomes; unlike any other's, for it ends with its number as an unknown field."""
    if operation.request is not None:
        kind, data = encode(operation.request)
    else:
        kind, data = _COMMAND[operation.kind], _payload(operation)
    return kind, data + _varint(1000 << 3) + _varint(operation.id)


def _payload(operation: Operation) -> bytes:
    key, value = operation.key, operation.value
    request: PutRequest | DeleteRangeRequest | TxnRequest
    if operation.kind is Kind.PUT:
        request = PutRequest(key=key, value=value, prev_kv=operation.wants_previous)
    elif operation.kind is Kind.DELETE:
        request = DeleteRangeRequest(key=key, prev_kv=True)
    else:
        request = TxnRequest(
            compare=[Compare(key=key, target=Compare.VERSION, result=Compare.EQUAL, version=operation.expected)],
            success=[RequestOp(request_put=PutRequest(key=key, value=value))],
            failure=[RequestOp(request_range=RangeRequest(key=key))],
        )
    return request.SerializeToString()


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _item(kv: KeyValue) -> Item:
    return kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version


def answer(result: object) -> Answer:
    """What the client of a write sees."""
    if isinstance(result, PutDone):
        return result.revision, None
    if isinstance(result, PutResponse):
        return result.header.revision, _item(result.prev_kv) if result.HasField("prev_kv") else None
    if isinstance(result, DeleteRangeResponse):
        assert result.deleted == len(result.prev_kvs), "a deleted key comes with its value"
        return result.header.revision, _item(result.prev_kvs[0]) if result.prev_kvs else None
    if not isinstance(result, TxnResponse):
        return _answer_of_leases_and_sessions(result)
    if result.succeeded:
        return result.header.revision, True
    kvs = result.responses[0].response_range.kvs
    return result.header.revision, _item(kvs[0]) if kvs else None


def _answer_of_leases_and_sessions(result: object) -> Answer:
    if isinstance(result, Refusal):
        return result.revision, result.code
    if isinstance(result, SessionOpened):
        return 0, (result.session, result.ttl_ms)
    if isinstance(result, LeaseGrantResponse):
        return result.header.revision, (result.ID, result.ttl_ms)
    if isinstance(result, LeaseRevokeResponse):
        return result.header.revision, None
    assert isinstance(result, Done), f"the state machine says {result}"
    return result.revision, None


def read(machine: StateMachine, operation: Operation) -> Answer:
    """Serve a read."""
    if operation.kind is Kind.READ:
        response = machine.range(RangeRequest(key=operation.key))
        return response.header.revision, _item(response.kvs[0]) if response.kvs else None
    response = machine.range(RangeRequest(key=b"\0", range_end=b"\0"))
    return response.header.revision, tuple(map(_item, response.kvs))
