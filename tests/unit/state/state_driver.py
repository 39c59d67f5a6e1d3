"""A state machine driven one command an entry, with requests in and responses or refusals out."""

from __future__ import annotations

from typing import Any, NamedTuple

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    DeleteRangeRequest,
    PutRequest,
    PutResponse,
    RangeRequest,
    RequestOp,
    TxnRequest,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.maintenance_pb2 import AlarmRequest
from raftkv._pb.state_pb2 import (
    LeaseCheckpoints,
    LeaseExpire,
    MemberAttributes,
    SessionExpire,
    SessionOpen,
)
from raftkv.state.commands import Command, CommandKind, Group, encode_session_call
from raftkv.state.keys import LEASE, LEASE_END, LEASE_ID, LEASE_KEY, LEASE_RECORD, LEASES_END
from raftkv.state.leases import LeaseRecord
from raftkv.state.machine import StateMachine
from raftkv.state.results import PutDone, Refusal, Refused, Result
from raftkv.state.store import KeyValueStore, MemoryStore
from raftkv.state.txn import is_read_only


class SessionCall(NamedTuple):
    """A call of a session, to be handed in like any request."""

    session: int
    seq: int
    kind: int
    payload: bytes
    first_incomplete: int = 0

    def SerializeToString(self) -> bytes:
        return encode_session_call(self.session, self.seq, self.first_incomplete, self.kind, self.payload)


KINDS = {
    PutRequest: CommandKind.PUT,
    DeleteRangeRequest: CommandKind.DELETE_RANGE,
    TxnRequest: CommandKind.TXN,
    CompactionRequest: CommandKind.COMPACT,
    MemberAttributes: CommandKind.MEMBER_ATTR,
    AlarmRequest: CommandKind.ALARM,
    LeaseGrantRequest: CommandKind.LEASE_GRANT,
    LeaseRevokeRequest: CommandKind.LEASE_REVOKE,
    LeaseExpire: CommandKind.LEASE_EXPIRE,
    LeaseCheckpoints: CommandKind.LEASE_CHECKPOINT,
    SessionOpen: CommandKind.SESSION_OPEN,
    SessionExpire: CommandKind.SESSION_EXPIRE,
    SessionCall: CommandKind.SESSION_CALL,
}


def command(request: Any, seq: int = 1) -> Command:
    return Command(seq, KINDS[type(request)], request.SerializeToString())


def group(*requests: Any) -> Group:
    return Group(1, 1, tuple(command(request, seq) for seq, request in enumerate(requests)))


def answer(result: Result) -> Any:
    """What the client gets of a result; of a put always the response, as from a node."""
    if not isinstance(result, PutDone):
        return result
    response = PutResponse()
    response.header.revision = result.revision
    return response


class Driver:
    """The machine with an entry a call; reads go where a node would send them."""

    def __init__(self, store: KeyValueStore | None = None) -> None:
        self.store = MemoryStore() if store is None else store
        self.machine = StateMachine(self.store)
        self.term = 1
        self.entries: list[tuple[int, int, list[Group]]] = []

    def apply(self, *requests: Any) -> list[Any]:
        """All requests in one entry."""
        entry = (self.machine.applied_index + 1, self.term, [group(*requests)])
        self.entries.append(entry)
        return [answer(result) for result in self.machine.apply(*entry)[0]]

    def call(self, request: Any) -> Any:
        """One request, as a node would: a Result, or for reads a response or a Refusal."""
        try:
            if isinstance(request, RangeRequest):
                return self.machine.range(request)
            if isinstance(request, TxnRequest) and is_read_only(request):
                return self.machine.read_txn(request)
        except Refused as refused:
            return refused.refusal
        return self.apply(request)[0]

    def put(self, key: bytes, value: bytes = b"", **fields: Any) -> Any:
        return self.call(PutRequest(key=key, value=value, **fields))

    def delete(self, key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
        return self.call(DeleteRangeRequest(key=key, range_end=range_end, **fields))

    def range(self, key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
        return self.call(RangeRequest(key=key, range_end=range_end, **fields))

    def txn(self, compare: Any = (), success: Any = (), failure: Any = ()) -> Any:
        return self.call(TxnRequest(compare=compare, success=map(op, success), failure=map(op, failure)))

    def compact(self, revision: int) -> Any:
        return self.call(CompactionRequest(revision=revision))

    def sweep(self, budget: int = 1 << 30) -> None:
        while self.machine.sweep(budget):
            pass

    def values(self, key: bytes = b"\0", range_end: bytes = b"\0", **fields: Any) -> dict[bytes, bytes] | Refusal:
        response = self.range(key, range_end, **fields)
        return response if isinstance(response, Refusal) else {kv.key: kv.value for kv in response.kvs}


def stored_leases(store: KeyValueStore) -> dict[int, LeaseRecord]:
    return {
        LEASE_ID.unpack(key[len(LEASE) :])[0]: LeaseRecord(*LEASE_RECORD.unpack(value))
        for key, value in store.iterate(LEASE, LEASE_END)
    }


def attachments(store: KeyValueStore) -> set[tuple[int, bytes]]:
    """The keys of each lease as the index has them."""
    found = set()
    for stored, _ in store.iterate(LEASE_KEY, LEASES_END):
        pair = stored[len(LEASE_KEY) :]
        found.add((LEASE_ID.unpack_from(pair)[0], pair[LEASE_ID.size :]))
    return found


def op(request: Any) -> RequestOp:
    if isinstance(request, RequestOp):
        return request
    names = {PutRequest: "put", DeleteRangeRequest: "delete_range", RangeRequest: "range", TxnRequest: "txn"}
    return RequestOp(**{f"request_{names[type(request)]}": request})
