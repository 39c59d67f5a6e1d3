"""The server's address and settings."""

from __future__ import annotations

import asyncio
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
    assert await transport.bind(server, f"127.0.0.1:{port}", "listen_client") == port
    await server.stop(0)


async def test_a_port_in_use_is_named_with_its_flag(tmp_path: Path) -> None:
    server = transport.client_server(config(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BindError) as caught:
            await transport.bind(server, f"127.0.0.1:{port}", "listen_client")
        assert str(caught.value) == f"cannot listen on 127.0.0.1:{port} (--listen-client): Address already in use"
        with pytest.raises(BindError):  # although [::1] is free
            await transport.bind(server, f"localhost:{port}", "listen_client")
    await server.stop(0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::]"])
async def test_what_a_host_stands_for_is_listened_on(tmp_path: Path, host: str) -> None:
    if host == "[::]" and not has_ipv6():
        host = "0.0.0.0"
    server = transport.client_server(config(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    families = {found[0] for found in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)}
    if host == "[::]":
        families.add(socket.AF_INET)
    if not has_ipv6():
        families.discard(socket.AF_INET6)
    await transport.bind(server, f"{host}:{port}", "listen_client")
    await server.start()
    try:
        for family in families:
            with socket.socket(family) as caller:
                caller.setblocking(False)
                where = ("127.0.0.1" if family is socket.AF_INET else "::1", port)
                await asyncio.get_running_loop().sock_connect(caller, where)
    finally:
        await server.stop(0)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_two_nodes_never_share_a_port(tmp_path: Path) -> None:
    """With SO_REUSEPORT, gRPC's default, the second would silently take half of the first one's connections."""
    first, second = transport.client_server(config(tmp_path)), transport.client_server(config(tmp_path))
    port = await first.bind("127.0.0.1:0")
    await first.start()
    with pytest.raises(BindError):
        await transport.bind(second, f"127.0.0.1:{port}", "listen_client")
    await first.stop(0)
    await second.stop(0)


@pytest.mark.parametrize(
    ("address", "reason"),
    [("203.0.113.7:23790", "Cannot assign requested address"), ("no-such-host.invalid:23790", "no-such-host.invalid")],
)
async def test_an_address_of_another_machine_is_named(tmp_path: Path, address: str, reason: str) -> None:
    server = transport.client_server(config(tmp_path))
    with pytest.raises(BindError, match=reason):
        await transport.bind(server, address, "listen_peer")
    await server.stop(0)


def test_a_call_too_many_is_answered_and_does_not_wait_in_the_client(tmp_path: Path) -> None:
    limits = transport.client_limits(config(tmp_path))
    assert limits.message_bytes_max == 1_572_864 + 524_288
    assert limits.calls_max > NodeConfig(name="n1", data_dir=tmp_path).inflight_requests_max
