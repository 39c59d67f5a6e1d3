"""Why a node refuses or gives up a request, before it becomes a gRPC status.

Refusals by the *data* (a compacted revision, an unknown lease) are results of the state machine and no exceptions;
see `raftkv.state`. What is here is of the node's own making. `grpc_errors` has the table from both to codes and texts.

    RequestError
    ├─ Unavailable        try again, here or elsewhere: NoLeader, LeaderChanged, RequestTimeout, OutcomeHidden,
    │                     Stopping, TransferTimeout
    ├─ Overloaded         try again after `retry_after_s`: TooManyRequests
    ├─ DeadlineExceeded   the caller's own time is over
    └─ Refused            never succeeds as sent, or not on this node: InvalidField, RequestTooLarge, NoSpace, Corrupt,
                          NotLeader, BadTransferee, MemberNotFound, LearnerRefused, WaiterExpired, NotElected,
                          NobodyElected, LeaderNotGiven, NotSupported

`executed` answers what matters for a write: "no" is a promise that it changed nothing and never will.
"""

from __future__ import annotations

import enum
from typing import Literal


class ConfigError(ValueError):
    """A setting is impossible. Nothing has started.

    Attributes:
        field: the field of `NodeConfig`; its flag is spelled with dashes.
        problem: what is wrong, and what would be right.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


Executed = Literal["no", "unknown"]
"""What is known of a write that was answered with an error; goes over the wire. "no": it changed nothing and never
will."""


class RequestError(Exception):
    """The root: a request that this node does not carry out, or not to its end.

    Attributes:
        executed: see `Executed`.
    """

    def __init__(self, message: str = "", *, executed: Executed = "no") -> None:
        super().__init__(message)
        self.executed = executed


class Unavailable(RequestError):
    """Not now, or not known whether."""


class NoLeader(Unavailable):
    """No leader is known and the caller did not want to wait, or waited in vain. Nothing was proposed."""


class LeaderChanged(Unavailable):
    """Leadership moved while the request was on its way."""


class TimeoutKind(enum.Enum):
    """What a request waited for when the node gave it up."""

    GENERAL = enum.auto()
    LEADER_FAILURE = enum.auto()  # the leader it was given to has failed
    CONNECTION_LOST = enum.auto()  # this node lost touch with the leader or the quorum
    APPLY = enum.auto()  # the entry or read index is known, this node has not applied so far yet


class RequestTimeout(Unavailable):
    """The node's own time limit passed.

    Attributes:
        kind: what it waited for.
    """

    def __init__(self, kind: TimeoutKind = TimeoutKind.GENERAL, *, executed: Executed = "unknown") -> None:
        super().__init__(kind.name, executed=executed)
        self.kind = kind


class OutcomeHidden(Unavailable):
    """A snapshot replaced the part of the log in which this command would have shown: its fate cannot be known here."""

    def __init__(self) -> None:
        super().__init__(executed="unknown")


class Stopping(Unavailable):
    """This node is stopping."""


class TransferTimeout(Unavailable):
    """Leadership was not taken over in time; it stays where it was."""


class Overloaded(RequestError):
    """A budget is used up: try again.

    Attributes:
        limit: the configuration field that was reached.
        retry_after_s: when it is worth trying again.
    """

    def __init__(self, limit: str, retry_after_s: float = 0.1) -> None:
        super().__init__(limit)
        self.limit = limit
        self.retry_after_s = retry_after_s


class TooManyRequests(Overloaded):
    """More requests or bytes are in flight than this node takes on. Nothing was proposed."""


class DeadlineExceeded(RequestError):
    """The deadline that came with the request has passed."""


class Refused(RequestError):
    """Repeating it here changes nothing."""


class InvalidField(Refused):
    """A field is out of its bounds.

    Attributes:
        field: its name, as in the .proto.
        problem: the bound, and what was sent.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem


class RequestTooLarge(Refused):
    """The request exceeds `max_request_bytes`."""


class NoSpace(Refused):
    """The alarm NOSPACE is on: writes that need space are refused until it is disarmed."""


class Corrupt(Refused):
    """The alarm CORRUPT is on: nodes disagree about the data."""


class NotLeader(Refused):
    """Only the leader does this."""


class BadTransferee(Refused):
    """Leadership cannot go to that member."""


class MemberNotFound(Refused):
    """No member has this id."""


class LearnerRefused(Refused):
    """A learner does not serve this."""


class WaiterExpired(Refused):
    """The key of one who waited for a lock has vanished: its lease has ended, or somebody deleted it."""


class NotElected(Refused):
    """The key of a leader or candidate is not there any more, or not the same."""


class NobodyElected(Refused):
    """There is no leader on this name."""


class LeaderNotGiven(Refused):
    """The request does not say which leader is meant."""


class NotSupported(Refused):
    """raftkv does not do this (yet); the message says what and since when or why."""
