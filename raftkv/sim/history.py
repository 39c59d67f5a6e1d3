"""What clients did and saw, and the proof that it was linearizable (K1, K3).

The witness: the log gives an order of the commands. They are replayed in that order on a plain dict, which knows
nothing of the state machine, and every answer must be the one of the replay. A read has its place by its revision.
Real time is then the only other thing that must agree: what began after somebody had been told of a revision must not
be older. For writes that follows, because they enter the log after they began; reads are checked for it.

    called -> (the log applies it, once at most) -> returned: OK, FAILED (never applied), UNKNOWN (perhaps)
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from raftkv.sim.requests import Request


class Violation(AssertionError):
    """A promise was broken; `rule` is its name in reliability.md."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule


class Kind(enum.Enum):
    """What a client asks for."""

    PUT = "put"
    DELETE = "delete"
    SWAP = "swap"
    """A transaction: put if the key's version is `expected`, else read it."""
    READ = "read"
    SCAN = "scan"
    """A read of all keys at one revision."""
    COMMAND = "command"
    """What `request` says: of sessions, and what is done within one."""
    RENEW = "renew"
    """A keepalive of a lease."""


READS = (Kind.READ, Kind.SCAN)


class Outcome(enum.Enum):
    """What the client knows at the end."""

    PENDING = "pending"
    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


Item = tuple[bytes, bytes, int, int, int]
"""Key, value, create revision, mod revision, version."""

Answer = tuple[int, object]
"""The revision in the header, and what else the answer says, comparable."""


@dataclass(slots=True, eq=False)
class Operation:
    """One call of a client."""

    id: int
    kind: Kind
    key: bytes
    value: bytes = b""
    expected: int = 0
    wants_previous: bool = False
    node: int = 0
    outcome: Outcome = Outcome.PENDING
    answer: Answer | None = None
    floor: int = 0  # the greatest revision that anybody had been told of when it began
    witness: Answer | None = None  # what the replay of the log says
    index: int = 0  # the entry that carried it
    request: Request | None = None  # of COMMAND and RENEW
    then: Callable[[Operation], None] | None = None  # for whoever waits for the outcome

    def __str__(self) -> str:
        what = f"#{self.id} {self.kind.value} {self.key.decode()!r}"
        if self.kind is Kind.SWAP:
            what += f" if version={self.expected}"
        if self.request is not None:
            what = f"#{self.id} {self.request}"
        if self.value:
            what += f" = {self.value.decode()!r}"
        return f"{what} on node {self.node}: {self.outcome.value} {self.answer or ''}".rstrip()


class Model:
    """A key space as plain as it can be, with all of its past."""

    def __init__(self) -> None:
        self.revision = 1
        self._items: dict[bytes, Item] = {}
        self._past: dict[bytes, tuple[list[int], list[Item | None]]] = {}

    def apply(self, operation: Operation, index: int) -> Answer:
        """What a write in the entry `index` answers."""
        key, before = operation.key, self._items.get(operation.key)
        if operation.kind is Kind.PUT:
            return self.put(key, operation.value), before if operation.wants_previous else None
        if operation.kind is Kind.DELETE:
            if before is None:
                return self.revision, None
            self.delete([key])
            return self.revision, before
        assert operation.kind is Kind.SWAP, f"{operation.kind} is no write"
        if operation.expected == (before[4] if before else 0):
            return self.put(key, operation.value), True
        return self.revision, before

    def read(self, operation: Operation, revision: int) -> object:
        """What a read at `revision` must see."""
        if operation.kind is Kind.READ:
            return self._at(operation.key, revision)
        items = (self._at(key, revision) for key in sorted(self._past))
        return tuple(item for item in items if item is not None)

    def item(self, key: bytes) -> Item | None:
        """What a key is now."""
        return self._items.get(key)

    def put(self, key: bytes, value: bytes) -> int:
        """Write a key; the revision that it makes."""
        before, revision = self._items.get(key), self.revision + 1
        self.revision = revision
        item = (key, value, before[2] if before else revision, revision, before[4] + 1 if before else 1)
        self._items[key] = item
        self._remember(key, item)
        return revision

    def delete(self, keys: Iterable[bytes]) -> None:
        """Take out keys that are there, in one revision."""
        self.revision += 1
        for key in keys:
            del self._items[key]
            self._remember(key, None)

    def _remember(self, key: bytes, item: Item | None) -> None:
        revisions, items = self._past.setdefault(key, ([], []))
        revisions.append(self.revision)
        items.append(item)

    def _at(self, key: bytes, revision: int) -> Item | None:
        revisions, items = self._past.get(key, ([], []))
        place = bisect_right(revisions, revision)
        return items[place - 1] if place else None


class History:
    """Takes what happens as it happens, and raises `Violation` at the first thing that must not be."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model or Model()
        self.operations: list[Operation] = []
        self._told = 1  # the greatest revision that any client was told of

    @property
    def told(self) -> int:
        """The greatest revision that any client was told of."""
        return self._told

    def called(self, operation: Operation) -> None:
        """A client begins."""
        # A call that is repeated has the answer of its first time; whoever repeats it knows when that was.
        operation.floor = 0 if operation.kind is Kind.COMMAND else self._told
        self.operations.append(operation)

    def applied(self, index: int, operations: Sequence[Operation]) -> None:
        """The entry `index`, the next that has ever been applied, carries these."""
        for operation in operations:
            if operation.witness is not None:
                raise Violation("X1", f"applied twice, in entries {operation.index} and {index}: {operation}")
            if operation.outcome is Outcome.FAILED:
                raise Violation("K3", f"applied in entry {index} after it had failed for certain: {operation}")
            operation.witness = self.model.apply(operation, index)
            operation.index = index

    def returned(self, operation: Operation, outcome: Outcome, answer: Answer | None = None) -> None:
        """A client is told the outcome; `answer` for OK only."""
        if operation.outcome is not Outcome.PENDING:
            raise Violation("K3", f"answered twice, now {outcome.value} {answer}: {operation}")
        operation.outcome, operation.answer = outcome, answer
        if outcome is Outcome.FAILED and operation.witness is not None:
            raise Violation("K3", f"failed for certain, but was applied in entry {operation.index}: {operation}")
        if outcome is not Outcome.OK:
            return
        assert answer is not None, "an operation that went well has an answer"
        if operation.kind in READS:
            self._check_read(operation, answer)
        elif operation.witness is None:
            raise Violation("D1", f"acknowledged, but nobody has applied it: {operation}")
        elif answer != operation.witness:
            raise Violation("K1", f"the log says {operation.witness}: {operation}")
        if answer[0] < operation.floor:
            raise Violation("K1", f"stale, revision {operation.floor} was told before it began: {operation}")
        self._told = max(self._told, answer[0])

    def _check_read(self, operation: Operation, answer: Answer) -> None:
        revision, seen = answer
        if revision > self.model.revision:
            raise Violation("K1", f"read from the future, the log has made {self.model.revision}: {operation}")
        expected = self.model.read(operation, revision)
        if seen != expected:
            raise Violation("K1", f"at revision {revision} there was {expected}: {operation}")

    def count(self, outcome: Outcome) -> int:
        """How many operations ended so."""
        return sum(1 for operation in self.operations if operation.outcome is outcome)
