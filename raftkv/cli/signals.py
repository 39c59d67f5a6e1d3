"""Signals as something to wait for, or as calls: for commands that have to tidy up, or that run another one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal came while we waited."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


class Signals:
    """SIGINT, SIGTERM and SIGHUP. The first that is not passed on is kept in `came`."""

    def __init__(self) -> None:
        self.came: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.pass_on: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """They come here instead of ending us."""
        loop = asyncio.get_running_loop()
        mine = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
        for number in mine:
            loop.add_signal_handler(number, self._take, number)
        try:
            yield
        finally:
            for number in mine:
                loop.remove_signal_handler(number)

    def _take(self, number: int) -> None:
        if self.pass_on is not None:
            self.pass_on(number)
        elif not self.came.done():
            self.came.set_result(number)
