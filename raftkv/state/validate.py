"""What a request must satisfy before it is proposed, with etcd's texts.

These checks need no state, so a node makes them where the request arrives, and nothing invalid enters the log. The
order of the checks is etcd's, so that a request with several faults gets the same answer.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    DeleteRangeRequest,
    Guard,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest
from raftkv._pb.state_pb2 import SessionOpen
from raftkv._pb.watch_pb2 import WatchCreateRequest
from raftkv.state.keys import span
from raftkv.state.leases import TTL_MS_MAX, TTL_S_MAX
from raftkv.state.sessions import CALLABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How large a request may be."""

    key_bytes_max: int = 32 * 1024
    """A key or a range end. etcd has no limit of its own for it; no sane key is larger, and keys are kept in memory."""
    request_bytes_max: int = 1536 * 1024
    """The whole marshalled request; etcd's `--max-request-bytes`."""
    txn_ops_max: int = 128
    """Compares, operations of either branch, each; etcd's `--max-txn-ops`. Nested ones share what the outer left."""
    txn_depth_max: int = 32
    """Transactions inside each other. Protobuf decoders stop at 100 messages, that is at 49 of these."""
    guards_max: int = 8
    """Guards of one request; nobody holds many locks at once in good order."""


class InvalidCode(enum.Enum):
    """What is wrong; the value is etcd's text, which clients match."""

    EMPTY_KEY = "etcdserver: key is not provided"
    KEY_NOT_FOUND = "etcdserver: key not found"
    VALUE_PROVIDED = "etcdserver: value is provided"
    LEASE_PROVIDED = "etcdserver: lease is provided"
    TOO_MANY_OPS = "etcdserver: too many operations in txn request"
    DUPLICATE_KEY = "etcdserver: duplicate key given in txn request"
    INVALID_SORT_OPTION = "etcdserver: invalid sort option"
    REQUEST_TOO_LARGE = "etcdserver: request is too large"
    KEY_TOO_LARGE = "etcdserver: key is too large"
    """Ours: etcd has no such limit."""
    LEASE_TTL_TOO_LARGE = "etcdserver: too large lease TTL"
    LEASE_ID_NEGATIVE = "etcdserver: lease ID is negative"
    """Ours: in etcd such leases have made members differ."""
    TOO_MANY_GUARDS = "raftkv: too many guards"
    GUARD_TOKEN = "raftkv: the token of a guard is not above zero"
    GUARD_NESTED = "raftkv: guards belong to the outermost request"
    SESSION_TTL_NEGATIVE = "raftkv: the time to live of a session is negative"
    SESSION_CALL = "raftkv: not a call of a session"


class InvalidRequest(Exception):
    """The request can never succeed as it is. Nothing was proposed. The gRPC status is INVALID_ARGUMENT, but for a time
    to live that is too large: OUT_OF_RANGE, as in etcd.

    `field` names what is wrong, `limit` and `actual` what was allowed and found, where that is a question of size.
    """

    def __init__(self, code: InvalidCode, field: str, *, limit: int | None = None, actual: int | None = None) -> None:
        self.code = code
        self.field = field
        self.limit = limit
        self.actual = actual
        self.text = code.value
        if code is InvalidCode.KEY_TOO_LARGE:
            self.text += f": {field} has {actual} bytes, the limit is {limit}"
        super().__init__(self.text)


DEFAULT_LIMITS = RequestLimits()


def check_size(request_bytes: int, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check the marshalled size of a request that will be proposed.

    Raises:
        InvalidRequest: REQUEST_TOO_LARGE.
    """
    if request_bytes > limits.request_bytes_max:
        raise InvalidRequest(
            InvalidCode.REQUEST_TOO_LARGE, "request", limit=limits.request_bytes_max, actual=request_bytes
        )


def check_range(request: RangeRequest, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check a range read.

    Raises:
        InvalidRequest: EMPTY_KEY, KEY_TOO_LARGE, INVALID_SORT_OPTION.
    """
    _check_key(request.key, request.range_end, limits)
    if not (0 <= request.sort_order <= RangeRequest.DESCEND and 0 <= request.sort_target <= RangeRequest.VALUE):
        raise InvalidRequest(InvalidCode.INVALID_SORT_OPTION, "sort_order, sort_target")


def check_watch(request: WatchCreateRequest, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check the size of what is to be watched, which is kept for as long as the watch; an empty key is "\\0".

    Raises:
        InvalidRequest: KEY_TOO_LARGE.
    """
    _check_key(request.key or b"\0", request.range_end, limits)


def check_put(request: PutRequest, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check a put.

    Raises:
        InvalidRequest: EMPTY_KEY, KEY_TOO_LARGE, VALUE_PROVIDED, LEASE_PROVIDED; of a guard.
    """
    _check_put(request, limits)
    if request.guards:
        check_guards(request.guards, limits)


def check_delete(request: DeleteRangeRequest, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check a delete.

    Raises:
        InvalidRequest: EMPTY_KEY, KEY_TOO_LARGE; of a guard.
    """
    _check_key(request.key, request.range_end, limits)
    if request.guards:
        check_guards(request.guards, limits)


def check_compaction(request: CompactionRequest, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Nothing about a compaction can be judged without the state."""


def check_txn(request: TxnRequest, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check a transaction, reading or writing.

    Raises:
        InvalidRequest: of any operation inside; TOO_MANY_OPS, KEY_NOT_FOUND (an operation that is none), DUPLICATE_KEY;
            of a guard; GUARD_NESTED.
    """
    _check_txn(request, limits, limits.txn_ops_max, 1)
    _check_writes(request.success)
    _check_writes(request.failure)
    if request.guards:
        check_guards(request.guards, limits)


def check_guards(guards: Sequence[Guard], limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """Check the guards of a request.

    Raises:
        InvalidRequest: TOO_MANY_GUARDS, EMPTY_KEY, KEY_TOO_LARGE, GUARD_TOKEN.
    """
    if len(guards) > limits.guards_max:
        raise InvalidRequest(InvalidCode.TOO_MANY_GUARDS, "guards", limit=limits.guards_max, actual=len(guards))
    for guard in guards:
        _check_key(guard.key, b"", limits, "guards.key")
        if guard.token <= 0:
            raise InvalidRequest(InvalidCode.GUARD_TOKEN, "guards.token", actual=guard.token)


def check_lease_grant(request: LeaseGrantRequest) -> None:
    """Check a grant. An ID of 0 is to be filled in by the node; a time to live below the least is raised, as in etcd.

    Raises:
        InvalidRequest: LEASE_TTL_TOO_LARGE, LEASE_ID_NEGATIVE.
    """
    if request.ttl_ms > TTL_MS_MAX:
        raise InvalidRequest(InvalidCode.LEASE_TTL_TOO_LARGE, "ttl_ms", limit=TTL_MS_MAX, actual=request.ttl_ms)
    if request.TTL > TTL_S_MAX:
        raise InvalidRequest(InvalidCode.LEASE_TTL_TOO_LARGE, "TTL", limit=TTL_S_MAX, actual=request.TTL)
    if request.ID < 0:
        raise InvalidRequest(InvalidCode.LEASE_ID_NEGATIVE, "ID", actual=request.ID)


def check_session_open(request: SessionOpen) -> None:
    """Check the beginning of a session. A time to live out of bounds is moved into them; 0 is the default.

    Raises:
        InvalidRequest: SESSION_TTL_NEGATIVE.
    """
    if request.ttl_ms < 0:
        raise InvalidRequest(InvalidCode.SESSION_TTL_NEGATIVE, "ttl_ms", actual=request.ttl_ms)


def check_session_call(session: int, seq: int, first_incomplete: int, kind: int) -> None:
    """Check the numbers of a call of a session; what it carries is checked as it would be without a session.

    Raises:
        InvalidRequest: SESSION_CALL.
    """
    if session > 0 and seq > 0 and first_incomplete <= seq and kind in CALLABLE:
        return
    if session <= 0:
        field = "session"
    elif seq <= 0:
        field = "seq"
    else:
        field = "first_incomplete" if first_incomplete > seq else "kind"
    raise InvalidRequest(InvalidCode.SESSION_CALL, field)


def _check_put(request: PutRequest, limits: RequestLimits) -> None:
    key = request.key
    if not key or len(key) > limits.key_bytes_max:
        _check_key(key, b"", limits)
    if request.ignore_value and request.value:
        raise InvalidRequest(InvalidCode.VALUE_PROVIDED, "value")
    if request.ignore_lease and request.lease:
        raise InvalidRequest(InvalidCode.LEASE_PROVIDED, "lease")


def _check_key(key: bytes, range_end: bytes, limits: RequestLimits, field: str = "key") -> None:
    if not key:
        raise InvalidRequest(InvalidCode.EMPTY_KEY, field)
    longest = limits.key_bytes_max
    if len(key) > longest:
        raise InvalidRequest(InvalidCode.KEY_TOO_LARGE, field, limit=longest, actual=len(key))
    # One more, for the end of a range that includes the longest key.
    if len(range_end) > longest + 1:
        raise InvalidRequest(InvalidCode.KEY_TOO_LARGE, "range_end", limit=longest + 1, actual=len(range_end))


def _check_txn(request: TxnRequest, limits: RequestLimits, ops_max: int, depth: int) -> None:
    used = max(len(request.compare), len(request.success), len(request.failure))
    if used > ops_max or depth > limits.txn_depth_max:
        raise InvalidRequest(InvalidCode.TOO_MANY_OPS, "txn", limit=limits.txn_ops_max)
    for compare in request.compare:
        _check_key(compare.key, compare.range_end, limits)
    for op in (*request.success, *request.failure):
        kind = op.WhichOneof("request")
        if kind == "request_range":
            check_range(op.request_range, limits)
        elif kind == "request_put":
            _check_put(op.request_put, limits)
            _check_not_guarded(op.request_put)
        elif kind == "request_delete_range":
            _check_key(op.request_delete_range.key, op.request_delete_range.range_end, limits)
            _check_not_guarded(op.request_delete_range)
        elif kind == "request_txn":
            _check_not_guarded(op.request_txn)
            _check_txn(op.request_txn, limits, ops_max - used, depth + 1)
        else:
            raise InvalidRequest(InvalidCode.KEY_NOT_FOUND, "request")


def _check_not_guarded(request: PutRequest | DeleteRangeRequest | TxnRequest) -> None:
    # Refused rather than ignored: who sends one there believes that it protects.
    if request.guards:
        raise InvalidRequest(InvalidCode.GUARD_NESTED, "guards")


class _Spans:
    """A union of half-open intervals of keys, kept as disjoint ones in order."""

    def __init__(self) -> None:
        self.starts: list[bytes] = []
        self.stops: list[bytes | None] = []  # None: past every key, in the last place only

    def add(self, start: bytes, stop: bytes | None) -> None:
        if stop is not None and start >= stop:
            return
        low = bisect_left(self.starts, start)
        if low and (self.stops[low - 1] is None or start <= self._stop(low - 1)):
            low -= 1
            start = self.starts[low]
        high = len(self.starts) if stop is None else bisect_right(self.starts, stop)
        if high > low and stop is not None:
            last = self.stops[high - 1]
            stop = None if last is None else max(stop, last)
        self.starts[low:high] = [start]
        self.stops[low:high] = [stop]

    def _stop(self, place: int) -> bytes:
        stop = self.stops[place]
        assert stop is not None, "an interval behind one without end"
        return stop

    def __contains__(self, key: bytes) -> bool:
        place = bisect_right(self.starts, key) - 1
        if place < 0:
            return False
        stop = self.stops[place]
        return stop is None or key < stop


def _check_writes(ops: Sequence[RequestOp]) -> tuple[set[bytes], _Spans]:
    """Refuse a branch that writes a key twice; returns the keys it puts and what it deletes.

    The two branches of a nested transaction exclude each other, so they may write the same keys. As in etcd, a nested
    transaction is checked against the deletes of this level and of the nested ones before it, not of those behind it,
    and a delete of everything from a key on (range_end "\\0") is not looked at. What passes so has a clear meaning too:
    operations run in their order.
    """
    deleted = _Spans()
    for op in ops:
        if op.HasField("request_delete_range") and op.request_delete_range.range_end != b"\0":
            deleted.add(*span(op.request_delete_range.key, op.request_delete_range.range_end))
    written: set[bytes] = set()
    for op in ops:
        if not op.HasField("request_txn"):
            continue
        put_then, deleted_then = _check_writes(op.request_txn.success)
        put_else, deleted_else = _check_writes(op.request_txn.failure)
        for key in sorted(put_then | put_else):
            if key in written or key in deleted:
                raise InvalidRequest(InvalidCode.DUPLICATE_KEY, "key")
        written |= put_then | put_else
        for inner in (deleted_then, deleted_else):
            for start, stop in zip(inner.starts, inner.stops, strict=True):
                deleted.add(start, stop)
    for op in ops:
        if op.HasField("request_put"):
            key = op.request_put.key
            if key in written or key in deleted:
                raise InvalidRequest(InvalidCode.DUPLICATE_KEY, "key")
            written.add(key)
    return written, deleted
