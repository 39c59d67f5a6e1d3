"""One endpoint: its channel, and what is known about the node behind it.

    channel not READY --READY--> fresh: epoch + 1, breaker half-open at most, health unknown
    READY --an attempt got no answer--> suspect --a probe or any call is answered--> fresh

A connection reports; it decides nothing. Who is asked is `routing`, what a failure means is `retry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import grpc
import grpc.aio

from raftkv.client import health
from raftkv.client.breaker import Breaker, BreakerConfig, BreakerState
from raftkv.client.endpoints import is_proxied
from raftkv.client.health import Health
from raftkv.client.methods import Method, RequestT, ResponseT, StreamedT, StreamMethod
from raftkv.client.tls import TLS

READY: Final = grpc.ChannelConnectivity.READY
FAILED: Final = grpc.ChannelConnectivity.TRANSIENT_FAILURE
TROUBLE_TIMEOUT_S: Final = 1.0

KEEPALIVE_S: Final = 10.0
KEEPALIVE_ANSWER_S: Final = 5.0

# The pair of keepalive settings that was measured to notice a frozen or black-holed server:
# `grpc.http2.ping_timeout_ms` decides (its default is a minute), `keepalive_timeout_ms` alone does nothing.
CHANNEL_OPTIONS: Final[Mapping[str, int]] = {
    "grpc.keepalive_time_ms": int(KEEPALIVE_S * 1000),
    "grpc.keepalive_timeout_ms": int(KEEPALIVE_ANSWER_S * 1000),
    "grpc.http2.ping_timeout_ms": int(KEEPALIVE_ANSWER_S * 1000),
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    # A cluster that is back must be found within a second; the default would wait up to two minutes.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 1_000,
    "grpc.max_reconnect_backoff_ms": 800,
    # gRPC must repeat nothing behind our back: a write repeated by it may be done twice.
    "grpc.enable_retries": 0,
    # Answers of any size; requests are bounded by the server, whose error says so.
    "grpc.max_receive_message_length": -1,
    "grpc.max_send_message_length": -1,
    # Two clients in a process must not share a connection, or the failure of one would be the failure of both.
    "grpc.use_local_subchannel_pool": 1,
}


class LastingCall(Protocol):
    """What is ended when the node turns out to be silent."""

    def cancel(self) -> object: ...


UnaryCall = Callable[..., Any]  # grpc.aio's multicallable; typed where it is called: `Connection.unary`


class Connection:
    """One endpoint of a client."""

    __slots__ = (
        "_bidis",
        "_calls",
        "_get_state",
        "_streams",
        "answers",
        "breaker",
        "channel",
        "endpoint",
        "foreign",
        "health",
        "health_check",
        "health_watch",
        "heard_in",
        "inflight",
        "is_learner",
        "is_plain",
        "member_id",
        "open_streams",
        "suspect",
        "trouble",
    )

    def __init__(
        self,
        endpoint: str,
        *,
        options: Sequence[tuple[str, Any]],
        interceptors: Sequence[grpc.aio.ClientInterceptor],
        breaker: BreakerConfig,
        clock: Callable[[], float],
        on_breaker: Callable[[Connection, BreakerState], None],
        tls: TLS | None = None,
    ) -> None:
        self.endpoint: Final = endpoint
        self.channel: Final = _channel(endpoint, options, interceptors, tls)
        self.is_plain: Final = not (tls or options or interceptors or is_proxied(endpoint))
        """Whether another connection to the endpoint would be as the channel's, without gRPC's help."""
        self._get_state = self.channel.get_state
        self._calls: dict[Method[Any, Any], UnaryCall] = {}
        self._bidis: dict[StreamMethod[Any, Any], UnaryCall] = {}
        self._streams: dict[Method[Any, Any], UnaryCall] = {}
        self.breaker: Final = Breaker(breaker, clock, lambda state: on_breaker(self, state))
        self.health = Health.UNKNOWN
        self.suspect = False  # its last attempt got no answer, and nothing was heard from it since
        self.foreign = False  # belongs to another cluster than the other endpoints: never used
        self.heard_in = -1  # the router's generation in which it last gave a sign of life
        self.inflight = 0  # calls handed over and not ended; >= 0
        self.answers = 0  # calls that were answered, ever
        self.is_learner = False  # no vote; refuses most requests
        self.open_streams: set[LastingCall] = set()
        self.member_id = 0  # 0: not known yet
        self.trouble = ""  # why it could not connect, where that was asked
        self.health_watch: Final[UnaryCall] = self.channel.unary_stream(
            health.WATCH_PATH, request_serializer=health.encode_request, response_deserializer=health.decode_response
        )
        self.health_check: Final[UnaryCall] = self.channel.unary_unary(
            health.CHECK_PATH, request_serializer=health.encode_request, response_deserializer=health.decode_response
        )

    def is_ready(self) -> bool:
        """Whether a request handed over now goes out over an established connection. Costs 0.1 µs: gRPC's own state."""
        return self._get_state() is READY

    def connectivity(self, *, connect: bool = False) -> grpc.ChannelConnectivity:
        """The channel's state; with `connect`, an idle channel is told to connect."""
        return self._get_state(connect)

    def unary(self, method: Method[RequestT, ResponseT]) -> Callable[..., grpc.aio.UnaryUnaryCall[RequestT, ResponseT]]:
        """The multicallable for `method`, made once."""
        call = self._calls.get(method)
        if call is None:
            call = self._calls[method] = self.channel.unary_unary(
                method.path, request_serializer=method.serialize, response_deserializer=method.parse
            )
        return call

    def server_stream(
        self, method: Method[RequestT, ResponseT]
    ) -> Callable[..., grpc.aio.UnaryStreamCall[RequestT, ResponseT]]:
        """The multicallable for a server-streaming `method`, made once."""
        call = self._streams.get(method)
        if call is None:
            call = self._streams[method] = self.channel.unary_stream(
                method.path, request_serializer=method.serialize, response_deserializer=method.parse
            )
        return call

    def open_stream(
        self, method: StreamMethod[RequestT, StreamedT], metadata: Sequence[tuple[str, str]] = ()
    ) -> grpc.aio.StreamStreamCall[RequestT, StreamedT]:
        """Begin a stream both ways; `close_stream` must follow. It ends when the node turns out to be silent."""
        multicallable = self._bidis.get(method)
        if multicallable is None:
            multicallable = self._bidis[method] = self.channel.stream_stream(
                method.path, request_serializer=method.serialize, response_deserializer=method.parse
            )
        call: grpc.aio.StreamStreamCall[RequestT, StreamedT] = multicallable(metadata=tuple(metadata))
        self.open_streams.add(call)
        return call

    def open_call(
        self, method: Method[RequestT, ResponseT], request: RequestT
    ) -> grpc.aio.UnaryUnaryCall[RequestT, ResponseT]:
        """Begin a call that may take long to be answered; as a stream, it ends when the node turns out to be silent."""
        call = self.unary(method)(request)
        self.open_streams.add(call)
        return call

    def close_stream(self, call: LastingCall) -> None:
        """End a stream, or an `open_call`. grpc.aio does not cancel abandoned calls (grpc #43462)."""
        self.open_streams.discard(call)
        call.cancel()

    def abandon_streams(self) -> None:
        """The node is silent, cut off or leaving: whoever has a stream open goes on elsewhere."""
        for call in tuple(self.open_streams):
            call.cancel()

    def became_ready(self) -> None:
        """The channel connected: what was held against the old connection is void."""
        self.breaker.connection_ready()
        self.suspect = False
        self.trouble = ""
        self.health = Health.UNKNOWN

    async def ask_for_trouble(self) -> None:
        """Learn why the channel cannot connect: gRPC tells it only to calls, which fail at once in that state."""
        try:
            await self.health_check(health.SERVICE, timeout=TROUBLE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self.trouble = (error.details() or "").rpartition("last error: ")[2]

    async def is_alive(self, timeout_s: float) -> bool:
        """Whether the node gives a sign of life within `timeout_s`."""
        try:
            await self.health_check("", timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

    def answered(self, epoch: int) -> None:
        """Something sent in `epoch` was answered, with whatever result."""
        self.answers += 1
        self.breaker.succeeded(epoch)
        self.suspect = False

    def broke(self, epoch: int) -> None:
        """The connection broke under something sent in `epoch`, or a probe was not answered."""
        if epoch == self.breaker.epoch:
            self.suspect = True
        self.breaker.failed(epoch)

    def stayed_silent(self, epoch: int) -> None:
        """Something sent in `epoch` got no answer in its time.

        That may be the cluster's fault, or the caller gave it little time: the node becomes suspect, a probe decides.
        """
        if epoch == self.breaker.epoch:
            self.suspect = True
        if self.breaker.state is not BreakerState.CLOSED:
            self.breaker.failed(epoch)

    def __repr__(self) -> str:
        return f"<Connection {self.endpoint} {self._get_state().name} member={self.member_id:x}>"


def _channel(
    endpoint: str,
    options: Sequence[tuple[str, Any]],
    interceptors: Sequence[grpc.aio.ClientInterceptor],
    tls: TLS | None,
) -> grpc.aio.Channel:
    merged = {**CHANNEL_OPTIONS, **(tls.channel_options() if tls else {}), **dict(options)}
    settings: dict[str, Any] = {"options": list(merged.items()), "interceptors": list(interceptors)}
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, **settings)
    return grpc.aio.secure_channel(endpoint, tls.credentials(), **settings)
