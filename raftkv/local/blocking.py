"""`LocalCluster`: the blocking twin of `AsyncLocalCluster`, for plain scripts, tests and the Python prompt.

    with LocalCluster(3) as cluster:
        client = raftkv.Client(cluster.endpoints)

A loop in a thread of its own; each method hands over to its async twin. The thread lives as long as the cluster,
which matters: on Linux a node dies with the thread that started it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from raftkv.local.layout import Layout
from raftkv.local.process import NodeProcess
from raftkv.local.status import NodeRow
from raftkv.local.supervisor import NODE_COMMAND, AsyncLocalCluster

T = TypeVar("T")


class LocalCluster:
    """A cluster of node processes on this machine, used without asyncio. Arguments as `AsyncLocalCluster`."""

    def __init__(
        self,
        nodes: int | None = None,
        *,
        directory: Path | str | None = None,
        base_port: int | None = None,
        host: str = "127.0.0.1",
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        command: Sequence[str] = NODE_COMMAND,
    ) -> None:
        self._twin = AsyncLocalCluster(
            nodes,
            directory=directory,
            base_port=base_port,
            host=host,
            arguments=arguments,
            environment=environment,
            command=command,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start all nodes and wait until they follow one leader. Raises as `AsyncLocalCluster.start`."""
        try:
            self._run(self._twin.start(timeout_s=timeout_s))
        except BaseException:
            self._end_loop()
            raise

    def close(self, *, grace_s: float | None = None) -> None:
        """Stop all nodes. May be called twice."""
        if self._loop is None:
            return
        try:
            self._run(self._twin.close(grace_s=grace_s))
        finally:
            self._end_loop()

    @property
    def layout(self) -> Layout:
        """The shape of the cluster."""
        return self._twin.layout

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names."""
        return self._twin.names

    @property
    def endpoints(self) -> tuple[str, ...]:
        """host:port of every node for clients."""
        return self._twin.endpoints

    @property
    def directory(self) -> Path:
        """Where logs and data live."""
        return self._twin.directory

    def endpoint(self, name: str) -> str:
        """host:port of one node for clients."""
        return self._twin.endpoint(name)

    def log(self, name: str) -> Path:
        """One node's log file."""
        return self._twin.log(name)

    def process(self, name: str) -> NodeProcess:
        """One node's process."""
        return self._twin.process(name)

    def status(self, *, timeout_s: float = 0.5) -> list[NodeRow]:
        """One row a node."""
        return self._run(self._twin.status(timeout_s=timeout_s))

    def leader(self, *, timeout_s: float = 0.5) -> str | None:
        """The name of the leader, or None."""
        return self._run(self._twin.leader(timeout_s=timeout_s))

    def wait_leader(self, *, timeout_s: float = 10.0, other_than: str | None = None) -> str:
        """Wait until a node leads, and return its name."""
        return self._run(self._twin.wait_leader(timeout_s=timeout_s, other_than=other_than))

    def wait_healthy(self, *, timeout_s: float = 30.0) -> None:
        """Wait until every running node follows one leader."""
        self._run(self._twin.wait_healthy(timeout_s=timeout_s))

    def kill(self, target: str) -> list[str]:
        """SIGKILL a node, a list, `leader`, `followers` or `all`."""
        return self._run(self._twin.kill(target))

    def stop(self, target: str, *, grace_s: float = 10.0) -> list[str]:
        """SIGTERM, and SIGKILL after `grace_s`."""
        return self._run(self._twin.stop(target, grace_s=grace_s))

    def pause(self, target: str) -> list[str]:
        """SIGSTOP."""
        return self._run(self._twin.pause(target))

    def resume(self, target: str) -> list[str]:
        """SIGCONT."""
        return self._run(self._twin.resume(target))

    def restart(self, target: str, *, wait: bool = True, timeout_s: float = 30.0) -> list[str]:
        """Stop nodes that run, start them on their data, wait until they follow."""
        return self._run(self._twin.restart(target, wait=wait, timeout_s=timeout_s))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="local-cluster", daemon=True)
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # KeyboardInterrupt comes here, in the caller's thread, while the work goes on in the loop's.
            future.cancel()
            raise

    def _end_loop(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return

        async def drain() -> None:
            # What was cancelled half-way (Ctrl-C during start) still has processes to kill and files to remove.
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(drain(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
