"""A queue whose items have priorities: the smallest number first, and in one priority the oldest first.

queue = PriorityQueue(client, "jobs")
await queue.put("urgent", priority=0)
await queue.put("whenever", priority=900)
"""

from __future__ import annotations

from typing import Final

from raftkv.client import DEFAULT, ConfigError
from raftkv.client.keys import Text
from raftkv.client.options import TimeoutArg
from raftkv.recipes.queue import Queue

PRIORITY_MAX: Final = 0xFFFF
PRIORITY_DEFAULT: Final = 0x8000


class PriorityQueue(Queue):
    """A priority queue on a name; as `Queue` in all else. The two do not see each other's items."""

    _kind = "priority-queue"

    async def put(self, value: Text, *, priority: int = PRIORITY_DEFAULT, timeout: TimeoutArg = DEFAULT) -> bytes:
        """Add an item; its id.

        Args:
            priority: 0 (first) to 65,535 (last).
        Raises:
            ConfigError: the priority is out of range.
            OutcomeUnknown, Unavailable, InvalidRequest: as in `Queue.put`.
        """
        if type(priority) is not int or not 0 <= priority <= PRIORITY_MAX:
            raise ConfigError("priority", f"{priority!r} is not a whole number from 0 to {PRIORITY_MAX}")
        return await self._put(b"%04x" % priority, value, timeout)
