"""Those who wait for a node: whoever has gone is forgotten, here and in the replica, though nobody leads."""

from __future__ import annotations

import pytest

from raftkv.replica.effects import Answers
from raftkv.replica.replica import FORGET_TICKS
from raftkv.server.callers import Callers
from raftkv.server.errors import OutcomeHidden, RequestTimeout
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


class Told:
    """A waiter that is no future."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def done(self) -> bool:
        return False

    def set_result(self, result: object, /) -> None:
        self.told.append(result)

    def set_exception(self, fault: Exception, /) -> None:
        self.told.append(fault)

    def cancel(self) -> None:
        self.told.append("cancelled")


async def test_a_waiter_of_another_kind_is_told_once_and_in_the_turn() -> None:
    replica = Node(1, (1, 2, 3)).replica
    callers = Callers(replica, lambda: 0, request_timeout_s=60.0)
    answered, hidden, late, gone = (Told() for _ in range(4))
    for waiter, deadline in ((answered, None), (hidden, None), (late, -1.0), (gone, None)):
        callers.submit_for(waiter, CommandKind.PUT, b"", deadline)
    callers.abandon(gone)
    callers.answer(Answers([(answered, "result")], [], [hidden]))
    callers.expire()
    assert answered.told == ["result"]
    assert gone.told == ["cancelled"]
    assert [type(each) for each in hidden.told + late.told] == [OutcomeHidden, RequestTimeout]
    assert callers.idle
