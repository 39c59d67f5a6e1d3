"""The shape of a local cluster and where it lives on disk.

DIR/cluster.json    the shape, and while a supervisor runs: its process and control socket
DIR/cluster.lock    held by the supervisor
DIR/n1/node.log     what the node wrote to stderr, one JSON object a line
DIR/n1/data/        its data directory
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

from raftkv.local.errors import LocalClusterError

STATE_FILE = "cluster.json"
LOCK_FILE = "cluster.lock"
VERSION = 1
DEFAULT_BASE_PORT = 2379
"""etcd's client port, so that clients find the first node without being told."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node: its name and ports."""

    name: str
    client_port: int
    peer_port: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """All that a supervisor must know to run, or run again, the cluster of a directory."""

    directory: Path
    host: str
    nodes: tuple[NodeSpec, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names, in order."""
        return tuple(node.name for node in self.nodes)

    def client(self, node: NodeSpec) -> str:
        """Where clients reach the node."""
        return address(self.host, node.client_port)

    def peer(self, node: NodeSpec) -> str:
        """Where the other nodes reach the node."""
        return address(self.host, node.peer_port)

    def log(self, name: str) -> Path:
        """The node's log file."""
        return self.directory / name / "node.log"

    def data(self, name: str) -> Path:
        """The node's data directory."""
        return self.directory / name / "data"

    def arguments(self, node: NodeSpec) -> list[str]:
        """The arguments of `raftkv node` for this node."""
        cluster = ",".join(f"{each.name}={self.peer(each)}" for each in self.nodes)
        return [
            *("--name", node.name),
            *("--data-dir", str(self.data(node.name))),
            *("--listen-client", self.client(node)),
            *("--listen-peer", self.peer(node)),
            *("--initial-cluster", cluster),
        ]

    def save(self, supervisor: dict[str, Any] | None) -> None:
        """Write the state file; `supervisor` is None when none runs."""
        content = {
            "version": VERSION,
            "host": self.host,
            "nodes": [
                {
                    **dataclasses.asdict(node),
                    "client": self.client(node),
                    "peer": self.peer(node),
                    "log": str(self.log(node.name)),
                }
                for node in self.nodes
            ],
            "supervisor": supervisor,
        }
        target = self.directory / STATE_FILE
        temporary = target.with_suffix(".json.new")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.chmod(0o600)
        temporary.replace(target)


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """What a topology file or the command line says of a cluster that is to be started. None: not said."""

    nodes: int | None = None
    base_port: int | None = None
    host: str = "127.0.0.1"
    arguments: tuple[str, ...] = ()
    """More arguments for every `raftkv node`."""

    def with_options(self, nodes: int | None, base_port: int | None) -> Topology:
        """What options say comes before what the file says."""
        return dataclasses.replace(
            self,
            nodes=self.nodes if nodes is None else nodes,
            base_port=self.base_port if base_port is None else base_port,
        )


_TOPOLOGY_TYPES: dict[str, type] = {"nodes": int, "base_port": int, "host": str, "node": dict}
# What the supervisor decides for each node by itself.
_OURS = ("name", "data_dir", "listen_client", "listen_peer", "initial_cluster")


def read_topology(path: Path) -> Topology:
    """Read a topology file.

    Raises:
        LocalClusterError: names the key that is unknown (with the nearest known one) or of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LocalClusterError(f"{path}: {error}") from error
    for key, value in content.items():
        kind = _TOPOLOGY_TYPES.get(key)
        if kind is None:
            near = difflib.get_close_matches(key, _TOPOLOGY_TYPES, 1) or [", ".join(_TOPOLOGY_TYPES)]
            raise LocalClusterError(f"{path}: unknown key {key!r} (known: {near[0]})")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LocalClusterError(f"{path}: {key}: {value!r} is not {'a table' if kind is dict else kind.__name__}")
    arguments: list[str] = []
    for key, value in content.pop("node", {}).items():
        if key.replace("-", "_") in _OURS:
            raise LocalClusterError(f"{path}: node.{key}: the supervisor sets it for each node; leave it out")
        arguments += [f"--{key.replace('_', '-')}", str(value)]
    return Topology(**content, arguments=tuple(arguments))


def address(host: str, port: int) -> str:
    """host:port, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def fixed_ports(count: int, base_port: int) -> tuple[NodeSpec, ...]:
    """Nodes n1, n2, … with the ports base, base+1 (n1: clients, peers), base+2, base+3 (n2), …"""
    return tuple(NodeSpec(f"n{i + 1}", base_port + 2 * i, base_port + 2 * i + 1) for i in range(count))


def load(directory: Path) -> tuple[Layout, dict[str, Any] | None] | None:
    """Read the state file: the shape and the supervisor. None when the directory holds no cluster.

    Raises:
        LocalClusterError: the file is there but not one of ours.
    """
    path = directory / STATE_FILE
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise LocalClusterError(f"{path}: version {content['version']} is not {VERSION}, which this raftkv writes")
        nodes = tuple(NodeSpec(each["name"], each["client_port"], each["peer_port"]) for each in content["nodes"])
        return Layout(directory, content["host"], nodes), content["supervisor"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LocalClusterError(f"{path} is damaged or not raftkv's ({error}): choose another --dir") from error


def default_directory() -> Path:
    """Where `raftkv cluster` keeps its cluster: $RAFTKV_CLUSTER_DIR, else raftkv/cluster under XDG's state home."""
    chosen = os.environ.get("RAFTKV_CLUSTER_DIR")
    if chosen:
        return Path(chosen)
    state_home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state_home) / "raftkv" / "cluster"
