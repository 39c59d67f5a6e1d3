"""Transactions: compare, choose a branch, run its operations as one revision.

As etcd: the compares of the whole tree of nested transactions are judged first, against the store before the
transaction; then everything that may be refused in the chosen branches is checked, puts before ranges; only then the
operations run, each seeing the writes of those before it. So a refused transaction has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from raftkv._pb.kv_pb2 import (
    Compare,
    DeleteRangeRequest,
    DeleteRangeResponse,
    Guard,
    PutRequest,
    PutResponse,
    RequestOp,
    TxnRequest,
    TxnResponse,
)
from raftkv.state.keys import VERSION, span
from raftkv.state.mvcc import Reader
from raftkv.state.overlay import Overlay
from raftkv.state.ranges import read_range
from raftkv.state.results import PutDone, Refusal, RefusalCode, Refused

LeaseExists = Callable[[int], bool]
_Comparable = TypeVar("_Comparable", int, bytes)

_VERSION_FIELD = {Compare.VERSION: 3, Compare.CREATE: 2, Compare.MOD: 0, Compare.LEASE: 4}
"""Where VERSION.unpack has what is compared."""
_NOTHING = (0, 0, 0, 0, 0)
"""A missing key compares like this."""


class Branch(NamedTuple):
    """One transaction of the tree, decided. For each operation the decided transaction inside it, if it is one."""

    succeeded: bool
    ops: list[tuple[RequestOp, Branch | None]]


def is_read_only(request: TxnRequest) -> bool:
    """Whether no operation of either branch, at any depth, writes. Such a transaction needs no log entry."""
    for op in (*request.success, *request.failure):
        kind = op.WhichOneof("request")
        if kind in ("request_put", "request_delete_range"):
            return False
        if kind == "request_txn" and not is_read_only(op.request_txn):
            return False
    return True


def needs_space(request: TxnRequest) -> bool:
    """Whether either branch, at any depth, puts anything. Deleting needs no space worth a quota."""
    for op in (*request.success, *request.failure):
        kind = op.WhichOneof("request")
        if kind == "request_put" or (kind == "request_txn" and needs_space(op.request_txn)):
            return True
    return False


def is_serializable(request: TxnRequest) -> bool:
    """Whether a read-only transaction may be served without a quorum: all its ranges say so, compares aside."""
    for op in (*request.success, *request.failure):
        kind = op.WhichOneof("request")
        if kind == "request_range" and not op.request_range.serializable:
            return False
        if kind == "request_txn" and not is_serializable(op.request_txn):
            return False
    return True


def guards_hold(reader: Reader, guards: Iterable[Guard]) -> bool:
    """Whether the key of each guard is there and was created at its token.

    A create revision is never used twice, so a token that has been lost never holds again.
    """
    for guard in guards:
        version = reader.get(b"c" + guard.key)
        if version is None or VERSION.unpack(version)[2] != guard.token:
            return False
    return True


def apply_put(
    overlay: Overlay, request: PutRequest, compact_revision: int, lease_exists: LeaseExists
) -> PutDone | PutResponse | Refusal:
    """A put outside of a transaction; the caller commits the revision."""
    if request.guards and not guards_hold(overlay.reader(compact_revision), request.guards):
        return Refusal(RefusalCode.GUARD_FAILED, overlay.revision, compact_revision)
    if request.lease and not lease_exists(request.lease):
        return Refusal(RefusalCode.LEASE_NOT_FOUND, overlay.revision, compact_revision)
    response = PutResponse()
    refusal = _put(overlay, request, compact_revision, response)
    if refusal is not None:
        return refusal
    return response if request.prev_kv else PutDone(response.header.revision)


def apply_delete(overlay: Overlay, request: DeleteRangeRequest, compact_revision: int) -> DeleteRangeResponse | Refusal:
    """A delete outside of a transaction; the caller commits the revision."""
    if request.guards and not guards_hold(overlay.reader(compact_revision), request.guards):
        return Refusal(RefusalCode.GUARD_FAILED, overlay.revision, compact_revision)
    response = DeleteRangeResponse()
    _delete(overlay, request, compact_revision, response)
    return response


def apply_txn(
    overlay: Overlay, request: TxnRequest, compact_revision: int, lease_exists: LeaseExists
) -> TxnResponse | Refusal:
    """Run a transaction; the caller commits the revision."""
    reader = overlay.reader(compact_revision)
    if request.guards and not guards_hold(reader, request.guards):
        return reader.refusal(RefusalCode.GUARD_FAILED)
    branch = _decide(reader, request)
    refusal, may_fail = _check_puts(reader, branch, lease_exists)
    if refusal is None:
        refusal = _check_ranges(reader, branch)
    if refusal is not None:
        return refusal
    savepoint = overlay.savepoint() if may_fail else None
    response = TxnResponse()
    try:
        _run(overlay, branch, compact_revision, response)
    except Refused as refused:
        # Only where the transaction itself deletes a key first and then wants to keep its value; validation forbids
        # that, but what is in the log is obeyed whole or not at all.
        assert savepoint is not None, "a transaction was refused half-way"
        overlay.rollback(savepoint)
        return refused.refusal
    response.header.revision = overlay.revision + 1 if overlay.number else overlay.revision
    return response


def read_txn(reader: Reader, request: TxnRequest) -> TxnResponse:
    """Run a read-only transaction.

    Raises:
        Refused: a range asks for a future or compacted revision, or a guard does not hold.
        ValueError: it is not read-only.
    """
    if not is_read_only(request):
        raise ValueError("the transaction writes")
    if request.guards and not guards_hold(reader, request.guards):
        raise Refused(reader.refusal(RefusalCode.GUARD_FAILED))
    branch = _decide(reader, request)
    refusal = _check_ranges(reader, branch)
    if refusal is not None:
        raise Refused(refusal)
    response = TxnResponse()
    _run_reads(reader, branch, response)
    response.header.revision = reader.revision
    return response


def _decide(reader: Reader, request: TxnRequest) -> Branch:
    succeeded = all(_holds(reader, compare) for compare in request.compare)
    ops = request.success if succeeded else request.failure
    return Branch(
        succeeded,
        [(op, _decide(reader, op.request_txn) if op.HasField("request_txn") else None) for op in ops],
    )


def _holds(reader: Reader, compare: Compare) -> bool:
    key = compare.key
    if compare.range_end:
        start, stop = span(key, compare.range_end)
        found = reader.walk(start, stop, reader.revision)
    else:
        version = reader.find(key, reader.revision)
        found = iter(() if version is None else ((key, version),))
    empty = True
    for key, version in found:
        empty = False
        if compare.target == Compare.VALUE:
            passed = _compare(compare, reader.value(key, version), compare.value)
        else:
            passed = _compare_version(compare, VERSION.unpack(version))
        if not passed:
            return False
    if empty:
        # There is no way to say "no value" on the wire, so a compare with the value of nothing never holds.
        return compare.target != Compare.VALUE and _compare_version(compare, _NOTHING)
    return True


def _compare_version(compare: Compare, version: tuple[int, ...]) -> bool:
    target = compare.target
    place = _VERSION_FIELD.get(target)
    if place is None:
        return _compare(compare, 0, 0)  # a target from the future: equal, as in etcd
    wanted = (
        compare.mod_revision
        if target == Compare.MOD
        else compare.create_revision
        if target == Compare.CREATE
        else compare.version
        if target == Compare.VERSION
        else compare.lease
    )
    return _compare(compare, version[place], wanted)


def _compare(compare: Compare, actual: _Comparable, wanted: _Comparable) -> bool:
    result = compare.result
    if result == Compare.EQUAL:
        return actual == wanted
    if result == Compare.NOT_EQUAL:
        return actual != wanted
    if result == Compare.GREATER:
        return actual > wanted
    if result == Compare.LESS:
        return actual < wanted
    return True  # a result from the future: passed, as in etcd


def _operations(branch: Branch) -> Iterator[RequestOp]:
    """All operations that will run, nested ones in their places."""
    for op, inner in branch.ops:
        if inner is not None:
            yield from _operations(inner)
        else:
            yield op


def _check_puts(reader: Reader, branch: Branch, lease_exists: LeaseExists) -> tuple[Refusal | None, bool]:
    """Why a put of the transaction cannot be done, and whether some put depends on the key being there."""
    depends = False
    for op in _operations(branch):
        if not op.HasField("request_put"):
            continue
        request = op.request_put
        if request.ignore_value or request.ignore_lease:
            depends = True
            if reader.find(request.key, reader.revision) is None:
                return reader.refusal(RefusalCode.KEY_NOT_FOUND), depends
        if request.lease and not lease_exists(request.lease):
            return reader.refusal(RefusalCode.LEASE_NOT_FOUND), depends
    return None, depends


def _check_ranges(reader: Reader, branch: Branch) -> Refusal | None:
    for op in _operations(branch):
        if op.HasField("request_range"):
            try:
                reader.check_revision(op.request_range.revision)
            except Refused as refused:
                return refused.refusal
    return None


def _put(overlay: Overlay, request: PutRequest, compact_revision: int, response: PutResponse) -> Refusal | None:
    key = request.key
    value = request.value
    lease = request.lease
    if request.prev_kv or request.ignore_value or request.ignore_lease:
        reader = overlay.reader(compact_revision)
        version = reader.find(key, reader.revision)
        if version is None:
            if request.ignore_value or request.ignore_lease:
                return reader.refusal(RefusalCode.KEY_NOT_FOUND)
        else:
            if request.ignore_value:
                value = reader.value(key, version)
            if request.ignore_lease:
                lease = VERSION.unpack(version)[4]
            if request.prev_kv:
                reader.fill(response.prev_kv, key, version, reader.value(key, version))
    overlay.put(key, value, lease)
    response.header.revision = overlay.revision + 1
    return None


def _delete(
    overlay: Overlay, request: DeleteRangeRequest, compact_revision: int, response: DeleteRangeResponse
) -> None:
    reader = overlay.reader(compact_revision)
    if request.range_end:
        start, stop = span(request.key, request.range_end)
        found = list(reader.walk(start, stop, reader.revision))
    else:
        version = reader.find(request.key, reader.revision)
        found = [] if version is None else [(request.key, version)]
    if request.prev_kv:
        for (key, version), value in zip(found, reader.values(found), strict=True):
            reader.fill(response.prev_kvs.add(), key, version, value)
    for key, version in found:
        overlay.delete(key, version)
    response.deleted = len(found)
    response.header.revision = overlay.revision + 1 if overlay.number else overlay.revision


def _run(overlay: Overlay, branch: Branch, compact_revision: int, response: TxnResponse) -> None:
    response.succeeded = branch.succeeded
    for op, inner in branch.ops:
        answer = response.responses.add()
        kind = op.WhichOneof("request")
        if inner is not None:
            answer.response_txn.header.SetInParent()
            _run(overlay, inner, compact_revision, answer.response_txn)
        elif kind == "request_put":
            refusal = _put(overlay, op.request_put, compact_revision, answer.response_put)
            if refusal is not None:
                raise Refused(refusal)
        elif kind == "request_range":
            read_range(overlay.reader(compact_revision), op.request_range, answer.response_range)
        elif kind == "request_delete_range":
            _delete(overlay, op.request_delete_range, compact_revision, answer.response_delete_range)


def _run_reads(reader: Reader, branch: Branch, response: TxnResponse) -> None:
    response.succeeded = branch.succeeded
    for op, inner in branch.ops:
        answer = response.responses.add()
        if inner is not None:
            answer.response_txn.header.SetInParent()
            _run_reads(reader, inner, answer.response_txn)
        elif op.HasField("request_range"):
            read_range(reader, op.request_range, answer.response_range)
