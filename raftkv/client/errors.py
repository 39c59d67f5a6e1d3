"""What a call of the SDK may raise. The branch answers one question: what may the caller do now?

    RaftkvError
    ├─ ConfigError        names the field; nothing has started
    ├─ InvalidRequest     never succeeds as sent: RequestTooLarge, FutureRevision, Compacted
    ├─ ConditionFailed    the data says no: LeaseNotFound, LockLost, SessionExpired
    ├─ Unavailable        not done, safe to repeat: NoLeader, LeaderChanged, Overloaded, DeadlineExceeded
    ├─ OutcomeUnknown     perhaps done: a write whose answer did not arrive
    └─ Closed             your own code closed this client (or forked away from it); `.perhaps_done` says the rest

`Unavailable` is also a `ConnectionError`, and a call that was not done when its time ran out is also a `TimeoutError`,
so that code which knows nothing of raftkv can catch both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftkv.client.results import KeyValue


class RaftkvError(Exception):
    """The root: catches everything that this SDK raises on purpose.

    Attributes:
        message: the reason, in the server's words where a server gave one.
        code: what decided, machine-readable: `NO_LEADER`, `COMPACTED`, ..., else the gRPC code's name; "" if local.
        endpoint: the `host:port` that was tried last, None where the call reached none.
        attempts: how many times the request was handed to an endpoint.
    """

    def __init__(self, message: str, *, code: str = "", endpoint: str | None = None, attempts: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.endpoint = endpoint
        self.attempts = attempts

    def __str__(self) -> str:
        if self.endpoint is None:
            return self.message
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"{self.message} ({self.endpoint}, {times})"


class ConfigError(RaftkvError):
    """A setting is wrong. Nothing has started.

    Attributes:
        field: the constructor argument, URL part or environment variable at fault.
    """

    def __init__(self, field: str, problem: str = "") -> None:
        super().__init__(f"{field}: {problem}" if problem else field)
        self.field = field


class InvalidRequest(RaftkvError):
    """The request can never succeed as sent. Nothing was changed.

    Attributes:
        field: the field of the request at fault, where the server names one.
    """

    field: str = ""


class RequestTooLarge(InvalidRequest):
    """The request, or the answer it asks for, exceeds a size limit."""


class FutureRevision(InvalidRequest):
    """The revision asked for has not been written yet."""


class Compacted(InvalidRequest):
    """The revision asked for has been compacted away.

    Attributes:
        compact_revision: the oldest revision that can still be read; 0 where the server did not say (etcd does not).
    """

    compact_revision: int = 0


class ConditionFailed(RaftkvError):
    """The data says no. Nothing was changed; look at the data and decide anew.

    Attributes:
        key: the key the condition was about, b"" where there is no single one.
        current: what that key holds, None where it has no value or was not read.
    """

    key: bytes = b""
    current: KeyValue | None = None


class LeaseNotFound(ConditionFailed):
    """The lease named in a put does not exist (any more)."""


class LeaseLost(ConditionFailed):
    """A lease was not kept alive in time, or somebody revoked it: what was bound to it is gone or about to go."""


class LockLost(ConditionFailed):
    """The lock is not held (any more): its lease ran out, or its key is gone. A write guarded by it did nothing."""


class NotLeading(LockLost):
    """This candidate does not lead (any more) in its election."""


class SessionExpired(ConditionFailed):
    """The session under which writes are made exactly once is gone; the next write begins a new one."""


class Unavailable(RaftkvError, ConnectionError):
    """Not done. The same call may be repeated, now or later."""


class DeadlineExceeded(Unavailable, TimeoutError):
    """The time of the call ran out, and it was not done. `__cause__` is the last failure met on the way."""


class LockTimeout(DeadlineExceeded):
    """The lock was not obtained in time; nothing is held and nobody waits in its queue for you."""


class NoLeader(Unavailable):
    """The cluster has no leader (no quorum, or an election is on)."""


class NoLeaderInTime(NoLeader, DeadlineExceeded):
    """No leader was found before the time of the call ran out."""


class LeaderChanged(Unavailable):
    """Leadership moved while the call was on its way."""


class Overloaded(Unavailable):
    """The server sheds load.

    Attributes:
        retry_after_s: how long the server asks to wait, 0.0 where it did not say.
        limit: the limit that was reached, where the server names it.
    """

    retry_after_s: float = 0.0
    limit: str = ""


class OutcomeUnknown(RaftkvError):
    """Perhaps done, perhaps not: a write was sent and its answer did not arrive.

    Within its session the SDK has repeated the write until its time ran out or the session had expired; without one
    (against etcd, with `retry=None`) it never repeats such a write. With the code `RESULT_NOT_KEPT` it was done, once,
    and its answer is lost. Read what it would have changed, or make the write conditional (`if_revision`, `txn`), so
    that repeating it is harmless.
    """


class Closed(RaftkvError):
    """This client was closed by your own code, or belongs to the process this one was forked from.

    Attributes:
        perhaps_done: True for a write that was under way when the client was closed: perhaps it was done. False: the
            call changed nothing.
    """

    perhaps_done: bool = False
