"""Transactions: comparisons, and what to do when they hold and when they do not.

    await client.txn().when(Key("stock").value == b"1").then(Put("stock", "0")).otherwise(Get("stock")).commit()

`Key(...).version == 0` makes a comparison instead of an answer; `bool()` of one raises, so that it cannot be mistaken.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, NoReturn, Self, TypeAlias, TypeVar

from raftkv._pb import kv_pb2
from raftkv.client.errors import InvalidRequest
from raftkv.client.keys import Namespace, Text, to_bytes
from raftkv.client.options import DEFAULT, TimeoutArg
from raftkv.client.results import DeleteResult, OpResult, PutResult, RangeResult, TxnResult

_Pb = kv_pb2.Compare
_RESULT: Final = {"==": _Pb.EQUAL, "!=": _Pb.NOT_EQUAL, "<": _Pb.LESS, ">": _Pb.GREATER}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One condition of a transaction; made by comparing a field of `Key`."""

    key: Text
    end: Text | None
    prefix: bool
    field: str
    operator: str
    operand: int | bytes

    def __bool__(self) -> NoReturn:
        raise TypeError("a comparison of raftkv.Key is a condition for txn().when(...), it has no truth value here")

    def to_pb(self, namespace: Namespace) -> kv_pb2.Compare:
        """On the wire."""
        key, range_end = namespace.span(self.key, self.end, self.prefix)
        message = kv_pb2.Compare(result=_RESULT[self.operator], key=key, range_end=range_end)
        operand = self.operand
        if isinstance(operand, bytes):
            message.target = _Pb.VALUE
            message.value = operand
        elif self.field == "version":
            message.target = _Pb.VERSION
            message.version = operand
        elif self.field == "create_revision":
            message.target = _Pb.CREATE
            message.create_revision = operand
        elif self.field == "mod_revision":
            message.target = _Pb.MOD
            message.mod_revision = operand
        else:
            message.target = _Pb.LEASE
            message.lease = operand
        return message


class _Field:
    """A field of a key, waiting to be compared."""

    __slots__ = ("_key", "_name")

    def __init__(self, key: Key, name: str) -> None:
        self._key = key
        self._name = name

    def _compare(self, operator: str, operand: object) -> Comparison:
        key = self._key
        if self._name == "value":
            if not isinstance(operand, (str, bytes)):
                raise TypeError(f"a value is compared with str or bytes, not {type(operand).__name__}")
            return Comparison(key.key, key.end, key.prefix, self._name, operator, to_bytes(operand, "value"))
        if not isinstance(operand, int) or isinstance(operand, bool):
            raise TypeError(f"{self._name} is compared with an int, not {type(operand).__name__}")
        if not -(2**63) <= operand < 2**63:
            raise InvalidRequest(f"{self._name}: {operand} is not a 64-bit number", code="INVALID_COMPARE")
        return Comparison(key.key, key.end, key.prefix, self._name, operator, operand)

    def __eq__(self, other: object) -> Comparison:  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: object) -> Comparison:  # type: ignore[override]
        return self._compare("!=", other)

    def __lt__(self, other: int | Text) -> Comparison:
        return self._compare("<", other)

    def __gt__(self, other: int | Text) -> Comparison:
        return self._compare(">", other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Key:
    """A key to compare. With `end` or `prefix` the condition must hold for every key in that range."""

    key: Text
    end: Text | None = None
    prefix: bool = False

    @property
    def version(self) -> _Field:
        """How often it was put; 0 where it does not exist."""
        return _Field(self, "version")

    @property
    def create_revision(self) -> _Field:
        """The revision it came into being; 0 where it does not exist."""
        return _Field(self, "create_revision")

    @property
    def mod_revision(self) -> _Field:
        """The revision of its last change; 0 where it does not exist."""
        return _Field(self, "mod_revision")

    @property
    def value(self) -> _Field:
        """Its value; every comparison is false where it does not exist."""
        return _Field(self, "value")

    @property
    def lease(self) -> _Field:
        """Its lease; 0 where it has none or does not exist."""
        return _Field(self, "lease")


@dataclass(frozen=True, slots=True)
class Guard:
    """Proof of a lock, for a write: it is refused as a whole once the lock has another holder. See `Lock.guard`."""

    key: bytes
    """The lock's key, as on the wire, namespace included."""
    token: int
    """The lock's fencing token."""

    def to_pb(self) -> kv_pb2.Guard:
        """On the wire, to a raftkv node."""
        return kv_pb2.Guard(key=self.key, token=self.token)

    def compare(self) -> kv_pb2.Compare:
        """As a condition of a transaction, which etcd understands too."""
        return kv_pb2.Compare(key=self.key, target=_Pb.CREATE, result=_Pb.EQUAL, create_revision=self.token)


@dataclass(frozen=True, slots=True)
class Put:
    """Put a key, inside a transaction. Arguments as of `AsyncClient.put`."""

    key: Text
    value: Text = b""
    lease: int = 0
    prev: bool = False
    ignore_value: bool = False
    ignore_lease: bool = False

    def to_pb(self, namespace: Namespace) -> kv_pb2.PutRequest:
        """On the wire."""
        return kv_pb2.PutRequest(
            key=namespace.key(self.key),
            value=to_bytes(self.value, "value"),
            lease=self.lease,
            prev_kv=self.prev,
            ignore_value=self.ignore_value,
            ignore_lease=self.ignore_lease,
        )


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key or a range, inside a transaction. Arguments as of `AsyncClient.range`."""

    key: Text
    end: Text | None = None
    prefix: bool = False
    limit: int = 0
    keys_only: bool = False
    count_only: bool = False
    revision: int = 0

    def to_pb(self, namespace: Namespace) -> kv_pb2.RangeRequest:
        """On the wire."""
        key, range_end = namespace.span(self.key, self.end, self.prefix)
        return kv_pb2.RangeRequest(
            key=key,
            range_end=range_end,
            limit=self.limit,
            keys_only=self.keys_only,
            count_only=self.count_only,
            revision=self.revision,
        )


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key or a range, inside a transaction. Arguments as of `AsyncClient.delete`."""

    key: Text
    end: Text | None = None
    prefix: bool = False
    prev: bool = False

    def to_pb(self, namespace: Namespace) -> kv_pb2.DeleteRangeRequest:
        """On the wire."""
        key, range_end = namespace.span(self.key, self.end, self.prefix)
        return kv_pb2.DeleteRangeRequest(key=key, range_end=range_end, prev_kv=self.prev)


@dataclass(frozen=True, slots=True)
class Branches:
    """A whole transaction, as data. As an operation of another one it is nested (etcd >= 3.3)."""

    when: tuple[Comparison, ...] = ()
    then: tuple[Op, ...] = ()
    otherwise: tuple[Op, ...] = ()

    def writes(self) -> bool:
        """Whether any branch changes anything; one that does not is a read and may be repeated freely."""
        return any(
            op.writes() if isinstance(op, Branches) else not isinstance(op, Get) for op in self.then + self.otherwise
        )

    def to_pb(self, namespace: Namespace) -> kv_pb2.TxnRequest:
        """On the wire."""
        return kv_pb2.TxnRequest(
            compare=[comparison.to_pb(namespace) for comparison in self.when],
            success=[_op_to_pb(op, namespace) for op in self.then],
            failure=[_op_to_pb(op, namespace) for op in self.otherwise],
        )


Op: TypeAlias = Put | Get | Delete | Branches


def _op_to_pb(op: Op, namespace: Namespace) -> kv_pb2.RequestOp:
    if isinstance(op, Put):
        return kv_pb2.RequestOp(request_put=op.to_pb(namespace))
    if isinstance(op, Get):
        return kv_pb2.RequestOp(request_range=op.to_pb(namespace))
    if isinstance(op, Delete):
        return kv_pb2.RequestOp(request_delete_range=op.to_pb(namespace))
    return kv_pb2.RequestOp(request_txn=op.to_pb(namespace))


_Committed = TypeVar("_Committed")


class TxnBuilder(Generic[_Committed]):
    """A transaction being put together. Each method returns the builder; `commit` sends it."""

    __slots__ = ("_branches", "_send")

    def __init__(self, send: Callable[[Branches, TimeoutArg], _Committed]) -> None:
        self._send = send
        self._branches = Branches()

    @property
    def branches(self) -> Branches:
        """What was put together so far, to nest it in another transaction."""
        return self._branches

    def when(self, *comparisons: Comparison) -> Self:
        """Add conditions; all must hold. Without any, the `then` branch is always taken."""
        for comparison in comparisons:
            if not isinstance(comparison, Comparison):
                raise TypeError(f"when() takes comparisons of Key(...), not {comparison!r}")
        old = self._branches
        self._branches = Branches(old.when + comparisons, old.then, old.otherwise)
        return self

    def then(self, *ops: Op | TxnBuilder[_Committed]) -> Self:
        """Add operations to be carried out when all conditions hold."""
        old = self._branches
        self._branches = Branches(old.when, old.then + _ops("then", ops), old.otherwise)
        return self

    def otherwise(self, *ops: Op | TxnBuilder[_Committed]) -> Self:
        """Add operations to be carried out when some condition does not hold."""
        old = self._branches
        self._branches = Branches(old.when, old.then, old.otherwise + _ops("otherwise", ops))
        return self

    def commit(self, *, timeout: TimeoutArg = DEFAULT) -> _Committed:
        """Send it. It is carried out as one: entirely, in one revision, or not at all.

        Args:
            timeout: as in every call.
        Raises:
            InvalidRequest: too many operations, a key put twice, ...
            OutcomeUnknown: it writes, and its answer did not arrive.
            Unavailable: it was not done.
        """
        return self._send(self._branches, timeout)


def _ops(where: str, ops: tuple[object, ...]) -> tuple[Op, ...]:
    plain: list[Op] = []
    for op in ops:
        if isinstance(op, TxnBuilder):
            plain.append(op.branches)
        elif isinstance(op, (Put, Get, Delete, Branches)):
            plain.append(op)
        else:
            raise TypeError(f"{where}() takes Put, Get, Delete or a transaction, not {op!r}")
    return tuple(plain)


Txn: TypeAlias = TxnBuilder[Awaitable[TxnResult]]
"""What `AsyncClient.txn()` gives."""


def range_result(response: kv_pb2.RangeResponse, namespace: Namespace, revision: int) -> RangeResult:
    """The typed form of a RangeResponse."""
    return RangeResult(tuple(map(namespace.item, response.kvs)), response.count, response.more, revision)


def put_result(response: kv_pb2.PutResponse, namespace: Namespace, revision: int) -> PutResult:
    """The typed form of a PutResponse."""
    return PutResult(revision, namespace.item(response.prev_kv) if response.HasField("prev_kv") else None)


def delete_result(response: kv_pb2.DeleteRangeResponse, namespace: Namespace, revision: int) -> DeleteResult:
    """The typed form of a DeleteRangeResponse."""
    return DeleteResult(response.deleted, revision, tuple(map(namespace.item, response.prev_kvs)))


def txn_result(response: kv_pb2.TxnResponse, namespace: Namespace, revision: int) -> TxnResult:
    """The typed form of a TxnResponse. All of it happened in one revision, that of the outermost header."""
    results: list[OpResult] = []
    for op in response.responses:
        kind = op.WhichOneof("response")
        if kind == "response_range":
            results.append(range_result(op.response_range, namespace, revision))
        elif kind == "response_put":
            results.append(put_result(op.response_put, namespace, revision))
        elif kind == "response_delete_range":
            results.append(delete_result(op.response_delete_range, namespace, revision))
        elif kind == "response_txn":
            results.append(txn_result(op.response_txn, namespace, revision))
    return TxnResult(response.succeeded, revision, tuple(results))
