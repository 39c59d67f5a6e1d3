"""Cluster and Maintenance over the wire, and reflection."""

from __future__ import annotations

import hashlib
from pathlib import Path

import grpc
import pytest
from fake_node import FakeNode, FakeSpool, Served, failure, serve, trailers, until
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from raftkv._pb import cluster_pb2, kv_pb2
from raftkv._pb import maintenance_pb2 as pb

Code = grpc.StatusCode


async def test_members_are_listed(served: Served) -> None:
    response = await served.cluster.MemberList(cluster_pb2.MemberListRequest())
    assert served.node.barriers == 0
    assert [(member.ID, member.name) for member in response.members] == [(served.node.node_id, "n1"), (77, "")]
    assert list(response.members[0].clientURLs) == ["http://127.0.0.1:2379"]
    assert response.header.cluster_id == served.node.cluster_id
    assert response.header.revision == 0  # as etcd
    await served.cluster.MemberList(cluster_pb2.MemberListRequest(linearizable=True))
    assert served.node.barriers == 1


@pytest.mark.parametrize("method", ["MemberAdd", "MemberRemove", "MemberUpdate", "MemberPromote"])
async def test_members_cannot_be_changed_yet(served: Served, method: str) -> None:
    error = await failure(served.raw(f"/etcdserverpb.Cluster/{method}", b""))
    assert error.code() is Code.UNIMPLEMENTED
    assert str(error.details()).startswith(f"raftkv: {method}: members cannot be changed over the wire yet")


async def test_status_says_how_the_node_is_without_a_leader_too(served: Served) -> None:
    status = await served.maintenance.Status(pb.StatusRequest())
    assert [int(part) for part in status.version.split(".")] >= [3, 4, 0]
    assert (status.leader, status.raftTerm, status.dbSize) == (served.node.node_id, 3, 4096)
    assert status.dbSizeQuota == served.node.config.quota_backend_bytes
    assert list(status.errors) == []
    await served.maintenance.Alarm(pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE, memberID=77, alarm=pb.NOSPACE))
    served.node.leader = 0
    served.node.hold()
    status = await served.maintenance.Status(pb.StatusRequest(), timeout=2)
    assert list(status.errors) == ["etcdserver: no leader", "memberID:77 alarm:NOSPACE"]
    assert status.leader == status.header.leader == 0


async def test_alarms_are_armed_listed_and_disarmed(served: Served) -> None:
    ask = served.maintenance.Alarm
    on, off = pb.AlarmRequest.ACTIVATE, pb.AlarmRequest.DEACTIVATE
    mine = served.node.node_id
    assert not (await ask(pb.AlarmRequest())).alarms
    armed = await ask(pb.AlarmRequest(action=on, memberID=mine, alarm=pb.NOSPACE))
    assert list(armed.alarms) == [pb.AlarmMember(memberID=mine, alarm=pb.NOSPACE)]
    await ask(pb.AlarmRequest(action=on, memberID=77, alarm=pb.CORRUPT))
    assert len((await ask(pb.AlarmRequest())).alarms) == 2
    assert len((await ask(pb.AlarmRequest(memberID=77))).alarms) == 1
    assert len((await ask(pb.AlarmRequest(alarm=pb.NOSPACE))).alarms) == 1
    for call in (
        served.kv.Range(kv_pb2.RangeRequest(key=b"k", serializable=True)),
        served.kv.Put(kv_pb2.PutRequest(key=b"k")),
        served.kv.DeleteRange(kv_pb2.DeleteRangeRequest(key=b"k")),
        served.kv.Txn(kv_pb2.TxnRequest()),
        served.kv.Compact(kv_pb2.CompactionRequest(revision=1)),
    ):
        error = await failure(call)
        assert (error.code(), error.details()) == (Code.DATA_LOSS, "etcdserver: corrupt cluster")
    gone = await ask(pb.AlarmRequest(action=off))
    assert len(gone.alarms) == 2
    assert not served.node.machine.alarms
    await served.kv.Put(kv_pb2.PutRequest(key=b"k"))


@pytest.mark.parametrize(
    ("request_", "code", "name"),
    [
        (pb.AlarmRequest(action=7), Code.INVALID_ARGUMENT, "INVALID_FIELD"),  # type: ignore[arg-type]
        (pb.AlarmRequest(action=1, alarm=-3), Code.INVALID_ARGUMENT, "INVALID_FIELD"),  # type: ignore[arg-type]
        (pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE, memberID=5, alarm=pb.NOSPACE),
            Code.NOT_FOUND,
            "MEMBER_NOT_FOUND",
        ),
    ],
)
async def test_what_is_no_alarm_is_refused(served: Served, request_: pb.AlarmRequest, code: Code, name: str) -> None:
    error = await failure(served.maintenance.Alarm(request_))
    assert (error.code(), trailers(error)["raftkv-error"]) == (code, name)
    assert served.node.proposed == []


async def test_an_alarm_of_no_member_is_of_the_node_that_was_asked(served: Served) -> None:
    armed = await served.maintenance.Alarm(pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE, alarm=pb.NOSPACE))
    assert [alarm.memberID for alarm in armed.alarms] == [served.node.node_id]


async def test_hashes(served: Served) -> None:
    before = await served.maintenance.HashKV(pb.HashKVRequest())
    await served.kv.Put(kv_pb2.PutRequest(key=b"k", value=b"v"))
    after = await served.maintenance.HashKV(pb.HashKVRequest())
    assert before.hash != after.hash
    assert (before.hash_revision, after.hash_revision, after.compact_revision) == (1, 2, -1)
    assert (await served.maintenance.HashKV(pb.HashKVRequest(revision=1))).hash == before.hash
    assert (await served.maintenance.Hash(pb.HashRequest())).hash == served.node.machine.hash()
    for revision, text in ((99, "a future revision"), (-1, "compacted")):
        error = await failure(served.maintenance.HashKV(pb.HashKVRequest(revision=revision)))
        assert error.code() is Code.OUT_OF_RANGE
        assert text in str(error.details())


async def test_leadership_moves(served: Served) -> None:
    move = served.maintenance.MoveLeader
    assert not (await move(pb.MoveLeaderRequest(targetID=77))).HasField("header")
    assert served.node.transferred_to == 77
    error = await failure(move(pb.MoveLeaderRequest(targetID=5)))
    assert (error.code(), error.details()) == (Code.FAILED_PRECONDITION, "etcdserver: bad leader transferee")
    await move(pb.MoveLeaderRequest(targetID=served.node.node_id))
    served.node.leader = 77
    error = await failure(move(pb.MoveLeaderRequest(targetID=5)))
    assert (error.code(), error.details()) == (Code.FAILED_PRECONDITION, "etcdserver: not leader")


async def test_defragment_and_downgrade(served: Served) -> None:
    assert not (await served.maintenance.Defragment(pb.DefragmentRequest())).HasField("header")
    assert served.node.defragmented == 1
    error = await failure(served.maintenance.Downgrade(pb.DowngradeRequest()))
    assert error.code() is Code.UNIMPLEMENTED


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 32 * 1024, 100_001])
async def test_a_snapshot_is_what_etcdctl_takes_for_whole(tmp_path: Path, size: int) -> None:
    node = FakeNode(tmp_path)
    node.spool = FakeSpool(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    async with serve(node) as served:
        parts = [part async for part in served.maintenance.Snapshot(pb.SnapshotRequest())]
    payload = b"".join(part.blob for part in parts[:-1])
    assert len(payload) % 512 == 0
    assert payload.startswith(node.spool.content)
    assert not payload[size:].strip(b"\0")
    assert parts[-1].blob == hashlib.sha256(payload).digest()
    assert max(len(part.blob) for part in parts) <= 32 * 1024
    left = len(payload)
    for part in parts[:-1]:
        left -= len(part.blob)
        assert part.remaining_bytes == left
    assert node.spool.closed


async def test_a_snapshot_nobody_wants_any_more_is_given_back(served: Served) -> None:
    served.node.spool = FakeSpool(bytes(50_000_000))
    stream = served.maintenance.Snapshot(pb.SnapshotRequest())
    await anext(aiter(stream))
    stream.cancel()
    await until(lambda: served.node.spool.closed)


@pytest.mark.parametrize(
    "method",
    ["Alarm", "Status", "Defragment", "Hash", "HashKV", "MoveLeader"],
)
async def test_bytes_that_are_no_request_are_named_so(served: Served, method: str) -> None:
    error = await failure(served.raw(f"/raftkv.v1.Maintenance/{method}", b"\xff\xff"))
    assert error.code() is Code.INVALID_ARGUMENT
    assert error.details() == f"raftkv: the bytes are no request of {method}"


async def test_what_is_not_served_is_said_to_be_so(served: Served) -> None:
    for method in ("/etcdserverpb.Auth/AuthEnable", "/raftkv.v1.KV/Nothing", "/nobody/knows"):
        assert (await failure(served.raw(method, b""))).code() is Code.UNIMPLEMENTED


async def test_reflection_tells_of_our_services_with_their_messages(served: Served) -> None:
    call = served.channel.stream_stream(
        f"/{reflection.SERVICE_NAME}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="raftkv.v1.KV"),
    ]
    answers = [answer async for answer in call(iter(requests))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"raftkv.v1.KV", "raftkv.v1.Cluster", "raftkv.v1.Maintenance", "grpc.health.v1.Health"} <= names
    assert not any(name.startswith("etcdserverpb") for name in names)
    files = [FileDescriptorProto.FromString(raw) for raw in answers[1].file_descriptor_response.file_descriptor_proto]
    assert "raftkv.v1" in {file.package for file in files}
