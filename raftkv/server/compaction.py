"""When the log is cut: only behind a state that has been made durable.

Every `snapshot_entries` entries or `snapshot_log_bytes` bytes: fsync the state as of some applied index, then drop
the log's prefix, but keep a tail for followers that lag a little, so that they need no snapshot.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raftkv.raft.types import SnapshotMeta
from raftkv.replica.effects import Apply

if TYPE_CHECKING:
    from raftkv.server.runtime import Runtime

MARK_BYTES = 1 << 20


class Compaction:
    """Counts what was applied, and cuts the log in the background; at most one cut at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._bytes = 0
        self._marks: deque[tuple[int, int]] = deque([(0, 0)])  # (index, bytes applied up to it), about every MiB
        self._cut_bytes = 0  # of _bytes, how much the last cut left behind
        self._cut_index = runtime.stores.log.first_index() - 1
        self._running = False

    def applied(self, applies: Sequence[Apply]) -> None:
        """Entries have been applied."""
        for apply in applies:
            self._bytes += len(apply.entry.data)
        last = applies[-1].entry.index
        if self._bytes - self._marks[-1][1] >= MARK_BYTES:
            self._marks.append((last, self._bytes))
        config = self._runtime.config
        due = (
            last - self._cut_index >= config.snapshot_entries + config.snapshot_catchup_entries
            or self._bytes - self._cut_bytes >= config.snapshot_log_bytes
        )
        if due and not self._running:
            self._running = True
            self._runtime.spawn(self._cut(), name="compaction")

    def installed(self, index: int) -> None:
        """A snapshot stands for everything up to `index` now."""
        self._cut_index = index
        self._marks = deque([(index, self._bytes)])
        self._cut_bytes = self._bytes

    async def _cut(self) -> None:
        runtime = self._runtime
        stores, config = runtime.stores, runtime.config
        try:
            machine, index = runtime.machine, runtime.machine.applied_index
            await asyncio.to_thread(stores.state.sync)
            if runtime.machine is not machine:
                return  # a snapshot was installed meanwhile, and brought its own beginning of the log
            cut = self._index_to_keep_from(index - config.snapshot_catchup_entries, config.snapshot_log_bytes // 2)
            if cut >= stores.log.first_index():
                meta = SnapshotMeta(cut, stores.log.term(cut), runtime.replica.raft.conf_at(cut))
                await runtime.write_log(lambda: stores.log.compact(meta))
                runtime.replica.raft.compacted(cut)
                self._cut_index = cut
                runtime.log.info("compacted", index=cut, applied=index)
        finally:
            self._running = False

    def _index_to_keep_from(self, by_entries: int, bytes_max: int) -> int:
        """The last index to drop: `by_entries`, or later where what follows is more than `bytes_max`."""
        while len(self._marks) > 1 and self._bytes - self._marks[0][1] > bytes_max:
            self._marks.popleft()
        index, self._cut_bytes = self._marks[0]
        return max(by_entries, min(index, self._runtime.machine.applied_index))
