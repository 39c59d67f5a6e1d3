"""Random requests: few keys, many edges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from state_driver import SessionCall

from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    Compare,
    DeleteRangeRequest,
    Guard,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.state_pb2 import (
    LeaseCheckpoints,
    LeaseExpire,
    LeaseRemaining,
    SessionExpire,
    SessionOpen,
)
from raftkv.state.commands import CommandKind

T = TypeVar("T")
LEASES = (1, 2, 2**63 - 1)
KEYS = (b"a", b"b", b"c", b"ab", b"a\0", b"a\0\xff", b"a\0\1", b"\0", b"\0\0", b"\xff", b"\xff\xff", b"b\xff")
KEYS += (b"d/", b"d/a", b"d/b/c")
ENDS = (b"", b"", b"\0", b"b", b"c", b"a\0\0", b"\xff", b"a", b"d", b"d0")
VALUES = (b"", b"1", b"2", b"10", b"\xff\0", b"x" * 300)


class Chooser:
    """Choices from a seed. Tests under Hypothesis draw a seed for each request, so that failures shrink to a few."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return self._random.choice(options)

    def number(self, low: int, high: int) -> int:
        return self._random.randint(min(low, high), max(low, high))

    def chance(self, percent: int) -> bool:
        return self._random.randrange(100) < percent


class Ops:
    """Requests that make sense, or nearly, at a revision and a compact revision."""

    def __init__(self, choose: Chooser, leases: Sequence[int] = (0, 0, 0, 0, 0, 0, 0, 0, 12345)) -> None:
        self.choose = choose
        self.leases = leases
        self.revision = 1
        self.compact_revision = -1

    def any_request(self, term: int, sessions: Sequence[int]) -> Any:
        """Also what etcd does not have, or another test asks it: leases, guards, sessions.

        Args:
            term: of the entry it is for.
            sessions: that are open.
        """
        choose = self.choose
        self.leases = (0, 0, 0, *LEASES)
        kinds = ("plain", "plain", "leased", "leased", "guarded", "lease", "leader", "session", "call", "call")
        kind = choose.pick(kinds)
        if kind == "leased":
            return PutRequest(key=choose.pick(KEYS), value=choose.pick(VALUES), lease=choose.pick((0, *LEASES)))
        if kind == "guarded":
            return self.guarded()
        if kind == "lease":
            return self.lease()
        if kind == "leader":
            return self.leader(term, sessions)
        if kind == "session":
            return SessionOpen()
        return self.session_call(sessions) if kind == "call" else self.request()

    def guarded(self) -> Any:
        choose = self.choose
        request = getattr(self, choose.pick(("put", "delete", "txn")))()
        for _ in range(choose.pick((1, 1, 2))):
            request.guards.append(
                Guard(key=choose.pick(KEYS[:3]), token=choose.number(self.revision - 9, self.revision))
            )
        return request

    def lease(self) -> Any:
        choose = self.choose
        lease = choose.pick(LEASES)
        if choose.chance(80):
            return LeaseGrantRequest(ID=lease, TTL=choose.number(-1, 9), ttl_ms=choose.pick((0, 0, 2500)))
        return LeaseRevokeRequest(ID=lease)

    def leader(self, term: int, sessions: Sequence[int]) -> Any:
        choose = self.choose
        proposer_term = term if choose.chance(70) else term - 1
        ids = [choose.pick(LEASES) for _ in range(choose.number(1, 3))]
        kind = choose.pick(("expire", "checkpoint", "checkpoint", "sessions"))
        if kind == "expire":
            return LeaseExpire(proposer_term=proposer_term, ids=ids)
        if kind == "checkpoint":
            left = [LeaseRemaining(id=lease, remaining_ms=choose.number(-1, 9999)) for lease in ids]
            return LeaseCheckpoints(proposer_term=proposer_term, leases=left)
        ended = [choose.pick((*sessions, 404))]
        return SessionExpire(proposer_term=choose.pick((0, proposer_term)), sessions=ended)

    def session_call(self, sessions: Sequence[int]) -> SessionCall:
        choose = self.choose
        inner = choose.pick((self.put, self.delete, self.txn, self.compact, self.guarded, self.lease))()
        kinds = {
            PutRequest: CommandKind.PUT,
            DeleteRangeRequest: CommandKind.DELETE_RANGE,
            TxnRequest: CommandKind.TXN,
            CompactionRequest: CommandKind.COMPACT,
            LeaseGrantRequest: CommandKind.LEASE_GRANT,
            LeaseRevokeRequest: CommandKind.LEASE_REVOKE,
        }
        seq = choose.number(1, 9)
        return SessionCall(
            session=choose.pick(sessions) if sessions and choose.chance(95) else 404,
            seq=seq,
            first_incomplete=choose.number(0, seq) if choose.chance(30) else 0,
            kind=kinds[type(inner)],
            payload=inner.SerializeToString(),
        )

    def request(self) -> Any:
        kind = self.choose.pick(("put", "put", "put", "range", "range", "delete", "txn", "txn", "compact"))
        if kind == "compact" and not self.choose.chance(30):
            kind = "put"
        return getattr(self, kind)()

    def put(self) -> PutRequest:
        choose = self.choose
        request = PutRequest(key=choose.pick(KEYS), value=choose.pick(VALUES))
        if choose.chance(25):
            request.prev_kv = choose.chance(50)
            request.lease = choose.pick(self.leases)
            if choose.chance(30):
                request.ignore_value = True
                request.value = b"" if choose.chance(90) else b"1"
            if choose.chance(30):
                request.ignore_lease = True
                request.lease = 0 if choose.chance(90) else request.lease
        return request

    def delete(self) -> DeleteRangeRequest:
        choose = self.choose
        return DeleteRangeRequest(key=choose.pick(KEYS), range_end=self.end(), prev_kv=choose.chance(30))

    def end(self) -> bytes:
        return self.choose.pick(ENDS) if self.choose.chance(60) else b""

    def some_revision(self) -> int:
        choose = self.choose
        if choose.chance(50):
            return 0
        near = choose.pick((1, self.revision, self.compact_revision, self.revision // 2))
        # Below zero etcd differs with itself: the latest for a range, compacted inside of a transaction.
        return max(0, near + choose.number(-2, 2))

    def range(self) -> RangeRequest:
        choose = self.choose
        request = RangeRequest(key=choose.pick(KEYS), range_end=choose.pick(ENDS), revision=self.some_revision())
        if choose.chance(50):
            request.limit = choose.number(-1, 5)
        if choose.chance(50):
            request.sort_order = choose.pick((RangeRequest.NONE, RangeRequest.ASCEND, RangeRequest.DESCEND))
            request.sort_target = choose.pick(tuple(RangeRequest.SortTarget.values()))
        request.keys_only = choose.chance(15)
        request.count_only = choose.chance(10)
        if choose.chance(20):
            request.min_mod_revision = choose.number(0, self.revision + 1)
            request.max_mod_revision = choose.pick((0, choose.number(0, self.revision + 1)))
        if choose.chance(20):
            request.min_create_revision = choose.pick((0, choose.number(0, self.revision + 1)))
            request.max_create_revision = choose.number(0, self.revision + 1)
        return request

    def compare(self) -> Compare:
        choose = self.choose
        compare = Compare(
            key=choose.pick(KEYS),
            result=choose.pick(tuple(Compare.CompareResult.values())),
            target=choose.pick(tuple(Compare.CompareTarget.values())),
        )
        if choose.chance(30):
            compare.range_end = choose.pick(ENDS)
        number = choose.pick((0, 1, 2, self.revision, choose.number(0, self.revision)))
        field = choose.pick(
            ("version", "create_revision", "mod_revision", "lease", "value", "none", "own", "own", "own")
        )
        if field == "own":
            field = ("version", "create_revision", "mod_revision", "value", "lease")[compare.target]
        if field == "value":
            compare.value = choose.pick(VALUES)
        elif field != "none":
            setattr(compare, field, number)
        return compare

    def txn(self, depth: int = 0) -> TxnRequest:
        choose = self.choose
        request = TxnRequest()
        for _ in range(choose.pick((0, 1, 1, 2))):
            request.compare.append(self.compare())
        for ops in (request.success, request.failure):
            for _ in range(choose.number(0, 3)):
                ops.append(self.operation(depth))
        return request

    def operation(self, depth: int) -> RequestOp:
        kind = self.choose.pick(("put", "put", "range", "delete", "txn", "none"))
        if kind == "none" and not self.choose.chance(2):
            kind = "put"
        if kind == "put":
            return RequestOp(request_put=self.put())
        if kind == "range":
            return RequestOp(request_range=self.range())
        if kind == "delete":
            return RequestOp(request_delete_range=self.delete())
        if kind == "txn" and depth < 2:
            return RequestOp(request_txn=self.txn(depth + 1))
        return RequestOp() if kind == "none" else RequestOp(request_range=self.range())

    def compact(self) -> CompactionRequest:
        low = max(0, self.compact_revision - 1)
        return CompactionRequest(revision=self.choose.number(low, self.revision + 1), physical=self.choose.chance(50))
