"""What coordinating clients ask for, as data, and its bytes: sessions, leases, places in a queue, guarded writes."""

from __future__ import annotations

from dataclasses import dataclass

from raftkv._pb.kv_pb2 import (
    Compare,
    DeleteRangeRequest,
    Guard,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.state_pb2 import SessionExpire, SessionOpen
from raftkv.state.commands import CommandKind, encode_session_call


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key; `guard` is the key of a lock and the token it must have."""

    key: bytes
    value: bytes
    guard: tuple[bytes, int] | None = None


@dataclass(frozen=True, slots=True)
class Create:
    """Write a key that does not exist, bound to a lease: the place of a waiter in the queue of a lock."""

    key: bytes
    value: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete a key if it was created at just this revision: an unlock."""

    key: bytes
    token: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Begin a lease."""

    lease: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """End a lease."""

    lease: int


Body = Put | Create | Remove | Grant | Revoke


@dataclass(frozen=True, slots=True)
class Call:
    """One sending of a mutation within a session."""

    session: int
    seq: int
    first_incomplete: int
    body: Body


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a session."""

    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Close:
    """End one's own session."""

    session: int


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Renew a lease: no command, but a question to whoever leads."""

    lease: int


Request = Call | Open | Close | KeepAlive


def encode(request: Request) -> tuple[CommandKind, bytes]:
    """The command that a request becomes."""
    if isinstance(request, Call):
        kind, payload = _encode_body(request.body)
        call = encode_session_call(request.session, request.seq, request.first_incomplete, kind, payload)
        return CommandKind.SESSION_CALL, call
    if isinstance(request, Open):
        return CommandKind.SESSION_OPEN, SessionOpen(ttl_ms=request.ttl_ms).SerializeToString()
    assert isinstance(request, Close), f"{request} is no command"
    return CommandKind.SESSION_EXPIRE, SessionExpire(sessions=[request.session]).SerializeToString()


def _encode_body(body: Body) -> tuple[CommandKind, bytes]:
    if isinstance(body, Grant):
        return CommandKind.LEASE_GRANT, LeaseGrantRequest(ID=body.lease, ttl_ms=body.ttl_ms).SerializeToString()
    if isinstance(body, Revoke):
        return CommandKind.LEASE_REVOKE, LeaseRevokeRequest(ID=body.lease).SerializeToString()
    if isinstance(body, Put):
        guards = [Guard(key=body.guard[0], token=body.guard[1])] if body.guard else []
        return CommandKind.PUT, PutRequest(key=body.key, value=body.value, guards=guards).SerializeToString()
    if isinstance(body, Create):
        wanted = 0
        change = RequestOp(request_put=PutRequest(key=body.key, value=body.value, lease=body.lease))
    else:
        wanted = body.token
        change = RequestOp(request_delete_range=DeleteRangeRequest(key=body.key))
    request = TxnRequest(
        compare=[Compare(key=body.key, target=Compare.CREATE, result=Compare.EQUAL, create_revision=wanted)],
        success=[change],
        failure=[RequestOp(request_range=RangeRequest(key=body.key))],
    )
    return CommandKind.TXN, request.SerializeToString()
