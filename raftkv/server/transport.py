"""Where a node listens: the gRPC server that clients connect to, its settings, and the addresses of both ports.

The settings were measured (grpcio 1.85): the ping floor is `min_ping_interval_without_data_ms`, not the often copied
`min_recv_ping_interval`, which is no known argument; without `permit_without_calls` idle channels are sent away; with
`so_reuseport` on, two nodes would silently share one port.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

import grpc

from raftkv.server.config import NodeConfig
from raftkv.server.rpc_server import Server

RECEIVE_MARGIN_BYTES: Final = 512 * 1024
"""What a message may exceed `max_request_bytes` by before gRPC itself refuses it; as in etcd."""

CONCURRENT_STREAMS_MAX: Final = 65_536
"""On one connection. A call beyond it waits in the client, silently, until its deadline; so it must not be reached
before `inflight_requests_max`, which answers."""


class BindError(Exception):
    """An address cannot be listened on.

    Attributes:
        address: `host:port`.
        field: the setting it came from.
        reason: the system's words.
    """

    def __init__(self, address: str, field: str, reason: str) -> None:
        super().__init__(f"cannot listen on {address} (--{field.replace('_', '-')}): {reason}")
        self.address = address
        self.field = field
        self.reason = reason


def server_options(config: NodeConfig) -> list[tuple[str, int]]:
    """The channel arguments of the clients' server."""
    return [
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # etcd's floor
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_time_ms", 7_200_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", CONCURRENT_STREAMS_MAX),
        ("grpc.max_receive_message_length", config.max_request_bytes + RECEIVE_MARGIN_BYTES),
        ("grpc.max_send_message_length", -1),
    ]


def client_server(config: NodeConfig) -> grpc.aio.Server:
    """A server for clients, without services or address."""
    return grpc.aio.server(options=server_options(config))


def bind(server: grpc.aio.Server, address: str, field: str) -> int:
    """Have `server` listen on `address`.

    Returns:
        The port.
    Raises:
        BindError: it is in use, not of this machine, or not allowed.
    """
    reason = _obstacle(address)
    if reason:
        raise BindError(address, field, reason)
    try:
        return server.add_insecure_port(address)
    except RuntimeError as fault:
        raise BindError(address, field, _obstacle(address) or str(fault)) from fault


async def bind_peers(server: Server, address: str, field: str) -> None:
    """As `bind`, for the server of the other nodes.

    Raises:
        BindError: as `bind`.
    """
    reason = _obstacle(address)
    if reason:
        raise BindError(address, field, reason)
    try:
        await server.bind(address)
    except OSError as fault:
        raise BindError(address, field, fault.strerror or str(fault)) from fault


def _obstacle(address: str) -> str:
    """Why one of the addresses a host stands for cannot be listened on; empty when nothing is in the way.

    gRPC is content when any of them works, and tells no reason when none does. `localhost` has two.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as fault:
        return f"{host}: {fault.strerror or fault}"
    reasons = [reason for each in found if (reason := _bind_once(each[0], each[4]))]
    missing = [reason for reason in reasons if reason in _NOT_HERE]
    if len(missing) < len(reasons):
        return next(reason for reason in reasons if reason not in _NOT_HERE)
    return missing[0] if len(missing) == len(found) else ""


_NOT_HERE: Final = frozenset(os.strerror(number) for number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))
"""Of several addresses of a host, these may be missing: a machine without IPv6 still has a localhost."""


def _bind_once(family: int, where: Sequence[object]) -> str:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(tuple(where))
            probe.listen(1)  # with SO_REUSEADDR, a second bind may pass where a second listen does not
    except OSError as fault:
        return os.strerror(fault.errno) if fault.errno else str(fault)
    return ""
