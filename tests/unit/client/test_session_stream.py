"""What carries the stream of writes: which way is taken, and what each says of its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from raftkv.client import TLS, AsyncClient
from raftkv.client.endpoints import is_proxied
from raftkv.client.faults import FaultKind
from raftkv.client.session_stream import ChannelStream, SessionStream, StreamBroken, WireStream, open_session_stream
from tests.unit.client.conftest import FakeCluster, FakeNode, Proxy, Tools
from tests.unit.client.session_nodes import Table, nodes_of, with_sessions

MakeClient = Callable[..., AsyncClient]


@pytest.fixture
async def table(cluster: FakeCluster) -> Table:
    """Three nodes with the session stream instead of the fixture's own."""
    return await with_sessions(cluster)


def stream_of(client: AsyncClient) -> SessionStream:
    """The one that carries its writes now."""
    found: SessionStream = client._context.pool.parts["pipeline"]._stream
    return found


class Recorder(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    """Notes which streams are opened."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        self.seen.append(details.method.decode() if isinstance(details.method, bytes) else details.method)
        return await continuation(details, requests)


async def test_a_plain_endpoint_has_a_connection_for_it(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    client = make_client()
    await client.put("a", "1")
    assert isinstance(stream_of(client), WireStream)


async def test_an_interceptor_sees_it(cluster: FakeCluster, table: Table, make_client: MakeClient) -> None:
    recorder = Recorder()
    client = make_client(interceptors=[recorder])
    await client.put("a", "1")
    assert isinstance(stream_of(client), ChannelStream)
    assert "/raftkv.v1.Session/Stream" in recorder.seen


async def test_options_and_proxies_hold_for_it(
    cluster: FakeCluster, table: Table, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(channel_options=[("grpc.primary_user_agent", "test")])
    await client.put("a", "1")
    assert isinstance(stream_of(client), ChannelStream)
    monkeypatch.setenv("http_proxy", "127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,127.0.0.0/8")  # which gRPC understands, and we need not
    client = make_client()
    await client.put("a", "1")
    assert isinstance(stream_of(client), ChannelStream)


async def test_tls_holds_for_it() -> None:
    async with AsyncClient("https://127.0.0.1:1", tls=TLS()) as client:
        client._context.pool.enter()
        assert not client._context.pool.connections[0].is_plain


@pytest.mark.parametrize(
    ("environment", "proxied"),
    [
        ({}, False),
        ({"http_proxy": ""}, False),
        ({"http_proxy": "proxy:1"}, True),
        ({"https_proxy": "proxy:1"}, True),
        ({"grpc_proxy": "proxy:1"}, True),
        ({"http_proxy": "proxy:1", "no_proxy": "a.test"}, False),
        ({"http_proxy": "proxy:1", "no_proxy": "other.test, .test"}, False),
        ({"http_proxy": "proxy:1", "no_proxy": "other.test,"}, True),
        ({"http_proxy": "proxy:1", "no_proxy": "a.test", "no_grpc_proxy": "other.test"}, True),
    ],
)
def test_whether_an_endpoint_is_reached_through_a_proxy(environment: dict[str, str], proxied: bool) -> None:
    assert is_proxied("a.test:2379", environment) is proxied


async def test_a_node_that_cannot_be_connected_to_is_unreachable(cluster: FakeCluster, make_client: MakeClient) -> None:
    client = make_client()
    await client.get("a")
    connection = client._context.pool.connections[0]
    await cluster.nodes[0].stop()
    with pytest.raises(StreamBroken) as found:
        await open_session_stream(connection)
    assert found.value.code is grpc.StatusCode.UNAVAILABLE
    assert found.value.fault.kind is FaultKind.UNREACHABLE


async def test_a_node_that_goes_between_two_writes_is_replaced(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    client = make_client()
    for number in range(len(cluster.nodes)):
        await client.put(f"k{number}", "v")
        stream = stream_of(client)
        assert isinstance(stream, WireStream)
        (node,) = (each for each in cluster.nodes if each.endpoint == stream._connection.endpoint)
        await node.stop()
        await node.start()
    await client.put("last", "v")
    assert table.executed == [b"k0", b"k1", b"k2", b"last"]


async def test_a_connection_that_falls_silent_is_left_though_the_channel_lives(
    cluster: FakeCluster,
    table: Table,
    make_client: MakeClient,
    make_proxy: Callable[[FakeNode], Awaitable[Proxy]],
    tools: type[Tools],
) -> None:
    """A router forgets one connection of two: that the node answers over the other is no proof."""
    proxy = await make_proxy(nodes_of(cluster)[0])
    client = make_client(proxy)
    await client.put("a", "1")
    stream = stream_of(client)
    proxy.freeze_latest()
    async with asyncio.timeout(10):
        await client.put("b", "1")
    assert stream_of(client) is not stream
    assert (await client.get("b")) is not None
    assert table.executed == [b"a", b"b"]
