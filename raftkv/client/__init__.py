"""The SDK: `AsyncClient` for asyncio, `Client` for everything else. It knows the messages and nothing of the server."""

from __future__ import annotations

import logging

from raftkv.client import forking as _forking  # noqa: F401 - before anything else imports gRPC

# isort: split
from raftkv.client.blocking import BlockingCluster, BlockingMaintenance, BlockingTxn, Client
from raftkv.client.blocking_coordination import (
    BlockingElection,
    BlockingLeadership,
    BlockingLease,
    BlockingLock,
    BlockingWatch,
)
from raftkv.client.breaker import BreakerConfig, BreakerState
from raftkv.client.client import AsyncClient
from raftkv.client.contender import LockState
from raftkv.client.election import Election, Leadership
from raftkv.client.errors import (
    Closed,
    Compacted,
    ConditionFailed,
    ConfigError,
    DeadlineExceeded,
    FutureRevision,
    InvalidRequest,
    LeaderChanged,
    LeaseLost,
    LeaseNotFound,
    LockLost,
    LockTimeout,
    NoLeader,
    NoLeaderInTime,
    NotLeading,
    OutcomeUnknown,
    Overloaded,
    RaftkvError,
    RequestTooLarge,
    SessionExpired,
    Unavailable,
)
from raftkv.client.events import AttemptFailed, BreakerChanged, ConnectionChanged, LeaderSeen
from raftkv.client.lease import Lease, LeaseGrant, LeaseInfo, LeaseState
from raftkv.client.lock import Lock
from raftkv.client.maintenance import SnapshotDamaged
from raftkv.client.options import DEFAULT, Timeout
from raftkv.client.pool import ClientStats, ConnectionState
from raftkv.client.results import (
    Alarm,
    CompactResult,
    DeleteResult,
    EndpointStatus,
    Event,
    HashKV,
    KeyValue,
    Member,
    PutResult,
    RangeResult,
    SavedSnapshot,
    Status,
    TxnResult,
    WatchBatch,
)
from raftkv.client.retry import Retry
from raftkv.client.tls import TLS
from raftkv.client.txn import Delete, Get, Guard, Key, Put, Txn
from raftkv.client.watch import Watch

# A library leaves the choice of where its log goes to the program it is part of.
logging.getLogger("raftkv").addHandler(logging.NullHandler())

__all__ = [
    "DEFAULT",
    "TLS",
    "Alarm",
    "AsyncClient",
    "AttemptFailed",
    "BlockingCluster",
    "BlockingElection",
    "BlockingLeadership",
    "BlockingLease",
    "BlockingLock",
    "BlockingMaintenance",
    "BlockingTxn",
    "BlockingWatch",
    "BreakerChanged",
    "BreakerConfig",
    "BreakerState",
    "Client",
    "ClientStats",
    "Closed",
    "CompactResult",
    "Compacted",
    "ConditionFailed",
    "ConfigError",
    "ConnectionChanged",
    "ConnectionState",
    "DeadlineExceeded",
    "Delete",
    "DeleteResult",
    "Election",
    "EndpointStatus",
    "Event",
    "FutureRevision",
    "Get",
    "Guard",
    "HashKV",
    "InvalidRequest",
    "Key",
    "KeyValue",
    "LeaderChanged",
    "LeaderSeen",
    "Leadership",
    "Lease",
    "LeaseGrant",
    "LeaseInfo",
    "LeaseLost",
    "LeaseNotFound",
    "LeaseState",
    "Lock",
    "LockLost",
    "LockState",
    "LockTimeout",
    "Member",
    "NoLeader",
    "NoLeaderInTime",
    "NotLeading",
    "OutcomeUnknown",
    "Overloaded",
    "Put",
    "PutResult",
    "RaftkvError",
    "RangeResult",
    "RequestTooLarge",
    "Retry",
    "SavedSnapshot",
    "SessionExpired",
    "SnapshotDamaged",
    "Status",
    "Timeout",
    "Txn",
    "TxnResult",
    "Unavailable",
    "Watch",
    "WatchBatch",
]
