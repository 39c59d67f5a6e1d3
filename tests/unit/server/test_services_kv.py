"""KV over the wire: the way of each request, and what bad ones get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_node import FakeNode, Served, failure, serve, trailers, until

from raftkv._pb import kv_pb2 as pb
from raftkv.server.errors import (
    LeaderChanged,
    NoLeader,
    OutcomeHidden,
    RequestError,
    RequestTimeout,
    Stopping,
    TimeoutKind,
    TooManyRequests,
)
from raftkv.server.grpc_errors import internal_errors
from raftkv.server.services.reads import Reads
from raftkv.state.commands import CommandKind
from raftkv.state.mvcc import Reader
from raftkv.state.store import StoreDamaged
from raftkv.storage.errors import CorruptRecord

Code = grpc.StatusCode
PREFIX = b"\0"


def op(**kind: Any) -> pb.RequestOp:
    return pb.RequestOp(**{f"request_{name}": request for name, request in kind.items()})


async def fill(served: Served, count: int, value: bytes = b"v") -> None:
    for number in range(count):
        request = pb.PutRequest(key=b"key/%05d" % number, value=value)
        await served.node.propose(CommandKind.PUT, request.SerializeToString(), None)


async def test_a_put_proposes_the_bytes_as_they_came(served: Served) -> None:
    raw = pb.PutRequest(key=b"k", value=b"v").SerializeToString() + b"\xf8\x3f\x01"  # and a field nobody knows
    response = pb.PutResponse.FromString(await served.raw("/raftkv.v1.KV/Put", raw))
    assert served.node.proposed == [(CommandKind.PUT, raw)]
    assert response.header.revision == 2
    assert response.header.cluster_id == served.node.cluster_id
    assert response.header.member_id == served.node.node_id
    assert response.header.raft_term == 3
    assert response.header.leader == served.node.node_id


async def test_both_names_lead_to_the_same_service(served: Served) -> None:
    for name in ("raftkv.v1", "etcdserverpb"):
        await served.raw(f"/{name}.KV/Put", pb.PutRequest(key=b"k", value=name.encode()).SerializeToString())
        got = pb.RangeResponse.FromString(
            await served.raw(f"/{name}.KV/Range", pb.RangeRequest(key=b"k").SerializeToString())
        )
        assert got.kvs[0].value == name.encode()
        await served.raw(f"/{name}.Cluster/MemberList", b"")
        await served.raw(f"/{name}.Maintenance/Status", b"")
    assert served.services.counts["raftkv.v1.KV/Put"].ok == 2
    assert served.services.counts["raftkv.v1.KV/Put"].started == 2


async def test_reads_are_linearizable_unless_they_say_serializable(served: Served) -> None:
    await served.kv.Range(pb.RangeRequest(key=b"k"))
    assert served.node.barriers == 1
    await served.kv.Range(pb.RangeRequest(key=b"k", serializable=True))
    assert served.node.barriers == 1
    read = pb.TxnRequest(success=[op(range=pb.RangeRequest(key=b"k"))])
    await served.kv.Txn(read)
    assert served.node.barriers == 2
    read.success[0].request_range.serializable = True
    await served.kv.Txn(read)
    assert served.node.barriers == 2
    assert served.node.proposed == []  # a transaction that only reads needs no log


async def test_a_long_range_is_read_apart_and_is_the_same(served: Served) -> None:
    await fill(served, 1000, b"x" * 50)
    whole = await served.kv.Range(pb.RangeRequest(key=b"key/", range_end=b"key0"))
    assert (len(whole.kvs), whole.count, whole.more) == (1000, 1000, False)
    assert whole.header.revision == 1001
    assert whole.header.member_id == served.node.node_id
    part = await served.kv.Range(pb.RangeRequest(key=b"key/", range_end=b"key0", limit=7))
    assert list(part.kvs) == list(whole.kvs[:7])
    assert (part.count, part.more) == (1000, True)
    in_txn = await served.kv.Txn(pb.TxnRequest(success=[op(range=pb.RangeRequest(key=b"key/", range_end=b"key0"))]))
    assert list(in_txn.responses[0].response_range.kvs) == list(whole.kvs)
    assert in_txn.header.member_id == served.node.node_id


async def test_heavy_values_are_soon_read_apart(served: Served) -> None:
    await fill(served, 64, bytes(200_000))
    request = pb.RangeRequest(key=b"key/", range_end=b"key0")
    apart = 0
    read_apart = Reads.apart

    async def counted(self: Reads, read: Callable[[Reader], bytes]) -> bytes:
        nonlocal apart
        apart += 1
        return await read_apart(self, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reads, "apart", counted)
        sizes = {len((await served.kv.Range(request)).kvs) for _ in range(3)}
    assert sizes == {64}
    assert apart == 2


@pytest.mark.parametrize("limit", [0, -5, 1, 500, 5000])
@pytest.mark.parametrize("mode", ["plain", "keys_only", "count_only"])
async def test_a_streamed_range_adds_up_to_the_whole(served: Served, limit: int, mode: str) -> None:
    await fill(served, 1500, b"x" * 1000)
    request = pb.RangeRequest(key=b"key/", range_end=b"key0", limit=limit)
    if mode != "plain":
        setattr(request, mode, True)
    whole = await served.kv.Range(request)
    chunks = [chunk.range_response async for chunk in served.kv.RangeStream(request)]
    assert [kv for chunk in chunks for kv in chunk.kvs] == list(whole.kvs)
    assert (chunks[-1].count, chunks[-1].more) == (whole.count, whole.more)
    assert chunks[-1].header == whole.header
    assert not any(chunk.HasField("header") or chunk.more or chunk.count for chunk in chunks[:-1])
    if len(whole.kvs) > 100:
        assert len(chunks[0].kvs) == 10
        assert max(chunk.ByteSize() for chunk in chunks) < 600_000


async def test_a_streamed_range_stays_at_its_revision(served: Served) -> None:
    await fill(served, 2000, b"x" * 1000)
    stream = served.kv.RangeStream(pb.RangeRequest(key=b"key/", range_end=b"key0"))
    first = await anext(aiter(stream))
    await fill(served, 2000, b"new")
    rest = [kv async for chunk in stream for kv in chunk.range_response.kvs]
    assert len(first.range_response.kvs) + len(rest) == 2000
    assert {kv.value for kv in rest} == {b"x" * 1000}


async def test_a_stream_that_is_left_gives_everything_back(served: Served) -> None:
    await fill(served, 3000, b"x" * 2000)
    for _ in range(5):
        stream = served.kv.RangeStream(pb.RangeRequest(key=b"key/", range_end=b"key0"))
        await anext(aiter(stream))
        stream.cancel()
    await until(lambda: not served.services.inflight.requests and not served.services.inflight.bytes)


async def test_compaction_waits_for_the_sweep_where_it_is_physical(served: Served) -> None:
    await fill(served, 3)
    await served.kv.Compact(pb.CompactionRequest(revision=3))
    assert served.node.machine.compact_revision == 3
    assert served.node.machine.sweeping
    call = asyncio.ensure_future(served.kv.Compact(pb.CompactionRequest(revision=4, physical=True)))
    await asyncio.sleep(0.1)
    assert not call.done()
    while served.node.machine.sweep(100):
        pass
    await call


# What goes wrong.

BAD: list[tuple[str, Callable[[], Any], Code, str, str]] = [
    ("Range", lambda: pb.RangeRequest(), Code.INVALID_ARGUMENT, "etcdserver: key is not provided", "EMPTY_KEY"),
    (
        "Range",
        lambda: pb.RangeRequest(key=b"k" * 40_000),
        Code.INVALID_ARGUMENT,
        "etcdserver: key is too large: key has 40000 bytes, the limit is 32768",
        "KEY_TOO_LARGE",
    ),
    (
        "Range",
        lambda: pb.RangeRequest(key=b"k", range_end=b"k" * 40_000),
        Code.INVALID_ARGUMENT,
        "etcdserver: key is too large: range_end has 40000 bytes, the limit is 32769",
        "KEY_TOO_LARGE",
    ),
    (
        "Range",
        lambda: pb.RangeRequest(key=b"k", sort_order=9),  # type: ignore[arg-type]
        Code.INVALID_ARGUMENT,
        "etcdserver: invalid sort option",
        "INVALID_SORT_OPTION",
    ),
    (
        "Range",
        lambda: pb.RangeRequest(key=b"k", sort_target=-1),  # type: ignore[arg-type]
        Code.INVALID_ARGUMENT,
        "etcdserver: invalid sort option",
        "INVALID_SORT_OPTION",
    ),
    (
        "Range",
        lambda: pb.RangeRequest(key=b"k", revision=1 << 62),
        Code.OUT_OF_RANGE,
        "etcdserver: mvcc: required revision is a future revision",
        "FUTURE_REVISION",
    ),
    (
        "Range",
        lambda: pb.RangeRequest(key=b"k", revision=1),
        Code.OUT_OF_RANGE,
        "etcdserver: mvcc: required revision has been compacted",
        "COMPACTED",
    ),
    ("Put", lambda: pb.PutRequest(value=b"v"), Code.INVALID_ARGUMENT, "etcdserver: key is not provided", "EMPTY_KEY"),
    (
        "Put",
        lambda: pb.PutRequest(key=b"k", value=b"v", ignore_value=True),
        Code.INVALID_ARGUMENT,
        "etcdserver: value is provided",
        "VALUE_PROVIDED",
    ),
    (
        "Put",
        lambda: pb.PutRequest(key=b"k", lease=5, ignore_lease=True),
        Code.INVALID_ARGUMENT,
        "etcdserver: lease is provided",
        "LEASE_PROVIDED",
    ),
    (
        "Put",
        lambda: pb.PutRequest(key=b"missing", ignore_value=True),
        Code.INVALID_ARGUMENT,
        "etcdserver: key not found",
        "KEY_NOT_FOUND",
    ),
    (
        "Put",
        lambda: pb.PutRequest(key=b"k", lease=-5),
        Code.NOT_FOUND,
        "etcdserver: requested lease not found",
        "LEASE_NOT_FOUND",
    ),
    (
        "Put",
        lambda: pb.PutRequest(key=b"k", value=bytes(1_600_000)),
        Code.INVALID_ARGUMENT,
        "etcdserver: request is too large",
        "REQUEST_TOO_LARGE",
    ),
    ("DeleteRange", lambda: pb.DeleteRangeRequest(), Code.INVALID_ARGUMENT, "etcdserver: key is not provided", ""),
    (
        "Txn",
        lambda: pb.TxnRequest(success=[op(put=pb.PutRequest(key=b"%d" % n)) for n in range(129)]),
        Code.INVALID_ARGUMENT,
        "etcdserver: too many operations in txn request",
        "TOO_MANY_OPS",
    ),
    (
        "Txn",
        lambda: pb.TxnRequest(success=[op(put=pb.PutRequest(key=b"k"))] * 2),
        Code.INVALID_ARGUMENT,
        "etcdserver: duplicate key given in txn request",
        "DUPLICATE_KEY",
    ),
    (
        "Txn",
        lambda: pb.TxnRequest(success=[pb.RequestOp()]),
        Code.INVALID_ARGUMENT,
        "etcdserver: key not found",
        "EMPTY_OPERATION",
    ),
    (
        "Txn",
        lambda: pb.TxnRequest(compare=[pb.Compare()]),
        Code.INVALID_ARGUMENT,
        "etcdserver: key is not provided",
        "EMPTY_KEY",
    ),
    (
        "Txn",
        lambda: pb.TxnRequest(compare=[pb.Compare(key=b"k", result=4)]),  # type: ignore[arg-type]
        Code.INVALID_ARGUMENT,
        "raftkv: compare.result: 4 is none of 0 to 3",
        "INVALID_FIELD",
    ),
    (
        "Txn",
        lambda: nested(1, pb.TxnRequest(compare=[pb.Compare(key=b"k", target=-7)])),  # type: ignore[arg-type]
        Code.INVALID_ARGUMENT,
        "raftkv: compare.target: -7 is none of 0 to 4",
        "INVALID_FIELD",
    ),
    (
        "Txn",
        lambda: nested(32),
        Code.INVALID_ARGUMENT,
        "etcdserver: too many operations in txn request",
        "TOO_MANY_OPS",
    ),
    (
        "Txn",
        lambda: nested(48),
        Code.INVALID_ARGUMENT,
        "etcdserver: too many operations in txn request",
        "TOO_MANY_OPS",
    ),
    (
        "Compact",
        lambda: pb.CompactionRequest(revision=-1),
        Code.OUT_OF_RANGE,
        "etcdserver: mvcc: required revision has been compacted",
        "COMPACTED",
    ),
    (
        "Compact",
        lambda: pb.CompactionRequest(revision=1000),
        Code.OUT_OF_RANGE,
        "etcdserver: mvcc: required revision is a future revision",
        "FUTURE_REVISION",
    ),
]


def nested(depth: int, inner: pb.TxnRequest | None = None) -> pb.TxnRequest:
    txn = inner or pb.TxnRequest()
    for _ in range(depth):
        txn = pb.TxnRequest(success=[op(txn=txn)])
    return txn


@pytest.mark.parametrize(("method", "make", "code", "text", "name"), BAD)
async def test_a_bad_request_gets_etcds_words_and_changes_nothing(
    served: Served, method: str, make: Callable[[], Any], code: Code, text: str, name: str
) -> None:
    await fill(served, 3)
    await served.kv.Compact(pb.CompactionRequest(revision=3))
    revision = served.node.machine.revision
    error = await failure(served.raw(f"/raftkv.v1.KV/{method}", make().SerializeToString()))
    assert (error.code(), error.details()) == (code, text)
    said = trailers(error)
    assert said["raftkv-error"] == name or not name
    assert said["raftkv-executed"] == "no"
    if name == "COMPACTED":
        assert said["raftkv-compact-revision"] == "3"
    if name in ("KEY_TOO_LARGE", "REQUEST_TOO_LARGE", "TOO_MANY_OPS"):
        assert said["raftkv-field"]
        assert int(said["raftkv-limit"]) in (32768, 32769, 1_572_864, 128)
    assert served.node.machine.revision == revision


@pytest.mark.parametrize("method", ["Range", "Put", "DeleteRange", "Txn", "Compact"])
@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256))])
async def test_bytes_that_are_no_request_are_named_so(served: Served, method: str, garbage: bytes) -> None:
    error = await failure(served.raw(f"/etcdserverpb.KV/{method}", garbage))
    assert error.code() is Code.INVALID_ARGUMENT
    assert error.details() == f"raftkv: the bytes are no request of {method}"
    assert trailers(error)["raftkv-error"] == "MALFORMED"
    assert served.node.proposed == []


async def test_nesting_beyond_what_protobuf_reads_is_refused(served: Served) -> None:
    raw = nested(49).SerializeToString()
    for _ in range(200):
        raw = _wrap(raw)
    error = await failure(served.raw("/raftkv.v1.KV/Txn", raw))
    assert error.code() is Code.INVALID_ARGUMENT


def _wrap(txn: bytes) -> bytes:
    """A transaction around the bytes of one: success = [request_txn]."""
    inner = b"\x22" + _varint(len(txn)) + txn
    return b"\x12" + _varint(len(inner)) + inner


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


async def test_a_message_beyond_grpcs_own_cap_is_refused_by_it(served: Served) -> None:
    error = await failure(served.kv.Put(pb.PutRequest(key=b"k", value=bytes(3_000_000))))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert served.node.proposed == []


async def test_limits_below_zero_are_none_as_in_etcd(served: Served) -> None:
    await fill(served, 3)
    got = await served.kv.Range(pb.RangeRequest(key=PREFIX, range_end=PREFIX, limit=-1, revision=-1))
    assert len(got.kvs) == 3


async def test_a_stream_takes_no_order_and_no_filters(served: Served) -> None:
    for request in (
        pb.RangeRequest(key=b"k", sort_target=pb.RangeRequest.MOD),
        pb.RangeRequest(key=b"k", sort_order=pb.RangeRequest.DESCEND),
        pb.RangeRequest(key=b"k", min_create_revision=1),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in served.kv.RangeStream(request):
                pass
        assert caught.value.code() is Code.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.kv.RangeStream(pb.RangeRequest(key=b"k", revision=99)):
            pass
    assert caught.value.details() == "etcdserver: mvcc: required revision is a future revision"


FAULTS: list[tuple[Exception, Code, str, str, str]] = [
    (NoLeader(), Code.UNAVAILABLE, "etcdserver: no leader", "NO_LEADER", "no"),
    (LeaderChanged(executed="unknown"), Code.UNAVAILABLE, "etcdserver: leader changed", "LEADER_CHANGED", "unknown"),
    (RequestTimeout(), Code.UNAVAILABLE, "etcdserver: request timed out", "TIMEOUT", "unknown"),
    (RequestTimeout(executed="no"), Code.UNAVAILABLE, "etcdserver: request timed out", "TIMEOUT", "no"),
    (
        RequestTimeout(TimeoutKind.LEADER_FAILURE),
        Code.UNAVAILABLE,
        "etcdserver: request timed out, possibly due to previous leader failure",
        "TIMEOUT",
        "unknown",
    ),
    (
        RequestTimeout(TimeoutKind.CONNECTION_LOST),
        Code.UNAVAILABLE,
        "etcdserver: request timed out, possibly due to connection lost",
        "TIMEOUT",
        "unknown",
    ),
    (
        RequestTimeout(TimeoutKind.APPLY),
        Code.UNAVAILABLE,
        "etcdserver: request timed out, waiting for the applied index took too long",
        "TIMEOUT",
        "unknown",
    ),
    (
        OutcomeHidden(),
        Code.UNAVAILABLE,
        "etcdserver: request timed out, possibly due to connection lost",
        "OUTCOME_HIDDEN",
        "unknown",
    ),
    (Stopping(), Code.UNAVAILABLE, "etcdserver: server stopped", "STOPPING", "no"),
    (
        TooManyRequests("somewhere", 0.25),
        Code.RESOURCE_EXHAUSTED,
        "etcdserver: too many requests",
        "TOO_MANY_REQUESTS",
        "no",
    ),
]


@pytest.mark.parametrize(("fault", "code", "text", "name", "executed"), FAULTS)
async def test_the_nodes_own_failures(
    served: Served, fault: RequestError, code: Code, text: str, name: str, executed: str
) -> None:
    served.node.fault = fault
    error = await failure(served.kv.Put(pb.PutRequest(key=b"k")))
    assert (error.code(), error.details()) == (code, text)
    said = trailers(error)
    assert (said["raftkv-error"], said["raftkv-executed"]) == (name, executed)
    if name == "TOO_MANY_REQUESTS":
        assert said["grpc-retry-pushback-ms"] == "250"
    read = await failure(served.kv.Range(pb.RangeRequest(key=b"k")))
    assert read.details() == text
    assert trailers(read)["raftkv-executed"] == "no"  # a read changes nothing


async def test_an_error_nobody_expected_keeps_its_secrets(served: Served) -> None:
    before = internal_errors["Put"]
    served.node.fault = KeyError("/home/somebody/secret")
    error = await failure(served.kv.Put(pb.PutRequest(key=b"k")))
    assert error.code() is Code.INTERNAL
    assert "secret" not in str(error.details())
    assert str(error.details()).startswith("raftkv: internal error ")
    assert trailers(error)["raftkv-executed"] == "unknown"
    assert internal_errors["Put"] == before + 1
    served.node.fault = None
    await served.kv.Put(pb.PutRequest(key=b"k"))
    assert served.services.counts["raftkv.v1.KV/Put"].failed[Code.INTERNAL] == 1


@pytest.mark.parametrize(
    "fault", [StoreDamaged("no record"), CorruptRecord(Path("x"), b"k", "a flipped bit")], ids=["state", "disk"]
)
async def test_a_store_that_lies_ends_the_node(served: Served, fault: Exception) -> None:
    served.node.fault = fault
    await failure(served.kv.Range(pb.RangeRequest(key=b"k")))
    assert served.node.fatal_faults == [fault]


# Waiting.


async def test_hasleader_fails_at_once_where_others_wait(served: Served) -> None:
    served.node.leader = 0
    served.node.hold()
    error = await failure(served.kv.Put(pb.PutRequest(key=b"k"), metadata=(("hasleader", "true"),)))
    assert error.details() == "etcdserver: no leader"
    assert served.node.deadlines == []
    waiting = asyncio.ensure_future(served.kv.Put(pb.PutRequest(key=b"k")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    served.node.leader = served.node.node_id
    served.node.release()
    await waiting


async def test_a_callers_deadline_reaches_the_node_and_drops_the_command(served: Served) -> None:
    served.node.hold()
    began = asyncio.get_running_loop().time()
    error = await failure(served.kv.Put(pb.PutRequest(key=b"k"), timeout=2))
    assert error.code() in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)
    (deadline,) = served.node.deadlines
    assert deadline is not None
    assert began < deadline <= asyncio.get_running_loop().time() + 2
    served.node.release()
    await served.kv.Range(pb.RangeRequest(key=b"other"))
    assert served.node.proposed == []
    assert served.services.inflight.requests == 0


async def test_without_a_deadline_the_node_decides(served: Served) -> None:
    await served.kv.Put(pb.PutRequest(key=b"k"))
    assert served.node.deadlines == [None]


async def test_a_cancelled_call_leaves_nothing_behind(served: Served) -> None:
    served.node.hold()
    call = served.kv.Put(pb.PutRequest(key=b"k"))
    await until(lambda: served.services.inflight.requests == 1 and served.node.deadlines)
    call.cancel()
    await until(lambda: not served.services.inflight.requests)
    await until(lambda: served.node.abandoned == 1)
    assert served.services.counts["raftkv.v1.KV/Put"].failed[Code.CANCELLED] == 1
    served.node.release()
    assert served.node.proposed == []


# Budgets.


async def test_more_requests_than_the_node_takes_on_are_refused_at_once(tmp_path: Path) -> None:
    async with serve(FakeNode(tmp_path, inflight_requests_max=5)) as served:
        served.node.hold()
        taken = [asyncio.ensure_future(served.kv.Put(pb.PutRequest(key=b"%d" % n))) for n in range(5)]
        await until(lambda: served.services.inflight.requests == 5)
        error = await failure(served.kv.Put(pb.PutRequest(key=b"k")))  # while the others wait for ever
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert trailers(error)["raftkv-limit"] == "inflight_requests_max"
        assert int(trailers(error)["grpc-retry-pushback-ms"]) > 0
        await served.raw("/raftkv.v1.Maintenance/Status", b"")  # operators get through
        served.node.release()
        await asyncio.gather(*taken)
        await served.kv.Put(pb.PutRequest(key=b"k"))
        assert served.services.inflight.requests == served.services.inflight.bytes == 0


async def test_more_bytes_than_the_node_takes_on_are_refused(tmp_path: Path) -> None:
    async with serve(FakeNode(tmp_path, inflight_bytes_max=1_600_000)) as served:
        served.node.hold()
        taken = asyncio.ensure_future(served.kv.Put(pb.PutRequest(key=b"big", value=bytes(1_500_000))))
        await until(lambda: served.services.inflight.requests)
        error = await failure(served.kv.Put(pb.PutRequest(key=b"k", value=bytes(200_000))))
        assert trailers(error)["raftkv-limit"] == "inflight_bytes_max"
        served.node.release()
        await taken
        assert served.services.inflight.bytes == 0


# Room.


async def test_a_full_store_refuses_puts_until_it_is_disarmed(tmp_path: Path) -> None:
    async with serve(FakeNode(tmp_path, quota_backend_bytes=1 << 20)) as served:
        await served.kv.Put(pb.PutRequest(key=b"k"))
        served.node.bytes_on_disk = 2 << 20
        async with asyncio.timeout(30):
            while True:  # the size is looked at once a second
                try:
                    await served.kv.Put(pb.PutRequest(key=b"k"))
                except grpc.aio.AioRpcError as error:
                    refused = error
                    break
                await asyncio.sleep(0.05)
        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert refused.details() == "etcdserver: mvcc: database space exceeded"
        assert trailers(refused)["raftkv-error"] == "NO_SPACE"
        assert served.node.machine.alarms == {(served.node.node_id, 1)}
        put = pb.TxnRequest(success=[op(put=pb.PutRequest(key=b"t"))])
        assert (await failure(served.kv.Txn(put))).details() == "etcdserver: mvcc: database space exceeded"
        await served.kv.DeleteRange(pb.DeleteRangeRequest(key=b"k"))
        await served.kv.Txn(pb.TxnRequest(success=[op(delete_range=pb.DeleteRangeRequest(key=b"k"))]))
        await served.kv.Range(pb.RangeRequest(key=b"k"))
        await served.kv.Compact(pb.CompactionRequest(revision=2))
        served.node.bytes_on_disk = 1000
        disarm = b"\x08\x02"  # action DEACTIVATE, every member and alarm
        await served.raw("/etcdserverpb.Maintenance/Alarm", disarm)
        await served.kv.Put(pb.PutRequest(key=b"k"))
