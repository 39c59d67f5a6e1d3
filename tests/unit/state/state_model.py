"""The key space, its leases and sessions as a child would write them: a whole dict for each revision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from state_driver import SessionCall

from raftkv._pb.common_pb2 import KeyValue
from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    CompactionResponse,
    Compare,
    DeleteRangeRequest,
    DeleteRangeResponse,
    PutRequest,
    PutResponse,
    RangeRequest,
    RangeResponse,
    TxnRequest,
    TxnResponse,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse
from raftkv._pb.state_pb2 import LeaseCheckpoints, LeaseExpire, SessionExpire, SessionOpen, SessionOpened
from raftkv.state.commands import CommandKind
from raftkv.state.results import Done, RefusalCode

CALLS: dict[int, Any] = {
    CommandKind.PUT: PutRequest,
    CommandKind.DELETE_RANGE: DeleteRangeRequest,
    CommandKind.TXN: TxnRequest,
    CommandKind.COMPACT: CompactionRequest,
    CommandKind.LEASE_GRANT: LeaseGrantRequest,
    CommandKind.LEASE_REVOKE: LeaseRevokeRequest,
}


@dataclass(frozen=True)
class Item:
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0

    def message(self, key: bytes, keys_only: bool = False) -> KeyValue:
        return KeyValue(
            key=key,
            value=b"" if keys_only else self.value,
            create_revision=self.create_revision,
            mod_revision=self.mod_revision,
            version=self.version,
            lease=self.lease,
        )


class Refuse(Exception):
    def __init__(self, code: RefusalCode) -> None:
        self.code = code


def inside(key: bytes, start: bytes, end: bytes) -> bool:
    if not end:
        return key == start
    return key >= start and (end == b"\0" or key < end)


@dataclass
class Session:
    acknowledged: int = 0
    answers: dict[int, Any] = field(default_factory=dict)


@dataclass
class Model:
    revision: int = 1
    compact_revision: int = -1
    items: dict[bytes, Item] = field(default_factory=dict)
    past: dict[int, dict[bytes, Item]] = field(default_factory=dict)
    events: list[tuple[int, str, bytes, Item | None]] = field(default_factory=list)
    changed: bool = False
    leases: dict[int, tuple[int, int]] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    entry: int = 0
    opened: int = 0
    term: int = 7

    def __post_init__(self) -> None:
        self.past[1] = {}

    def begin(self, entry: int) -> None:
        """What follows is in this entry of the log."""
        self.entry = entry
        self.opened = 0

    def call(self, request: Any) -> Any:
        """The response, or the code of the refusal."""
        if isinstance(request, SessionCall):
            return self.session_call(request)
        if isinstance(request, SessionOpen | SessionExpire):
            return self.session_open() if isinstance(request, SessionOpen) else self.session_expire(request)
        if isinstance(request, LeaseExpire | LeaseCheckpoints):
            if request.proposer_term != self.term:
                return RefusalCode.STALE_TERM
            return self.expire(request) if isinstance(request, LeaseExpire) else self.checkpoint(request)
        self.changed = False
        before = dict(self.items), len(self.events)
        try:
            if isinstance(request, PutRequest | DeleteRangeRequest | TxnRequest):
                self.guard(request)
            if isinstance(request, TxnRequest):
                response: Any = self.txn(request, iter(self.check(request)))
            else:
                response = {
                    RangeRequest: self.range,
                    PutRequest: self.put,
                    DeleteRangeRequest: self.delete,
                    CompactionRequest: self.compact,
                    LeaseGrantRequest: self.grant,
                    LeaseRevokeRequest: self.revoke,
                }[type(request)](request)
        except Refuse as refuse:
            self.items = before[0]
            del self.events[before[1] :]
            return refuse.code
        self.commit()
        response.header.revision = self.revision
        return response

    def commit(self) -> None:
        self.revision += self.changed
        self.changed = False
        self.past[self.revision] = dict(self.items)

    def guard(self, request: Any) -> None:
        for guard in request.guards:
            if guard.key not in self.items or self.items[guard.key].create_revision != guard.token:
                raise Refuse(RefusalCode.GUARD_FAILED)

    def grant(self, request: LeaseGrantRequest) -> LeaseGrantResponse:
        if request.ID in self.leases:
            raise Refuse(RefusalCode.LEASE_EXISTS)
        ttl_ms = max(request.ttl_ms or request.TTL * 1000, 2000)
        self.leases[request.ID] = ttl_ms, 0
        return LeaseGrantResponse(ID=request.ID, TTL=ttl_ms // 1000, ttl_ms=ttl_ms)

    def revoke(self, request: LeaseRevokeRequest) -> LeaseRevokeResponse:
        if request.ID not in self.leases:
            raise Refuse(RefusalCode.LEASE_NOT_FOUND)
        self.end(request.ID, "delete")
        return LeaseRevokeResponse()

    def end(self, lease: int, kind: str) -> None:
        del self.leases[lease]
        for key in sorted(key for key, item in self.items.items() if item.lease == lease):
            del self.items[key]
            self.changed = True
            self.events.append((self.now, kind, key, None))

    def expire(self, request: LeaseExpire) -> Done:
        for lease in request.ids:
            if lease in self.leases:
                self.end(lease, "expire")
                self.commit()
        return Done(self.revision)

    def checkpoint(self, request: LeaseCheckpoints) -> Done:
        for each in request.leases:
            if each.id in self.leases:
                ttl_ms = self.leases[each.id][0]
                self.leases[each.id] = ttl_ms, each.remaining_ms if 0 < each.remaining_ms < ttl_ms else 0
        return Done(self.revision)

    def session_open(self) -> SessionOpened:
        session = (self.entry << 20) + self.opened
        self.opened += 1
        self.sessions[session] = Session()
        return SessionOpened(session=session, ttl_ms=3_600_000)

    def session_expire(self, request: SessionExpire) -> Any:
        if request.proposer_term not in (0, self.term):
            return RefusalCode.STALE_TERM
        for session in request.sessions:
            self.sessions.pop(session, None)
        return Done(self.revision)

    def session_call(self, call: SessionCall) -> Any:
        session = self.sessions.get(call.session)
        if session is None:
            return RefusalCode.SESSION_EXPIRED
        if call.seq in session.answers:
            return session.answers[call.seq]
        if call.seq < max(session.acknowledged, call.first_incomplete):
            return RefusalCode.STALE_SEQUENCE
        session.acknowledged = max(session.acknowledged, call.first_incomplete)
        for seq in [seq for seq in session.answers if seq < session.acknowledged]:
            del session.answers[seq]
        answer = self.call(CALLS[call.kind].FromString(call.payload))
        session.answers[call.seq] = answer
        return answer

    @property
    def now(self) -> int:
        return self.revision + self.changed

    def put(self, request: PutRequest) -> PutResponse:
        response = PutResponse()
        if request.lease and request.lease not in self.leases:
            raise Refuse(RefusalCode.LEASE_NOT_FOUND)
        old = self.items.get(request.key)
        if old is None and (request.ignore_value or request.ignore_lease):
            raise Refuse(RefusalCode.KEY_NOT_FOUND)
        if old is not None and request.prev_kv:
            response.prev_kv.CopyFrom(old.message(request.key))
        self.changed = True
        new = Item(request.value, self.now, self.now, 1, request.lease)
        if old is not None:
            value = old.value if request.ignore_value else request.value
            lease = old.lease if request.ignore_lease else request.lease
            new = replace(new, value=value, create_revision=old.create_revision, version=old.version + 1, lease=lease)
        self.items[request.key] = new
        self.events.append((self.now, "put", request.key, new))
        response.header.revision = self.now
        return response

    def delete(self, request: DeleteRangeRequest) -> DeleteRangeResponse:
        response = DeleteRangeResponse()
        for key in sorted(self.items):
            if inside(key, request.key, request.range_end):
                old = self.items.pop(key)
                self.changed = True
                self.events.append((self.now, "delete", key, None))
                response.deleted += 1
                if request.prev_kv:
                    response.prev_kvs.append(old.message(key))
        response.header.revision = self.now
        return response

    def compact(self, request: CompactionRequest) -> CompactionResponse:
        if request.revision <= self.compact_revision:
            raise Refuse(RefusalCode.COMPACTED)
        if request.revision > self.revision:
            raise Refuse(RefusalCode.FUTURE_REVISION)
        self.compact_revision = request.revision
        return CompactionResponse()

    def at(self, revision: int) -> dict[bytes, Item]:
        if revision <= 0 or revision == self.now:
            return self.items
        if revision > self.now:
            raise Refuse(RefusalCode.FUTURE_REVISION)
        if revision < self.compact_revision:
            raise Refuse(RefusalCode.COMPACTED)
        return self.past[revision]

    def range(self, request: RangeRequest) -> RangeResponse:
        items = self.at(request.revision)
        keys = sorted(key for key in items if inside(key, request.key, request.range_end))
        response = RangeResponse(count=len(keys))
        response.header.revision = self.now
        if request.count_only:
            return response
        filtered = bool(
            request.min_mod_revision
            or request.max_mod_revision
            or request.min_create_revision
            or request.max_create_revision
        )
        if request.limit > 0 and request.sort_order == RangeRequest.NONE and not filtered:
            keys = keys[: request.limit + 1]
        endless = 1 << 62
        keys = [
            key
            for key in keys
            if request.min_mod_revision <= items[key].mod_revision <= (request.max_mod_revision or endless)
            and request.min_create_revision <= items[key].create_revision <= (request.max_create_revision or endless)
        ]
        attribute = ("key", "version", "create_revision", "mod_revision", "value")[request.sort_target]
        keys.sort(
            key=lambda key: key if attribute == "key" else getattr(items[key], attribute),
            reverse=request.sort_order == RangeRequest.DESCEND,
        )
        if 0 < request.limit < len(keys):
            keys = keys[: request.limit]
            response.more = True
        response.kvs.extend(items[key].message(key, request.keys_only) for key in keys)
        return response

    def holds(self, compare: Compare) -> bool:
        found = [item for key, item in self.items.items() if inside(key, compare.key, compare.range_end)]
        if not found:
            if compare.target == Compare.VALUE:
                return False
            found = [Item(b"", 0, 0, 0)]
        attribute = ("version", "create_revision", "mod_revision", "value", "lease")[compare.target]
        wanted = getattr(compare, attribute)
        for item in found:
            actual = getattr(item, attribute)
            if not (actual == wanted, actual > wanted, actual < wanted, actual != wanted)[compare.result]:
                return False
        return True

    def check(self, request: TxnRequest) -> list[bool]:
        """All compares, outer before inner, then what may refuse: puts of the whole tree, then ranges."""
        decided: list[bool] = []
        ops: list[Any] = []
        self.decide(request, decided, ops)
        for put in (op.request_put for op in ops if op.HasField("request_put")):
            if (put.ignore_value or put.ignore_lease) and put.key not in self.items:
                raise Refuse(RefusalCode.KEY_NOT_FOUND)
            if put.lease and put.lease not in self.leases:
                raise Refuse(RefusalCode.LEASE_NOT_FOUND)
        for op in ops:
            if op.HasField("request_range"):
                self.at(op.request_range.revision)
        return decided

    def decide(self, request: TxnRequest, decided: list[bool], ops: list[Any]) -> None:
        decided.append(all(map(self.holds, request.compare)))
        for op in request.success if decided[-1] else request.failure:
            if op.HasField("request_txn"):
                self.decide(op.request_txn, decided, ops)
            else:
                ops.append(op)

    def txn(self, request: TxnRequest, decided: Iterator[bool]) -> TxnResponse:
        response = TxnResponse(succeeded=next(decided))
        for op in request.success if response.succeeded else request.failure:
            answer = response.responses.add()
            if op.HasField("request_put"):
                answer.response_put.CopyFrom(self.put(op.request_put))
            elif op.HasField("request_delete_range"):
                answer.response_delete_range.CopyFrom(self.delete(op.request_delete_range))
            elif op.HasField("request_range"):
                answer.response_range.CopyFrom(self.range(op.request_range))
            elif op.HasField("request_txn"):
                answer.response_txn.CopyFrom(self.txn(op.request_txn, decided))
                answer.response_txn.header.SetInParent()
        return response
