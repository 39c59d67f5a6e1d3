"""The one table from what went wrong to what goes over the wire.

A gRPC code and etcd's exact text, because clients of etcd match texts; and trailing metadata for our SDK, which decides
by these and never by a text:

    raftkv-error             an UPPER_SNAKE name, see the table
    raftkv-executed          "no": nothing was changed and nothing will be; "unknown"
    raftkv-field             the field at fault, with raftkv-limit where it is a question of size
    raftkv-compact-revision  the oldest revision that can still be read, where it matters
    grpc-retry-pushback-ms   when to try again, where a budget is used up

Where etcd itself sends code Unknown by accident (`too many requests`), the code here is the one etcd's clients have for
that text.
"""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Final

import structlog
from google.protobuf.message import DecodeError
from grpc import StatusCode

from raftkv.raft import errors as raft
from raftkv.rpc.methods import Context
from raftkv.server import errors
from raftkv.server.errors import Executed, TimeoutKind
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.validate import InvalidCode, InvalidRequest

ERROR_TRAILER: Final = "raftkv-error"
EXECUTED_TRAILER: Final = "raftkv-executed"
FIELD_TRAILER: Final = "raftkv-field"
LIMIT_TRAILER: Final = "raftkv-limit"
COMPACT_REVISION_TRAILER: Final = "raftkv-compact-revision"
RETRY_AFTER_TRAILER: Final = "grpc-retry-pushback-ms"

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. An empty text means: the error's own words."""

    code: StatusCode
    name: str
    text: str = ""


def _etcd(code: StatusCode, name: str, text: str) -> Row:
    return Row(code, name, f"etcdserver: {text}")


REFUSALS: Final[dict[RefusalCode, Row]] = {
    RefusalCode.KEY_NOT_FOUND: _etcd(StatusCode.INVALID_ARGUMENT, "KEY_NOT_FOUND", "key not found"),
    RefusalCode.COMPACTED: _etcd(StatusCode.OUT_OF_RANGE, "COMPACTED", "mvcc: required revision has been compacted"),
    RefusalCode.FUTURE_REVISION: _etcd(
        StatusCode.OUT_OF_RANGE, "FUTURE_REVISION", "mvcc: required revision is a future revision"
    ),
    RefusalCode.LEASE_NOT_FOUND: _etcd(StatusCode.NOT_FOUND, "LEASE_NOT_FOUND", "requested lease not found"),
    RefusalCode.DUPLICATE_KEY: _etcd(
        StatusCode.INVALID_ARGUMENT, "DUPLICATE_KEY", "duplicate key given in txn request"
    ),
    RefusalCode.MALFORMED: Row(StatusCode.INVALID_ARGUMENT, "MALFORMED", "raftkv: malformed request"),
    RefusalCode.NO_SPACE: _etcd(StatusCode.RESOURCE_EXHAUSTED, "NO_SPACE", "mvcc: database space exceeded"),
    RefusalCode.CORRUPT: _etcd(StatusCode.DATA_LOSS, "CORRUPT", "corrupt cluster"),
    RefusalCode.UNKNOWN_COMMAND: Row(
        StatusCode.UNIMPLEMENTED, "UNKNOWN_COMMAND", "raftkv: this cluster does not know the command"
    ),
    RefusalCode.LEASE_EXISTS: _etcd(StatusCode.FAILED_PRECONDITION, "LEASE_EXISTS", "lease already exists"),
    RefusalCode.STALE_TERM: Row(
        StatusCode.FAILED_PRECONDITION, "STALE_TERM", "raftkv: proposed by a leader of an earlier term"
    ),
    RefusalCode.GUARD_FAILED: Row(
        StatusCode.FAILED_PRECONDITION, "LOCK_LOST", "raftkv: lock lost: its key is gone or has another owner"
    ),
    RefusalCode.SESSION_EXPIRED: Row(
        StatusCode.FAILED_PRECONDITION, "SESSION_EXPIRED", "raftkv: there is no such session, it may have expired"
    ),
    RefusalCode.TOO_MANY_SESSIONS: Row(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SESSIONS", "raftkv: too many sessions"),
    RefusalCode.STALE_SEQUENCE: Row(
        StatusCode.INVALID_ARGUMENT, "STALE_SEQUENCE", "raftkv: the sequence number was acknowledged before"
    ),
    RefusalCode.SESSION_FULL: Row(
        StatusCode.RESOURCE_EXHAUSTED, "SESSION_FULL", "raftkv: too many unacknowledged answers in the session"
    ),
    RefusalCode.RESULT_NOT_KEPT: Row(
        StatusCode.FAILED_PRECONDITION,
        "RESULT_NOT_KEPT",
        "raftkv: done before, but the answer was too large to be kept",
    ),
}
"""The data says no: the same answer on every node, and nothing was changed."""

INVALID: Final[dict[InvalidCode, str]] = {
    InvalidCode.EMPTY_KEY: "EMPTY_KEY",
    # Not KEY_NOT_FOUND, which is what the data may say: here an operation of a transaction is none at all.
    InvalidCode.KEY_NOT_FOUND: "EMPTY_OPERATION",
    InvalidCode.VALUE_PROVIDED: "VALUE_PROVIDED",
    InvalidCode.LEASE_PROVIDED: "LEASE_PROVIDED",
    InvalidCode.TOO_MANY_OPS: "TOO_MANY_OPS",
    InvalidCode.DUPLICATE_KEY: "DUPLICATE_KEY",
    InvalidCode.INVALID_SORT_OPTION: "INVALID_SORT_OPTION",
    InvalidCode.REQUEST_TOO_LARGE: "REQUEST_TOO_LARGE",
    InvalidCode.KEY_TOO_LARGE: "KEY_TOO_LARGE",
    InvalidCode.LEASE_TTL_TOO_LARGE: "LEASE_TTL_TOO_LARGE",
    InvalidCode.LEASE_ID_NEGATIVE: "LEASE_ID_NEGATIVE",
    InvalidCode.TOO_MANY_GUARDS: "TOO_MANY_GUARDS",
    InvalidCode.GUARD_TOKEN: "GUARD_TOKEN",
    InvalidCode.GUARD_NESTED: "GUARD_NESTED",
    InvalidCode.SESSION_TTL_NEGATIVE: "SESSION_TTL_NEGATIVE",
    InvalidCode.SESSION_CALL: "SESSION_CALL",
}
"""The request can never succeed: INVALID_ARGUMENT, and the text is the code's value."""

INVALID_OUT_OF_RANGE: Final = frozenset({InvalidCode.LEASE_TTL_TOO_LARGE})
"""But for these, which etcd answers with OUT_OF_RANGE."""

_UNAVAILABLE = StatusCode.UNAVAILABLE
TIMEOUTS: Final[dict[TimeoutKind, Row]] = {
    TimeoutKind.GENERAL: _etcd(_UNAVAILABLE, "TIMEOUT", "request timed out"),
    TimeoutKind.LEADER_FAILURE: _etcd(
        _UNAVAILABLE, "TIMEOUT", "request timed out, possibly due to previous leader failure"
    ),
    TimeoutKind.CONNECTION_LOST: _etcd(_UNAVAILABLE, "TIMEOUT", "request timed out, possibly due to connection lost"),
    TimeoutKind.APPLY: _etcd(_UNAVAILABLE, "TIMEOUT", "request timed out, waiting for the applied index took too long"),
}

EXCEPTIONS: Final[dict[type[Exception], Row]] = {
    errors.NoLeader: _etcd(_UNAVAILABLE, "NO_LEADER", "no leader"),
    errors.LeaderChanged: _etcd(_UNAVAILABLE, "LEADER_CHANGED", "leader changed"),
    errors.OutcomeHidden: _etcd(_UNAVAILABLE, "OUTCOME_HIDDEN", "request timed out, possibly due to connection lost"),
    errors.Stopping: _etcd(_UNAVAILABLE, "STOPPING", "server stopped"),
    errors.TransferTimeout: _etcd(_UNAVAILABLE, "TRANSFER_TIMEOUT", "request timed out, leader transfer took too long"),
    errors.TooManyRequests: _etcd(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", "too many requests"),
    errors.DeadlineExceeded: Row(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "context deadline exceeded"),
    errors.InvalidField: Row(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    errors.RequestTooLarge: _etcd(StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", "request is too large"),
    errors.NoSpace: _etcd(StatusCode.RESOURCE_EXHAUSTED, "NO_SPACE", "mvcc: database space exceeded"),
    errors.Corrupt: _etcd(StatusCode.DATA_LOSS, "CORRUPT", "corrupt cluster"),
    errors.NotLeader: _etcd(StatusCode.FAILED_PRECONDITION, "NOT_LEADER", "not leader"),
    errors.BadTransferee: _etcd(StatusCode.FAILED_PRECONDITION, "BAD_TRANSFEREE", "bad leader transferee"),
    errors.MemberNotFound: _etcd(StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND", "member not found"),
    errors.LearnerRefused: _etcd(StatusCode.FAILED_PRECONDITION, "LEARNER_REFUSED", "rpc not supported for learner"),
    # etcd sends these with code Unknown; clients match the texts.
    errors.WaiterExpired: Row(StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED", "mutex: session is expired"),
    errors.NotElected: Row(StatusCode.FAILED_PRECONDITION, "NOT_ELECTED", "election: not leader"),
    errors.NobodyElected: Row(StatusCode.NOT_FOUND, "NOBODY_ELECTED", "election: no leader"),
    errors.LeaderNotGiven: Row(StatusCode.INVALID_ARGUMENT, "LEADER_NOT_GIVEN", '"leader" field must be provided'),
    errors.NotSupported: Row(StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED"),
    # What consensus itself says to a call it does not carry out.
    raft.NoLeader: _etcd(_UNAVAILABLE, "NO_LEADER", "no leader"),
    raft.NotLeader: _etcd(StatusCode.FAILED_PRECONDITION, "NOT_LEADER", "not leader"),
    raft.InvalidTransferee: _etcd(StatusCode.FAILED_PRECONDITION, "BAD_TRANSFEREE", "bad leader transferee"),
    raft.Overloaded: _etcd(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", "too many requests"),
    raft.TransferInProgress: _etcd(_UNAVAILABLE, "LEADER_CHANGED", "leader changed"),
}

MALFORMED: Final = Row(StatusCode.INVALID_ARGUMENT, "MALFORMED")
INTERNAL: Final = Row(StatusCode.INTERNAL, "INTERNAL")


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, ready to be sent."""

    code: StatusCode
    name: str
    text: str
    executed: Executed = "no"
    more: tuple[tuple[str, str], ...] = ()

    @property
    def trailers(self) -> tuple[tuple[str, str], ...]:
        """The trailing metadata."""
        return ((ERROR_TRAILER, self.name), (EXECUTED_TRAILER, self.executed), *self.more)


internal_errors: Counter[str] = Counter()
"""How often each method met an error nobody expected. Each is in the log, under the id that the client was told."""


def answer_to(fault: Exception, *, method: str, mutates: bool) -> Answer:
    """What the client is told. Never raises, and never tells more than the table says.

    Args:
        method: the RPC's name, for the log.
        mutates: whether it could have changed anything; a read that failed was never "executed".
    """
    answer = _known(fault, method)
    if answer is None:
        answer = _unexpected(fault, method)
    if not mutates and answer.executed != "no":
        answer = Answer(answer.code, answer.name, answer.text, "no", answer.more)
    return answer


def _known(fault: Exception, method: str) -> Answer | None:
    if isinstance(fault, Refused):
        return _refusal(fault.refusal)
    if isinstance(fault, InvalidRequest):
        more = [(FIELD_TRAILER, fault.field)]
        if fault.limit is not None:
            more.append((LIMIT_TRAILER, str(fault.limit)))
        code = StatusCode.OUT_OF_RANGE if fault.code in INVALID_OUT_OF_RANGE else StatusCode.INVALID_ARGUMENT
        return Answer(code, INVALID[fault.code], fault.text, more=tuple(more))
    if isinstance(fault, DecodeError):
        return Answer(MALFORMED.code, MALFORMED.name, f"raftkv: the bytes are no request of {method}")
    row = EXCEPTIONS.get(type(fault))
    if isinstance(fault, errors.RequestTimeout):
        row = TIMEOUTS[fault.kind]
    if row is None:
        return None
    executed = fault.executed if isinstance(fault, errors.RequestError) else "no"
    return Answer(row.code, row.name, row.text or f"raftkv: {fault}", executed, _more(fault))


def _more(fault: Exception) -> tuple[tuple[str, str], ...]:
    if isinstance(fault, errors.Overloaded):
        return ((LIMIT_TRAILER, fault.limit), (RETRY_AFTER_TRAILER, str(max(1, round(fault.retry_after_s * 1000)))))
    if isinstance(fault, raft.Overloaded):
        return ((LIMIT_TRAILER, "uncommitted_bytes_max"), (RETRY_AFTER_TRAILER, "100"))
    if isinstance(fault, errors.InvalidField) and fault.field:
        return ((FIELD_TRAILER, fault.field),)
    return ()


def _refusal(refusal: Refusal) -> Answer:
    row = REFUSALS[refusal.code]
    more: tuple[tuple[str, str], ...] = ()
    if refusal.code is RefusalCode.COMPACTED:
        more = ((COMPACT_REVISION_TRAILER, str(max(refusal.compact_revision, 0))),)
    # The one refusal of something that has happened, and only now cannot be told in full.
    executed: Executed = "unknown" if refusal.code is RefusalCode.RESULT_NOT_KEPT else "no"
    return Answer(row.code, row.name, row.text, executed, more)


def _unexpected(fault: Exception, method: str) -> Answer:
    error_id = secrets.token_hex(4)
    internal_errors[method] += 1
    _log.error("internal_error", error_id=error_id, method=method, exc_info=fault)
    return Answer(
        INTERNAL.code, INTERNAL.name, f"raftkv: internal error {error_id}; this node's log has more", "unknown"
    )


async def abort(context: Context, answer: Answer) -> None:
    """End the call with that answer; does not return."""
    await context.abort(answer.code, answer.text, answer.trailers)
