"""One command, one client: open it, make the call, close it.

Commands work on messages, not on the SDK's results, because `-o json` shows every field that etcdctl shows. The calls
still go through the SDK: many endpoints, the leader found, retries, one deadline over all.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from raftkv.cli.options import Settings
from raftkv.client import AsyncClient
from raftkv.client.endpoints import resolve_endpoints
from raftkv.client.errors import RaftkvError
from raftkv.client.faults import error_of, understand
from raftkv.client.methods import Method, RequestT, ResponseT
from raftkv.client.routing import Purpose

T = TypeVar("T")

DIRECT_OPTIONS = (("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))


def client_of(settings: Settings) -> AsyncClient:
    """A client with these settings."""
    return AsyncClient(settings.endpoints, timeout=settings.timeout_s, tls=settings.tls)


def call(
    settings: Settings, method: Method[RequestT, ResponseT], request: RequestT, purpose: Purpose = Purpose.READ
) -> ResponseT:
    """Make one call to the cluster. Raises as the SDK does."""

    async def work() -> ResponseT:
        async with client_of(settings) as client:
            return await client.call(method, request, purpose)

    return run(work())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's asynchronous part. Ctrl-C cancels it and raises KeyboardInterrupt."""
    return _runner().run(work)


@functools.cache
def _runner() -> asyncio.Runner:
    # One loop for all calls of a command: grpc.aio stays with the loop it met first.
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def endpoints_of(settings: Settings) -> tuple[str, ...]:
    """Each as `host:port`."""
    return resolve_endpoints(settings.endpoints, tls=settings.tls is not None)


def channel(settings: Settings, endpoint: str) -> grpc.Channel:
    """A blocking connection to exactly this endpoint."""
    if settings.tls is None:
        return grpc.insecure_channel(endpoint, options=DIRECT_OPTIONS)
    options = (*DIRECT_OPTIONS, *settings.tls.channel_options().items())
    return grpc.secure_channel(endpoint, settings.tls.credentials(), options=options)


def direct(settings: Settings, endpoint: str, method: Method[RequestT, ResponseT], request: RequestT) -> ResponseT:
    """Ask exactly this endpoint, once: for what is about a node and not about the cluster.

    Raises:
        RaftkvError: it did not answer, or refused.
    """
    with channel(settings, endpoint) as connection:
        ask = connection.unary_unary(
            method.path, request_serializer=method.serialize, response_deserializer=method.parse
        )
        try:
            response: ResponseT = ask(request, timeout=settings.timeout_s)
        except grpc.RpcError as error:
            raise failure(error, endpoint) from error
    return response


def failure(error: grpc.RpcError, endpoint: str) -> RaftkvError:
    """The SDK's error for what a blocking call raised."""
    call: Any = error  # gRPC raises one object that is the error and the call, which its types do not say
    return error_of(
        understand(call.code(), call.details() or "", call.trailing_metadata()), endpoint=endpoint, attempts=1
    )


def each(settings: Settings, ask: Callable[[str], T]) -> list[tuple[str, T | RaftkvError]]:
    """Ask every endpoint at once; an endpoint that fails is shown by its error."""
    return each_of(endpoints_of(settings), ask)


def each_of(endpoints: Sequence[str], ask: Callable[[str], T]) -> list[tuple[str, T | RaftkvError]]:
    """As `each`, for these endpoints."""

    def guarded(endpoint: str) -> T | RaftkvError:
        try:
            return ask(endpoint)
        except RaftkvError as error:
            return error

    with ThreadPoolExecutor(min(32, len(endpoints))) as threads:
        return list(zip(endpoints, threads.map(guarded, endpoints), strict=True))
