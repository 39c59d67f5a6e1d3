"""Elections: what a leader is told when it is one no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from raftkv._pb import kv_pb2
from raftkv.client import AsyncClient, Leadership, LockState, NotLeading
from tests.unit.client.leasing import Clock, LeasingNode, MakeClient, started


@pytest.fixture
async def node() -> AsyncIterator[LeasingNode]:
    node = await started()
    yield node
    await node.stop()


@pytest.fixture
def client(node: LeasingNode, make_client: MakeClient) -> AsyncClient:
    return make_client(node, timeout=3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def look(leadership: Leadership) -> None:
    leadership.check()


async def guard(leadership: Leadership) -> None:
    leadership.guard()


async def proclaim(leadership: Leadership) -> None:
    await leadership.proclaim("still me")


@pytest.mark.parametrize("ask", [look, guard, proclaim])
async def test_who_leads_no_more_is_told_that_it_does_not(
    ask: Callable[[Leadership], Awaitable[None]], client: AsyncClient, clock: Clock
) -> None:
    leadership = client.election("x").campaign("me")
    for _ in range(2):
        with pytest.raises(NotLeading):
            await ask(leadership)
        await leadership.acquire()
        clock.advance(60)
    with pytest.raises(NotLeading):
        await ask(leadership)


async def test_the_block_of_who_leads_no_more_is_left_with_that(client: AsyncClient, clock: Clock) -> None:
    async def lead() -> None:
        async with client.election("x", ttl=9).campaign("me"):
            clock.advance(9)
            await asyncio.sleep(60)

    with pytest.raises(NotLeading):
        await lead()


async def test_who_finds_out_by_itself_is_not_cancelled_besides(client: AsyncClient, node: LeasingNode) -> None:
    """The cancellation of its own task would come out later, where nobody expects it."""
    leadership = client.election("x").campaign("me")

    async def lead() -> None:
        async with leadership:
            node.cluster.delete(kv_pb2.DeleteRangeRequest(key=leadership.key))
            await leadership.proclaim("still me")

    with pytest.raises(NotLeading):
        await lead()
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert leadership.state is LockState.LOST


async def test_who_does_not_listen_is_cancelled_all_the_same(client: AsyncClient, node: LeasingNode) -> None:
    async def lead() -> None:
        async with client.election("x").campaign("me") as leadership:
            node.cluster.delete(kv_pb2.DeleteRangeRequest(key=leadership.key))
            with contextlib.suppress(NotLeading):
                await leadership.proclaim("still me")
            await asyncio.Event().wait()

    with pytest.raises(NotLeading):
        async with asyncio.timeout(10):
            await lead()


async def test_resigning_what_was_lost_is_no_error(client: AsyncClient, node: LeasingNode, clock: Clock) -> None:
    leadership = await client.election("x").campaign("me").acquire()
    clock.advance(60)
    await leadership.resign()
    assert leadership.state is LockState.LOST
    await leadership.acquire()
    await leadership.resign()
    await leadership.resign()
    assert leadership.state is LockState.IDLE
    assert node.cluster.keys(b"x/") == []


async def test_a_campaign_that_is_only_tried(client: AsyncClient) -> None:
    async with client.election("x").campaign("me"):
        with pytest.raises(TimeoutError):
            await client.election("x").campaign("you", timeout=0).acquire()
