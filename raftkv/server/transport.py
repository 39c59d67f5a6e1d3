"""Where a node listens: the server that clients call, what it lets them do, and the addresses of both ports."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from raftkv.rpc.limits import Limits
from raftkv.rpc.methods import MethodServer
from raftkv.rpc.server import Server
from raftkv.server.config import NodeConfig

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


KEEPALIVE_S: Final = 60.0
ANSWER_S: Final = 20.0
"""A client that is gone without a word holds what it holds for so long: streams, watches, a place in a queue."""


PING_EVERY_S_MIN: Final = 5.0
"""As etcd, so that clients tuned for etcd are neither refused nor better treated."""


def client_limits(config: NodeConfig) -> Limits:
    """What a client may ask of its connection."""
    return Limits(
        message_bytes_max=config.max_request_bytes + RECEIVE_MARGIN_BYTES,
        call_window_bytes=1 << 20,
        window_bytes=16 << 20,
        calls_max=CONCURRENT_STREAMS_MAX,
        keepalive_s=KEEPALIVE_S,
        answer_s=ANSWER_S,
        ping_every_s_min=PING_EVERY_S_MIN,
        gathers=True,
        answers_first=True,
    )


def client_server(config: NodeConfig) -> MethodServer:
    """A server for clients, without services or address."""
    return MethodServer({}, client_limits(config))


async def bind(server: Server, address: str, field: str) -> int:
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
        return await server.bind(address)
    except OSError as fault:
        raise BindError(address, field, fault.strerror or str(fault)) from fault


def _obstacle(address: str) -> str:
    """Why one of the addresses a host stands for cannot be listened on; empty when nothing is in the way.

    `localhost` has two.
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
