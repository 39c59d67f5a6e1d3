"""The server that other nodes call: an address, connections, and a task for each call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import grpc
import structlog

from raftkv.server.rpc import Call, Connection, Ended

Handler = Callable[[Call], Awaitable[None]]
"""Serves one call: it accepts, reads, sends, and returns; or raises `Ended`."""


class Server:
    """Listens for other nodes and serves their calls, by path."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._tasks: asyncio.TaskGroup
        self._connections: set[Connection] = set()
        self._listening: asyncio.Server | None = None

    async def bind(self, address: str) -> None:
        """Take the address `host:port`.

        Raises:
            OSError: it cannot be had.
        """
        host, _, port = address.rpartition(":")
        self._listening = await asyncio.get_running_loop().create_server(
            self._connect, host.strip("[]"), int(port), start_serving=False
        )

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Serve from now on; each call is a task of `tasks`."""
        assert self._listening is not None, "not bound"
        self._tasks = tasks
        await self._listening.start_serving()

    def close(self) -> None:
        """Listen no more, and drop all connections: the calls on them end."""
        if self._listening is not None:
            self._listening.close()
        for connection in list(self._connections):
            connection.abort("this node stops")

    def _connect(self) -> Connection:
        connection = Connection(on_call=self._serve, on_lost=self._connections.discard)
        self._connections.add(connection)
        return connection

    def _serve(self, call: Call) -> None:
        handler = self._handlers.get(call.headers.get(":path", ""))
        if handler is None:
            call.finish(Ended(grpc.StatusCode.UNIMPLEMENTED, f"there is no {call.headers.get(':path')} here"))
        else:
            self._tasks.create_task(self._run(handler, call))

    async def _run(self, handler: Handler, call: Call) -> None:
        try:
            await handler(call)
            await call.drain()
        except Ended as ended:
            call.finish(ended)
        except Exception as fault:  # noqa: BLE001 - one call's, not the node's
            structlog.get_logger().error("peer_call_failed", exc_info=fault)
            call.finish(Ended(grpc.StatusCode.UNKNOWN, f"{type(fault).__name__}: {fault}"))
        else:
            call.finish(Ended(grpc.StatusCode.OK))
        finally:
            call.cancel()
