"""Room for writes: the quota, and the alarms that stop them.

    below the quota --a write finds it reached--> NOSPACE proposed --applied--> writes that need space are refused
                                                     (by every node, until an operator disarms it)

The size of the state is asked for once a second, not for each write: LevelDB answers by looking at its files.
"""

from __future__ import annotations

import asyncio

from raftkv._pb.maintenance_pb2 import CORRUPT, NOSPACE, AlarmRequest
from raftkv.server.errors import Corrupt, NoSpace
from raftkv.server.services.contract import Node
from raftkv.state.commands import CommandKind

LOOK_EVERY_S = 1.0


class Quota:
    """Says whether a write may be proposed."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._look_at = 0.0  # when to look at the size again
        self._full = False

    def check_intact(self) -> None:
        """Refuse everything while nodes disagree about the data.

        Raises:
            Corrupt: that alarm is on.
        """
        alarms = self._node.machine.alarms
        if alarms and any(kind == CORRUPT for _, kind in alarms):
            raise Corrupt

    async def check_space(self) -> None:
        """Refuse a write that needs space where there is none.

        Raises:
            Corrupt, NoSpace: that alarm is on, or the quota is reached (which raises the alarm).
        """
        if self.is_reached():
            alarm = AlarmRequest(action=AlarmRequest.ACTIVATE, memberID=self._node.node_id, alarm=NOSPACE)
            await self._node.propose(CommandKind.ALARM, alarm.SerializeToString(), None)
            self._look_at = 0.0  # when it was disarmed, the next write looks afresh
            raise NoSpace

    def is_reached(self) -> bool:
        """Whether the quota is reached and nobody has said so yet; then `check_space` must.

        Raises:
            Corrupt, NoSpace: that alarm is on.
        """
        alarms = self._node.machine.alarms
        if alarms:
            self.check_intact()
            if any(kind == NOSPACE for _, kind in alarms):
                raise NoSpace
        now = self._loop.time()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._full = self._node.state_bytes() >= self._node.config.quota_backend_bytes
        return self._full
