"""How much a node takes on at once.

A request that does not fit is refused at once (RESOURCE_EXHAUSTED, with a hint when to try again), so that those
already taken keep their time, and the node its memory. What operators ask (Cluster, Maintenance) is not counted:
an overloaded node must still say how it is.

Invariant: both counters are 0 when no request is under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from raftkv.server.config import NodeConfig
from raftkv.server.errors import TooManyRequests
from raftkv.state.validate import RequestLimits

RETRY_AFTER_S = 0.1
"""Long enough for a node at its limit to have answered what it has: thousands of requests take some 100 ms."""


class Inflight:
    """The requests and request bytes under way, of all calls or of one sort."""

    __slots__ = ("_names", "bytes", "bytes_max", "refused", "requests", "requests_max")

    def __init__(self, requests_max: int, bytes_max: int, sort: str = "") -> None:
        """
        Args:
            sort: of the calls, to name the limits by; those of all calls have their names in the configuration.
        """
        self._names = (f"{sort}_max", f"{sort}_bytes_max") if sort else ("inflight_requests_max", "inflight_bytes_max")
        self.requests = 0
        self.requests_max = requests_max
        self.bytes = 0
        self.bytes_max = bytes_max
        self.refused = 0

    def enter(self, size: int) -> None:
        """Take a request of `size` bytes on; `leave` must follow.

        Raises:
            TooManyRequests: naming the limit; nothing was counted.
        """
        if self.requests >= self.requests_max:
            self.refused += 1
            raise TooManyRequests(self._names[0], RETRY_AFTER_S)
        if self.bytes + size > self.bytes_max:
            self.refused += 1
            raise TooManyRequests(self._names[1], RETRY_AFTER_S)
        self.requests += 1
        self.bytes += size

    @contextlib.contextmanager
    def during(self, size: int) -> Iterator[None]:
        """`enter`, and `leave` at the end of the block."""
        self.enter(size)
        try:
            yield
        finally:
            self.leave(size)

    def leave(self, size: int) -> None:
        """The request was answered, or its caller has gone."""
        self.requests -= 1
        self.bytes -= size
        assert self.requests >= 0, "more requests ended than began"


def request_limits(config: NodeConfig) -> RequestLimits:
    """The bounds of single requests, as configured."""
    return RequestLimits(
        key_bytes_max=config.max_key_bytes,
        request_bytes_max=config.max_request_bytes,
        txn_ops_max=config.max_txn_ops,
    )
