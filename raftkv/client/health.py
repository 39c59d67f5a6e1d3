"""`grpc.health.v1.Health` as far as a client needs it, without its generated code.

Its two messages are one field each, and registering them a second time in a process that also uses
`grpcio-health-checking` of another version is asking for trouble.
"""

from __future__ import annotations

import enum
from typing import Final

WATCH_PATH: Final = "/grpc.health.v1.Health/Watch"
CHECK_PATH: Final = "/grpc.health.v1.Health/Check"
SERVICE: Final = "raftkv.v1.KV"


class Health(enum.IntEnum):
    """What an endpoint says of itself. The numbers are those of HealthCheckResponse.ServingStatus."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3  # a server that is no raftkv node: etcd knows only the service ""


_KNOWN: Final = frozenset(int(health) for health in Health)


def encode_request(service: str) -> bytes:
    """HealthCheckRequest{1: service}."""
    name = service.encode()
    if len(name) > 127:
        raise ValueError("the service name needs a longer length prefix")
    return bytes((0x0A, len(name))) + name if name else b""


def decode_response(data: bytes) -> Health:
    """HealthCheckResponse{1: status}; whatever cannot be understood is UNKNOWN, which does not keep calls away."""
    if len(data) >= 2 and data[0] == 0x08 and data[1] in _KNOWN:
        return Health(data[1])
    return Health.UNKNOWN
