"""Waiting for a change, and for time that is limited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from raftkv.client import Compacted, DeadlineExceeded, Event, RaftkvError, Watch


@asynccontextmanager
async def limited(timeout_s: float | None, error: type[DeadlineExceeded], what: str, code: str) -> AsyncIterator[None]:
    """Raise `error` when the block takes longer; failures of calls inside that ran out of time stay what they are."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as timeout:
        if timeout_s is None or isinstance(timeout, RaftkvError):
            raise
        raise error(f"{what} within {timeout_s:g} s", code=code) from None


class Deadline:
    """A moment on the loop's clock, by which something is to be done; None is never."""

    def __init__(self, timeout_s: float | None) -> None:
        self._at = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    def remaining(self) -> float | None:
        """Seconds left, at least a millisecond so that it is a possible time-out; None is without limit."""
        return None if self._at is None else max(0.001, self._at - asyncio.get_running_loop().time())

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return self._at is not None and asyncio.get_running_loop().time() >= self._at


async def changed(watch: Watch, wanted: Callable[[Event], bool]) -> None:
    """Return with the first wanted event, when `watch` was stopped, or when history is gone: then look again."""
    try:
        async for event in watch:
            if wanted(event):
                return
    except Compacted:
        return
    finally:
        watch.stop()


def is_put(event: Event) -> bool:
    """A put."""
    return event.kind == "put"


def is_delete(event: Event) -> bool:
    """A delete, by whomever or because a lease ran out."""
    return event.kind == "delete"


def is_any(event: Event) -> bool:
    """Anything."""
    return True
