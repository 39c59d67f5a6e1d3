"""Leases: what their holder is told, and what is left of them afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from raftkv.client import AsyncClient, LeaseLost, LeaseState
from tests.unit.client.conftest import Tools
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


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_its_end_is_told_whether_or_not_it_is_kept_alive(
    keep_alive: bool, client: AsyncClient, node: LeasingNode, clock: Clock
) -> None:
    told: list[str] = []
    lease = await client.lease(9, keep_alive=keep_alive)
    lease.on_lost(lambda: told.append("lost"))
    assert lease.state is LeaseState.HELD
    clock.advance(5)
    assert lease.state is LeaseState.AT_RISK
    clock.advance(4)
    assert lease.state is LeaseState.LOST
    with pytest.raises(LeaseLost):
        lease.check()
    async with asyncio.timeout(10):
        await lease.lost.wait()
    assert told == ["lost"]
    assert lease.why_lost == "no renewal was confirmed within 9 s"


async def test_one_that_is_not_kept_alive_is_not(
    client: AsyncClient, node: LeasingNode, clock: Clock, tools: type[Tools]
) -> None:
    alone = await client.lease(9, keep_alive=False)
    async with client.lease(9) as kept:
        clock.advance(4)
        await tools.until(lambda: kept.remaining() > 8)
        clock.advance(4)
        assert kept.state is LeaseState.HELD
        assert alone.state is LeaseState.AT_RISK
    await alone.revoke()
    assert alone.lost.is_set()
    assert node.cluster.leases == {}


async def test_who_asked_not_to_be_told_any_more_is_not(client: AsyncClient) -> None:
    told: list[int] = []
    lease = await client.lease(9)
    forget = [lease.on_lost(lambda number=number: told.append(number)) for number in range(3)]  # type: ignore[misc]
    forget[1]()
    forget[1]()
    await lease.revoke()
    assert told == [0, 2]
    lease.on_lost(lambda: told.append(3))()
    assert told == [0, 2, 3]


async def test_a_listener_that_raises_does_the_client_no_harm(
    client: AsyncClient, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lease = await client.lease(9)
    lease.on_lost(lambda: [][0])
    clock.advance(9)
    async with asyncio.timeout(10):
        await lease.lost.wait()
    await client.put("k", "v")
    assert "was to be told of a loss" in caplog.text


async def test_it_is_revoked_once_however_often_it_is_given_up(
    client: AsyncClient, node: LeasingNode, tools: type[Tools]
) -> None:
    lease = await client.lease(9)
    lease.abandon()
    lease.abandon()
    await tools.until(lambda: node.cluster.leases == {})
    await client.close()
    assert node.count("LeaseRevoke") == 1
