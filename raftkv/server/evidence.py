"""What a node sees besides Raft's clock: proof that its leader is gone, and reasons of its own not to serve."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from raftkv.raft.types import NodeId

if TYPE_CHECKING:
    from raftkv.server.runtime import Runtime

DISK_STALLED_S = 1.0


class Evidence:
    """Of one node."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._probing = False
        self.on_reasons: Callable[[frozenset[str]], None] = lambda reasons: None
        """Told when the reasons change."""
        self.reasons: frozenset[str] = frozenset(("starting",))
        """Why this node does not serve; empty while it does."""

    def suspect(self, peer: NodeId) -> None:
        """Something broke between us and the leader `peer`: see whether its process is gone, and say so if it is."""
        if not self._probing and not self._runtime.stopping:
            self._probing = True
            self._runtime.spawn(self._probe(peer), name=f"probe-{peer:x}")

    async def _probe(self, peer: NodeId) -> None:
        runtime = self._runtime
        try:
            gone = await runtime.peers.is_gone(peer)
        finally:
            self._probing = False
        if gone and peer == runtime.leader:
            runtime.log.info("leader_suspected", peer=f"{peer:x}", term=runtime.term, reason="connection refused")
            runtime.on_gone(peer)

    def update(self, disk_busy_since: float | None, *, restoring: bool) -> None:
        """Look at the reasons anew.

        Args:
            disk_busy_since: when the write that is under way began, by the monotonic clock.
            restoring: whether the state lags far behind the log, or is being replaced.
        """
        reasons = set()
        if self._runtime.stopping:
            reasons.add("stopping")
        if self._runtime.leader == 0:
            reasons.add("no leader")
        if disk_busy_since is not None and time.monotonic() - disk_busy_since > DISK_STALLED_S:
            reasons.add("disk stalled")
        if restoring:
            reasons.add("restoring")
        if reasons != self.reasons:
            self.reasons = frozenset(reasons)
            self._runtime.log.info("health", serving=not reasons, reasons=sorted(reasons))
            self.on_reasons(self.reasons)
