"""A steady load of writes and reads that remembers everything, so that what it was promised can be checked.

Each writer puts keys of its own, one at a time, to a value of its own; a write that was acknowledged is remembered
with its revision. Readers read keys that were acknowledged and must find them. `verify` reads everything back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from raftkv.client import AsyncClient


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """The longest time without a successful write in some window. Times are time.monotonic()."""

    before: float
    """When the last write before it was acknowledged."""
    after: float
    """When the first write after it was."""

    @property
    def length_ms(self) -> float:
        """How long it was, in milliseconds."""
        return (self.after - self.before) * 1000


@dataclasses.dataclass(slots=True)
class Verdict:
    """What reading everything back has shown."""

    acknowledged: int = 0
    """Writes that were acknowledged."""
    found: int = 0
    """Of these: read back with the value and the revision that were promised."""
    lost: list[str] = dataclasses.field(default_factory=list)
    """Of these: missing or different, each as a line."""
    unknown: int = 0
    """Writes whose outcome was not learned; they may be there or not."""

    @property
    def kept(self) -> bool:
        """Every acknowledged write was found."""
        return not self.lost and self.found == self.acknowledged


class Load:
    """Writers and readers over one or several clients.

        async with Load(client) as load:
            ...
        verdict = await load.verify(client)

    Args:
        clients: writers and readers are spread over them.
        writers: concurrent writers, each with one write in flight.
        readers: concurrent readers.
        pause_s: between two writes of a writer (and reads of a reader); the load's pace.
        prefix: of all keys.
        value_bytes: length of a value.
    """

    def __init__(
        self,
        *clients: AsyncClient,
        writers: int = 8,
        readers: int = 4,
        pause_s: float = 0.01,
        prefix: str = "load/",
        value_bytes: int = 64,
    ) -> None:
        assert clients, "a load needs a client"
        self.prefix = prefix
        self.writes: list[tuple[float, float]] = []  # (sent, acknowledged), in order of acknowledgement
        self.reads: list[tuple[float, float]] = []
        self.errors: Counter[str] = Counter()  # "put NoLeader" -> how often callers saw it
        self.error_texts: list[str] = []  # the first few, for the report
        self._clients = clients
        self._writers = writers
        self._readers = readers
        self._pause_s = pause_s
        self._value_bytes = value_bytes
        self._acknowledged: dict[str, tuple[bytes, int]] = {}
        self._keys: list[str] = []  # of acknowledged writes, for the readers to choose from
        self._unknown: dict[str, bytes] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._wrote = asyncio.Event()
        self._random = random.Random(1)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in range(self._writers):
            self._tasks.append(loop.create_task(self._write(number), name=f"writer {number}"))
        for number in range(self._readers):
            self._tasks.append(loop.create_task(self._read(number), name=f"reader {number}"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the load. Raises what a writer or reader failed with, other than an error of the SDK."""
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    async def wait_writes(self, count: int, *, timeout_s: float = 10.0) -> None:
        """Wait until `count` more writes are acknowledged. Raises TimeoutError."""
        wanted = len(self.writes) + count
        async with asyncio.timeout(timeout_s):
            while len(self.writes) < wanted:
                self._wrote.clear()
                await self._wrote.wait()

    def gap(self, since: float, until: float) -> Gap:
        """The longest time between two acknowledged writes that touches the window."""
        longest = Gap(since, since)
        last = since
        for _, done in self.writes:
            if done <= since:
                last = done
                continue
            if done - last > longest.after - longest.before:
                longest = Gap(last, done)
            last = done
            if done >= until:
                return longest
        # The load ended (or still waits) without another write: the gap reaches to the end of the window.
        return Gap(last, until) if until - last > longest.after - longest.before else longest

    async def verify(self, client: AsyncClient) -> Verdict:
        """Read everything back, linearizably, and compare."""
        verdict = Verdict(acknowledged=len(self._acknowledged), unknown=len(self._unknown))
        there = {item.key.decode(): item async for item in client.scan(self.prefix, timeout=30.0)}
        for key, (value, revision) in self._acknowledged.items():
            item = there.get(key)
            if item is None:
                verdict.lost.append(f"{key}: acknowledged with revision {revision}, not there")
            elif (item.value, item.mod_revision) != (value, revision):
                verdict.lost.append(
                    f"{key}: acknowledged {value[:16]!r} with revision {revision}, "
                    f"found {item.value[:16]!r} with {item.mod_revision}"
                )
            else:
                verdict.found += 1
        for key, item in there.items():
            if key not in self._acknowledged and self._unknown.get(key) != item.value:
                verdict.lost.append(f"{key}: found, but nobody wrote that")
        return verdict

    async def _write(self, number: int) -> None:
        from raftkv.client import OutcomeUnknown, RaftkvError

        client = self._clients[number % len(self._clients)]
        await asyncio.sleep(self._pause_s * number / max(1, self._writers))  # not all in step
        serial = 0
        while True:
            serial += 1
            key = f"{self.prefix}{number:02d}/{serial:06d}"
            value = f"{number}.{serial}.".encode().ljust(self._value_bytes, b"x")
            sent = time.monotonic()
            # A write that is cancelled on its way (the load ends) is one whose outcome is not known.
            self._unknown[key] = value
            try:
                result = await client.put(key, value)
            except OutcomeUnknown as error:
                self._failed("put", error)
            except RaftkvError as error:
                del self._unknown[key]
                self._failed("put", error)
            else:
                del self._unknown[key]
                self.writes.append((sent, time.monotonic()))
                self._acknowledged[key] = (value, result.revision)
                self._keys.append(key)
                self._wrote.set()
            await asyncio.sleep(self._pause_s)

    async def _read(self, number: int) -> None:
        from raftkv.client import RaftkvError

        client = self._clients[number % len(self._clients)]
        while True:
            await asyncio.sleep(self._pause_s)
            if not self._keys:
                continue
            key = self._random.choice(self._keys)
            sent = time.monotonic()
            try:
                item = await client.get(key)
            except RaftkvError as error:
                self._failed("get", error)
                continue
            self.reads.append((sent, time.monotonic()))
            value, revision = self._acknowledged[key]
            if item is None or (item.value, item.mod_revision) != (value, revision):
                self.errors["get: an acknowledged write was not there"] += 1

    def _failed(self, call: str, error: Exception) -> None:
        self.errors[f"{call}: {type(error).__name__}"] += 1
        if len(self.error_texts) < 20:
            self.error_texts.append(f"{call}: {type(error).__name__}: {error}")


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, nearest rank; 0.0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered), max(1, math.ceil(share * len(ordered) - 1e-9))) - 1]
