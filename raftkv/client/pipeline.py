"""The mutations of one client over one stream: whatever concurrent calls there are leave as one message.

    call --queue--> numbered in a session, sent --answer--> the caller
                        ^          |
                        +----------+  the stream broke, no leader, ...: the same number again, perhaps elsewhere

Because each mutation keeps its (session, number), repeating it is harmless: callers do not see leader changes, broken
connections or dead nodes, and `OutcomeUnknown` is left for an expired session, for time that ran out, and for what was
done with an answer too large to be kept. A server without the service (etcd, raftkv before 0.2) answers UNIMPLEMENTED
to the first stream; from then on calls are unary.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError

from raftkv._pb import session_pb2
from raftkv.client.cancelling import being_cancelled
from raftkv.client.connection import Connection
from raftkv.client.errors import Closed, DeadlineExceeded, OutcomeUnknown, RaftkvError
from raftkv.client.events import AttemptFailed
from raftkv.client.faults import (
    Fault,
    FaultKind,
    closed_under_way,
    error_of,
    fault_in,
    outcome_unknown,
)
from raftkv.client.methods import Method, RequestT, ResponseT
from raftkv.client.options import Timeout
from raftkv.client.retry import Retry, backoff_s
from raftkv.client.routing import Purpose
from raftkv.client.session import METHODS, Sessions
from raftkv.client.session_stream import SessionStream, StreamBroken, open_session_stream
from raftkv.client.waiting import Call, Waiting

if TYPE_CHECKING:
    from raftkv.client.pool import Pool

CALLS_MAX: Final = 10_000  # queued and under way; further callers wait for their turn
BATCH_CALLS_MAX: Final = 256
BATCH_BYTES_MAX: Final = 384 << 10
"""Of requests in a message; a larger one goes alone. Nodes let a message exceed the largest request by 512 KiB, so with
its envelopes no batch is refused by gRPC for its size, however small that is: only a request that goes alone."""
CLOSE_S: Final = 0.25
SILENCE_S: Final = 0.1  # so long nothing was answered, though something is under way: does the node live?
PROOF_S: Final = 0.2


class Unsupported(Exception):
    """The servers have no such stream: make the call another way. Nothing was done."""


class Pipeline:
    """Of one client and its clones."""

    def __init__(self, pool: Pool) -> None:
        assert pool.loop is not None
        self._pool = pool
        self._loop = pool.loop
        self._waiting = Waiting(self._loop, CALLS_MAX, self._time_is_up)
        self._queue: deque[Call] = deque()  # not yet numbered, or to be sent again
        self._under_way: dict[int, Call] = {}  # sent over the stream that is open now, by id
        self._resting: set[Call] = set()  # refused for now: back in the queue after a pause
        self._end: Exception | None = None  # nothing is sent any more, and this is why
        self._sessions = Sessions()
        self._largest: Call | None = None  # of those that went alone over this stream, while it is not answered
        self._cancelled: list[int] = []
        self._next_id = 1
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()  # something is under way
        self._started = False
        self._ever_served = False
        self._stream: SessionStream | None = None
        self._connection: Connection | None = None
        self._answered: tuple[Method[Any, Any], bytes] | None = None  # an answer of the last message
        self.unsupported = False

    async def call(
        self, method: Method[RequestT, ResponseT], payload: bytes, timeout: Timeout, retry: Retry
    ) -> ResponseT:
        """Have one mutation done, exactly once.

        Raises:
            Unsupported: make a unary call instead.
            OutcomeUnknown: its time ran out under way, its session expired, or its answer was too large to be kept.
            RaftkvError: as any call.
        """
        pool = self._pool
        pool.calls += 1
        deadline = None if timeout.total is None else self._loop.time() + timeout.total
        call = Call(method, payload, deadline, retry, self._loop.create_future())
        waiting = self._waiting
        try:
            await waiting.enter(call)
            try:
                if self._end is not None:  # which it was not when the caller looked
                    raise self._end
                if not self._started:
                    self._start()
                self._queue.append(call)
                self._wake.set()
                return method.parse(await call.future)
            finally:
                waiting.leave(call)
        except RaftkvError as error:
            pool.failures += 1
            if isinstance(error, OutcomeUnknown):
                pool.outcomes_unknown += 1
            raise
        except asyncio.CancelledError:
            self._drop(call)
            raise

    def _start(self) -> None:
        self._started = True
        self._pool.spawn(self._run(), "pipeline")

    # --- one call's end ---------------------------------------------------------------------------------------------

    def _time_is_up(self, call: Call) -> None:
        if call.future.done():
            return
        endpoint = self._connection.endpoint if self._connection is not None and call.attempts else None
        fault = call.fault
        if fault is None:
            fault = Fault(FaultKind.SILENT, "DEADLINE_EXCEEDED", "no answer arrived in time", not call.sent)
        if call.sent or call.perhaps_done:
            error: RaftkvError = outcome_unknown(fault, endpoint=endpoint, attempts=call.attempts)
        elif not call.attempts and self._connection is None:
            error = DeadlineExceeded(self._pool.unreachable(), code="UNREACHABLE")
        else:
            if fault.kind is FaultKind.SILENT and self._pool.nobody_serves():
                fault = Fault(FaultKind.NO_LEADER, "NO_LEADER", "no node can serve: the cluster has no quorum", True)
            error = error_of(fault, endpoint=endpoint, attempts=call.attempts, time_is_up=True)
        call.future.set_exception(error)
        self._drop(call)

    def _drop(self, call: Call) -> None:
        """Nobody waits for it any more: it is not sent, or the node is told."""
        if call.sent:
            self._cancelled.append(call.id)
            self._under_way.pop(call.id, None)
            call.sent = False
        self._complete(call)
        self._wake.set()  # the node has to be told, or there is room in a session now
        if not call.future.done():
            call.future.cancel()

    def _complete(self, call: Call) -> None:
        if call.session is not None:
            call.session.complete(call.seq)

    def _fail(self, call: Call, error: BaseException) -> None:
        self._complete(call)
        if not call.future.done():
            call.future.set_exception(error)

    def _end_all(self, error: Exception) -> None:
        """None is sent again. Only to those that were certainly not done this is just an error."""
        calls = [*self._under_way.values(), *self._queue, *self._resting]
        for each in (self._under_way, self._queue, self._resting):
            each.clear()
        for call in calls:
            told = error
            if call.perhaps_done or call.sent:
                fault = call.fault or Fault(FaultKind.UNREACHABLE, "UNREACHABLE", str(error), not_executed=False)
                unknown = outcome_unknown(fault, endpoint=None, attempts=call.attempts)
                told = closed_under_way(True, attempts=call.attempts) if isinstance(error, Closed) else unknown
            self._fail(call, told)

    # --- the stream -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        waits = 0
        try:
            while not self.unsupported:
                while not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                try:
                    connection = await self._pick()
                except RaftkvError as error:
                    self._end_all(error)
                    continue
                answered = await self._serve(connection)
                waits = 0 if answered else waits + 1
                if waits > 1:
                    await asyncio.sleep(backoff_s(Retry(), waits, self._pool.random.random()))
        finally:
            self._end = Unsupported() if self.unsupported else closed_under_way(False)
            self._end_all(self._end)

    async def _pick(self) -> Connection:
        while True:
            connection = self._pool.router.pick(Purpose.SESSION)
            if connection is not None:
                return connection
            await self._pool.wait_ready(None)

    async def _serve(self, connection: Connection) -> bool:
        """Send and receive over a stream to this node until it ends. Whether it answered anything."""
        pool = self._pool
        epoch = connection.breaker.epoch
        answers = connection.answers
        broken: StreamBroken | None = None
        try:
            stream = await open_session_stream(connection)
        except StreamBroken as error:
            connection.breaker.released(epoch)
            self._understand_end(connection, epoch, error)
            return False
        self._stream, self._connection = stream, connection
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send(stream))
                group.create_task(self._leave_if_silent(connection, stream, epoch))
                await stream.serve(partial(self._take_all, connection, epoch))
                raise EOFError  # which ends the group
        except* StreamBroken as errors:
            broken = next(error for error in errors.exceptions if isinstance(error, StreamBroken))
            self._refuse_too_large(connection, broken.fault)
        except* EOFError:
            pass
        finally:
            self._stream = self._largest = None
            stream.close()
            connection.breaker.released(epoch)
            self._sessions.opening.clear()
            self._cancelled.clear()
            self._take_back()
        if being_cancelled():
            raise asyncio.CancelledError  # which the group above may have kept to itself
        if broken is not None:
            self._understand_end(connection, epoch, broken)
        return connection.answers > answers and not pool.closed

    def _understand_end(self, connection: Connection, epoch: int, broken: StreamBroken) -> None:
        if broken.code is grpc.StatusCode.UNIMPLEMENTED and not self._ever_served:
            self.unsupported = True
            return
        fault = broken.fault
        if fault.kind.blames_endpoint:
            self._pool.unanswered(connection, epoch, silent=False)
        elif fault.kind is FaultKind.STOPPING:
            self._pool.stops(connection)
        elif fault.kind is FaultKind.LEARNER:
            connection.is_learner = True
            self._pool.router.forget_choices()
        for call in self._queue:
            call.fault = fault

    def _refuse_too_large(self, connection: Connection, fault: Fault) -> None:
        """gRPC ends the stream over a message that exceeds the node's limit; the largest one sent does for certain."""
        call = self._largest
        if call is None or self._under_way.get(call.id) is not call:
            return
        if fault.kind is FaultKind.TOO_LARGE and fault.not_executed:
            del self._under_way[call.id]
            call.sent = False
            self._refused(connection, call, fault)

    def _take_back(self) -> None:
        """The stream is gone: what was sent over it goes out again, first and in its order."""
        for call in reversed(self._under_way.values()):
            call.sent = False
            call.perhaps_done = True
            self._pool.retries += 1
            self._queue.appendleft(call)
        self._under_way.clear()

    async def _leave_if_silent(self, connection: Connection, stream: SessionStream, epoch: int) -> None:
        """End the stream at a node that neither answers nor gives a sign of life: it may be frozen.

        Within a session repeating is harmless, so this need not be certain: by the time that the others have elected a
        leader (some 400 ms), what was under way should wait at one of them. Whoever is only busy proves its life.
        """
        while True:
            if not self._is_asked():
                self._sent.clear()
                await self._sent.wait()
            answers = connection.answers
            await asyncio.sleep(SILENCE_S)
            if self._is_asked() and connection.answers == answers and not await stream.is_alive(PROOF_S):
                self._pool.unanswered(connection, epoch, silent=True)
                raise EOFError

    def _is_asked(self) -> bool:
        return bool(self._under_way or self._sessions.opening)

    async def _send(self, stream: SessionStream) -> None:
        while True:
            moving = self._queue and not self._sessions.opening and self._is_misplaced()
            if moving and not self._under_way:
                await stream.complete()  # the node ends the stream, and what waits goes elsewhere
                return
            message = None if moving else self._next_message()  # before it moves, what is under way is answered
            if message is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._sent.set()
            await stream.send(message)

    def _is_misplaced(self) -> bool:
        assert self._connection is not None
        return self._pool.router.misplaced(Purpose.SESSION, self._connection)

    def _next_message(self) -> session_pb2.SessionRequests | None:
        """What can be sent now; None while that is nothing."""
        message = session_pb2.SessionRequests(cancelled=self._cancelled)
        self._cancelled.clear()
        requests, queue, now = message.requests, self._queue, self._loop.time()
        count = size = 0
        while queue and count < BATCH_CALLS_MAX and size < BATCH_BYTES_MAX:
            call = queue[0]
            if call.future.done():
                queue.popleft()
                continue
            payload = call.payload
            if count and size + len(payload) > BATCH_BYTES_MAX:
                break
            session = call.session
            if session is None:
                session = self._sessions.with_room()
                if session is None:
                    opening = self._sessions.request(self._take_id())
                    if opening is not None:
                        requests.append(opening)
                    break
                call.session, call.seq = session, session.take()
            queue.popleft()
            call.id = self._take_id()
            call.sent = True
            call.attempts += 1
            self._under_way[call.id] = call
            if len(payload) > BATCH_BYTES_MAX and (self._largest is None or len(payload) > len(self._largest.payload)):
                self._largest = call
            request = requests.add()  # field by field: as arguments they would cost half as much again
            request.id = call.id
            request.method = METHODS[call.method]
            request.payload = payload
            if call.deadline is not None:
                request.timeout_ms = max(1, int((call.deadline - now) * 1000))
            request.session = session.id
            request.seq = call.seq
            request.first_incomplete = session.first_incomplete
            if call.perhaps_done:
                request.perhaps_done = True
            count += 1
            size += len(payload)
        return message if requests or message.cancelled else None

    def _take_id(self) -> int:
        id = self._next_id
        self._next_id = id + 1
        return id

    # --- answers ----------------------------------------------------------------------------------------------------

    def _take_all(self, connection: Connection, epoch: int, message: session_pb2.SessionResponses) -> None:
        self._ever_served = True
        connection.answered(epoch)
        self._pool.router.heard(connection)
        for response in message.responses:
            self._take(connection, response)
        if self._answered is not None:
            # One of them is enough to learn who leads; to look at each would cost more than all else here.
            method, payload = self._answered
            self._answered = None
            with contextlib.suppress(DecodeError):  # its caller hears of that
                self._pool.observe(connection, method.parse(payload).header)
        if self._queue or self._cancelled:
            self._wake.set()  # there is room again

    def _take(self, connection: Connection, response: session_pb2.SessionResponse) -> None:
        id = response.id
        if id in self._sessions.opening:
            self._opened(connection, response)
            return
        call = self._under_way.pop(id, None)
        if call is None:
            return  # its caller has gone
        call.sent = False
        if call is self._largest:
            self._largest = None
        payload = response.payload
        if not payload and response.HasField("error"):  # asked last: it costs as much as all else here
            self._refused(connection, call, fault_in(response.error))
            return
        self._complete(call)
        self._answered = (call.method, payload)
        if not call.future.done():
            call.future.set_result(payload)

    def _opened(self, connection: Connection, response: session_pb2.SessionResponse) -> None:
        if not response.HasField("error"):
            self._sessions.opened(response.id, response.payload)
            return
        fault = fault_in(response.error)
        for call in self._queue:
            call.fault = fault
        # The request keeps its place in `opening` while it waits, so that nobody opens another one meanwhile.
        self._note(connection, fault)
        pause_s = max(backoff_s(Retry(), 1, self._pool.random.random()), fault.retry_after_s)
        self._loop.call_later(pause_s, self._open_again, response.id)

    def _open_again(self, id: int) -> None:
        self._sessions.opening.discard(id)
        self._wake.set()

    def _refused(self, connection: Connection, call: Call, fault: Fault) -> None:
        call.fault = fault
        if fault.code == "SESSION_EXPIRED":
            self._session_is_gone(connection, call, fault)
            return
        if fault.kind.is_final:  # what the state refuses was not done under this number, and never will be
            self._give_up(connection, call, fault, known=fault.not_executed and fault.code != "STALE_SEQUENCE")
            return
        call.perhaps_done = call.perhaps_done or not fault.not_executed
        tries_max = call.retry.attempts_max
        if tries_max is not None and call.attempts >= tries_max:
            self._give_up(connection, call, fault, known=not call.perhaps_done)
            return
        self._note(connection, fault)
        pause_s = max(backoff_s(call.retry, call.waits, self._pool.random.random()), fault.retry_after_s)
        call.waits += 1
        self._pool.retries += 1
        self._pool.hooks.fire(
            "attempt_failed",
            AttemptFailed(call.method.name, connection.endpoint, fault.code, fault.text, call.attempts, pause_s),
        )
        self._resting.add(call)
        self._loop.call_later(pause_s, self._again, call)

    def _give_up(self, connection: Connection, call: Call, fault: Fault, *, known: bool) -> None:
        error = error_of if known else outcome_unknown
        self._fail(call, error(fault, endpoint=connection.endpoint, attempts=call.attempts))

    def _again(self, call: Call) -> None:
        self._resting.discard(call)
        if not call.future.done():
            # Before those without a number: they may be waiting for this one to make room in its session.
            self._queue.appendleft(call)
            self._wake.set()

    def _session_is_gone(self, connection: Connection, call: Call, fault: Fault) -> None:
        """Nothing was done under it now; but perhaps before it expired."""
        assert call.session is not None
        self._sessions.expired(call.session)
        if call.perhaps_done:
            self._give_up(connection, call, fault, known=False)
            return
        call.session = None  # no attempt did anything: it may be done under a new one
        self._queue.append(call)

    def _note(self, connection: Connection, fault: Fault) -> None:
        """What an answer says about the node."""
        if fault.kind in (FaultKind.NO_LEADER, FaultKind.LEADER_CHANGED):
            self._pool.leader_wanted()
        elif fault.kind is FaultKind.STOPPING:
            self._pool.stops(connection)  # which also ends the stream
        elif fault.kind is FaultKind.LEARNER:
            connection.is_learner = True
            connection.abandon_streams()

    # --- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Tell the cluster to forget our sessions, if that can be done at once; else they expire."""
        stream, request = self._stream, self._sessions.last_request(self._take_id())
        if stream is None or request is None:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await stream.send(session_pb2.SessionRequests(requests=[request]))
        except (TimeoutError, StreamBroken, EOFError):
            return


def pipeline_of(pool: Pool) -> Pipeline:
    """The one pipeline of a client and its clones."""
    pipeline = pool.parts.get("pipeline")
    if pipeline is None:
        pipeline = pool.parts["pipeline"] = Pipeline(pool)
        pool.closers.append(pipeline.close)
    assert isinstance(pipeline, Pipeline)
    return pipeline
