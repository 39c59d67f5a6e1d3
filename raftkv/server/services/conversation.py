"""One session stream: requests in, answers out, what is under way between them; all of it bounded.

    arrives -> accept each request -> under way -> finished -> sent
                 ^                                              |
                 +---- no room: the stream is not read <-- room +

A request takes its room until its answer is sent, so a client that does not read its answers is not read itself. As a
rule neither takes a task: a message is taken apart in the moment it arrives (`_take_now`), and the answers of one round
of the loop leave as one message in the next (`_send`). Where there is no room, or much to do, tasks do it, and wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from raftkv._pb import session_pb2 as pb
from raftkv._pb.kv_pb2 import RangeRequest
from raftkv.server.errors import InvalidField, Stopping
from raftkv.server.grpc_errors import RETRY_AFTER_TRAILER, answer_to
from raftkv.server.limits import Inflight
from raftkv.server.services.contract import Node
from raftkv.server.services.reads import Reads
from raftkv.server.services.registry import Stream
from raftkv.state.commands import CommandKind
from raftkv.state.results import Result
from raftkv.state.store import StoreDamaged
from raftkv.storage.errors import NodeFatal

REQUESTS_MAX = 4_096
BYTES_MAX = 64 << 20
"""Of requests and answers of one stream."""
MESSAGE_BYTES_MAX = 1 << 20
"""A message of answers is cut here; one answer may be larger."""
ANSWERS_BYTES_MAX = 16 << 20
"""While so much waits to be written, no further reads are carried out: their answers may be large."""
LONG_READS_MAX = 16
REQUESTS_AT_ONCE = 256
"""Then others get their turn of the loop."""

MUTATIONS = frozenset(
    (
        pb.SESSION_METHOD_PUT,
        pb.SESSION_METHOD_DELETE_RANGE,
        pb.SESSION_METHOD_TXN,
        pb.SESSION_METHOD_COMPACT,
        pb.SESSION_METHOD_LEASE_GRANT,
        pb.SESSION_METHOD_LEASE_REVOKE,
        pb.SESSION_METHOD_OPEN,
        pb.SESSION_METHOD_CLOSE,
    )
)


class _Request:
    """One request under way; a `Waiter` for those that the node is asked for by `Conversation.submit`."""

    __slots__ = ("_talk", "future", "id", "is_submitted", "method", "reply", "size")

    def __init__(self, talk: Conversation, request: pb.SessionRequest, size: int) -> None:
        self._talk = talk
        self.id = request.id
        self.method = request.method
        self.size = size
        self.is_submitted = False
        self.future: asyncio.Future[Any] | None = None
        self.reply: Callable[[Any], bytes] = bytes

    def done(self) -> bool:
        """Of `Waiter`: one that is dropped is abandoned, too, and hears nothing."""
        return False

    def set_result(self, result: Result, /) -> None:
        """Of `Waiter`."""
        self._talk.answered(self, result)

    def set_exception(self, fault: Exception, /) -> None:
        """Of `Waiter`."""
        self._talk.failed(self, fault)

    def cancel(self) -> None:
        """Of `Waiter`."""


class Conversation:
    """See the module. `accept` begins a request: it calls `wait`, `run` or `read`, or raises what is wrong with it."""

    def __init__(
        self,
        node: Node,
        reads: Reads,
        inflight: Inflight,
        stream: Stream,
        accept: Callable[[Conversation, pb.SessionRequest], None],
    ) -> None:
        self._node = node
        self._reads = reads
        self._inflight = inflight
        self._stream = stream
        self._accept = accept
        self._under_way: dict[int, _Request] = {}
        self._out: deque[tuple[int, bytes, pb.SessionError | None]] = deque()  # id, payload or error
        self._out_bytes = 0
        self._count = 0  # requests whose answer is not written yet
        self._bytes = 0  # of those, and of the answers in _out
        self._ready: deque[tuple[int, RangeRequest]] = deque()  # reads that may be carried out
        self._long_reads = 0
        self._loop = asyncio.get_running_loop()
        self._send_due = False
        self._fault: Exception | None = None  # of the client, in what arrived last
        self._wake = asyncio.Event()  # for the writer
        self._room = asyncio.Event()  # for the reader
        self._ending = False
        self._is_over = False  # all is answered, or nobody is there any more
        self._tasks: asyncio.TaskGroup

    async def run_to_end(self) -> None:
        """Serve the stream until the client sends no more, and everything is answered.

        Raises:
            Stopping: the node stops; everything is answered.
        """
        stopping: Stopping | None = None
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._write())
                try:
                    while (raw := await self._stream.feed(self._take_now)) is not None:
                        if self._fault is not None:
                            raise self._fault
                        await self._take(pb.SessionRequests.FromString(raw))
                except Stopping as fault:
                    stopping = fault
                self._ending = True
                self._wake.set()
        finally:
            for each in list(self._under_way):
                self._drop(each)
        if stopping is not None:
            raise stopping

    # What `accept` does with a request.

    def submit(
        self,
        each: int,
        kind: CommandKind,
        payload: bytes,
        deadline: float | None,
        reply: Callable[[Result], bytes],
    ) -> None:
        """The answer is made by `reply` from the result of a command, in the very turn in which it is applied."""
        request = self._under_way[each]
        request.reply = reply
        self._node.submit_for(request, kind, payload, deadline)
        request.is_submitted = True

    def wait(self, each: int, future: asyncio.Future[Any], reply: Callable[[Any], bytes]) -> None:
        """The answer is made by `reply` from what the node's future gives."""
        request = self._under_way[each]
        request.future = future
        request.reply = reply
        future.add_done_callback(partial(self._finished, each))

    def run(self, each: int, call: Coroutine[Any, Any, bytes]) -> None:
        """The answer is what a coroutine returns."""
        task = self._under_way[each].future = self._tasks.create_task(self._run(each, call))
        task.add_done_callback(lambda _: call.close())  # for one that was cancelled before it began

    def read(self, each: int, request: RangeRequest, deadline: float | None) -> None:
        """The answer is a range, read when a read index is known, unless it does not want one."""
        if request.serializable:
            self._make_ready(each, request)
            return
        future = self._under_way[each].future = self._node.submit_read(deadline)
        future.add_done_callback(partial(self._confirmed, each, request))

    # Requests.

    def _take_now(self, raw: bytes) -> bool:
        """Begin what a message asks for; False where it has to wait, or is at fault."""
        try:
            batch = pb.SessionRequests.FromString(raw)
            requests = batch.requests
            count = len(requests)
            if count > REQUESTS_AT_ONCE or self._count + count > REQUESTS_MAX or self._bytes + len(raw) > BYTES_MAX:
                return False
            for request in requests:
                self._begin(request)
        except Exception as fault:  # noqa: BLE001 - raised where the stream is served
            self._fault = fault
            return False
        for each in batch.cancelled:
            self._drop(each)
        return True

    async def _take(self, batch: pb.SessionRequests) -> None:
        for number, request in enumerate(batch.requests, 1):
            while self._count >= REQUESTS_MAX or self._bytes >= BYTES_MAX:
                self._room.clear()
                await self._room.wait()
            self._begin(request)
            if number % REQUESTS_AT_ONCE == 0:
                await asyncio.sleep(0)
        for each in batch.cancelled:
            self._drop(each)

    def _begin(self, request: pb.SessionRequest) -> None:
        each = request.id
        if each in self._under_way:
            raise InvalidField("requests.id", f"{each} is under way already")
        method, size = request.method, len(request.payload)
        self._count += 1
        try:
            self._inflight.enter(size)
        except Exception as fault:  # noqa: BLE001 - an answer like any other
            self._fail(each, method, fault)
            return
        self._bytes += size
        self._under_way[each] = _Request(self, request, size)
        try:
            self._accept(self, request)
        except Exception as fault:  # noqa: BLE001 - as in the registry: a status, whatever it is
            self._end(each)
            self._fail(each, method, fault)

    def _drop(self, each: int) -> None:
        """Nobody waits for its answer."""
        if each in self._under_way:
            request = self._end(each)
            self._count -= 1
            self._room.set()
            if request.is_submitted:
                self._node.abandon(request)
            elif isinstance(request.future, asyncio.Task):
                request.future.cancel()
            elif request.future is not None:
                self._node.abandon(request.future)

    def _end(self, each: int) -> _Request:
        request = self._under_way.pop(each)
        self._bytes -= request.size
        self._inflight.leave(request.size)
        return request

    def answered(self, request: _Request, result: Result) -> None:
        """A command is applied that this request had submitted."""
        each = request.id
        self._end(each)
        try:
            payload = request.reply(result)
        except Exception as fault:  # noqa: BLE001 - as above
            self._fail(each, request.method, fault)
        else:
            self._put_out(each, payload, None)

    def failed(self, request: _Request, fault: Exception) -> None:
        """What this request had submitted ended without a result."""
        self._end(request.id)
        self._fail(request.id, request.method, fault)

    def _finished(self, each: int, future: asyncio.Future[Any]) -> None:
        request = self._under_way.get(each)
        if request is None or future.cancelled():
            return
        fault = future.exception()
        if fault is None:
            self.answered(request, future.result())
        else:
            assert isinstance(fault, Exception), "a base exception"
            self.failed(request, fault)

    async def _run(self, each: int, call: Coroutine[Any, Any, bytes]) -> None:
        try:
            payload = await call
        except Exception as fault:  # noqa: BLE001 - as above
            self._fail(each, self._end(each).method, fault)
        else:
            self._end(each)
            self._put_out(each, payload, None)

    # Reads.

    def _confirmed(self, each: int, request: RangeRequest, future: asyncio.Future[object]) -> None:
        if each not in self._under_way or future.cancelled():
            return
        fault = future.exception()
        if fault is None:
            self._make_ready(each, request)
        else:
            assert isinstance(fault, Exception), "a base exception"
            self._fail(each, self._end(each).method, fault)

    def _make_ready(self, each: int, request: RangeRequest) -> None:
        self._ready.append((each, request))
        self._carry_out()

    def _carry_out(self) -> None:
        if self._is_over:
            return  # reads that are cancelled make room, which others are not to take
        while self._ready and self._out_bytes < ANSWERS_BYTES_MAX and self._long_reads < LONG_READS_MAX:
            each, request = self._ready.popleft()
            if each not in self._under_way:
                continue
            if request.range_end:
                self._long_reads += 1
                self.run(each, self._read_long(request))
                continue
            ended = self._end(each)
            try:
                payload = self._reads.one(request)
            except Exception as fault:  # noqa: BLE001 - as above
                self._fail(each, ended.method, fault)
            else:
                self._put_out(each, payload, None)

    async def _read_long(self, request: RangeRequest) -> bytes:
        try:
            return await self._reads.range(request)
        finally:
            self._long_reads -= 1
            self._send_soon()

    # Answers.

    def _fail(self, each: int, method: pb.SessionMethod.ValueType, fault: Exception) -> None:
        if isinstance(fault, NodeFatal | StoreDamaged):
            self._node.fatal(fault)
        name = pb.SessionMethod.Name(method) if method in pb.SessionMethod.values() else str(method)
        answer = answer_to(fault, method=name, mutates=method in MUTATIONS)
        more = dict(answer.more)
        error = pb.SessionError(
            code=answer.code.value[0],
            message=answer.text,
            reason=answer.name,
            executed=answer.executed,
            retry_after_ms=int(more.pop(RETRY_AFTER_TRAILER, 0)),
            more=more,
        )
        self._put_out(each, b"", error)

    def _put_out(self, each: int, payload: bytes, error: pb.SessionError | None) -> None:
        self._out.append((each, payload, error))
        size = _size(payload, error)
        self._out_bytes += size
        self._bytes += size
        self._send_soon()

    def _send_soon(self) -> None:
        if not self._send_due:
            self._send_due = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._send_due = False
        self._carry_out()
        while self._out and not self._stream.held_up:
            self._stream.send(self._next_message())
            self._carry_out()
        if self._out or self._ending:
            self._wake.set()

    async def _write(self) -> None:
        """What the client does not take at once."""
        try:
            while self._out or self._under_way or not self._ending:
                if not self._out:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._stream.write(self._next_message())
                self._carry_out()
        finally:
            self._is_over = True

    def _next_message(self) -> bytes:
        message = pb.SessionResponses()
        add = message.responses.add
        count = size = 0
        out = self._out
        while out and size < MESSAGE_BYTES_MAX:
            each, payload, error = out.popleft()
            if error is None:
                add(id=each, payload=payload)
            else:
                add(id=each, error=error)
            size += _size(payload, error)
            count += 1
        self._out_bytes -= size
        self._bytes -= size
        self._count -= count
        self._room.set()
        return message.SerializeToString()


def _size(payload: bytes, error: pb.SessionError | None) -> int:
    """What an answer counts for."""
    return len(payload) if error is None else len(error.message)
