"""Row 65 of the catalogue and W7: the SDK's watch goes on where it was, whenever and however often its stream breaks.

The SDK against the real services over a real state machine. A mutant is our own code with the bug put in; the check
must find it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_node import Served

from raftkv._pb.kv_pb2 import CompactionRequest, PutRequest, RequestOp, TxnRequest
from raftkv._pb.watch_pb2 import WatchRequest
from raftkv.client import AsyncClient, Compacted
from raftkv.client.connection import Connection
from raftkv.client.feed import Feed
from raftkv.server.grpc_errors import internal_errors
from raftkv.state.commands import CommandKind

Check = Callable[[Served], Awaitable[None]]
Patch = Callable[[pytest.MonkeyPatch], None]


async def apply(served: Served, kind: CommandKind, request: PutRequest | TxnRequest) -> None:
    await served.node.propose(kind, request.SerializeToString(), None)


async def change(served: Served, rng: random.Random, number: int) -> list[tuple[str, bytes, bytes]]:
    """One revision, and the events it makes."""
    key, value = b"k/%d" % (number % 5), b"%d" % number
    choice = rng.random()
    if choice < 0.6:
        await apply(served, CommandKind.PUT, PutRequest(key=key, value=value))
        return [("put", key, value)]
    if choice < 0.7:
        await apply(served, CommandKind.PUT, PutRequest(key=b"elsewhere", value=value))
        return []
    keys = [b"k/t%d" % each for each in range(3)]
    puts = [RequestOp(request_put=PutRequest(key=each, value=value)) for each in keys]
    await apply(served, CommandKind.TXN, TxnRequest(success=puts))
    return [("put", each, value) for each in keys]


def cut(client: AsyncClient) -> None:
    """End all streams, as a node that dies would."""
    for connection in client._context.pool.connections:
        connection.abandon_streams()


async def nothing_is_lost_or_repeated_when_streams_break(served: Served) -> None:
    rng = random.Random(5)
    errors = internal_errors.total()
    written: list[tuple[str, bytes, bytes]] = []
    seen: list[tuple[str, bytes, bytes]] = []
    async with AsyncClient([served.address], timeout=60) as client, client.watch("k/", prefix=True) as watch:

        async def look() -> None:
            async for event in watch:
                if event.key == b"k/end":
                    return
                seen.append((event.kind, event.key, event.value))

        looking = asyncio.create_task(look())
        for number in range(100):
            written += await change(served, rng, number)
            if rng.random() < 0.1:
                cut(client)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.02)
        while not looking.done():  # until it sees one: who has missed something still comes to an end
            await apply(served, CommandKind.PUT, PutRequest(key=b"k/end"))
            await asyncio.wait([looking], timeout=0.2)
    assert seen == written
    assert internal_errors.total() == errors, "that clients go is no error of the node"


async def a_stream_that_ends_before_it_has_begun_is_followed_by_another(served: Served) -> None:
    """grpc.aio leaves a write waiting whose call was cancelled before its metadata was sent."""
    original = Connection.open_stream
    cuts = 3

    def open_stream(self: Connection, *arguments: Any, **options: Any) -> Any:
        nonlocal cuts
        call = original(self, *arguments, **options)
        if cuts:
            cuts -= 1
            asyncio.get_running_loop().call_soon(call.cancel)
        return call

    with pytest.MonkeyPatch.context() as patch:
        async with AsyncClient([served.address], timeout=60) as client:
            patch.setattr(Connection, "open_stream", open_stream)
            await apply(served, CommandKind.PUT, PutRequest(key=b"k/1"))
            try:
                async with asyncio.timeout(8), client.watch("k/", prefix=True, start_revision=1) as watch:
                    assert (await anext(watch)).key == b"k/1"
            except TimeoutError:
                pytest.fail("it waits for a stream that has ended")
    assert cuts == 0


async def a_watch_whose_history_went_while_it_was_away_says_so(served: Served) -> None:
    async with AsyncClient([served.address], timeout=60) as client, client.watch("k/", prefix=True) as watch:
        await apply(served, CommandKind.PUT, PutRequest(key=b"k/1"))
        assert (await anext(watch)).key == b"k/1"
        # Neither of these waits: the stream is gone before any of it is told.
        cut(client)
        for _ in range(5):
            await apply(served, CommandKind.PUT, PutRequest(key=b"k/1"))
        compaction = CompactionRequest(revision=served.node.machine.revision)
        await served.node.propose(CommandKind.COMPACT, compaction.SerializeToString(), None)
        with pytest.raises(Compacted) as caught:
            async with asyncio.timeout(60):
                await anext(watch)
        assert caught.value.compact_revision == served.node.machine.compact_revision


def waits_for_its_first_write(patch: pytest.MonkeyPatch) -> None:
    """As it was, until this check found it."""

    async def ask(self: Feed, call: Any) -> None:
        await call.write(WatchRequest(create_request=self._request))

    patch.setattr(Feed, "_ask", ask)


def goes_on_from_now(patch: pytest.MonkeyPatch) -> None:
    """A new stream is a new watch."""
    original = Feed._watch_at

    async def watch_at(self: Feed, connection: Connection) -> None:
        self.next_revision = 0
        await original(self, connection)

    patch.setattr(Feed, "_watch_at", watch_at)


def begins_anew(patch: pytest.MonkeyPatch) -> None:
    """It knows where it began, and not how far it came."""
    original = Feed._watch_at
    first: dict[Feed, int] = {}

    async def watch_at(self: Feed, connection: Connection) -> None:
        self.next_revision = first.setdefault(self, 2)
        for inbox in self._inboxes:  # or it would leave out what it has had
            inbox.next_revision = self.next_revision
        await original(self, connection)

    patch.setattr(Feed, "_watch_at", watch_at)


def skips_one_revision(patch: pytest.MonkeyPatch) -> None:
    """It goes on one revision too far."""
    original = Feed._watch_at

    async def watch_at(self: Feed, connection: Connection) -> None:
        self.next_revision += self.next_revision > 0
        await original(self, connection)

    patch.setattr(Feed, "_watch_at", watch_at)


CHECKS: list[Check] = [
    nothing_is_lost_or_repeated_when_streams_break,
    a_stream_that_ends_before_it_has_begun_is_followed_by_another,
    a_watch_whose_history_went_while_it_was_away_says_so,
]
MUTANTS: list[tuple[Patch, Check]] = [
    (waits_for_its_first_write, a_stream_that_ends_before_it_has_begun_is_followed_by_another),
    (goes_on_from_now, nothing_is_lost_or_repeated_when_streams_break),
    (begins_anew, nothing_is_lost_or_repeated_when_streams_break),
    (skips_one_revision, nothing_is_lost_or_repeated_when_streams_break),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_sound(check: Check, served: Served) -> None:
    await check(served)


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda each: each.__name__)
async def test_mutant_is_found(mutant: Patch, check: Check, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await check(served)
