"""How `raftkv cluster status|kill|…` reaches the supervisor of a directory: one JSON line each way on a Unix socket.

    {"op": "kill", "target": "leader"}   ->   {"ok": true, "result": ["n3"]}
                                              {"ok": false, "error": "'n9': no such node; the nodes are n1, n2, n3"}

The socket's path stands in the directory's state file. Only the user who runs the supervisor can open it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, Self

from raftkv.local import layout as layouts
from raftkv.local.errors import ClusterNotRunning, LocalClusterError
from raftkv.local.status import NodeRow
from raftkv.local.supervisor import AsyncLocalCluster

_LINE_BYTES_MAX = 1 << 20
_SOCKET_PATH_MAX = 100  # sun_path holds 104 bytes on macOS, 108 on Linux
SOCKET_FILE = "cluster.sock"


class ControlServer:
    """Serves one cluster's supervisor. `down` is set when somebody asked for the end; its value: remove the data."""

    def __init__(self, cluster: AsyncLocalCluster) -> None:
        self.cluster = cluster
        self.down: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # one disturbance after another: two restarts of one node must not meet
        self._waiting_for_end: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        directory = self.cluster.directory
        self._path = directory / SOCKET_FILE
        if len(os.fsencode(self._path)) > _SOCKET_PATH_MAX:
            self._path = Path(tempfile.mkdtemp(prefix="raftkv-control-")) / SOCKET_FILE
        self._path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_LINE_BYTES_MAX)
        finally:
            os.umask(before)
        self.cluster.layout.save({"pid": os.getpid(), "socket": str(self._path)})
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self._remove_socket()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def finish(self) -> None:
        """Tell those who asked for the end that everything is stopped."""
        for writer in self._waiting_for_end:
            writer.write(b'{"ok": true, "result": null}\n')
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()

    def _remove_socket(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            if self._path.parent.name.startswith("raftkv-control-"):
                shutil.rmtree(self._path.parent, ignore_errors=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            try:
                request = json.loads(await reader.readline())
                if request["op"] == "down":
                    self._waiting_for_end.append(writer)
                    if not self.down.done():
                        self.down.set_result(bool(request.get("remove", False)))
                    return
                answer = {"ok": True, "result": await self._do(request)}
            except LocalClusterError as error:
                answer = {"ok": False, "error": str(error)}
            except (ValueError, KeyError, TypeError) as error:
                answer = {"ok": False, "error": f"not a request that this version understands: {error}"}
            writer.write(json.dumps(answer).encode() + b"\n")
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()
        finally:
            self._answering.discard(task)

    async def _do(self, request: dict[str, Any]) -> Any:
        cluster = self.cluster
        operation, target = request["op"], str(request.get("target", ""))
        if operation == "status":
            return [row.as_dict() for row in await cluster.status()]
        async with self._turn:
            match operation:
                case "kill":
                    return await cluster.kill(target)
                case "stop":
                    return await cluster.stop(target)
                case "pause":
                    return await cluster.pause(target)
                case "resume":
                    return await cluster.resume(target)
                case "restart":
                    return await cluster.restart(target)
        raise ValueError(f"op {operation!r}")


def ask(directory: Path, operation: str, *, timeout_s: float = 60.0, **arguments: Any) -> Any:
    """Ask the supervisor of `directory`.

    Raises:
        ClusterNotRunning: nobody answers there.
        LocalClusterError: the supervisor refused; its words.
    """
    stored = layouts.load(directory)
    supervisor = stored[1] if stored is not None else None
    if not supervisor or not supervisor.get("socket"):
        raise ClusterNotRunning(directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(supervisor["socket"])
        except OSError:
            raise ClusterNotRunning(directory) from None
        try:
            connection.sendall(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except TimeoutError:
            raise LocalClusterError(f"the supervisor gave no answer to {operation} in {timeout_s:g} s") from None
        except OSError:
            line = b""
    if not line:
        raise LocalClusterError(f"the supervisor (pid {supervisor['pid']}) ended while it worked on {operation}")
    answer = json.loads(line)
    if not answer["ok"]:
        raise LocalClusterError(answer["error"])
    return answer["result"]


def rows(directory: Path) -> list[NodeRow]:
    """The table of the cluster that runs in `directory`. Raises as `ask`."""
    return [NodeRow.from_dict(each) for each in ask(directory, "status")]


def running_endpoints(directory: Path) -> list[str]:
    """Client addresses of the cluster that runs in `directory`; none when none runs. Never raises."""
    try:
        stored = layouts.load(directory)
        if stored is None or not stored[1]:
            return []
        os.kill(int(stored[1]["pid"]), 0)
    except (OSError, LocalClusterError, ValueError, KeyError, TypeError):
        return []
    return [stored[0].client(node) for node in stored[0].nodes]
