"""Who wants to be told that something is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

LOG: Final = logging.getLogger("raftkv")


class Callbacks:
    """Callbacks, each called once at most. What one raises is logged: it must hinder neither the others nor us."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[object, Callable[[], None]] = {}

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called by the next `fire`. Returns a function that ends that."""
        key = object()
        self._waiting[key] = callback

        def forget() -> None:
            self._waiting.pop(key, None)

        return forget

    def clear(self) -> None:
        """Call none of them."""
        self._waiting.clear()

    def fire(self) -> None:
        """Call them all."""
        waiting, self._waiting = self._waiting, {}
        for callback in waiting.values():
            call(callback)


def call(callback: Callable[[], None]) -> None:
    """Call it now."""
    try:
        callback()
    except Exception:
        LOG.exception("raftkv client: %r failed, which was to be told of a loss", callback)
