"""A lease that somebody else was granted, renewed again and again through whatever node answers.

The SDK's keeper looks after the leases of its own client. This one has nothing but an id: how long the lease is, the
first answer tells.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import grpc

from raftkv._pb import lease_pb2
from raftkv.cli.options import Settings
from raftkv.cli.session import channel, endpoints_of, failure
from raftkv.client.errors import ConditionFailed, InvalidRequest, RaftkvError, Unavailable
from raftkv.client.methods import LEASE_KEEP_ALIVE

RENEW_SHARE = 1 / 3
TRY_SHARE = 1 / 6
TRY_MIN_S = 1.0
TRY_MAX_S = 10.0
PAUSE_S = 0.1


def renewals(settings: Settings, lease_id: int) -> Iterator[lease_pb2.LeaseKeepAliveResponse]:
    """Renew it, now and every third of its time; ends with the first answer that says it is gone.

    Whether it is gone only the cluster knows: a new leader gives every lease its time anew. So once it has been
    renewed, nodes are asked until one answers, however long that takes.

    Raises:
        RaftkvError: nobody answered the first time, within the call's limit; or it was refused.
    """
    endpoints = list(endpoints_of(settings))
    limit_s: float | None = settings.timeout_s
    try_s = max(TRY_MIN_S, settings.timeout_s / 4)
    while True:
        began = time.monotonic()
        response = _renew(settings, endpoints, lease_id, try_s, None if limit_s is None else began + limit_s)
        yield response
        ttl_s = response.ttl_ms / 1000 if response.ttl_ms else float(response.TTL)
        if ttl_s <= 0:
            return
        limit_s, try_s = None, max(TRY_MIN_S, ttl_s * TRY_SHARE)
        time.sleep(max(0.0, began + ttl_s * RENEW_SHARE - time.monotonic()))


def _renew(
    settings: Settings, endpoints: list[str], lease_id: int, try_s: float, deadline: float | None
) -> lease_pb2.LeaseKeepAliveResponse:
    """One confirmed renewal. The endpoint that gave it stands first in `endpoints` afterwards."""
    slow = 0
    while True:
        tried = time.monotonic()
        left_s = math.inf if deadline is None else deadline - tried
        try:
            return _renew_at(settings, endpoints[0], lease_id, max(0.001, min(try_s, left_s)))
        except (InvalidRequest, ConditionFailed):
            raise
        except RaftkvError as error:
            endpoints.append(endpoints.pop(0))
            slow += time.monotonic() - tried >= try_s
            if slow == len(endpoints):  # who is slow, and not gone, must be heard out some time
                slow, try_s = 0, max(try_s, min(2 * try_s, TRY_MAX_S))
            time.sleep(PAUSE_S)
            if deadline is not None and time.monotonic() >= deadline:
                raise Unavailable(
                    f"lease {lease_id:x} was not renewed in time: {error.message}", endpoint=error.endpoint, attempts=1
                ) from error


def _renew_at(settings: Settings, endpoint: str, lease_id: int, timeout_s: float) -> lease_pb2.LeaseKeepAliveResponse:
    answered = threading.Event()

    def requests() -> Iterator[lease_pb2.LeaseKeepAliveRequest]:
        yield lease_pb2.LeaseKeepAliveRequest(ID=lease_id)
        answered.wait(timeout_s)  # a stream whose asking half has ended may be ended before its answer

    with channel(settings, endpoint) as connection:
        ask = connection.stream_stream(
            LEASE_KEEP_ALIVE.path,
            request_serializer=LEASE_KEEP_ALIVE.serialize,
            response_deserializer=LEASE_KEEP_ALIVE.parse,
        )
        try:
            response: lease_pb2.LeaseKeepAliveResponse = next(
                ask(requests(), timeout=timeout_s, metadata=(("hasleader", "true"),))
            )
        except grpc.RpcError as error:
            raise failure(error, endpoint) from error
        except StopIteration:
            raise Unavailable("the node ended the stream", endpoint=endpoint, attempts=1) from None
        finally:
            answered.set()
    return response
