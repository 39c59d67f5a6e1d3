"""Keys and values: get, range, scan, put, delete, transactions, update, compaction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from raftkv._pb import kv_pb2
from raftkv.client.calls import invoke
from raftkv.client.errors import ConditionFailed, InvalidRequest, LockLost
from raftkv.client.keys import Namespace, Text, to_bytes
from raftkv.client.methods import COMPACT, DELETE_RANGE, PUT, RANGE, TXN, Method, RequestT, ResponseT
from raftkv.client.options import DEFAULT, Consistency, Timeout, TimeoutArg, timeout_from
from raftkv.client.pipeline import Unsupported, pipeline_of
from raftkv.client.pool import Pool
from raftkv.client.results import CompactResult, DeleteResult, KeyValue, PutResult, RangeResult, TxnResult
from raftkv.client.retry import Retry
from raftkv.client.routing import Purpose
from raftkv.client.session import METHODS
from raftkv.client.txn import (
    Branches,
    Delete,
    Get,
    Guard,
    Key,
    Put,
    Txn,
    TxnBuilder,
    delete_result,
    put_result,
    range_result,
    txn_result,
)

_Pb = kv_pb2.RangeRequest
Sort: TypeAlias = Literal["key", "-key", "version", "-version", "create", "-create", "mod", "-mod", "value", "-value"]
"""What a range is sorted by; with a minus, greatest first."""
SORT_TARGETS: Final = {
    "key": _Pb.KEY,
    "version": _Pb.VERSION,
    "create": _Pb.CREATE,
    "mod": _Pb.MOD,
    "value": _Pb.VALUE,
}


@dataclass(frozen=True, slots=True)
class Context:
    """What a client and its parts share: the connections, and how calls are made over them."""

    pool: Pool
    timeout: Timeout
    retry: Retry | None
    namespace: Namespace
    consistency: Consistency

    async def call(
        self, method: Method[RequestT, ResponseT], request: RequestT, purpose: Purpose, timeout: TimeoutArg
    ) -> ResponseT:
        """One call with this client's settings."""
        limits = self.timeout if timeout is DEFAULT else timeout_from(timeout, self.timeout)
        pool = self.pool
        if purpose is Purpose.WRITE and self.retry is not None and method in METHODS:
            pool.enter()
            pipeline = pipeline_of(pool)
            if not pipeline.unsupported:
                try:
                    return await pipeline.call(method, method.serialize(request), limits, self.retry)
                except Unsupported:
                    pool.calls -= 1  # counted again as the unary call it becomes
        return await invoke(pool, method, request, purpose=purpose, timeout=limits, retry=self.retry)

    def read_purpose(self, serializable: bool | None) -> Purpose:
        """Where a read goes."""
        stale = self.consistency == "serializable" if serializable is None else serializable
        return Purpose.STALE_READ if stale else Purpose.READ


class KV:
    """The key-value half of `AsyncClient`."""

    _context: Context

    async def get(
        self, key: Text, *, revision: int = 0, serializable: bool | None = None, timeout: TimeoutArg = DEFAULT
    ) -> KeyValue | None:
        """Read one key, linearizably unless asked otherwise.

        Args:
            key: text is encoded as UTF-8.
            revision: the store as of this revision; 0 is now.
            serializable: True lets any node answer from what it has, perhaps stale, even without a quorum; None is
                the client's `consistency`.
            timeout: seconds for the whole call, retries included; None waits for ever.
        Returns:
            The item, or None where the key had no value.
        Raises:
            Compacted: history before `.compact_revision` is gone.
            FutureRevision: `revision` has not been written yet.
            Unavailable: nothing was read in time.

        Same as etcd v3 `Range` on one key.
        """
        context = self._context
        purpose = context.read_purpose(serializable)
        try:
            request = kv_pb2.RangeRequest(
                key=context.namespace.key(key), revision=revision, serializable=purpose is Purpose.STALE_READ
            )
        except ValueError as error:
            raise _bad(error) from None
        response = await context.call(RANGE, request, purpose, timeout)
        return context.namespace.item(response.kvs[0]) if response.kvs else None

    async def range(
        self,
        key: Text,
        end: Text | None = None,
        *,
        prefix: bool = False,
        limit: int = 0,
        sort: Sort | None = None,
        keys_only: bool = False,
        count_only: bool = False,
        revision: int = 0,
        min_mod_revision: int = 0,
        max_mod_revision: int = 0,
        min_create_revision: int = 0,
        max_create_revision: int = 0,
        serializable: bool | None = None,
        timeout: TimeoutArg = DEFAULT,
    ) -> RangeResult:
        """Read a range of keys in one piece.

        Args:
            key: the first key, or the prefix.
            end: the range is [key, end); "\\0" is everything from `key` on; None is the one key.
            prefix: all keys that begin with `key` ("" is all keys).
            limit: at most so many items; 0 is no limit.
            sort: by what; a leading minus is descending. None is by key, ascending.
            keys_only: leave the values out.
            count_only: only `.count`.
            revision: the store as of this revision; 0 is now.
            min_mod_revision, max_mod_revision, min_create_revision, max_create_revision: inclusive filters; 0 is off.
            serializable: as in `get`.
            timeout: as in `get`.
        Raises:
            Compacted, FutureRevision, Unavailable: as in `get`.

        Same as etcd v3 `Range`.
        """
        context = self._context
        purpose = context.read_purpose(serializable)
        order, target = _sort(sort)
        try:
            first, range_end = context.namespace.span(key, end, prefix)
            request = kv_pb2.RangeRequest(
                key=first,
                range_end=range_end,
                limit=limit,
                revision=revision,
                sort_order=order,
                sort_target=target,
                serializable=purpose is Purpose.STALE_READ,
                keys_only=keys_only,
                count_only=count_only,
                min_mod_revision=min_mod_revision,
                max_mod_revision=max_mod_revision,
                min_create_revision=min_create_revision,
                max_create_revision=max_create_revision,
            )
        except ValueError as error:
            raise _bad(error) from None
        response = await context.call(RANGE, request, purpose, timeout)
        return range_result(response, context.namespace, response.header.revision)

    async def scan(
        self,
        prefix: Text,
        *,
        page_size: int = 500,
        revision: int = 0,
        keys_only: bool = False,
        serializable: bool | None = None,
        timeout: TimeoutArg = DEFAULT,
    ) -> AsyncIterator[KeyValue]:
        """Walk all keys that begin with `prefix`, in key order, page by page, all as of one revision.

        Args:
            prefix: "" is all keys.
            page_size: keys fetched at a time.
            revision: the store as of this revision; 0 is the moment of the first page.
            keys_only: leave the values out.
            serializable: as in `get`.
            timeout: for each page.
        Raises:
            Compacted: the pinned revision was compacted away during the walk.
            Unavailable: a page was not read in time.
        """
        async for page in self.pages(
            prefix,
            page_size=page_size,
            revision=revision,
            keys_only=keys_only,
            serializable=serializable,
            timeout=timeout,
        ):
            for item in page:
                yield item

    async def pages(
        self,
        prefix: Text,
        *,
        page_size: int = 500,
        revision: int = 0,
        keys_only: bool = False,
        serializable: bool | None = None,
        timeout: TimeoutArg = DEFAULT,
    ) -> AsyncIterator[tuple[KeyValue, ...]]:
        """`scan`, a page at a time; the arguments are the same."""
        if page_size < 1:
            raise InvalidRequest(f"page_size: {page_size} must be at least 1", code="INVALID_RANGE")
        context = self._context
        purpose = context.read_purpose(serializable)
        try:
            first, range_end = context.namespace.span(prefix, None, True)
            request = kv_pb2.RangeRequest(
                key=first,
                range_end=range_end,
                limit=page_size,
                revision=revision,
                serializable=purpose is Purpose.STALE_READ,
                keys_only=keys_only,
            )
        except ValueError as error:
            raise _bad(error) from None
        while True:
            response = await context.call(RANGE, request, purpose, timeout)
            if response.kvs:
                yield tuple(map(context.namespace.item, response.kvs))
            if not response.more or not response.kvs:
                return
            # Pinned by the first page, so that the pages fit together.
            request.revision = request.revision or response.header.revision
            request.key = response.kvs[-1].key + b"\0"

    async def put(
        self,
        key: Text,
        value: Text,
        *,
        lease: int = 0,
        prev: bool = False,
        if_revision: int | None = None,
        if_absent: bool = False,
        ignore_value: bool = False,
        ignore_lease: bool = False,
        guards: Sequence[Guard] = (),
        timeout: TimeoutArg = DEFAULT,
    ) -> PutResult:
        """Write one key.

        Args:
            key, value: text is encoded as UTF-8.
            lease: bind the key to this lease; 0 detaches it from any.
            prev: also return what the key held before.
            if_revision: only if the key's `mod_revision` is exactly this (0: only if it does not exist).
            if_absent: only if the key does not exist.
            ignore_value: keep the present value (give "" as `value`), change the lease only.
            ignore_lease: keep the present lease.
            guards: locks under which this is written (`lock.guard()`); nothing is written unless all are still held.
            timeout: seconds for the whole call, retries included; None waits for ever.
        Raises:
            ConditionFailed: `if_revision` or `if_absent` does not hold; `.current` is what the key holds.
            LeaseNotFound: there is no such lease.
            LockLost: a lock among `guards` is not held any more.
            OutcomeUnknown: it was sent and no answer arrived in time, however often the SDK repeated it within its
                session (against etcd: never); or the session expired. With `if_revision` or `if_absent` you may repeat
                it yourself: at most one of the two takes effect.
            Unavailable: it was not done, repeat it as you like.
            RequestTooLarge, InvalidRequest: it can never be done.

        Same as etcd v3 `Put`; with a condition, a `Txn`.
        """
        context = self._context
        if if_absent or if_revision is not None:
            put = Put(key, value, lease, prev, ignore_value, ignore_lease)
            return await self._put_if(put, _expected(if_revision, if_absent), guards, timeout)
        if guards:
            put = Put(key, value, lease, prev, ignore_value, ignore_lease)
            result = await self.commit(Branches((), (put,)), guards=guards, timeout=timeout)
            done = result.results[0]
            assert isinstance(done, PutResult), "a transaction answers each operation in its kind"
            return done
        request = kv_pb2.PutRequest()  # field by field: as arguments they would cost more than twice as much
        try:
            request.key = context.namespace.key(key)
            request.value = value if type(value) is bytes else to_bytes(value, "value")
            if lease or prev or ignore_value or ignore_lease:
                request.lease, request.prev_kv = lease, prev
                request.ignore_value, request.ignore_lease = ignore_value, ignore_lease
        except ValueError as error:
            raise _bad(error) from None
        response = await context.call(PUT, request, Purpose.WRITE, timeout)
        revision = response.header.revision
        return put_result(response, context.namespace, revision) if prev else PutResult(revision)

    async def _put_if(self, put: Put, expected: int, guards: Sequence[Guard], timeout: TimeoutArg) -> PutResult:
        branches = Branches((Key(put.key).mod_revision == expected,), (put,), (Get(put.key),))
        result = await self.commit(branches, guards=guards, timeout=timeout)
        answer = result.results[0] if result.results else None
        if result.succeeded and isinstance(answer, PutResult):
            return answer
        raise self._condition_failed(put.key, expected, answer)

    def _condition_failed(self, key: Text, expected: int, answer: object) -> ConditionFailed:
        current = answer.items[0] if isinstance(answer, RangeResult) and answer.items else None
        found = "it does not exist" if current is None else f"its mod_revision is {current.mod_revision}"
        wanted = "not to exist" if expected == 0 else f"to have mod_revision {expected}"
        error = ConditionFailed(f"{key!r} was expected {wanted}, but {found}", code="CONDITION_FAILED")
        error.key = to_bytes(key, "key")
        error.current = current
        return error

    async def delete(
        self,
        key: Text,
        end: Text | None = None,
        *,
        prefix: bool = False,
        prev: bool = False,
        if_revision: int | None = None,
        guards: Sequence[Guard] = (),
        timeout: TimeoutArg = DEFAULT,
    ) -> DeleteResult:
        """Delete one key, a range, or a prefix.

        Args:
            key, end, prefix: as in `range`.
            prev: also return what was deleted.
            if_revision: one key only, and only if its `mod_revision` is exactly this.
            guards: as in `put`.
            timeout: as in `put`.
        Returns:
            `.deleted` is 0 where there was nothing to delete.
        Raises:
            ConditionFailed, LockLost, OutcomeUnknown, Unavailable: as in `put`.

        Same as etcd v3 `DeleteRange`; with a condition, a `Txn`.
        """
        context = self._context
        if if_revision is not None:
            if prefix or end is not None:
                raise InvalidRequest("if_revision needs a single key", code="INVALID_RANGE")
            return await self._delete_if(Delete(key, prev=prev), if_revision, guards, timeout)
        if guards:
            result = await self.commit(Branches((), (Delete(key, end, prefix, prev),)), guards=guards, timeout=timeout)
            done = result.results[0]
            assert isinstance(done, DeleteResult), "a transaction answers each operation in its kind"
            return done
        first, range_end = context.namespace.span(key, end, prefix)
        request = kv_pb2.DeleteRangeRequest(key=first, range_end=range_end, prev_kv=prev)
        response = await context.call(DELETE_RANGE, request, Purpose.WRITE, timeout)
        return delete_result(response, context.namespace, response.header.revision)

    async def _delete_if(
        self, delete: Delete, expected: int, guards: Sequence[Guard], timeout: TimeoutArg
    ) -> DeleteResult:
        branches = Branches((Key(delete.key).mod_revision == expected,), (delete,), (Get(delete.key),))
        result = await self.commit(branches, guards=guards, timeout=timeout)
        answer = result.results[0] if result.results else None
        if result.succeeded and isinstance(answer, DeleteResult):
            return answer
        raise self._condition_failed(delete.key, expected, answer)

    def txn(self, *, guards: Sequence[Guard] = ()) -> Txn:
        """Begin a transaction: `await client.txn().when(...).then(...).otherwise(...).commit()`.

        Args:
            guards: as in `put`.

        Same as etcd v3 `Txn`. Nothing is sent before `commit`.
        """

        def send(branches: Branches, timeout: TimeoutArg) -> Awaitable[TxnResult]:
            return self.commit(branches, guards=guards, timeout=timeout)

        return TxnBuilder(send)

    async def commit(
        self, branches: Branches, *, guards: Sequence[Guard] = (), timeout: TimeoutArg = DEFAULT
    ) -> TxnResult:
        """Carry out a transaction that was put together before (`txn().branches`); as `txn().commit()`."""
        context = self._context
        try:
            request = branches.to_pb(context.namespace)
        except ValueError as error:
            raise _bad(error) from None
        purpose = Purpose.WRITE if branches.writes() or guards else Purpose.READ
        if guards and not context.pool.is_raftkv:
            return await self._commit_guarded(request, guards, timeout)
        request.guards.extend(guard.to_pb() for guard in guards)
        response = await context.call(TXN, request, purpose, timeout)
        return txn_result(response, context.namespace, response.header.revision)

    async def _commit_guarded(
        self, request: kv_pb2.TxnRequest, guards: Sequence[Guard], timeout: TimeoutArg
    ) -> TxnResult:
        """The same by means of etcd: the guards are the conditions of an outer transaction."""
        context = self._context
        outer = kv_pb2.TxnRequest(compare=[guard.compare() for guard in guards])
        inner = bool(request.compare or request.failure)
        if inner:
            outer.success.add(request_txn=request)
        else:
            outer.success.extend(request.success)
        response = await context.call(TXN, outer, Purpose.WRITE, timeout)
        if not response.succeeded:
            raise LockLost("the lock is not held any more: nothing was written", code="LOCK_LOST")
        answer = response.responses[0].response_txn if inner else response
        return txn_result(answer, context.namespace, response.header.revision)

    async def update(
        self,
        key: Text,
        change: Callable[[KeyValue | None], Text],
        *,
        max_retries: int = 16,
        timeout: TimeoutArg = DEFAULT,
    ) -> KeyValue:
        """Read, change and write one key, again from the start whenever somebody else was faster.

        Args:
            key: the key.
            change: gets what the key holds (None where it does not exist) and returns the new value. It may be called
                several times, so it should have no effects of its own.
            max_retries: how often to start again.
            timeout: for each of the calls this makes.
        Returns:
            The key as written.
        Raises:
            ConditionFailed: somebody else was faster every time; `.current` is what the key holds.
            OutcomeUnknown: the write was sent and no answer arrived. Calling `update` again might apply `change` a
                second time.
            Unavailable: it was not done.
        """
        current = await self.get(key, serializable=False, timeout=timeout)
        retries = 0
        while True:
            expected = current.mod_revision if current is not None else 0
            value = to_bytes(change(current), "the value returned by change()")
            lease_kept = current is not None and current.lease != 0
            put = Put(key, value, ignore_lease=lease_kept)
            branches = Branches((Key(key).mod_revision == expected,), (put, Get(key)), (Get(key),))
            result = await self.commit(branches, timeout=timeout)
            read = result.results[-1] if result.results else None
            found = read.items[0] if isinstance(read, RangeResult) and read.items else None
            if result.succeeded and found is not None:
                return found
            if retries >= max_retries:
                raise self._condition_failed(key, expected, read)
            retries += 1
            current = found

    async def compact(self, revision: int, *, physical: bool = False, timeout: TimeoutArg = DEFAULT) -> CompactResult:
        """Forget the history before `revision`; what is current at `revision` stays readable.

        Args:
            revision: at most the present one.
            physical: wait until the space is free on the node that answers.
            timeout: as in `put`.
        Raises:
            Compacted: that much or more has been compacted already.
            FutureRevision: `revision` has not been written yet.
            OutcomeUnknown, Unavailable: as in `put`. Repeating it is harmless: it then raises Compacted.

        Same as etcd v3 `Compact`.
        """
        try:
            request = kv_pb2.CompactionRequest(revision=revision, physical=physical)
        except ValueError as error:
            raise _bad(error) from None
        response = await self._context.call(COMPACT, request, Purpose.WRITE, timeout)
        return CompactResult(response.header.revision)


def _sort(sort: str | None) -> tuple[kv_pb2.RangeRequest.SortOrder.ValueType, kv_pb2.RangeRequest.SortTarget.ValueType]:
    if sort is None:
        return _Pb.NONE, _Pb.KEY
    name = sort.removeprefix("-")
    if name not in SORT_TARGETS:
        raise InvalidRequest(f"sort: {sort!r} is not one of {', '.join(SORT_TARGETS)}", code="INVALID_SORT")
    return (_Pb.DESCEND if sort.startswith("-") else _Pb.ASCEND), SORT_TARGETS[name]


def _expected(if_revision: int | None, if_absent: bool) -> int:
    if if_absent and if_revision not in (None, 0):
        raise InvalidRequest("if_absent and if_revision contradict each other", code="INVALID_CONDITION")
    return if_revision or 0


def _bad(error: ValueError) -> InvalidRequest:
    """A number that does not fit into its field, or text that is no UTF-8: nothing was sent."""
    return InvalidRequest(f"the request cannot be encoded: {error}", code="INVALID_ARGUMENT")
