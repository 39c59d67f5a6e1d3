"""Watch over the wire: what etcd's clients rely on, under either name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_node import FakeNode, Served, serve, trailers, until

from raftkv._pb import kv_pb2
from raftkv._pb.common_pb2 import Event
from raftkv._pb.watch_pb2 import WatchRequest, WatchResponse
from raftkv.server.services import streams
from raftkv.server.services import watch as watch_service
from raftkv.server.watch_stream import StreamBuffer, Wakes
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.store import MemoryStore

Code = grpc.StatusCode


class Watching:
    """One stream."""

    def __init__(self, served: Served, name: str = "etcdserverpb", metadata: tuple[tuple[str, str], ...] = ()) -> None:
        method: Any = served.channel.stream_stream(f"/{name}.Watch/Watch")
        self.call = method(metadata=metadata)
        self._reading: asyncio.Future[Any] | None = None

    async def send(self, **request: Any) -> None:
        message = WatchRequest(**{f"{kind}_request": what for kind, what in request.items()})
        await self.call.write(message.SerializeToString())

    async def next(self, timeout_s: float = 20.0) -> WatchResponse:
        # A read that is cancelled takes the call with it, so one that came to nothing is kept.
        self._reading = self._reading or asyncio.ensure_future(self.call.read())
        await asyncio.wait((self._reading,), timeout=timeout_s)
        if not self._reading.done():
            raise TimeoutError
        reading, self._reading = self._reading, None
        raw = reading.result()
        if raw is grpc.aio.EOF:
            raise EOFError
        return WatchResponse.FromString(raw)

    async def end(self) -> grpc.aio.AioRpcError:
        """The error that the stream ends with, after whatever else."""
        while True:
            try:
                await self.next()
            except grpc.aio.AioRpcError as error:
                return error

    async def create(self, **fields: Any) -> WatchResponse:
        await self.send(create=fields)
        created = await self.next()
        assert created.created
        return created

    async def nothing(self) -> None:
        with pytest.raises(TimeoutError):
            await self.next(0.05)


@contextlib.asynccontextmanager
async def watching(served: Served, *arguments: Any) -> AsyncIterator[Watching]:
    stream = Watching(served, *arguments)
    try:
        yield stream
    finally:
        stream.call.cancel()


async def put(served: Served, key: bytes, value: bytes = b"v") -> None:
    await served.node.propose(CommandKind.PUT, kv_pb2.PutRequest(key=key, value=value).SerializeToString(), None)


async def delete(served: Served, key: bytes) -> None:
    await served.node.propose(CommandKind.DELETE_RANGE, kv_pb2.DeleteRangeRequest(key=key).SerializeToString(), None)


async def compact(served: Served, revision: int) -> None:
    await served.node.propose(
        CommandKind.COMPACT, kv_pb2.CompactionRequest(revision=revision).SerializeToString(), None
    )


@pytest.mark.parametrize("name", ["etcdserverpb", "raftkv.v1"])
async def test_changes_as_they_happen(served: Served, name: str) -> None:
    await put(served, b"k", b"before")
    async with watching(served, name) as stream:
        created = await stream.create(key=b"k", prev_kv=True)
        assert (created.watch_id, created.canceled, created.header.revision) == (0, False, 2)
        assert created.header.member_id == served.node.node_id
        assert created.header.raft_term == 3
        await put(served, b"other")
        await put(served, b"k", b"new")
        response = await stream.next()
        assert (response.watch_id, response.created, response.header.revision) == (0, False, 4)
        (event,) = response.events
        assert (event.type, event.kv.value, event.kv.mod_revision, event.kv.version) == (Event.PUT, b"new", 4, 2)
        assert event.prev_kv.value == b"before"
        await delete(served, b"k")
        (event,) = (await stream.next()).events
        assert event.type == Event.DELETE
        assert (event.kv.key, event.kv.mod_revision) == (b"k", 5)
        assert (event.kv.create_revision, event.kv.version, event.kv.value) == (0, 0, b"")
        assert event.prev_kv.value == b"new"


async def test_from_a_past_revision_and_from_a_future_one(served: Served) -> None:
    for number in range(5):
        await put(served, b"k", b"%d" % number)
    async with watching(served) as stream:
        await stream.create(key=b"k", start_revision=3)
        assert [event.kv.value for event in (await stream.next()).events] == [b"1", b"2", b"3", b"4"]
    async with watching(served) as stream:
        created = await stream.create(key=b"k", start_revision=9)
        assert created.header.revision == 6
        await stream.send(progress={})
        await put(served, b"k", b"early")
        await stream.nothing()
        await put(served, b"k", b"early")
        await put(served, b"k", b"due")
        assert [event.kv.value for event in (await stream.next()).events] == [b"due"]


async def test_a_long_history_is_read_apart(served: Served) -> None:
    for number in range(3000):
        await put(served, b"k/%d" % (number % 7), b"%d" % number)
    async with watching(served) as stream:
        await stream.create(key=b"k/", range_end=b"k0", start_revision=1)
        seen: list[bytes] = []
        while len(seen) < 3000:
            response = await stream.next()
            assert len({event.kv.mod_revision for event in response.events}) <= 4096
            seen += [event.kv.value for event in response.events]
    assert seen == [b"%d" % number for number in range(3000)]


async def test_many_watches_on_a_stream(served: Served) -> None:
    async with watching(served) as stream:
        assert (await stream.create(key=b"a")).watch_id == 0
        assert (await stream.create(key=b"b", watch_id=1)).watch_id == 1
        assert (await stream.create(key=b"", range_end=b"\0")).watch_id == 2
        duplicate = await stream.create(key=b"c", watch_id=1)
        assert (duplicate.watch_id, duplicate.canceled) == (-1, True)
        assert duplicate.cancel_reason == "mvcc: duplicate watch ID provided on the WatchStream"
        empty = await stream.create(key=b"c", range_end=b"b")
        assert (empty.watch_id, empty.canceled) == (-1, True)
        assert empty.cancel_reason == "mvcc: watcher range is empty"
        negative = await stream.create(key=b"c", start_revision=-1)
        assert (negative.watch_id, negative.canceled) == (-1, True)
        assert negative.cancel_reason == "etcdserver: mvcc: required revision has been compacted"
        await put(served, b"a")
        assert {(await stream.next()).watch_id for _ in range(2)} == {0, 2}
        await stream.send(cancel={"watch_id": 7})  # unknown: no answer
        await stream.send(cancel={"watch_id": 2})
        cancelled = await stream.next()
        assert (cancelled.watch_id, cancelled.canceled, cancelled.cancel_reason) == (2, True, "")
        assert cancelled.compact_revision == 0
        await put(served, b"b")
        assert (await stream.next()).watch_id == 1
        await stream.nothing()
        assert len(served.services.watches) == 2
    await until(lambda: not len(served.services.watches))


async def test_a_compacted_start_is_created_and_then_cancelled(served: Served) -> None:
    for _ in range(5):
        await put(served, b"k")
    await compact(served, 4)
    async with watching(served) as stream:
        created = await stream.create(key=b"k", start_revision=3)
        assert not created.canceled
        cancelled = await stream.next()
        assert (cancelled.watch_id, cancelled.canceled, cancelled.compact_revision) == (0, True, 4)
        assert (cancelled.cancel_reason, len(cancelled.events)) == ("", 0)
        await stream.create(key=b"k", start_revision=4)  # the compact revision itself is still whole
        assert [event.kv.mod_revision for event in (await stream.next()).events] == [4, 5, 6]


async def test_filters(served: Served) -> None:
    async with watching(served) as stream:
        await stream.create(key=b"k", filters=[0])
        await stream.create(key=b"k", filters=[1])
        await stream.create(key=b"k", filters=[0, 1])
        await put(served, b"k")
        assert (await stream.next()).watch_id == 1
        await delete(served, b"k")
        assert (await stream.next()).watch_id == 0
        await stream.nothing()


async def test_progress_is_reported_when_asked_for_and_all_are_synced(served: Served) -> None:
    async with watching(served) as stream:
        await stream.create(key=b"k")
        await put(served, b"other")
        await stream.send(progress={})
        progress = await stream.next()
        assert (progress.watch_id, len(progress.events), progress.header.revision) == (-1, 0, 2)
        assert not progress.created
        assert not progress.canceled
        await put(served, b"k")
        await stream.send(progress={})
        assert len((await stream.next()).events) == 1  # never ahead of what it speaks of
        assert (await stream.next()).header.revision == 3


async def test_progress_of_a_watch_that_was_taken_up_again(served: Served) -> None:
    await put(served, b"k")
    async with watching(served) as stream:
        await stream.create(key=b"k", start_revision=3)
        await stream.send(progress={})
        assert (await stream.next()).header.revision == 2
        await stream.create(key=b"k", start_revision=9)
        await stream.send(progress={})
        await stream.nothing()


async def test_progress_is_notified(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_service, "PROGRESS_INTERVAL_S", 0.2)
    async with watching(served) as stream:
        await stream.create(key=b"k", progress_notify=True)
        await stream.create(key=b"k")
        await put(served, b"other")
        progress = await stream.next()
        assert (progress.watch_id, progress.header.revision, len(progress.events)) == (0, 2, 0)


async def test_a_client_that_does_not_read_and_the_node_that_stops(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    async with serve(node) as served:
        async with watching(served) as stream:
            await stream.create(key=b"k")
            for _ in range(300):
                await put(served, b"k", bytes(100_000))
                await asyncio.sleep(0)
            assert served.services.watches.buffered_bytes < 2_000_000
            assert served.services.watches.behind == 1
            seen = 0
            while seen < 300:
                seen += len((await stream.next()).events)
            for _ in range(300):
                await put(served, b"k", bytes(100_000))
            served.services.end_streams()
            error = await stream.end()
            assert (error.code(), error.details()) == (Code.UNAVAILABLE, "etcdserver: server stopped")
        assert served.services.watches.buffered_bytes == 0


async def test_half_close_ends_the_stream(served: Served) -> None:
    async with watching(served) as stream:
        await stream.create(key=b"k")
        await stream.call.done_writing()
        with pytest.raises(EOFError):
            await stream.next()
        assert await stream.call.code() is Code.OK
    assert not len(served.services.watches)


async def test_progress_is_not_piled_up_for_who_does_not_read(served: Served) -> None:
    header = WatchResponse(header={"revision": 1}).SerializeToString()
    buffer = StreamBuffer(
        served.services.watches, Wakes(asyncio.get_running_loop().call_soon), lambda revision: header, bytes_max=200
    )
    watches = watch_service._Watches(served.services.watches, buffer)
    watches.handle(WatchRequest(create_request={"key": b"k", "progress_notify": True}))
    for _ in range(100):  # intervals
        watches._report()
    assert buffer.bytes < 250
    while list(buffer.pop()):
        pass
    watches._report()
    assert buffer.bytes, "as soon as it reads it is told again"
    watches.close()
    buffer.close()


async def test_keys_are_bounded(served: Served) -> None:
    """A watch keeps them as long as it lasts, and a stream may have many."""
    most = served.node.config.max_key_bytes
    async with watching(served) as stream:
        for fields in ({"key": bytes(most + 1)}, {"key": b"k", "range_end": b"l" * (most + 2)}):
            refused = await stream.create(**fields)
            assert (refused.watch_id, refused.canceled) == (-1, True)
            assert refused.cancel_reason.startswith("etcdserver: key is too large: ")
        assert not (await stream.create(key=b"k" * most, range_end=b"l" * (most + 1))).canceled
        assert len(served.services.watches) == 1


async def test_without_a_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_EVERY_S_MIN", 0.0)
    node = FakeNode(tmp_path, election_ms=100, heartbeat_ms=20)
    wanted = (("hasleader", "true"),)
    async with serve(node) as served, watching(served, "etcdserverpb", wanted) as stream, watching(served) as patient:
        await stream.create(key=b"k")
        await patient.create(key=b"k")
        node.leader = 0
        error = await stream.end()
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "etcdserver: no leader")
        await put(served, b"k")
        assert len((await patient.next()).events) == 1
        async with watching(served, "etcdserverpb", wanted) as late:
            assert (await late.end()).details() == "etcdserver: no leader"


async def test_what_is_no_request(served: Served) -> None:
    async with watching(served) as stream:
        await stream.call.write(b"")  # a member of the union that we do not know: ignored
        await stream.create(key=b"k")
        await stream.call.write(b"\x0a\xff\xff")
        assert (await stream.end()).code() is Code.INVALID_ARGUMENT


async def test_too_many_watches(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_service, "WATCHES_MAX", 2)
    monkeypatch.setattr(watch_service, "STREAMS_MAX", 1)
    async with watching(served) as stream:
        for _ in range(2):
            assert not (await stream.create(key=b"k")).canceled
        refused = await stream.create(key=b"k")
        assert (refused.canceled, refused.watch_id) == (True, -1)
        assert "too many watches" in refused.cancel_reason
        async with watching(served) as other:
            error = await other.end()
            assert error.code() is Code.RESOURCE_EXHAUSTED
            assert trailers(error)["raftkv-limit"] == "watch_streams_max"


async def test_a_snapshot_takes_the_place_of_the_state(served: Served) -> None:
    """Row 59: after a snapshot was installed, nothing comes twice and nothing from the past."""
    await put(served, b"k", b"1")
    async with watching(served) as stream:
        await stream.create(key=b"k")
        await put(served, b"k", b"2")
        assert [event.kv.value for event in (await stream.next()).events] == [b"2"]
        elsewhere = FakeNode(Path("/nowhere"))
        assert isinstance(served.node.machine.store, MemoryStore)
        elsewhere.machine = StateMachine(served.node.machine.store.copy())
        for value in (b"3", b"4"):
            raw = kv_pb2.PutRequest(key=b"k", value=value).SerializeToString()
            await elsewhere.propose(CommandKind.PUT, raw, None)
        served.node.machine = elsewhere.machine
        served.node.on_applied()
        assert [event.kv.value for event in (await stream.next()).events] == [b"3", b"4"]
        await put(served, b"k", b"5")
        assert [event.kv.value for event in (await stream.next()).events] == [b"5"]
