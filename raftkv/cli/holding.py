"""What `lock` and `elect` do: get it, hold it, give it back, whatever ends us.

waiting --signal--> given up (128 + signal)
   | held --signal--> given back (0; with a command: passed on to it)
   |  |---command ends--> given back (the command's code)
   |  `---lost--> 1; the command gets SIGTERM, then SIGKILL, and 125 is the code
   `--not free in time--> 1 or 124
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from raftkv._pb import kv_pb2
from raftkv.cli import fields, output
from raftkv.cli.child import Child
from raftkv.cli.options import Settings
from raftkv.cli.session import client_of, run
from raftkv.cli.signals import Interrupted, Signals
from raftkv.client import (
    AsyncClient,
    Compacted,
    Lock,
    LockTimeout,
    OutcomeUnknown,
    RaftkvError,
    Unavailable,
)
from raftkv.client.keys import prefix_end
from raftkv.client.methods import RANGE
from raftkv.client.routing import Purpose

TIMED_OUT = 124
FAILED = 125
RELEASE_S = 5.0

_Pb = kv_pb2.RangeRequest


# ---- lock ----


def hold(settings: Settings, name: bytes, *, ttl_s: float, wait_s: float | None) -> int:
    """`lock NAME`: print the key and hold it until a signal."""
    return run(_hold(settings, lambda client: client.lock(name, ttl_s, timeout=wait_s)))


def lead(settings: Settings, name: bytes, value: bytes, *, ttl_s: float) -> int:
    """`elect NAME VALUE`: the same with an election."""
    return run(_hold(settings, lambda client: client.election(name, ttl_s).campaign(value)))


async def _hold(settings: Settings, make: Callable[[AsyncClient], Lock]) -> int:
    signals = Signals()
    with signals.caught():
        async with client_of(settings) as client:
            lock = make(client)
            try:
                await _acquire(lock, signals)
            except Interrupted as interrupted:
                return interrupted.code
            lost = asyncio.ensure_future(lock.lost.wait())
            try:
                response = await client.call(RANGE, _Pb(key=lock.key), Purpose.READ)
                if response.kvs:  # else it is lost already, and that is about to be noticed
                    _show(response, settings)
                await _first(lost, signals.came)
            finally:
                lost.cancel()
                await _give_back(lock)  # raises LockLost where it was lost
    return 0


async def _acquire(lock: Lock, signals: Signals) -> None:
    """Get it. Raises Interrupted when a signal came first; then it is neither held nor waited for."""
    acquiring = asyncio.ensure_future(lock.acquire())
    await _first(acquiring, signals.came)
    if not signals.came.done():
        await acquiring
        return
    acquiring.cancel()
    with contextlib.suppress(asyncio.CancelledError, RaftkvError):
        await acquiring
        await lock.release()
    raise Interrupted(signals.came.result())


async def _first(*events: asyncio.Future[Any]) -> None:
    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)


async def _give_back(lock: Lock) -> None:
    """Raises LockLost where it was lost before. That nobody could be told is said, but is no failure."""
    left_s = lock.remaining()
    try:
        async with asyncio.timeout(RELEASE_S):
            await lock.release()
    except (Unavailable, OutcomeUnknown, TimeoutError) as error:
        reason = f": {error}" if isinstance(error, RaftkvError) else ""
        click.echo(f"Warning: not given back, it runs out by itself within {left_s:.0f} s{reason}", err=True)


def _show(response: kv_pb2.RangeResponse, settings: Settings) -> None:
    match settings.output:
        case "json":
            output.print_json(output.as_json(response))
        case "table":
            output.print_kv_table(response.kvs, hex_=settings.hex)
        case "fields":
            fields.show(fields.get(response))
        case _:
            output.print_range(response, hex_=settings.hex)


# ---- lock with a command ----


def run_under(
    settings: Settings, name: bytes, command: Sequence[str], *, ttl_s: float, wait_s: float | None, grace_s: float
) -> int:
    """`lock NAME -- COMMAND`: run it under the lock. Returns the exit code."""

    async def work() -> int:
        signals = Signals()
        with signals.caught():
            async with client_of(settings) as client:
                try:
                    lock = client.lock(name, ttl_s, timeout=wait_s)
                    return await _run_under(lock, command, grace_s, signals, settings.environment(client.endpoints))
                except Interrupted as interrupted:
                    return interrupted.code
                except LockTimeout as error:
                    return _failed(error.message, TIMED_OUT)
                except (RaftkvError, OSError) as error:
                    return _failed(str(error), FAILED)

    return run(work())


async def _run_under(
    lock: Lock, command: Sequence[str], grace_s: float, signals: Signals, environment: Mapping[str, str]
) -> int:
    await _acquire(lock, signals)
    try:
        child = await Child.start(command, {**environment, **environment_of(lock)})
        code = await _end_of(child, lock, grace_s, signals)
    finally:
        # Raises LockLost where it was lost, even if the command ended before anybody noticed.
        await _give_back(lock)
    return code


async def _end_of(child: Child, lock: Lock, grace_s: float, signals: Signals) -> int:
    """Wait for it, as long as the lock is held. Its exit code."""
    lost = asyncio.ensure_future(lock.lost.wait())
    ended = asyncio.ensure_future(child.wait())
    try:
        signals.pass_on = child.pass_on
        if signals.came.done():  # while it was being started
            child.pass_on(signals.came.result())
        await _first(ended, lost)
        if not ended.done():
            click.echo("Error: the lock is lost, the command gets SIGTERM", err=True)
            await child.end(grace_s)
        return await ended
    finally:
        lost.cancel()
        child.kill()


def environment_of(lock: Lock) -> dict[str, str]:
    """What the command gets to know of the lock it runs under."""
    key, fence = os.fsdecode(lock.key), str(lock.fence)
    return {
        "RAFTKV_LOCK_KEY": key,
        "RAFTKV_FENCE": fence,
        "RAFTKV_GUARD": f"{key}:{fence}",
        "ETCD_LOCK_KEY": key,
        "ETCD_LOCK_REV": fence,
    }


def _failed(reason: str, code: int) -> int:
    click.echo(f"Error: {' '.join(reason.split())}", err=True)
    return code


# ---- elect --listen ----


def listen(settings: Settings, name: bytes) -> None:
    """`elect NAME --listen`: show the leader, and every later one, until it is interrupted."""
    run(_listen(settings, name + b"/"))


async def _listen(settings: Settings, prefix: bytes) -> None:
    request = _Pb(key=prefix, range_end=prefix_end(prefix), sort_order=_Pb.ASCEND, sort_target=_Pb.CREATE, limit=1)
    shown: tuple[bytes, int] | None = None
    async with client_of(settings) as client:

        async def look(timeout_s: float | None) -> int:
            nonlocal shown
            response = await client.call(RANGE, request, Purpose.READ, timeout=timeout_s)
            if response.kvs and (response.kvs[0].key, response.kvs[0].mod_revision) != shown:
                shown = (response.kvs[0].key, response.kvs[0].mod_revision)
                response.ClearField("count")  # of the candidates; etcdctl shows neither
                response.ClearField("more")
                _show(response, settings)
            return response.header.revision

        revision = await look(settings.timeout_s)  # a cluster that cannot be reached is said at once, but only now
        while True:
            try:
                async with client.watch(prefix, prefix=True, start_revision=revision + 1, timeout=None) as watch:
                    async for batch in watch.batches():
                        if batch.events:
                            await look(None)
            except Compacted:
                revision = await look(None)
