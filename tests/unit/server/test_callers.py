"""Those who wait for a node: whoever has gone is forgotten, here and in the replica, though nobody leads."""

from __future__ import annotations

import pytest

from raftkv.replica.replica import FORGET_TICKS
from raftkv.server.callers import Callers
from raftkv.server.errors import RequestTimeout
from raftkv.state.commands import CommandKind
from tests.unit.replica.nodes import Node


async def test_whoever_gives_up_or_runs_out_of_time_is_forgotten() -> None:
    replica = Node(1, (1, 2, 3)).replica
    callers = Callers(replica, lambda: 0, request_timeout_s=60.0)
    for _ in range(100):
        callers.abandon(callers.read(None))
        callers.abandon(callers.submit(CommandKind.PUT, b"", None))
    late = [callers.read(-1.0), callers.submit(CommandKind.PUT, b"", -1.0)]
    callers.expire()
    for future in late:
        with pytest.raises(RequestTimeout) as raised:
            await future
        assert raised.value.executed == "no"
    assert callers.idle
    for _ in range(FORGET_TICKS):
        replica.tick()
    assert replica.waiting == 0
