"""raftkv: a linearizable key-value and lock service that you install with pip.

The SDK's names are here and load on first use, so that `import raftkv` (and with it `raftkv --help`) does not pay for
gRPC: `raftkv.AsyncClient`, `raftkv.Client` and the errors they raise.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftkv.client import (
        DEFAULT,
        Alarm,
        AsyncClient,
        AttemptFailed,
        BreakerChanged,
        BreakerConfig,
        BreakerState,
        Client,
        ClientStats,
        Closed,
        Compacted,
        CompactResult,
        ConditionFailed,
        ConfigError,
        ConnectionChanged,
        ConnectionState,
        DeadlineExceeded,
        Delete,
        DeleteResult,
        EndpointStatus,
        FutureRevision,
        Get,
        HashKV,
        InvalidRequest,
        Key,
        KeyValue,
        LeaderChanged,
        LeaderSeen,
        LeaseNotFound,
        Member,
        NoLeader,
        NoLeaderInTime,
        OutcomeUnknown,
        Overloaded,
        Put,
        PutResult,
        RaftkvError,
        RangeResult,
        RequestTooLarge,
        Retry,
        SavedSnapshot,
        SnapshotDamaged,
        Status,
        Timeout,
        Txn,
        TxnResult,
        Unavailable,
    )

__version__ = "0.1.0"

__all__ = [
    "DEFAULT",
    "Alarm",
    "AsyncClient",
    "AttemptFailed",
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
    "EndpointStatus",
    "FutureRevision",
    "Get",
    "HashKV",
    "InvalidRequest",
    "Key",
    "KeyValue",
    "LeaderChanged",
    "LeaderSeen",
    "LeaseNotFound",
    "Member",
    "NoLeader",
    "NoLeaderInTime",
    "OutcomeUnknown",
    "Overloaded",
    "Put",
    "PutResult",
    "RaftkvError",
    "RangeResult",
    "RequestTooLarge",
    "Retry",
    "SavedSnapshot",
    "SnapshotDamaged",
    "Status",
    "Timeout",
    "Txn",
    "TxnResult",
    "Unavailable",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("raftkv.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
