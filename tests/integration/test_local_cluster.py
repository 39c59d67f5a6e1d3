"""The supervisor with real nodes: what it shows, what it does to them, and that a cluster lives through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raftkv import AsyncClient, Client
from raftkv.local import AsyncLocalCluster, LocalCluster
from raftkv.local.load import Load

pytestmark = pytest.mark.integration


def test_the_table_shows_one_leader_and_what_was_written(raftkv_cluster: LocalCluster, raftkv_client: Client) -> None:
    revision = raftkv_client.put("a", "1").revision
    assert revision > 1
    rows = raftkv_cluster.status(timeout_s=20)
    assert sorted(row.role for row in rows) == ["follower"] * (len(rows) - 1) + ["leader"]
    assert len({row.term for row in rows}) == 1
    assert len({row.member_id for row in rows}) == len(rows)
    assert all((row.commit or 0) > 0 and (row.rss_bytes or 0) > 10_000_000 for row in rows)


def test_one_test_does_not_see_the_keys_of_another(raftkv_client: Client) -> None:
    assert raftkv_client.get("a") is None


def test_the_session_cluster_heals_between_tests_first(raftkv_cluster: LocalCluster) -> None:
    raftkv_cluster.kill("leader")
    raftkv_cluster.pause("n1,n2")
    with pytest.raises(AssertionError):
        raise AssertionError("as a failed test would leave it")


def test_the_session_cluster_heals_between_tests_second(raftkv_cluster: LocalCluster, raftkv_client: Client) -> None:
    assert [row.process for row in raftkv_cluster.status()] == ["running"] * len(raftkv_cluster.names)
    raftkv_client.put("still", "there")


async def test_the_async_client_has_its_own_keys(raftkv_async_client: AsyncClient) -> None:
    await raftkv_async_client.put("a", "2")
    item = await raftkv_async_client.get("a")
    assert item is not None
    assert item.value == b"2"


def test_data_survives_stopping_all_nodes_and_killing_all_nodes(
    raftkv_cluster_factory: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    with LocalCluster(3, directory=tmp_path / "c") as cluster, Client(cluster.endpoints, timeout=30) as client:
        first = client.put("k", "v")
        cluster.kill("all")
        cluster.restart("all")
        second = client.put("l", "w")
        assert second.revision == first.revision + 1
    again = raftkv_cluster_factory(directory=tmp_path / "c")
    with Client(again.endpoints, timeout=30) as client:
        item = client.get("k")
        assert item is not None
        assert (item.value, item.mod_revision) == (b"v", first.revision)


@pytest.mark.parametrize("how", ["kill", "stop", "pause"])
async def test_a_load_loses_nothing_and_sees_no_error_when_the_leader_goes(how: str) -> None:
    async with AsyncLocalCluster(3) as cluster, AsyncClient(cluster.endpoints, timeout=30.0) as client:
        async with Load(client, writers=4, readers=2) as load:
            await load.wait_writes(50, timeout_s=30)
            (leader,) = await getattr(cluster, how)("leader")
            assert await cluster.wait_leader(other_than=leader) != leader
            await load.wait_writes(50, timeout_s=30)
            if how == "pause":
                await cluster.resume(leader)
                await cluster.wait_healthy()
            else:
                await cluster.restart(leader)
            await load.wait_writes(20, timeout_s=30)
        verdict = await load.verify(client)
        assert load.errors == {}, load.error_texts
        assert verdict.kept, verdict.lost[:5]
        assert verdict.acknowledged >= 120
