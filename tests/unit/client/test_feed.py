"""Equal watches of a client: one on the wire, and yet each as if it were alone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from raftkv._pb import common_pb2, watch_pb2
from raftkv.client import AsyncClient, Compacted, Watch
from raftkv.client.feed import QUEUE_BATCHES
from tests.unit.client.conftest import FakeCluster, FakeNode, Tools

MakeClient = Callable[..., AsyncClient]


class WatchedNode(FakeNode):
    """A node with a history; one watch to a stream, one revision to a response."""

    def __init__(self, cluster: FakeCluster, member_id: int) -> None:
        super().__init__(cluster, member_id)
        self.history: list[common_pb2.Event] = []
        self.compacted = 0
        self.begun = 0  # streams, ever
        self.open = 0
        self._changed = asyncio.Event()

    def write(self, key: str, value: int = 0) -> int:
        """One more revision, which this returns."""
        self.cluster.revision += 1
        kv = common_pb2.KeyValue(key=key.encode(), value=b"%d" % value, mod_revision=self.cluster.revision)
        self.history.append(common_pb2.Event(kv=kv))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return self.cluster.revision

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        watch = grpc.stream_stream_rpc_method_handler(
            self._watch,
            request_deserializer=watch_pb2.WatchRequest.FromString,
            response_serializer=watch_pb2.WatchResponse.SerializeToString,
        )
        return [*super()._handlers(), grpc.method_handlers_generic_handler("etcdserverpb.Watch", {"Watch": watch})]

    def _response(self, **fields: Any) -> watch_pb2.WatchResponse:
        response = watch_pb2.WatchResponse(watch_id=1, **fields)
        self.fill(response.header)
        return response

    async def _watch(
        self, requests: AsyncIterator[watch_pb2.WatchRequest], context: Any
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        wanted = (await anext(requests)).create_request
        first = wanted.start_revision or self.cluster.revision + 1
        self.begun += 1
        self.open += 1
        try:
            yield self._response(created=True)
            if first < self.compacted:
                yield self._response(canceled=True, compact_revision=self.compacted)
                return
            while True:
                changed = self._changed
                for event in [each for each in self.history if each.kv.mod_revision >= first]:
                    first = event.kv.mod_revision + 1
                    if event.kv.key == wanted.key:
                        yield self._response(events=[event])
                await changed.wait()
        finally:
            self.open -= 1


@pytest.fixture
async def node(cluster: FakeCluster) -> AsyncIterator[WatchedNode]:
    node = WatchedNode(cluster, 1)
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
def client(node: WatchedNode, make_client: MakeClient) -> AsyncClient:
    return make_client(node)


def cut(client: AsyncClient) -> None:
    """End all streams, as a node that dies would."""
    for connection in client._context.pool.connections:
        connection.abandon_streams()


async def read(watch: Watch, count: int) -> list[int]:
    """The values of the next so many events."""
    async with asyncio.timeout(10):
        return [int((await anext(watch)).value) for _ in range(count)]


async def test_equal_watches_share_one_on_the_wire(node: WatchedNode, client: AsyncClient, tools: type[Tools]) -> None:
    async with client.watch("k") as first, client.watch("k") as second, client.watch("k", prev=True) as other:
        await tools.until(lambda: node.open == 2)
        for number in range(5):
            node.write("k", number)
        for watch in (first, second, other):
            assert await read(watch, 5) == [0, 1, 2, 3, 4]
        assert first.endpoint == second.endpoint == node.endpoint
        assert first.revision == second.revision == node.cluster.revision
    await tools.until(lambda: node.open == 0)


async def test_a_stream_that_had_ended_when_it_was_abandoned_is_followed_by_another(
    node: WatchedNode, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its reader is told of a cancellation of which the stream itself knows nothing."""
    async with client.watch("k") as watch:
        node.write("k", 1)
        assert await read(watch, 1) == [1]
        (stream,) = (call for each in client._context.pool.connections for call in each.open_streams)
        monkeypatch.setattr(type(stream), "cancelled", lambda call: False)
        cut(client)
        node.write("k", 2)
        assert await read(watch, 1) == [2]


async def test_one_that_does_not_read_stops_nobody_and_misses_nothing(
    node: WatchedNode, client: AsyncClient, tools: type[Tools]
) -> None:
    count = 5 * QUEUE_BATCHES
    async with client.watch("k") as quick, client.watch("k") as slow:
        await tools.until(lambda: node.open == 1)
        for number in range(count):
            node.write("k", number)
            assert await read(quick, 1) == [number]
        assert (node.begun, node.open) == (2, 1), "it is left alone until it reads"
        assert await read(slow, count) == list(range(count))
        # It has caught up: with the next event it shares again.
        node.write("k", count)
        assert await read(quick, 1) == await read(slow, 1) == [count]
        await tools.until(lambda: node.open == 1)
        node.write("k", count + 1)
        assert await read(quick, 1) == await read(slow, 1) == [count + 1]


async def test_one_that_reads_alone_is_waited_for(node: WatchedNode, client: AsyncClient, tools: type[Tools]) -> None:
    count = 5 * QUEUE_BATCHES
    async with client.watch("k") as slow:
        for number in range(count):
            node.write("k", number)
        feed = slow._inbox.feed
        assert feed is not None
        await tools.until(lambda: slow._inbox.full)
        async with client.watch("k") as quick:  # must not be behind the other
            node.write("k", count)
            assert await read(quick, 1) == [count]
        assert await read(slow, count + 1) == list(range(count + 1))
        assert slow._inbox.feed is feed
    await tools.until(lambda: node.open == 0)


@pytest.mark.parametrize("number", range(3))
async def test_each_begins_where_it_was_to(
    node: WatchedNode, client: AsyncClient, tools: type[Tools], number: int
) -> None:
    revisions = [node.write("k", value) for value in range(10)]
    starts = [revisions[4], revisions[-1] + 1, revisions[-1] + 3]
    starts = starts[number:] + starts[:number]
    expected = {revisions[4]: 4, revisions[-1] + 1: 10, revisions[-1] + 3: 12}
    async with (
        client.watch("k", start_revision=starts[0]) as first,
        client.watch("k", start_revision=starts[1]) as second,
        client.watch("k", start_revision=starts[2]) as third,
        client.watch("k") as last,
    ):
        for value in range(10, 20):
            node.write("k", value)
        assert await read(last, 10) == list(range(10, 20))
        for watch, start in zip((first, second, third), starts, strict=True):
            assert await read(watch, 20 - expected[start]) == list(range(expected[start], 20))
        await tools.until(lambda: node.open == 1)


async def test_who_ends_leaves_the_others_what_they_share(
    node: WatchedNode, client: AsyncClient, tools: type[Tools]
) -> None:
    async with client.watch("k") as last:
        async with client.watch("k") as first, client.watch("k") as second:
            await tools.until(lambda: node.open == 1)
            waiting = asyncio.ensure_future(anext(second, None))
            first.stop()
            node.write("k", 1)
            event = await waiting
            assert event is not None
            assert event.value == b"1"
            waiting = asyncio.ensure_future(anext(second, None))
            await asyncio.sleep(0)
            second.stop()
            assert await waiting is None
        forgotten = client.watch("k")
        await forgotten.__aenter__()
        await tools.until(lambda: node.open == 1)
        feed = last._inbox.feed
        assert feed is not None
        assert len(feed._inboxes) == 2
        del forgotten
        gc.collect()
        await tools.until(lambda: len(feed._inboxes) == 1)
        node.write("k", 2)
        assert await read(last, 2) == [1, 2]
    await tools.until(lambda: node.open == 0)


async def test_all_go_on_when_the_stream_breaks(node: WatchedNode, client: AsyncClient, tools: type[Tools]) -> None:
    async with client.watch("k") as first, client.watch("k") as second:
        await tools.until(lambda: node.open == 1)
        for number in range(20):
            cut(client)
            node.write("k", number)
            assert await read(first, 1) == await read(second, 1) == [number]
        assert node.open == 1


async def test_who_needs_nothing_of_what_was_compacted_goes_on(
    node: WatchedNode, client: AsyncClient, tools: type[Tools]
) -> None:
    begin = node.cluster.revision
    async with client.watch("k") as first, client.watch("k", start_revision=begin + 100) as later:
        await tools.until(lambda: node.open == 1)
        waiting = asyncio.ensure_future(read(later, 1))
        await asyncio.sleep(0)
        cut(client)
        for _ in range(90):
            node.write("elsewhere")
        node.compacted = begin + 50
        with pytest.raises(Compacted) as caught:
            await read(first, 1)
        assert caught.value.compact_revision == begin + 50
        while node.cluster.revision < begin + 99:
            node.write("k", -1)
        node.write("k", 1)
        assert await waiting == [1]


async def test_closing_the_client_ends_all(node: WatchedNode, client: AsyncClient, tools: type[Tools]) -> None:
    async with client.watch("k") as first, client.watch("k") as second:
        await tools.until(lambda: node.open == 1)
        waiting = [asyncio.ensure_future(anext(watch, None)) for watch in (first, second)]
        await asyncio.sleep(0)
        await client.close()
        assert await asyncio.gather(*waiting) == [None, None]
