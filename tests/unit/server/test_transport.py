"""The server's address and settings."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raftkv.server import transport
from raftkv.server.config import NodeConfig
from raftkv.server.transport import BindError


def config(directory: Path) -> NodeConfig:
    return NodeConfig(name="n1", data_dir=directory)


async def test_a_free_port_is_bound(tmp_path: Path) -> None:
    server = transport.client_server(config(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert transport.bind(server, f"127.0.0.1:{port}", "listen_client") == port
    await server.stop(0)


async def test_a_port_in_use_is_named_with_its_flag(tmp_path: Path) -> None:
    server = transport.client_server(config(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BindError) as caught:
            transport.bind(server, f"127.0.0.1:{port}", "listen_client")
        assert str(caught.value) == f"cannot listen on 127.0.0.1:{port} (--listen-client): Address already in use"
        with pytest.raises(BindError):  # although [::1] is free
            transport.bind(server, f"localhost:{port}", "listen_client")
    await server.stop(0)


async def test_two_nodes_never_share_a_port(tmp_path: Path) -> None:
    """With SO_REUSEPORT, gRPC's default, the second would silently take half of the first one's connections."""
    first, second = transport.client_server(config(tmp_path)), transport.client_server(config(tmp_path))
    port = first.add_insecure_port("127.0.0.1:0")
    await first.start()
    with pytest.raises(BindError):
        transport.bind(second, f"127.0.0.1:{port}", "listen_client")
    await first.stop(0)
    await second.stop(0)


@pytest.mark.parametrize(
    ("address", "reason"),
    [("203.0.113.7:23790", "Cannot assign requested address"), ("no-such-host.invalid:23790", "no-such-host.invalid")],
)
async def test_an_address_of_another_machine_is_named(tmp_path: Path, address: str, reason: str) -> None:
    server = transport.client_server(config(tmp_path))
    with pytest.raises(BindError, match=reason):
        transport.bind(server, address, "listen_peer")
    await server.stop(0)


def test_the_settings_are_those_that_were_measured(tmp_path: Path) -> None:
    options = dict(transport.server_options(config(tmp_path)))
    assert options["grpc.so_reuseport"] == 0
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 5000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.max_receive_message_length"] == 1_572_864 + 524_288
    assert options["grpc.max_concurrent_streams"] > NodeConfig(name="n1", data_dir=tmp_path).inflight_requests_max
