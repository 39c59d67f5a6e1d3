"""A counter that many change at once, with bounds that are kept.

    stock = Counter(client, "stock")
    left = await stock.add(-1, at_least=0)      # ConditionFailed when nothing is left

The number is the value of the key `<name>/.counter/value`, as decimal text. A change is a transaction on the number
that was read, begun again from the number found whenever somebody else was faster.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Final

from raftkv.client import (
    DEFAULT,
    AsyncClient,
    ConditionFailed,
    DeadlineExceeded,
    Get,
    Guard,
    Key,
    KeyValue,
    Put,
    RangeResult,
)
from raftkv.client.keys import Text
from raftkv.client.options import TimeoutArg, check_seconds
from raftkv.client.txn import Branches
from raftkv.recipes.names import prefix_of
from raftkv.recipes.waiting import Deadline

PAUSE_MAX_S: Final = 0.25
PAUSE_S: Final = 0.002


class Counter:
    """A counter on a name. An object of this class makes its own changes one after the other; use one per process.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name share it.
    """

    def __init__(self, client: AsyncClient, name: Text) -> None:
        self._client = client
        self._name = name
        self._key = prefix_of(name, "counter") + b"value"
        self._turn = asyncio.Lock()  # our own changes need not compete with each other

    async def value(self, *, timeout: TimeoutArg = DEFAULT) -> int:
        """The number now; 0 where nobody changed it yet.

        Raises:
            ConditionFailed: something that is no number stands there (code NOT_A_NUMBER).
            Unavailable: it was not read.
        """
        return self._number(await self._client.get(self._key, serializable=False, timeout=timeout))

    async def add(
        self,
        amount: int = 1,
        *,
        at_least: int | None = None,
        at_most: int | None = None,
        guards: Sequence[Guard] = (),
        timeout: float | None = 30.0,
    ) -> int:
        """Change it; the number after this change.

        Args:
            amount: what to add; may be negative.
            at_least, at_most: bounds that the number must not leave by this change.
            guards: as in `put`.
            timeout: seconds; None waits for ever.
        Raises:
            ConditionFailed: a bound would be left (code OUT_OF_BOUNDS; `.current` is what stands there), or something
                that is no number stands there (NOT_A_NUMBER). Nothing was changed.
            LockLost: a lock among `guards` is not held any more. Nothing was changed.
            DeadlineExceeded: others were faster all the time. Nothing was changed.
            OutcomeUnknown: as in `put`: perhaps it was changed. With raftkv only when its time ran out.
            Unavailable: it was not done.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        deadline = Deadline(timeout)
        async with self._turn:
            found = await self._client.get(self._key, serializable=False, timeout=deadline.remaining())
            conflicts = 0
            while True:
                number = self._number(found) + amount
                self._check_bounds(number, found, at_least, at_most)
                unchanged = Key(self._key).mod_revision == (0 if found is None else found.mod_revision)
                branches = Branches((unchanged,), (Put(self._key, str(number)),), (Get(self._key),))
                result = await self._client.commit(branches, guards=guards, timeout=deadline.remaining())
                if result.succeeded:
                    return number
                answer = result.results[0]
                assert isinstance(answer, RangeResult), "a transaction answers each operation in its kind"
                found = answer.items[0] if answer.items else None
                conflicts += 1
                pause_s = random.uniform(0, min(PAUSE_MAX_S, PAUSE_S * 2 ** min(conflicts, 10)))
                if deadline.passed:
                    raise DeadlineExceeded(f"counter {self._name!r}: others were faster", code="CONTENDED")
                await asyncio.sleep(pause_s)
                if conflicts > 1:  # what the failed transaction found is old by now
                    found = await self._client.get(self._key, serializable=False, timeout=deadline.remaining())

    async def set(self, value: int, *, guards: Sequence[Guard] = (), timeout: TimeoutArg = DEFAULT) -> None:
        """Set it, whatever it was. Repeating it is harmless. Raises as `put`."""
        await self._client.put(self._key, str(int(value)), guards=guards, timeout=timeout)

    def _number(self, item: KeyValue | None) -> int:
        if item is None:
            return 0
        try:
            return int(item.value)
        except ValueError:
            raise self._failed(f"holds {item.value[:40]!r}, which is no number", item, "NOT_A_NUMBER") from None

    def _check_bounds(self, number: int, item: KeyValue | None, least: int | None, most: int | None) -> None:
        if least is not None and number < least:
            raise self._failed(f"would be {number}, below {least}", item, "OUT_OF_BOUNDS")
        if most is not None and number > most:
            raise self._failed(f"would be {number}, above {most}", item, "OUT_OF_BOUNDS")

    def _failed(self, what: str, item: KeyValue | None, code: str) -> ConditionFailed:
        error = ConditionFailed(f"counter {self._name!r} {what}", code=code)
        error.key = self._key
        error.current = item
        return error
