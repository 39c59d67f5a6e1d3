"""Who writes the Raft log: one thread; or the loop itself, where handing over would cost more than the write.

The loop hands over writes and goes on; what gathered while one fsync ran goes into the next as a single
synced batch (group commit). Completion comes back to the loop in order.

    a small write, nothing under way, the disk quick of late  -> made at once, on the loop (`takes`, `write`)
    any other                                                 -> the thread (`persist`)

A failed write is fatal (rule Z1): the handle is never touched again, nobody is answered, `on_fatal` ends the
process. Only `close` after the thread has ended may close the store under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from raftkv.raft.types import Entry, HardState
from raftkv.replica.effects import Persist
from raftkv.storage.log_store import LogStore

T = TypeVar("T")

QUICK_S = 0.0005
"""A disk whose writes take less than this, on average, is quick. The two changes of thread that a write by the thread
takes cost about as much. A slow write moves the average so far that the next ones are the thread's."""
AVERAGE_OVER = 8
SMALL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Install:
    persist: Persist
    state_name: str


@dataclass(frozen=True, slots=True)
class _Job:
    call: Callable[[], None]


_AnyJob = Persist | _Install | _Job | None


class Disk:
    """Owner of all writes to the log; see the module."""

    def __init__(
        self,
        log: LogStore,
        loop: asyncio.AbstractEventLoop,
        on_persisted: Callable[[int], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._log = log
        self._loop = loop
        self._on_persisted = on_persisted
        self._on_fatal = on_fatal
        self._under_way = 0  # jobs handed over whose end the loop has not heard of
        self._average_s = QUICK_S  # of a synced write; not known to be quick yet
        self._jobs: queue.SimpleQueue[_AnyJob] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="raftkv-disk", daemon=True)
        self.busy_since: float | None = None
        """Monotonic time at which the write under way began; None while idle. Read by the health check."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def takes(self, persist: Persist) -> bool:
        """Whether this write is to be made by `write`, at once, and not by `persist`."""
        return (
            not self._under_way
            and persist.install is None
            and self._average_s < QUICK_S
            and sum([len(entry.data) for entry in persist.entries]) <= SMALL_BYTES
        )

    def write(self, persist: Persist) -> None:
        """Write one turn's hard state and entries on the loop; they are durable on return.

        Raises:
            NodeFatal: it failed.
        """
        self.busy_since = time.monotonic()
        self._write([persist])
        self.busy_since = None

    def persist(self, persist: Persist) -> None:
        """Write one turn's hard state and entries by the thread; `on_persisted` follows on the loop."""
        self._hand_over(persist)

    def install(self, persist: Persist, state_name: str) -> None:
        """Make a received snapshot current, in one batch with the log's new beginning."""
        self._hand_over(_Install(persist, state_name))

    def _hand_over(self, job: _AnyJob) -> None:
        self._under_way += 1
        self._jobs.put(job)

    def _heard(self, jobs: int) -> None:
        self._under_way -= jobs

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run other work that writes the log (compaction) between two writes."""
        future: asyncio.Future[T] = self._loop.create_future()

        def job() -> None:
            result = call()
            self._post(lambda: ended(result))

        def ended(result: T) -> None:
            self._heard(1)
            if not future.done():
                future.set_result(result)

        self._hand_over(_Job(job))
        return future

    def close(self) -> None:
        """Finish what was handed over, end the thread, close the log."""
        self._jobs.put(None)
        self._thread.join()
        self._log.close()

    # The thread.

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self.busy_since = time.monotonic()
                after: _AnyJob = job
                if isinstance(job, Persist):
                    group, after = self._gather(job)
                    self._write(group)
                    self._done(group[-1].number, len(group))
                if isinstance(after, _Install):
                    self._install(after)
                elif isinstance(after, _Job):
                    after.call()
                elif after is None:
                    return
                self.busy_since = None
        except BaseException as fault:  # noqa: BLE001 - whatever it is, this node may not go on
            self._on_fatal(fault)

    def _gather(self, first: Persist) -> tuple[list[Persist], _AnyJob]:
        """The writes queued by now, and the other job that ended their row (the last write again if none did)."""
        group = [first]
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group, group[-1]
            if not isinstance(job, Persist):
                return group, job
            group.append(job)

    def _write(self, group: list[Persist]) -> None:
        """Write all of `group` as one synced batch."""
        hard_state: HardState | None = None
        entries: list[Entry] = []
        for persist in group:
            hard_state = persist.hard_state or hard_state
            if persist.entries:
                # A later turn may replace a suffix that an earlier one was about to write.
                while entries and entries[-1].index >= persist.entries[0].index:
                    entries.pop()
                entries.extend(persist.entries)
        sync = any(persist.must_sync for persist in group)
        began = time.perf_counter()
        self._log.append(hard_state, entries, sync=sync)
        if sync:
            self._average_s += (time.perf_counter() - began - self._average_s) / AVERAGE_OVER

    def _install(self, job: _Install) -> None:
        meta = job.persist.install
        assert meta is not None, "an install names its snapshot"
        self._log.install(meta, job.persist.hard_state, job.state_name)
        if job.persist.entries:
            self._log.append(job.persist.hard_state, job.persist.entries)
        self._done(job.persist.number, 1)

    def _done(self, number: int, jobs: int) -> None:
        def done() -> None:
            self._heard(jobs)
            self._on_persisted(number)

        self._post(done)

    def _post(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: the process is stopping
            self._loop.call_soon_threadsafe(call)
