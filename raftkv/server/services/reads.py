"""Reads that must not hold up the loop.

A short range is read on the loop, where nothing has to be copied. A long one gives up there after a few keys
(`RangeTooLong`) and is read again in a thread, over a consistent view: the loop must go on sending heartbeats. There
are two such threads, so that a flood of long reads costs time to those who ask for them and to nobody else.

Measured (LevelDB, 256-byte values): 3 to 4 µs a key on the loop, so `LOOP_KEYS_MAX` keys are a third of a millisecond;
the way through a thread costs about 90 µs of its own. Values may be larger, so the bound follows what answers weigh.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TypeVar

from raftkv._pb.kv_pb2 import RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest
from raftkv.server.errors import Stopping
from raftkv.server.services.contract import Node, fill_header
from raftkv.state import hashing, txn
from raftkv.state.keys import span
from raftkv.state.mvcc import Reader
from raftkv.state.ranges import RangeTooLong, read_range
from raftkv.state.results import HashKVResult

T = TypeVar("T")

LOOP_KEYS_MAX = 100
"""Keys that a range may have to be read on the loop, at most."""
LOOP_BYTES_MAX = 256 * 1024
"""An answer made on the loop that weighs more than this halves how many keys the next may have."""

THREADS = 2
FIRST_CHUNK_KEYS = 10
"""As etcd 3.7: the first chunk of a stream comes fast, whatever the size of the values."""
CHUNK_BYTES = 512 * 1024


class Reads:
    """How this node reads; `close` waits for the threads, and must come before the stores are closed."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="raftkv-reads")
        self._closing = False
        self._loop_keys = LOOP_KEYS_MAX  # 1 <= it <= LOOP_KEYS_MAX

    def close(self) -> None:
        """Begin no more reads, and wait for those under way: LevelDB must not be closed under them."""
        self._closing = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def range(self, request: RangeRequest) -> bytes:
        """Serve a range from the state as it is now.

        Raises:
            Refused: FUTURE_REVISION or COMPACTED.
        """
        node = self._node
        try:
            response = node.machine.range(request, self._loop_keys)
        except RangeTooLong:
            header = RangeResponse()
            fill_header(node, header.header)

            def read(reader: Reader) -> bytes:
                response = read_range(reader, request)
                response.header.MergeFrom(header.header)
                return response.SerializeToString()

            return await self.apart(read)
        fill_header(node, response.header)
        answer = response.SerializeToString()
        if len(answer) > LOOP_BYTES_MAX:
            self._loop_keys = max(1, self._loop_keys // 2)
        elif self._loop_keys < LOOP_KEYS_MAX:
            self._loop_keys += 1
        return answer

    def one(self, request: RangeRequest) -> bytes:
        """Serve a range of a single key.

        Raises:
            Refused: as `range`.
        """
        node = self._node
        response = node.machine.range(request)
        fill_header(node, response.header)
        return response.SerializeToString()

    async def txn(self, request: TxnRequest) -> bytes:
        """Serve a transaction that only reads.

        Raises:
            Refused: as any of its ranges.
        """
        node = self._node
        if not _has_ranges(request):
            response = node.machine.read_txn(request)
            fill_header(node, response.header)
            return response.SerializeToString()
        header = RangeResponse()
        fill_header(node, header.header)

        def read(reader: Reader) -> bytes:
            response = txn.read_txn(reader, request)
            response.header.MergeFrom(header.header)
            return response.SerializeToString()

        return await self.apart(read)

    async def hash_kv(self, revision: int) -> HashKVResult:
        """The checksum of the keys at a revision.

        Raises:
            Refused: FUTURE_REVISION or COMPACTED.
        """

        def read(reader: Reader) -> HashKVResult:
            steps = hashing.hash_kv_steps(reader, revision)
            while True:
                try:
                    next(steps)
                except StopIteration as stop:
                    result: HashKVResult = stop.value
                    return result
                self._check_open()

        return await self.apart(read)

    async def stream(self, request: RangeRequest) -> AsyncGenerator[bytes, None]:
        """Serve a range in chunks, all of one revision; only the last has a header, `more` and `count`.

        Raises:
            Refused: FUTURE_REVISION or COMPACTED.
        """
        node = self._node
        machine = node.machine
        view = machine.store.view()
        chunks = _chunks(machine.reader(view), request)
        following: concurrent.futures.Future[RangeResponse | None] | None = None

        def finish(_: object = None) -> None:
            chunks.close()
            view.close()

        try:
            while True:
                following = self._submit(lambda: next(chunks, None))
                chunk = await asyncio.wrap_future(following)
                if chunk is None:
                    return
                if chunk.HasField("header"):
                    fill_header(node, chunk.header)
                yield RangeStreamResponse(range_response=chunk).SerializeToString()
        finally:
            # The caller may have gone while the thread still reads: the view is closed after that, not under it.
            if following is None:
                finish()
            else:
                following.add_done_callback(finish)

    async def apart(self, read: Callable[[Reader], T]) -> T:
        """Run `read` in a thread, over the state as of now."""
        return await asyncio.wrap_future(self.begin(read))

    def begin(self, read: Callable[[Reader], T]) -> concurrent.futures.Future[T]:
        """Begin to run `read` in a thread, over the state as of now.

        Raises:
            Stopping: here, or as the outcome.
        """
        machine = self._node.machine
        view = machine.store.view()  # taken here, where no entry is being applied
        reader = machine.reader(view)
        try:
            job = self._submit(lambda: read(reader))
        except Stopping:
            view.close()
            raise
        job.add_done_callback(lambda _: view.close())  # also when it was cancelled before it began
        return job

    def _submit(self, call: Callable[[], T]) -> concurrent.futures.Future[T]:
        def checked() -> T:
            self._check_open()
            return call()

        try:
            return self._threads.submit(checked)
        except RuntimeError as fault:  # shut down
            raise Stopping from fault

    def _check_open(self) -> None:
        if self._closing:
            raise Stopping


def _has_ranges(request: TxnRequest) -> bool:
    """Whether any part of it looks at more than one key."""
    if any(compare.range_end for compare in request.compare):
        return True
    for op in (*request.success, *request.failure):
        if op.request_range.range_end or (op.HasField("request_txn") and _has_ranges(op.request_txn)):
            return True
    return False


def _chunks(reader: Reader, request: RangeRequest) -> Generator[RangeResponse, None, None]:
    """The parts of a range in key order; the last has the header's revision, `count` and `more`."""
    revision = reader.check_revision(request.revision)
    limit = max(0, request.limit)
    count = 0
    chunk_keys = FIRST_CHUNK_KEYS
    pairs: list[tuple[bytes, bytes]] = []
    for pair in _found(reader, request, revision):
        count += 1
        if request.count_only or (limit and count > limit):
            continue
        if len(pairs) == chunk_keys:
            chunk = _chunk(reader, request, pairs)
            # The next has about CHUNK_BYTES if its values are like these, and at most four times as many keys.
            chunk_keys = max(1, min(CHUNK_BYTES * len(pairs) // chunk.ByteSize(), 4 * chunk_keys))
            pairs = []
            yield chunk
        pairs.append(pair)
    chunk = _chunk(reader, request, pairs)
    chunk.header.revision = reader.revision
    chunk.count = count
    chunk.more = bool(limit and count > limit and not request.count_only)
    yield chunk


def _chunk(reader: Reader, request: RangeRequest, pairs: list[tuple[bytes, bytes]]) -> RangeResponse:
    chunk = RangeResponse()
    values = [b""] * len(pairs) if request.keys_only else reader.values(pairs)
    for (key, version), value in zip(pairs, values, strict=True):
        reader.fill(chunk.kvs.add(), key, version, value)
    return chunk


def _found(reader: Reader, request: RangeRequest, revision: int) -> Iterator[tuple[bytes, bytes]]:
    if request.range_end:
        return reader.walk(*span(request.key, request.range_end), revision)
    version = reader.find(request.key, revision)
    return iter(() if version is None else ((request.key, version),))
