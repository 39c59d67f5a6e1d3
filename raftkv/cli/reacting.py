"""What `watch KEY -- COMMAND` does: run the command for each event, one after the other.

waiting for an event --signal--> ended (128 + signal)
   | running the command --signal--> passed on to it; when it has ended, so have we (128 + signal)
   |    |--it fails--> 1        `--it ends well--> the next event
   `--the watch fails--> as `watch` without a command
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any

import click

from raftkv._pb import common_pb2, watch_pb2
from raftkv.cli.child import Child
from raftkv.cli.fields import quoted
from raftkv.cli.following import KINDS, following
from raftkv.cli.options import Settings
from raftkv.cli.session import endpoints_of, run
from raftkv.cli.signals import Interrupted, Signals


def follow_with(
    settings: Settings, request: watch_pb2.WatchCreateRequest, command: Sequence[str], *, progress: bool
) -> int:
    """Show what happens and run `command` for each event. Returns the exit code; raises as the SDK's watch does."""
    return run(_follow_with(settings, request, command, progress))


async def _follow_with(
    settings: Settings, request: watch_pb2.WatchCreateRequest, command: Sequence[str], progress: bool
) -> int:
    signals = Signals()
    around = settings.environment(endpoints_of(settings))

    async def react(event: common_pb2.Event, header: common_pb2.ResponseHeader) -> None:
        await _run_for(event, command, {**around, **environment_of(event, header)}, signals)

    with signals.caught():
        watching = asyncio.ensure_future(following(settings, request, progress, react))
        either: list[asyncio.Future[Any]] = [watching, signals.came]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            return Interrupted(signals.came.result()).code
        try:
            await watching
        except Interrupted as interrupted:
            return interrupted.code
    raise AssertionError("unreachable: a watch ends with an error or a signal")


def environment_of(event: common_pb2.Event, header: common_pb2.ResponseHeader) -> dict[str, str]:
    """What the command gets to know of the event: etcdctl's variables, quoted as it quotes them."""
    return {
        "ETCD_WATCH_REVISION": str(header.revision),
        "ETCD_WATCH_EVENT_TYPE": quoted(KINDS[event.type]),
        "ETCD_WATCH_KEY": quoted(event.kv.key),
        "ETCD_WATCH_VALUE": quoted(event.kv.value),
    }


async def _run_for(
    event: common_pb2.Event, command: Sequence[str], environment: dict[str, str], signals: Signals
) -> None:
    """Raises click.ClickException when it failed, Interrupted when a signal came."""
    came: list[int] = []
    child: Child | None = None

    def pass_on(number: int) -> None:
        came.append(number)
        if child is not None:
            child.pass_on(number)

    what = f"{KINDS[event.type]} of {quoted(event.kv.key)} in revision {event.kv.mod_revision}"
    signals.pass_on = pass_on
    try:
        # It may be at work before we are told that it has started: a signal that comes meanwhile is its, too.
        child = await Child.start(command, environment, input=False)
        for number in came:
            child.pass_on(number)
        code = await child.wait()
    except OSError as error:
        size = sum(len(os.fsencode(value)) for value in environment.values())
        raise click.ClickException(
            f"{command[0]} cannot be run for {what}, with {size} bytes in its environment: {error.strerror}"
        ) from None
    finally:
        signals.pass_on = None
        if child is not None:
            child.kill()
    if came:
        raise Interrupted(came[0])
    if code:
        raise click.ClickException(f"{command[0]} ended with exit code {code} for {what}")
