"""The transactions that locks and elections are made of; see `candidates`, which says what they are for."""

from __future__ import annotations

from raftkv._pb.kv_pb2 import Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest
from raftkv.server.watch_matching import prefix_end

LEASE_MAX = (1 << 63) - 1


def key_of(name: bytes, lease: int) -> bytes:
    """The key of a lease in the queue of a name; the format is etcd's."""
    return b"%s/%x" % (name, lease)


def entry(name: bytes, lease: int, value: bytes | None) -> TxnRequest:
    """Make the key, or adopt the one that is there: first its state before that, last who is the first of the name.

    Args:
        value: what the key is to have; None leaves that of an existing one.
    """
    key = key_of(name, lease)
    put = PutRequest(key=key, value=value or b"", lease=lease)
    # A key of another lease is no place of ours in the queue, and nothing of it is to change.
    adopt = PutRequest(key=key, value=value or b"", ignore_value=value is None, ignore_lease=True)
    adopted = TxnRequest(compare=[_bound(key, lease)], success=[RequestOp(request_put=adopt)])
    return TxnRequest(
        compare=[_created(key, 0)],
        success=[RequestOp(request_put=put), first(name)],
        failure=[_get(key), RequestOp(request_txn=adopted), first(name)],
    )


def claim(key: bytes, create_revision: int, lease: int) -> TxnRequest:
    """Write a key once more as it is, if it is still ours."""
    put = PutRequest(key=key, ignore_value=True, ignore_lease=True)
    return TxnRequest(
        compare=[_created(key, create_revision), _bound(key, lease)], success=[RequestOp(request_put=put)]
    )


def proclamation(key: bytes, create_revision: int, lease: int, value: bytes) -> TxnRequest:
    """Give the key another value, if it is still the same one."""
    put = PutRequest(key=key, value=value, lease=lease, ignore_lease=not lease)
    return TxnRequest(compare=[_created(key, create_revision)], success=[RequestOp(request_put=put)])


def release(key: bytes, create_revision: int) -> TxnRequest:
    """Delete the key, if it is still the one created then; 0: whichever it is."""
    return TxnRequest(compare=[_created(key, create_revision)] if create_revision else [], success=[_delete(key)])


def withdrawal(key: bytes, mod_revision: int) -> TxnRequest:
    """Delete the key, if nobody has written it since."""
    unwritten = Compare(target=Compare.MOD, result=Compare.EQUAL, key=key, mod_revision=mod_revision)
    return TxnRequest(compare=[unwritten], success=[_delete(key)])


def look(name: bytes, key: bytes, create_revision: int) -> TxnRequest:
    """The key, and the one just before it."""
    before = first(name)
    before.request_range.sort_order = RangeRequest.DESCEND
    before.request_range.max_create_revision = create_revision - 1
    before.request_range.keys_only = True
    return TxnRequest(success=[_get(key), before])


def first(name: bytes) -> RequestOp:
    """The key of a name that was created first."""
    return RequestOp(
        request_range=RangeRequest(
            key=name + b"/",
            range_end=prefix_end(name + b"/"),
            sort_target=RangeRequest.CREATE,
            sort_order=RangeRequest.ASCEND,
            limit=1,
        )
    )


def _get(key: bytes) -> RequestOp:
    return RequestOp(request_range=RangeRequest(key=key))


def _delete(key: bytes) -> RequestOp:
    return RequestOp(request_delete_range=DeleteRangeRequest(key=key))


def _created(key: bytes, revision: int) -> Compare:
    return Compare(target=Compare.CREATE, result=Compare.EQUAL, key=key, create_revision=revision)


def _bound(key: bytes, lease: int) -> Compare:
    return Compare(target=Compare.LEASE, result=Compare.EQUAL, key=key, lease=lease)
