"""How one call is made: pick an endpoint, hand the request over, judge the result, perhaps again.

A plain loop, no task and no timer per call: gRPC keeps the deadline. On the way of a call that succeeds at once this
adds a few microseconds to what grpc.aio itself costs (bench/client_overhead.py measures it). Retrying by a library was
tried on paper and left: the loop changes its target between attempts and waits for connections within the same
deadline, so that the library would only have slept (ADR 0010).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, NoReturn

import grpc
import grpc.aio

from raftkv.client.connection import Connection
from raftkv.client.errors import DeadlineExceeded, RaftkvError, Unavailable
from raftkv.client.events import AttemptFailed
from raftkv.client.faults import Fault, FaultKind, closed_under_way, error_of, outcome_unknown, understand
from raftkv.client.methods import Method, RequestT, ResponseT
from raftkv.client.options import Timeout
from raftkv.client.pool import Pool
from raftkv.client.retry import Action, Decision, Retry, attempt_timeout_s, decide
from raftkv.client.routing import Purpose


class _Progress:
    """What a call that failed at least once remembers."""

    __slots__ = ("attempts", "fault", "tried", "waits")

    def __init__(self) -> None:
        self.attempts = 0
        self.waits = 0
        self.tried: set[Connection] = set()  # failed this request since it last waited
        self.fault: Fault | None = None


async def invoke(
    pool: Pool,
    method: Method[RequestT, ResponseT],
    request: RequestT,
    *,
    purpose: Purpose,
    timeout: Timeout,
    retry: Retry | None,
) -> ResponseT:
    """Make one call; see `decide` for what is tried again.

    Raises:
        OutcomeUnknown: a write was sent and its answer did not arrive.
        Unavailable: it was not done.
        InvalidRequest, ConditionFailed: the server refused it.
        Closed: the client is closed.
    """
    loop = pool.enter()
    pool.calls += 1
    router = pool.router
    deadline = None if timeout.total is None else loop.time() + timeout.total
    mutation = purpose is Purpose.WRITE or purpose is Purpose.LEADER
    progress: _Progress | None = None
    try:
        while True:
            if mutation and router.must_wait():
                await _wait_for_leader(pool, deadline, progress)
            avoid = progress.tried if progress is not None else ()
            connection = router.pick(purpose, avoid)
            if connection is None:
                connection = await _wait_for_connection(pool, purpose, timeout, deadline, progress)
            if progress is None and (mutation or timeout.attempt is None):
                limit_s = timeout.total if deadline is None else deadline - loop.time()
            else:
                limit_s = _limit_s(pool, connection, mutation, timeout, deadline, progress)
            epoch = connection.breaker.epoch
            if pool.lookout.resting:
                pool.lookout.wake()
            connection.inflight += 1
            try:
                response = await connection.unary(method)(request, timeout=limit_s)
            except grpc.aio.AioRpcError as error:
                failure = error
            except asyncio.CancelledError:
                connection.breaker.released(epoch)
                _raise_if_closed(pool, connection, mutation)
                raise
            else:
                connection.answered(epoch)
                pool.observe(connection, response.header)
                return response
            finally:
                connection.inflight -= 1
            if progress is None:
                progress = _Progress()
            await _after_failure(pool, connection, epoch, method, failure, mutation, deadline, retry, progress)
    except RaftkvError:
        pool.failures += 1
        raise


def _limit_s(
    pool: Pool,
    connection: Connection,
    mutation: bool,
    timeout: Timeout,
    deadline: float | None,
    progress: _Progress | None,
) -> float | None:
    assert pool.loop is not None
    remaining_s = None if deadline is None else max(0.001, deadline - pool.loop.time())
    if mutation:
        return remaining_s  # leaving it behind would make its outcome unknown: it has all the time there is
    avoid = {connection} if progress is None else progress.tried | {connection}
    return attempt_timeout_s(
        0 if progress is None else progress.attempts,
        attempt_s=timeout.attempt,
        remaining_s=remaining_s,
        elsewhere=pool.router.elsewhere(avoid),
    )


async def _wait_for_connection(
    pool: Pool, purpose: Purpose, timeout: Timeout, deadline: float | None, progress: _Progress | None
) -> Connection:
    """Nothing is connected: wait for it. Nothing was sent, so that running out of time here is harmless."""
    assert pool.loop is not None
    limits = [limit for limit in (timeout.connect,) if limit is not None]
    if deadline is not None:
        limits.append(max(0.0, deadline - pool.loop.time()))
    limit_s = min(limits, default=None)
    until = None if limit_s is None else pool.loop.time() + limit_s
    while True:
        connection = pool.router.pick(purpose)
        if connection is not None:
            return connection
        remaining_s = None if until is None else until - pool.loop.time()
        if (remaining_s is not None and remaining_s <= 0) or not await pool.wait_ready(remaining_s):
            attempts = progress.attempts if progress is not None else 0
            time_is_up = deadline is not None and pool.loop.time() >= deadline - 0.001
            kind = DeadlineExceeded if time_is_up else Unavailable
            raise kind(pool.unreachable(), code="UNREACHABLE", attempts=attempts)


async def _wait_for_leader(pool: Pool, deadline: float | None, progress: _Progress | None) -> None:
    """Etcd's leader is gone: nothing is sent before the next one is known."""
    assert pool.loop is not None
    if not await pool.wait_leader(None if deadline is None else deadline - pool.loop.time()):
        attempts = progress.attempts if progress is not None else 0
        text = "the leader is gone, and no other was known in time"
        raise DeadlineExceeded(text, code="NO_LEADER", attempts=attempts)


async def _after_failure(
    pool: Pool,
    connection: Connection,
    epoch: int,
    method: Method[Any, Any],
    error: grpc.aio.AioRpcError,
    mutation: bool,
    deadline: float | None,
    retry: Retry | None,
    progress: _Progress,
) -> None:
    """Return when the call should be tried again, else raise."""
    assert pool.loop is not None
    if pool.closed:
        _raise_if_closed(pool, connection, mutation)
    fault = understand(error.code(), error.details() or "", error.trailing_metadata())
    progress.attempts += 1
    progress.fault = fault
    progress.tried.add(connection)
    if fault.kind.blames_endpoint:
        pool.unanswered(connection, epoch, silent=fault.kind is FaultKind.SILENT)
    else:
        connection.answered(epoch)
    if fault.kind is FaultKind.LEARNER:
        connection.is_learner = True
        pool.router.forget_choices()
    if fault.kind is FaultKind.STOPPING:
        pool.stops(connection)
    if fault.kind in (FaultKind.NO_LEADER, FaultKind.LEADER_CHANGED):
        pool.leader_wanted()
    decision = decide(
        fault,
        mutation=mutation,
        attempts=progress.attempts,
        waits=progress.waits,
        elsewhere=pool.router.elsewhere(progress.tried),
        remaining_s=None if deadline is None else deadline - pool.loop.time(),
        policy=retry,
        uniform=pool.random.random,
    )
    again = decision.action is Action.AGAIN
    pool.hooks.fire(
        "attempt_failed",
        AttemptFailed(
            method.name,
            connection.endpoint,
            fault.code,
            fault.text,
            progress.attempts,
            decision.delay_s if again else None,
        ),
    )
    if not again:
        _give_up(pool, connection, fault, decision, progress, error)
    pool.retries += 1
    if decision.delay_s > 0:
        progress.waits += 1
        progress.tried.clear()  # after a pause every endpoint deserves another look
        await asyncio.sleep(decision.delay_s)
        pool.enter()


def _give_up(
    pool: Pool,
    connection: Connection,
    fault: Fault,
    decision: Decision,
    progress: _Progress,
    error: grpc.aio.AioRpcError,
) -> NoReturn:
    if decision.action is Action.UNKNOWN:
        pool.outcomes_unknown += 1
        raise outcome_unknown(fault, endpoint=connection.endpoint, attempts=progress.attempts) from error
    time_is_up = decision.action is Action.TIME_IS_UP
    if time_is_up and fault.kind in (FaultKind.SILENT, FaultKind.TIMEOUT) and pool.nobody_serves():
        text = "no node can serve: the cluster has no leader, or no quorum"
        fault = replace(fault, kind=FaultKind.NO_LEADER, code="NO_LEADER", text=text)
    raise error_of(fault, endpoint=connection.endpoint, attempts=progress.attempts, time_is_up=time_is_up) from error


def _raise_if_closed(pool: Pool, connection: Connection, mutation: bool) -> None:
    """Closing the client cancels the calls in flight; their callers were not cancelled themselves."""
    task = asyncio.current_task()
    if pool.closed and (task is None or not task.cancelling()):
        raise closed_under_way(mutation, endpoint=connection.endpoint, attempts=1) from None
