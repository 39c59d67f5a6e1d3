"""A local cluster: node processes on this machine, supervised, for demos, development and tests.

Nodes are only ever started as processes. `LocalCluster` is the blocking twin of `AsyncLocalCluster`.
Names are resolved on first use, so that a node process that only needs its lifeline imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftkv.local.blocking import LocalCluster
    from raftkv.local.errors import (
        ClusterRunning,
        LocalClusterError,
        NodeExited,
        NotReady,
        PortInUse,
        TopologyMismatch,
        UnknownNode,
    )
    from raftkv.local.status import NodeRow
    from raftkv.local.supervisor import AsyncLocalCluster

__all__ = [
    "AsyncLocalCluster",
    "ClusterRunning",
    "LocalCluster",
    "LocalClusterError",
    "NodeExited",
    "NodeRow",
    "NotReady",
    "PortInUse",
    "TopologyMismatch",
    "UnknownNode",
]

_HOME = {
    "AsyncLocalCluster": "supervisor",
    "LocalCluster": "blocking",
    "NodeRow": "status",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
