"""Health is truthful for each service, and its watchers never hold up a stop."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fake_node import Served, failure, until
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
NAMES = (
    "",
    "raftkv.v1.KV",
    "etcdserverpb.KV",
    "raftkv.v1.Cluster",
    "raftkv.v1.Maintenance",
    "etcdserverpb.Maintenance",
)


def stub_of(served: Served) -> Any:  # Any: the published stubs know no methods of HealthStub
    return health_pb2_grpc.HealthStub(served.channel)


async def statuses(served: Served) -> dict[str, bool]:
    stub = stub_of(served)
    answers = [await stub.Check(HealthCheckRequest(service=name)) for name in NAMES]
    return {name: answer.status == SERVING for name, answer in zip(NAMES, answers, strict=True)}


async def test_every_service_registered_has_a_health(served: Served) -> None:
    for name in served.services.names:
        assert served.health.status(name) == SERVING


@pytest.mark.parametrize("reason", ["no leader", "disk stalled", "restoring"])
async def test_a_reason_stops_what_needs_a_healthy_node(served: Served, reason: str) -> None:
    assert all((await statuses(served)).values())
    served.health.update(frozenset((reason,)))
    assert {name for name, serves in (await statuses(served)).items() if serves} == {
        "",
        "raftkv.v1.Maintenance",
        "etcdserverpb.Maintenance",
    }
    served.health.update(frozenset())
    assert all((await statuses(served)).values())


async def test_stopping_ends_everything_and_cannot_be_taken_back(served: Served) -> None:
    served.health.update(frozenset(("stopping", "no leader")))
    served.health.update(frozenset())
    assert not any((await statuses(served)).values())


async def test_an_unknown_service_is_not_found_and_can_be_watched(served: Served) -> None:
    stub = stub_of(served)
    error = await failure(stub.Check(HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    stream = stub.Watch(HealthCheckRequest(service="nobody"))
    assert (await anext(aiter(stream))).status == HealthCheckResponse.SERVICE_UNKNOWN
    stream.cancel()


async def test_watchers_see_changes_also_after_another_has_left(served: Served) -> None:
    stub = stub_of(served)
    leaves, stays = (stub.Watch(HealthCheckRequest(service="raftkv.v1.KV")) for _ in range(2))
    seen = aiter(stays)
    assert (await anext(aiter(leaves))).status == SERVING
    assert (await anext(seen)).status == SERVING
    leaves.cancel()
    await until(lambda: served.health._watchers == 1)
    served.health.update(frozenset(("no leader",)))
    assert (await anext(seen)).status == NOT_SERVING
    served.health.update(frozenset(("no leader", "disk stalled")))  # no news for a watcher
    served.health.update(frozenset())
    assert (await anext(seen)).status == SERVING


async def test_a_stop_tells_watchers_and_waits_for_none(served: Served) -> None:
    stub = stub_of(served)
    stream = stub.Watch(HealthCheckRequest(service="raftkv.v1.KV"))
    seen = aiter(stream)
    await anext(seen)
    served.health.update(frozenset(("stopping",)))
    assert (await anext(seen)).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(seen)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "etcdserver: server stopped"
    async with asyncio.timeout(15):  # half of the grace, of which nothing should be needed
        await served.server.stop(30)
