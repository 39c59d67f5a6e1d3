"""Whether we are being cancelled: what asyncio does not always say.

A read of a stream raises `CancelledError` when the stream was cancelled, too. The stream cannot be asked whether it
was: one that had ended by itself an instant before says no, and raises all the same. And a TaskGroup in which something
has failed by the time it is cancelled raises that failure and keeps the cancellation to itself.
"""

from __future__ import annotations

import asyncio


def being_cancelled() -> bool:
    """Whether somebody has cancelled the task that asks."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
