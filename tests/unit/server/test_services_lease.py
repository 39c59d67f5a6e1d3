"""Lease over the wire: etcd's behaviours, and what bad requests get."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from fake_node import FakeNode, Served, failure, serve, trailers, until

from raftkv._pb import kv_pb2
from raftkv._pb import lease_pb2 as pb
from raftkv._pb.maintenance_pb2 import CORRUPT, NOSPACE, AlarmRequest
from raftkv.server.errors import RequestTimeout, TimeoutKind
from raftkv.server.services import lease as lease_service
from raftkv.server.services import streams
from raftkv.state.commands import CommandKind
from raftkv.state.leases import LeaseRecord

Code = grpc.StatusCode


async def grant(served: Served, lease: int = 0, ttl: int = 60) -> int:
    return (await served.lease.LeaseGrant(pb.LeaseGrantRequest(ID=lease, TTL=ttl))).ID


async def keep_alive(served: Served, *leases: int) -> list[pb.LeaseKeepAliveResponse]:
    async def requests() -> AsyncIterator[pb.LeaseKeepAliveRequest]:
        for lease in leases:
            yield pb.LeaseKeepAliveRequest(ID=lease)

    return [response async for response in served.lease.LeaseKeepAlive(requests())]


async def test_a_grant_answers_with_what_was_granted(served: Served) -> None:
    response = await served.lease.LeaseGrant(pb.LeaseGrantRequest(ID=7, TTL=60))
    assert (response.ID, response.TTL, response.ttl_ms, response.error) == (7, 60, 60_000, "")
    assert response.header.cluster_id == served.node.cluster_id
    assert response.header.revision == 1, "a lease is no change of the key space"
    assert served.node.machine.leases == {7: LeaseRecord(60_000, 0)}
    response = await served.lease.LeaseGrant(pb.LeaseGrantRequest(ID=8, ttl_ms=2_500))
    assert (response.TTL, response.ttl_ms) == (2, 2_500)


async def test_the_server_picks_a_positive_id(served: Served) -> None:
    ids = [await grant(served) for _ in range(20)]
    assert len(set(ids)) == 20
    assert all(0 < lease < 1 << 63 for lease in ids)


async def test_an_id_that_the_server_picked_and_somebody_has_is_picked_anew(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await grant(served, 5)
    picks = iter((4, 4, 8))  # the id is one more
    monkeypatch.setattr("raftkv.server.services.lease.secrets.randbelow", lambda _: next(picks))
    assert await grant(served) == 9


async def test_an_id_that_is_taken_is_refused(served: Served) -> None:
    await grant(served, 7)
    error = await failure(served.lease.LeaseGrant(pb.LeaseGrantRequest(ID=7, TTL=5)))
    assert (error.code(), error.details()) == (Code.FAILED_PRECONDITION, "etcdserver: lease already exists")
    assert trailers(error)["raftkv-error"] == "LEASE_EXISTS"


@pytest.mark.parametrize("ttl", [-(1 << 63), -5, 0, 1])
async def test_a_time_to_live_below_the_least_is_raised(served: Served, ttl: int) -> None:
    response = await served.lease.LeaseGrant(pb.LeaseGrantRequest(TTL=ttl))
    assert (response.TTL, response.ttl_ms) == (2, 2_000)


async def test_the_least_time_follows_the_election_timeout(tmp_path: Path) -> None:
    async with serve(FakeNode(tmp_path, election_ms=1_000, heartbeat_ms=100)) as served:
        assert (await served.lease.LeaseGrant(pb.LeaseGrantRequest(TTL=1))).ttl_ms == 3_000


@pytest.mark.parametrize(
    ("request_", "code", "text", "name"),
    [
        (
            pb.LeaseGrantRequest(TTL=9_000_000_001),
            Code.OUT_OF_RANGE,
            "etcdserver: too large lease TTL",
            "LEASE_TTL_TOO_LARGE",
        ),
        (pb.LeaseGrantRequest(ttl_ms=1 << 62), Code.OUT_OF_RANGE, "etcdserver: too large lease TTL", None),
        (pb.LeaseGrantRequest(TTL=5, ID=-1), Code.INVALID_ARGUMENT, "etcdserver: lease ID is negative", None),
    ],
)
async def test_impossible_grants(
    served: Served, request_: pb.LeaseGrantRequest, code: Code, text: str, name: str | None
) -> None:
    error = await failure(served.lease.LeaseGrant(request_))
    assert (error.code(), error.details()) == (code, text)
    assert trailers(error)["raftkv-executed"] == "no"
    if name:
        assert trailers(error)["raftkv-error"] == name
    assert served.node.proposed == []


@pytest.mark.parametrize("method", ["LeaseGrant", "LeaseRevoke"])
async def test_nothing_unknown_gets_into_the_log(served: Served, method: str) -> None:
    """What a message carries beyond what we know would be kept by every node."""
    await grant(served, 7)
    served.node.proposed.clear()
    request = pb.LeaseGrantRequest(TTL=5) if method == "LeaseGrant" else pb.LeaseRevokeRequest(ID=7)
    unknown = b"\xfa\x3f"  # of 1023, length-delimited
    await served.raw(f"/raftkv.v1.Lease/{method}", request.SerializeToString() + unknown + b"\xff\x7f" + bytes(0x3FFF))
    ((_, proposed),) = served.node.proposed
    assert len(proposed) < 50
    error = await failure(served.raw(f"/raftkv.v1.Lease/{method}", unknown + b"\x80\x80\x74" + bytes(0x1D0000)))
    assert trailers(error)["raftkv-error"] == "REQUEST_TOO_LARGE"
    assert len(served.node.proposed) == 1


async def test_lists_of_any_length_are_not_made_on_the_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    for name in ("_keys", "_statuses"):
        original = getattr(lease_service, name)

        def noted(*arguments: object, call: Callable[..., bytes] = original) -> bytes:
            threads.append(threading.current_thread().name)
            return call(*arguments)

        monkeypatch.setattr(lease_service, name, noted)
    await grant(served, 9)
    await grant(served, 7)
    await served.kv.Put(kv_pb2.PutRequest(key=b"k", lease=7))
    told = await served.lease.LeaseLeases(pb.LeaseLeasesRequest())
    assert [each.ID for each in told.leases] == [7, 9]
    assert (told.header.revision, told.header.member_id) == (2, served.node.node_id)
    left = await served.lease.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=7, keys=True))
    assert (list(left.keys), left.grantedTTL, left.header.revision) == ([b"k"], 60, 2)
    assert all(name.startswith("raftkv-reads") for name in threads)
    assert len(threads) == 2


async def test_the_longest_lease(served: Served) -> None:
    assert (await served.lease.LeaseGrant(pb.LeaseGrantRequest(TTL=9_000_000_000))).TTL == 9_000_000_000


async def test_revoking_deletes_the_keys_in_one_revision(served: Served) -> None:
    await grant(served, 7)
    for key in (b"b", b"a"):
        await served.kv.Put(kv_pb2.PutRequest(key=key, value=b"v", lease=7))
    response = await served.lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=7))
    assert response.header.revision == 4
    assert response.header.member_id == served.node.node_id
    assert (await served.kv.Range(kv_pb2.RangeRequest(key=b"\0", range_end=b"\0"))).count == 0
    error = await failure(served.lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=7)))
    assert (error.code(), error.details()) == (Code.NOT_FOUND, "etcdserver: requested lease not found")


async def test_a_put_on_an_unknown_lease(served: Served) -> None:
    error = await failure(served.kv.Put(kv_pb2.PutRequest(key=b"k", lease=7)))
    assert (error.code(), error.details()) == (Code.NOT_FOUND, "etcdserver: requested lease not found")
    await grant(served, 7)
    await served.kv.Put(kv_pb2.PutRequest(key=b"k", lease=7))
    assert (await served.kv.Range(kv_pb2.RangeRequest(key=b"k"))).kvs[0].lease == 7


async def test_keeping_alive_answers_in_order_and_zero_for_the_unknown(served: Served) -> None:
    for lease in (7, 8):
        await grant(served, lease, lease)
    responses = await keep_alive(served, 8, 99, 7, -3, 8)
    assert [(response.ID, response.TTL) for response in responses] == [(8, 8), (99, 0), (7, 7), (-3, 0), (8, 8)]
    assert responses[0].ttl_ms == 8_000
    assert responses[0].header.revision == 1
    assert responses[0].header.cluster_id == served.node.cluster_id
    assert [lease for lease, renew in served.node.leases_asked if renew] == [8, 99, 7, -3, 8]


async def test_a_lease_that_ran_out_is_answered_with_zero(served: Served) -> None:
    await grant(served, 7, 5)
    await keep_alive(served, 7)
    expired = []
    for _ in range(60):
        served.node.clock_s += 0.1
        expired += served.node.lessor.work(lambda _: 0).expired
    assert expired == [7]
    assert [response.TTL for response in await keep_alive(served, 7)] == [0]
    assert (await served.lease.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=7))).TTL == -1


async def test_keepalives_wait_for_a_leader_and_fail_at_the_limit(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    async with serve(node) as served:
        await grant(served, 7)
        node.hold()
        waiting = asyncio.create_task(keep_alive(served, 7))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        node.release()
        assert (await waiting)[0].TTL == 60
        node.fault = RequestTimeout(TimeoutKind.LEADER_FAILURE)
        error = await failure(keep_alive(served, 7))
        assert error.code() is Code.UNAVAILABLE
        assert error.details() == "etcdserver: request timed out, possibly due to previous leader failure"


async def test_a_client_that_leaves_its_stream_leaves_nothing(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    async with serve(node) as served:
        node.hold()
        call = served.lease.LeaseKeepAlive()
        for lease in range(50):
            await call.write(pb.LeaseKeepAliveRequest(ID=lease + 1))
        await until(lambda: served.services.counts["raftkv.v1.Lease/LeaseKeepAlive"].started)
        await asyncio.sleep(0.05)
        call.cancel()
        await until(lambda: node.abandoned == 50)
        counts = served.services.counts["raftkv.v1.Lease/LeaseKeepAlive"]
        await until(lambda: counts.failed[Code.CANCELLED] == 1)


async def test_a_stream_that_wants_a_leader_ends_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_EVERY_S_MIN", 0.05)
    async with serve(FakeNode(tmp_path, election_ms=50, heartbeat_ms=10)) as served:
        call = served.lease.LeaseKeepAlive(metadata=(("hasleader", "true"),))
        other = served.lease.LeaseKeepAlive()
        for stream in (call, other):
            await stream.write(pb.LeaseKeepAliveRequest(ID=1))
            await stream.read()
        served.node.leader = 0
        await asyncio.sleep(0.06)
        served.node.leader = 1  # not three looks in a row
        await asyncio.sleep(0.2)
        assert not call.done()
        served.node.leader = 0
        error = await failure(call.read())
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "etcdserver: no leader")
        assert not other.done()
        error = await failure(served.lease.LeaseKeepAlive(metadata=(("hasleader", "true"),)).read())
        assert error.details() == "etcdserver: no leader"
        other.cancel()


async def test_a_stream_opened_during_an_election_waits_for_the_leader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """clientv3 opens its watch anew where the leader's death is known already, and gives it up on the first refusal."""
    monkeypatch.setattr(streams, "LOOK_EVERY_S_MIN", 0.2)
    async with serve(FakeNode(tmp_path, election_ms=50, heartbeat_ms=10)) as served:
        served.node.leader = 0
        call = served.lease.LeaseKeepAlive(metadata=(("hasleader", "true"),))
        await call.write(pb.LeaseKeepAliveRequest(ID=1))
        await asyncio.sleep(0.25)
        served.node.leader = 1
        await asyncio.sleep(0.6)
        await call.write(pb.LeaseKeepAliveRequest(ID=1))
        await call.read()
        assert not call.done()
        call.cancel()


async def test_streams_end_with_a_status_when_the_node_stops(served: Served) -> None:
    call = served.lease.LeaseKeepAlive()
    await call.write(pb.LeaseKeepAliveRequest(ID=1))
    await call.read()
    served.services.end_streams()
    error = await failure(call.read())
    assert (error.code(), error.details()) == (Code.UNAVAILABLE, "etcdserver: server stopped")
    error = await failure(served.lease.LeaseKeepAlive().read())
    assert error.details() == "etcdserver: server stopped"


async def test_garbage_in_the_stream(served: Served) -> None:
    call: grpc.aio.StreamStreamCall[bytes, bytes] = served.channel.stream_stream("/raftkv.v1.Lease/LeaseKeepAlive")()
    await call.write(b"\xff\xff")
    error = await failure(call.read())
    assert error.code() is Code.INVALID_ARGUMENT


async def test_time_to_live(served: Served) -> None:
    await grant(served, 7, 60)
    for key in (b"b", b"a"):
        await served.kv.Put(kv_pb2.PutRequest(key=key, value=b"v", lease=7))
    look = pb.LeaseTimeToLiveRequest(ID=7)
    await served.lease.LeaseTimeToLive(look)
    served.node.clock_s += 10.3
    response = await served.lease.LeaseTimeToLive(look)
    assert (response.ID, response.TTL, response.grantedTTL, list(response.keys)) == (7, 49, 60, [])
    assert response.ttl_ms == pytest.approx(49_700, abs=2)
    assert response.header.revision == 3
    response = await served.lease.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=7, keys=True))
    assert list(response.keys) == [b"a", b"b"]
    response = await served.lease.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=99, keys=True))
    assert (response.ID, response.TTL, response.grantedTTL, list(response.keys)) == (99, -1, 0, [])


async def test_all_leases(served: Served) -> None:
    assert list((await served.lease.LeaseLeases(pb.LeaseLeasesRequest())).leases) == []
    for lease in (9, 7, 8):
        await grant(served, lease)
    barriers = served.node.barriers
    response = await served.lease.LeaseLeases(pb.LeaseLeasesRequest())
    assert [each.ID for each in response.leases] == [7, 8, 9]
    assert served.node.barriers == barriers + 1


async def test_both_names(served: Served) -> None:
    raw = pb.LeaseGrantRequest(ID=3, TTL=5).SerializeToString()
    assert pb.LeaseGrantResponse.FromString(await served.raw("/etcdserverpb.Lease/LeaseGrant", raw)).TTL == 5
    call: grpc.aio.StreamStreamCall[bytes, bytes] = served.channel.stream_stream("/etcdserverpb.Lease/LeaseKeepAlive")()
    await call.write(pb.LeaseKeepAliveRequest(ID=3).SerializeToString())
    await call.done_writing()
    answer = await call.read()
    assert isinstance(answer, bytes)
    assert pb.LeaseKeepAliveResponse.FromString(answer).TTL == 5


async def test_alarms_stop_what_they_must(served: Served) -> None:
    await grant(served, 7)
    alarm = AlarmRequest(action=AlarmRequest.ACTIVATE, memberID=1, alarm=NOSPACE)
    await served.node.propose(CommandKind.ALARM, alarm.SerializeToString(), None)
    error = await failure(served.lease.LeaseGrant(pb.LeaseGrantRequest(TTL=5)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert (await keep_alive(served, 7))[0].TTL == 60
    await served.lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=7))
    alarm.alarm = CORRUPT
    await served.node.propose(CommandKind.ALARM, alarm.SerializeToString(), None)
    for call in (
        served.lease.LeaseGrant(pb.LeaseGrantRequest(TTL=5)),
        served.lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=7)),
        keep_alive(served, 7),
    ):
        assert (await failure(call)).code() is Code.DATA_LOSS
