"""Calls of Lock and Election, as tests make them."""

from __future__ import annotations

import asyncio
from typing import Any

from fake_node import Served, until

from raftkv._pb import election_pb2, election_pb2_grpc, kv_pb2, lease_pb2, lock_pb2, lock_pb2_grpc
from raftkv.state.commands import CommandKind


def locks(served: Served) -> lock_pb2_grpc.LockAsyncStub:
    return lock_pb2_grpc.LockStub(served.channel)


def elections(served: Served) -> election_pb2_grpc.ElectionAsyncStub:
    return election_pb2_grpc.ElectionStub(served.channel)


async def grant(served: Served, lease: int) -> int:
    raw = lease_pb2.LeaseGrantRequest(ID=lease, TTL=60).SerializeToString()
    await served.node.propose(CommandKind.LEASE_GRANT, raw, None)
    return lease


async def revoke(served: Served, lease: int) -> None:
    raw = lease_pb2.LeaseRevokeRequest(ID=lease).SerializeToString()
    await served.node.propose(CommandKind.LEASE_REVOKE, raw, None)


def keys(served: Served, prefix: bytes) -> list[bytes]:
    range_end = prefix[:-1] + bytes((prefix[-1] + 1,))
    return [kv.key for kv in served.node.machine.range(kv_pb2.RangeRequest(key=prefix, range_end=range_end)).kvs]


def lock(served: Served, name: bytes, lease: int, **options: Any) -> asyncio.Future[lock_pb2.LockResponse]:
    return asyncio.ensure_future(lock_now(served, name, lease, **options))


async def lock_now(served: Served, name: bytes, lease: int, **options: Any) -> lock_pb2.LockResponse:
    return await locks(served).Lock(lock_pb2.LockRequest(name=name, lease=lease), **options)


async def waiting(served: Served, name: bytes, count: int) -> None:
    """Until so many keys are in the queue and all but the first wait."""
    await until(lambda: len(served.services.watches) >= 2 * (count - 1))
    assert len(keys(served, name + b"/")) == count


async def campaign(served: Served, request: election_pb2.CampaignRequest) -> election_pb2.CampaignResponse:
    return await elections(served).Campaign(request)
