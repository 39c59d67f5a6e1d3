"""The RPCs the SDK calls, by etcd's names: raftkv nodes and etcd both answer to them.

The messages are raftkv.v1's, whose bytes are etcd's, so no etcd descriptor is ever registered and another etcd client
can live in the same interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from google.protobuf.message import Message

from raftkv._pb import cluster_pb2, common_pb2, kv_pb2, lease_pb2, lock_pb2, maintenance_pb2, session_pb2, watch_pb2


class Answer(Protocol):
    """A response: all of them carry the header."""

    @property
    def header(self) -> common_pb2.ResponseHeader:
        """Who answered, in which term."""


RequestT = TypeVar("RequestT", bound=Message)
StreamedT = TypeVar("StreamedT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Answer)


@dataclass(frozen=True, slots=True, eq=False)
class Method(Generic[RequestT, ResponseT]):
    """One unary (or server-streaming) RPC."""

    path: str
    serialize: Callable[[RequestT], bytes]
    parse: Callable[[bytes], ResponseT]

    @property
    def name(self) -> str:
        """`Put` of `/etcdserverpb.KV/Put`."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, eq=False)
class StreamMethod(Generic[RequestT, StreamedT]):
    """One RPC with streams both ways."""

    path: str
    serialize: Callable[[RequestT], bytes]
    parse: Callable[[bytes], StreamedT]


def _kv(name: str) -> str:
    return f"/etcdserverpb.KV/{name}"


def _maintenance(name: str) -> str:
    return f"/etcdserverpb.Maintenance/{name}"


def _lease(name: str) -> str:
    return f"/etcdserverpb.Lease/{name}"


RANGE: Final = Method(_kv("Range"), kv_pb2.RangeRequest.SerializeToString, kv_pb2.RangeResponse.FromString)
PUT: Final = Method(_kv("Put"), kv_pb2.PutRequest.SerializeToString, kv_pb2.PutResponse.FromString)
DELETE_RANGE: Final = Method(
    _kv("DeleteRange"), kv_pb2.DeleteRangeRequest.SerializeToString, kv_pb2.DeleteRangeResponse.FromString
)
TXN: Final = Method(_kv("Txn"), kv_pb2.TxnRequest.SerializeToString, kv_pb2.TxnResponse.FromString)
COMPACT: Final = Method(
    _kv("Compact"), kv_pb2.CompactionRequest.SerializeToString, kv_pb2.CompactionResponse.FromString
)
MEMBER_LIST: Final = Method(
    "/etcdserverpb.Cluster/MemberList",
    cluster_pb2.MemberListRequest.SerializeToString,
    cluster_pb2.MemberListResponse.FromString,
)
STATUS: Final = Method(
    _maintenance("Status"), maintenance_pb2.StatusRequest.SerializeToString, maintenance_pb2.StatusResponse.FromString
)
ALARM: Final = Method(
    _maintenance("Alarm"), maintenance_pb2.AlarmRequest.SerializeToString, maintenance_pb2.AlarmResponse.FromString
)
DEFRAGMENT: Final = Method(
    _maintenance("Defragment"),
    maintenance_pb2.DefragmentRequest.SerializeToString,
    maintenance_pb2.DefragmentResponse.FromString,
)
HASH_KV: Final = Method(
    _maintenance("HashKV"), maintenance_pb2.HashKVRequest.SerializeToString, maintenance_pb2.HashKVResponse.FromString
)
MOVE_LEADER: Final = Method(
    _maintenance("MoveLeader"),
    maintenance_pb2.MoveLeaderRequest.SerializeToString,
    maintenance_pb2.MoveLeaderResponse.FromString,
)
SNAPSHOT: Final = Method(
    _maintenance("Snapshot"),
    maintenance_pb2.SnapshotRequest.SerializeToString,
    maintenance_pb2.SnapshotResponse.FromString,
)
LEASE_GRANT: Final = Method(
    _lease("LeaseGrant"), lease_pb2.LeaseGrantRequest.SerializeToString, lease_pb2.LeaseGrantResponse.FromString
)
LEASE_REVOKE: Final = Method(
    _lease("LeaseRevoke"), lease_pb2.LeaseRevokeRequest.SerializeToString, lease_pb2.LeaseRevokeResponse.FromString
)
LEASE_KEEP_ALIVE: Final[StreamMethod[lease_pb2.LeaseKeepAliveRequest, lease_pb2.LeaseKeepAliveResponse]] = StreamMethod(
    _lease("LeaseKeepAlive"),
    lease_pb2.LeaseKeepAliveRequest.SerializeToString,
    lease_pb2.LeaseKeepAliveResponse.FromString,
)
LEASE_TIME_TO_LIVE: Final = Method(
    _lease("LeaseTimeToLive"),
    lease_pb2.LeaseTimeToLiveRequest.SerializeToString,
    lease_pb2.LeaseTimeToLiveResponse.FromString,
)
LEASE_LEASES: Final = Method(
    _lease("LeaseLeases"), lease_pb2.LeaseLeasesRequest.SerializeToString, lease_pb2.LeaseLeasesResponse.FromString
)
WATCH: Final[StreamMethod[watch_pb2.WatchRequest, watch_pb2.WatchResponse]] = StreamMethod(
    "/etcdserverpb.Watch/Watch", watch_pb2.WatchRequest.SerializeToString, watch_pb2.WatchResponse.FromString
)
LOCK: Final = Method("/raftkv.v1.Lock/Lock", lock_pb2.LockRequest.SerializeToString, lock_pb2.LockResponse.FromString)
SESSION_STREAM: Final[StreamMethod[session_pb2.SessionRequests, session_pb2.SessionResponses]] = StreamMethod(
    "/raftkv.v1.Session/Stream",
    session_pb2.SessionRequests.SerializeToString,
    session_pb2.SessionResponses.FromString,
)
