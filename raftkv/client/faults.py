"""What one failed attempt means.

A raftkv node says so in two trailers: `raftkv-error` (an UPPER_SNAKE code) and `raftkv-executed` ("no" or "unknown").
They decide. A real etcd sends neither; then its canonical texts (api/v3rpc/rpctypes/error.go) and the gRPC code decide,
and of a write only that counts as "not executed" which etcd answers before it proposes anything.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc

from raftkv._pb import session_pb2
from raftkv.client.errors import (
    Closed,
    Compacted,
    ConditionFailed,
    DeadlineExceeded,
    FutureRevision,
    InvalidRequest,
    LeaderChanged,
    LeaseNotFound,
    LockLost,
    NoLeader,
    NoLeaderInTime,
    OutcomeUnknown,
    Overloaded,
    RaftkvError,
    RequestTooLarge,
    SessionExpired,
    Unavailable,
)

ERROR_TRAILER: Final = "raftkv-error"
EXECUTED_TRAILER: Final = "raftkv-executed"
FIELD_TRAILER: Final = "raftkv-field"
LIMIT_TRAILER: Final = "raftkv-limit"
COMPACT_REVISION_TRAILER: Final = "raftkv-compact-revision"
RETRY_AFTER_TRAILER: Final = "grpc-retry-pushback-ms"


class FaultKind(enum.Enum):
    """Why an attempt failed; the first seven can never succeed by trying again."""

    INVALID = enum.auto()
    TOO_LARGE = enum.auto()
    FUTURE_REVISION = enum.auto()
    COMPACTED = enum.auto()
    CONDITION = enum.auto()
    NO_SPACE = enum.auto()  # not done, but waiting does not help either
    ANSWER_LOST = enum.auto()  # done, once; nobody has the answer any more
    NO_LEADER = enum.auto()
    LEADER_CHANGED = enum.auto()
    OVERLOADED = enum.auto()
    TIMEOUT = enum.auto()  # the node's own time limit
    STOPPING = enum.auto()  # the node goes away in an orderly manner
    LEARNER = enum.auto()  # a member without a vote, which serves next to nothing
    SILENT = enum.auto()  # no answer at all within the attempt's time
    UNREACHABLE = enum.auto()  # the connection broke or was never made
    OTHER = enum.auto()

    @property
    def is_final(self) -> bool:
        """Whether trying again is pointless."""
        return self in _FINAL

    @property
    def blames_endpoint(self) -> bool:
        """Whether no answer came at all, which casts doubt on the endpoint."""
        return self in (FaultKind.SILENT, FaultKind.UNREACHABLE)

    @property
    def moves_on(self) -> bool:
        """Whether another endpoint is worth trying at once."""
        return self.blames_endpoint or self in (FaultKind.STOPPING, FaultKind.LEARNER)


_FINAL: Final = frozenset(
    {
        FaultKind.INVALID,
        FaultKind.TOO_LARGE,
        FaultKind.FUTURE_REVISION,
        FaultKind.COMPACTED,
        FaultKind.CONDITION,
        FaultKind.NO_SPACE,
        FaultKind.ANSWER_LOST,
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed attempt, understood."""

    kind: FaultKind
    code: str
    text: str
    not_executed: bool
    """True only where it is proven that the request changed nothing."""
    retry_after_s: float = 0.0
    compact_revision: int = 0
    field: str = ""
    """The field of the request, or the limit, at fault."""


# What a raftkv node calls its refusals. A code missing here falls through to the gRPC code, so that an older SDK
# still understands a newer node.
_BY_CODE: Final[dict[str, FaultKind]] = {
    "COMPACTED": FaultKind.COMPACTED,
    "FUTURE_REVISION": FaultKind.FUTURE_REVISION,
    "REQUEST_TOO_LARGE": FaultKind.TOO_LARGE,
    "KEY_TOO_LARGE": FaultKind.TOO_LARGE,
    "LEASE_NOT_FOUND": FaultKind.CONDITION,
    "KEY_NOT_FOUND": FaultKind.CONDITION,
    "LEASE_EXISTS": FaultKind.CONDITION,
    "LOCK_LOST": FaultKind.CONDITION,
    "SESSION_EXPIRED": FaultKind.CONDITION,
    "NO_SPACE": FaultKind.NO_SPACE,
    "RESULT_NOT_KEPT": FaultKind.ANSWER_LOST,
    "NO_LEADER": FaultKind.NO_LEADER,
    "NOT_LEADER": FaultKind.LEADER_CHANGED,
    "LEADER_CHANGED": FaultKind.LEADER_CHANGED,
    "TOO_MANY_REQUESTS": FaultKind.OVERLOADED,
    "TIMEOUT": FaultKind.TIMEOUT,
    "TRANSFER_TIMEOUT": FaultKind.TIMEOUT,
    "DEADLINE_EXCEEDED": FaultKind.TIMEOUT,
    "OUTCOME_HIDDEN": FaultKind.TIMEOUT,
    "STOPPING": FaultKind.STOPPING,
    "LEARNER_REFUSED": FaultKind.LEARNER,
}

# etcd: text after "etcdserver: " -> (kind, our code, proven not executed).
_BY_ETCD_TEXT: Final[dict[str, tuple[FaultKind, str, bool]]] = {
    "mvcc: required revision has been compacted": (FaultKind.COMPACTED, "COMPACTED", True),
    "mvcc: required revision is a future revision": (FaultKind.FUTURE_REVISION, "FUTURE_REVISION", True),
    "request is too large": (FaultKind.TOO_LARGE, "REQUEST_TOO_LARGE", True),
    "mvcc: database space exceeded": (FaultKind.NO_SPACE, "NO_SPACE", True),
    "requested lease not found": (FaultKind.CONDITION, "LEASE_NOT_FOUND", True),
    "lease already exists": (FaultKind.CONDITION, "LEASE_EXISTS", True),
    "key not found": (FaultKind.CONDITION, "KEY_NOT_FOUND", True),
    "no leader": (FaultKind.NO_LEADER, "NO_LEADER", True),
    "too many requests": (FaultKind.OVERLOADED, "TOO_MANY_REQUESTS", True),
    "not leader": (FaultKind.LEADER_CHANGED, "NOT_LEADER", True),
    "rpc not supported for learner": (FaultKind.LEARNER, "LEARNER_REFUSED", True),
    # From here on etcd may have proposed already.
    "leader changed": (FaultKind.LEADER_CHANGED, "LEADER_CHANGED", False),
    "server stopped": (FaultKind.STOPPING, "STOPPING", False),
    "request timed out": (FaultKind.TIMEOUT, "TIMEOUT", False),
    "request timed out, possibly due to previous leader failure": (FaultKind.TIMEOUT, "TIMEOUT", False),
    "request timed out, possibly due to connection lost": (FaultKind.TIMEOUT, "TIMEOUT", False),
    "request timed out, waiting for the applied index took too long": (FaultKind.TIMEOUT, "TIMEOUT", False),
}
_ETCD_PREFIX: Final = "etcdserver: "
_CODES: Final[dict[int, grpc.StatusCode]] = {code.value[0]: code for code in grpc.StatusCode}

# Codes that both servers give before anything is proposed, or as the stored answer of a command that changed nothing.
_INVALID_CODES: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def understand(code: grpc.StatusCode, text: str, trailers: Iterable[tuple[str, str | bytes]] | None) -> Fault:
    """Say what a failed RPC means."""
    words = {key: value for key, value in trailers or () if isinstance(value, str)}
    name = words.get(ERROR_TRAILER)
    if name is not None:
        kind = _BY_CODE.get(name) or _kind_of_code(code)
        if kind.blames_endpoint:
            kind = FaultKind.TIMEOUT  # whatever it is called: a node that says so is there and talks
        return Fault(
            kind,
            name,
            text,
            not_executed=words.get(EXECUTED_TRAILER) == "no",
            retry_after_s=_retry_after_s(words),
            compact_revision=_natural(words.get(COMPACT_REVISION_TRAILER)),
            field=words.get(FIELD_TRAILER, words.get(LIMIT_TRAILER, "")),
        )
    known = _BY_ETCD_TEXT.get(text.removeprefix(_ETCD_PREFIX)) if text.startswith(_ETCD_PREFIX) else None
    if known is not None:
        return Fault(known[0], known[1], text, known[2], _retry_after_s(words))
    return _by_grpc_code(code, text, words)


def fault_in(error: session_pb2.SessionError) -> Fault:
    """Say what an error on the session stream means; it has in fields what a failed RPC has in trailers."""
    trailers = [(key, value) for key, value in error.more.items()]
    if error.reason:
        trailers += [(ERROR_TRAILER, error.reason), (EXECUTED_TRAILER, error.executed)]
    if error.retry_after_ms:
        trailers.append((RETRY_AFTER_TRAILER, str(error.retry_after_ms)))
    return understand(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message, trailers)


def _by_grpc_code(code: grpc.StatusCode, text: str, words: dict[str, str]) -> Fault:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        # gRPC itself, on either side: a message over a size limit. Where it was the *answer* that did not fit, the
        # request was executed.
        return Fault(FaultKind.TOO_LARGE, "REQUEST_TOO_LARGE", text, not_executed="CLIENT: Received" not in text)
    kind = _kind_of_code(code)
    return Fault(kind, code.name, text, not_executed=code in _INVALID_CODES, retry_after_s=_retry_after_s(words))


def _kind_of_code(code: grpc.StatusCode) -> FaultKind:
    if code in _INVALID_CODES:
        return FaultKind.INVALID
    if code is grpc.StatusCode.UNAVAILABLE:
        return FaultKind.UNREACHABLE
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return FaultKind.SILENT
    if code is grpc.StatusCode.CANCELLED:
        return FaultKind.STOPPING  # not by us: what a server that goes away does to calls that come too late
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return FaultKind.OVERLOADED
    return FaultKind.OTHER


def _retry_after_s(words: dict[str, str]) -> float:
    return _natural(words.get(RETRY_AFTER_TRAILER)) / 1000


def _natural(word: str | None) -> int:
    """A number that came over the wire; 0 for anything else, however odd."""
    return int(word) if word is not None and word.isascii() and word.isdigit() and len(word) < 20 else 0


_CLASS: Final[dict[FaultKind, type[RaftkvError]]] = {
    FaultKind.INVALID: InvalidRequest,
    FaultKind.TOO_LARGE: RequestTooLarge,
    FaultKind.FUTURE_REVISION: FutureRevision,
    FaultKind.COMPACTED: Compacted,
    FaultKind.CONDITION: ConditionFailed,
    FaultKind.NO_LEADER: NoLeader,
    FaultKind.LEADER_CHANGED: LeaderChanged,
    FaultKind.OVERLOADED: Overloaded,
}


_CLASS_OF_CONDITION: Final[dict[str, type[RaftkvError]]] = {
    "LEASE_NOT_FOUND": LeaseNotFound,
    "LOCK_LOST": LockLost,
    "SESSION_EXPIRED": SessionExpired,
}


def error_of(fault: Fault, *, endpoint: str | None, attempts: int, time_is_up: bool = False) -> RaftkvError:
    """The exception for a request that was not done (or that only reads)."""
    kind = _CLASS_OF_CONDITION.get(fault.code) or _CLASS.get(fault.kind, Unavailable)
    if time_is_up or (kind is Unavailable and fault.kind in (FaultKind.TIMEOUT, FaultKind.SILENT)):
        kind = NoLeaderInTime if fault.kind is FaultKind.NO_LEADER else DeadlineExceeded
    text = fault.text or fault.code
    error = kind(text, code=fault.code, endpoint=endpoint, attempts=attempts)
    if isinstance(error, Compacted):
        error.compact_revision = fault.compact_revision
    if isinstance(error, Overloaded):
        error.retry_after_s = fault.retry_after_s
        error.limit = fault.field
    if isinstance(error, InvalidRequest):
        error.field = fault.field
    return error


def outcome_unknown(fault: Fault, *, endpoint: str | None, attempts: int) -> OutcomeUnknown:
    """The exception for a write that was sent and whose answer did not arrive."""
    what = "the write was sent, whether it was done is not known"
    if fault.kind is FaultKind.ANSWER_LOST:
        what = "the write was done once, its answer is lost"
    return OutcomeUnknown(
        f"{what}: {fault.text or fault.code}",
        code=fault.code,
        endpoint=endpoint,
        attempts=attempts,
    )


def closed_under_way(perhaps_done: bool, *, endpoint: str | None = None, attempts: int = 0) -> Closed:
    """The exception for a call that was under way when its client was closed."""
    done = "whether this write was done is not known" if perhaps_done else "it changed nothing"
    error = Closed(f"the client was closed during the call; {done}", endpoint=endpoint, attempts=attempts)
    error.perhaps_done = perhaps_done
    return error
