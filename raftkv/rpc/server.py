"""A server: where it listens, who is connected, and a task for each call."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import grpc
from hyperframe.frame import DataFrame

from raftkv.rpc.call import Call, Ended
from raftkv.rpc.connection import LOG, Connection
from raftkv.rpc.limits import BETWEEN_NODES, Limits

Handler = Callable[[Call], Awaitable[None]]
"""Serves one call: it accepts, reads, sends, and returns; or raises `Ended`."""

BACKLOG: Final = 1024
"""Who may wait to be connected: all clients of a node that has died come to the others at once."""
_MAY_BE_MISSING: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

# h2 makes a text of each frame that comes, for a log that nobody keeps, and this one is in hexadecimal: of a batch of
# entries that takes longer than all else that is done to receive it.
DataFrame._body_repr = lambda self: f"data={self.body_len} bytes"  # type: ignore[method-assign]


class Server:
    """Listens, and serves calls by path."""

    def __init__(self, handlers: Mapping[str, Handler], limits: Limits = BETWEEN_NODES) -> None:
        self._handlers = dict(handlers)
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._all_lost = asyncio.Event()
        self._sockets: list[socket.socket] = []
        self._listening: list[asyncio.Server] = []

    def add(self, path: str, handler: Handler) -> None:
        """Serve this too."""
        self._handlers[path] = handler

    async def bind(self, address: str) -> int:
        """Take the address `host:port`: all that the host stands for and this machine has.

        Returns:
            The port.
        Raises:
            OSError: it cannot be had.
        """
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        missing: OSError | None = None
        for family, _, _, _, where in found:
            try:
                self._sockets.append(_bound(family, where))
            except OSError as fault:
                if fault.errno not in _MAY_BE_MISSING:
                    self._unbind()
                    raise
                missing = fault
        if not self._sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no such address")
        taken: int = self._sockets[0].getsockname()[1]
        return taken

    async def start(self) -> None:
        """Serve from now on."""
        assert self._sockets, "not bound"
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            self._listening.append(await loop.create_server(self._connect, sock=each, backlog=BACKLOG))

    def close(self) -> None:
        """Listen no more, and drop all connections: the calls on them end."""
        for listening in self._listening:
            listening.close()
        if not self._listening:
            self._unbind()
        for connection in list(self._connections):
            connection.abort("this node stops")

    async def stop(self, grace_s: float) -> None:
        """Listen no more, let what is under way come to its end for so long, then drop it; all is over on return."""
        for listening in self._listening:
            listening.close()
        for connection in list(self._connections):
            connection.go_away()
        if self._connections and grace_s:
            self._all_lost.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_lost.wait(), grace_s)
        self.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _unbind(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()

    def _connect(self) -> Connection:
        connection = Connection(self._limits, on_call=self._serve, on_lost=self._lost)
        self._connections.add(connection)
        return connection

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_lost.set()

    def _serve(self, call: Call) -> None:
        path = call.headers.get(":path", "")
        handler = self._handlers.get(path)
        if handler is None:
            call.finish(Ended(grpc.StatusCode.UNIMPLEMENTED, f"there is no {path} here"))
            return
        task = asyncio.get_running_loop().create_task(self._run(handler, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, handler: Handler, call: Call) -> None:
        try:
            await handler(call)
            if call.held_up:
                await call.drain()
            call.finish(_WELL)
        except Ended as ended:
            call.finish(ended)
        except Exception as fault:  # noqa: BLE001 - one call's, not the process's
            LOG.exception("raftkv: %s failed", call.headers.get(":path"))
            call.finish(Ended(grpc.StatusCode.UNKNOWN, f"{type(fault).__name__}: {fault}"))
        finally:
            call.cancel()


_WELL: Final = Ended(grpc.StatusCode.OK)


def _bound(family: int, where: tuple[object, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a node that was here before
        if family == socket.AF_INET6:
            only = str(where[0]) != "::"  # which stands for IPv4 too, as with every other gRPC server
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only))
        made.bind(where)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made
