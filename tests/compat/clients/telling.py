"""How a story is told: a program beside this one runs one of its stories against the cluster it is given.

    python with_etcd3aio.py STORY PREFIX ENDPOINT...

Programs of their own, because no two of these clients can live in one interpreter: each registers etcd's messages under
the same names. A story that lasts says `ready`, goes on until its standard input ends, and then tells what it found;
an exception is a failed story.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

Story = Callable[[str, list[str]], Coroutine[Any, Any, None] | None]


def main(stories: Mapping[str, Story]) -> None:
    """Run the story that the command line names."""
    story, prefix, *endpoints = sys.argv[1:]
    done = stories[story](prefix, endpoints)
    if inspect.iscoroutine(done):
        asyncio.run(done)
    print("told", flush=True)


def until_input_ends() -> threading.Event:
    """Say `ready`; what is returned is set when standard input has ended."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    print("ready", flush=True)
    return ended


def persist(attempt: Callable[[], object], give_up_s: float = 60.0) -> None:
    """Again until it works: for a write whose repetition changes nothing."""
    began = time.monotonic()
    while True:
        try:
            attempt()
        except Exception:
            if time.monotonic() - began > give_up_s:
                raise
            time.sleep(0.05)
        else:
            return


async def persist_async(attempt: Callable[[], Coroutine[Any, Any, object]], give_up_s: float = 60.0) -> None:
    """The same for a coroutine."""
    began = time.monotonic()
    while True:
        try:
            await attempt()
        except Exception:
            if time.monotonic() - began > give_up_s:
                raise
            await asyncio.sleep(0.05)
        else:
            return


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def check_seen(seen: list[tuple[int, str]], written: int) -> None:
    """A watch has told of keys 0, 1, 2, …: each, in order. A repeated write may have happened twice."""
    revisions = [revision for revision, _ in seen]
    assert revisions == sorted(set(revisions)), seen
    keys = [key for _, key in seen]
    assert list(dict.fromkeys(keys)) == [str(number) for number in range(written)], seen
