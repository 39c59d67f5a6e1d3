"""A way to a node that can swallow everything: no byte passes, no connection is refused, reset or ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence


class Blackhole:
    """Forwards connections from a port of its own to an address, until it is cut.

    Connections made or opened while it is cut stay where they are. Healed, it lets them go on if they are to `revive`,
    as TCP does when packets were only lost. If not, they stay silent for ever, as behind a firewall that has forgotten
    them, and only new ones pass.
    """

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted: list[asyncio.StreamWriter] = []
        self._passing = asyncio.Event()  # of the connections of this era; one that is never set keeps them for ever
        self._passing.set()
        self.address = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def before(cls, addresses: Sequence[str]) -> AsyncIterator[list[Blackhole]]:
        """One before each address."""
        holes = [cls(address) for address in addresses]
        servers = [await asyncio.start_server(hole._accept, "127.0.0.1", 0) for hole in holes]
        for hole, server in zip(holes, servers, strict=True):
            hole.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield holes
        finally:
            for server in servers:
                server.close()
            tasks = [task for hole in holes for task in hole._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for hole in holes:
                for writer in hole._accepted:  # also of tasks that had not begun
                    writer.transport.abort()

    def cut(self) -> None:
        """Swallow everything from now on."""
        self._passing.clear()

    def heal(self, *, revive: bool) -> None:
        """Let new connections pass, and the old ones if they are to revive."""
        if revive:
            self._passing.set()
        else:
            self._passing = asyncio.Event()
            self._passing.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted.append(writer)
        task = asyncio.create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing = self._passing
        writers = [writer]
        try:
            await passing.wait()
            there, back = await asyncio.open_connection(self._host, self._port)
            writers.append(back)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, back, passing))
                pumps.create_task(_pump(there, writer, passing))
        except* OSError:
            pass  # one side has ended it
        finally:
            for each in writers:
                each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event) -> None:
    while data := await reader.read(65536):
        await passing.wait()
        writer.write(data)
        await writer.drain()
    await passing.wait()  # an end does not pass either
    raise ConnectionResetError
