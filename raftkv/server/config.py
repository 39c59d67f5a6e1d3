"""The settings of one node, checked once at start.

The flags of `raftkv node`, its environment variables, the keys of its configuration file and the reference page are all
made from these fields; a field's `help` is their text. Times carry their unit in the name.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from raftkv.server.errors import ConfigError

T = TypeVar("T")

MIB: Final = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")
_MEMBERS_MAX: Final = 64


def _option(default: T, help_text: str, **metadata: Any) -> T:
    """A field with its help; mypy sees the default's type."""
    result: T = field(default=default, metadata={"help": help_text, **metadata})
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """How one node runs. Every field is checked; a wrong one raises `ConfigError` and nothing starts."""

    name: str = field(metadata={"help": "This node's name, one of --initial-cluster. Letters, digits and . _ -"})
    data_dir: Path = field(metadata={"help": "Directory of this node's log and state; made when missing."})
    listen_client: str = _option("127.0.0.1:2379", "host:port for clients.", etcd="listen-client-urls")
    listen_peer: str = _option("127.0.0.1:2380", "host:port for the other nodes.", etcd="listen-peer-urls")
    advertise_client: str = _option(
        "",
        "host:port under which clients reach this node; the default is --listen-client.",
        etcd="advertise-client-urls",
    )
    initial_cluster: Mapping[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "All members when the cluster begins: n1=host:port,n2=host:port (peer addresses). "
            "The default is this node alone."
        },
    )
    initial_cluster_state: Literal["new", "existing"] = _option(
        "new",
        "new: this node begins the cluster with the others; existing: it joins a cluster that runs.",
        choices=("new", "existing"),
    )
    initial_cluster_token: str = _option(
        "raftkv-cluster", "Tells clusters apart that were begun with the same names and addresses."
    )
    tick_ms: int = _option(10, "How long one tick of consensus is.", unit="ms", least=1, most=1000)
    heartbeat_ms: int = _option(
        50, "How often a leader shows that it lives.", unit="ms", least=1, most=60_000, etcd="heartbeat-interval"
    )
    election_ms: int = _option(
        400,
        "Silence before a campaign, drawn anew from one to two times this. At least five heartbeats.",
        unit="ms",
        least=10,
        most=600_000,
        etcd="election-timeout",
    )
    request_timeout_s: float = _option(
        7.0,
        "How long a request without a deadline may wait; etcd has 5 s + 2 election timeouts.",
        unit="s",
        least=0.1,
        most=3600.0,
    )
    max_request_bytes: int = _option(1_572_864, "The largest write.", unit="bytes", least=1024, most=64 * MIB)
    max_txn_ops: int = _option(128, "The most compares, or operations, in a transaction.", least=1, most=100_000)
    max_key_bytes: int = _option(32_768, "The longest key.", unit="bytes", least=1, most=MIB)
    inflight_requests_max: int = _option(
        10_000, "Requests under way on this node; more are refused with RESOURCE_EXHAUSTED.", least=1, most=10_000_000
    )
    inflight_bytes_max: int = _option(
        64 * MIB,
        "Bytes of requests under way on this node; more are refused with RESOURCE_EXHAUSTED.",
        unit="bytes",
        least=MIB,
        most=1 << 40,
    )
    apply_lag_max: int = _option(
        5_000,
        "Committed entries this node may still have to apply; further behind, it counts as restoring.",
        least=1,
        most=1 << 40,
    )
    snapshot_entries: int = _option(
        10_000, "Cut the log when it grew by so many entries.", least=1, most=1 << 40, etcd="snapshot-count"
    )
    snapshot_log_bytes: int = _option(
        64 * MIB, "Cut the log when it grew by so many bytes.", unit="bytes", least=1024, most=1 << 40
    )
    snapshot_catchup_entries: int = _option(
        5_000, "Entries kept behind a cut, for followers that are a little late.", least=0, most=1 << 40
    )
    quota_backend_bytes: int = _option(
        2048 * MIB,
        "The largest state; beyond it the alarm NOSPACE refuses writes that need space.",
        unit="bytes",
        least=MIB,
        most=1 << 50,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "info", "The least severe log lines that are written.", choices=("debug", "info", "warning", "error")
    )
    log_format: Literal["auto", "console", "json"] = _option(
        "auto", "auto: for people on a terminal, JSON otherwise.", choices=("auto", "console", "json")
    )
    lifeline_fd: int | None = _option(
        None, "End when this file descriptor reaches its end: the starter is gone.", hidden=True, least=0, most=1 << 20
    )

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name", f"{self.name!r} must be 1 to 63 letters, digits, '.', '_' or '-'")
        _check_bounds(self)
        set_field = object.__setattr__  # the frozen way in, for this once
        set_field(self, "data_dir", Path(self.data_dir))
        if self.data_dir.exists() and not self.data_dir.is_dir():
            raise ConfigError("data_dir", f"{self.data_dir} is not a directory")
        set_field(self, "listen_client", parse_address("listen_client", self.listen_client))
        set_field(self, "listen_peer", parse_address("listen_peer", self.listen_peer))
        advertised = self.advertise_client or self.listen_client
        set_field(self, "advertise_client", parse_address("advertise_client", advertised))
        if self.listen_client == self.listen_peer:
            raise ConfigError("listen_peer", f"{self.listen_peer} is listen_client too; they must be two ports")
        if not self.initial_cluster_token or len(self.initial_cluster_token) > 256:
            raise ConfigError("initial_cluster_token", "must have 1 to 256 characters")
        set_field(self, "initial_cluster", _check_cluster(self))
        if self.heartbeat_ms % self.tick_ms or self.election_ms % self.tick_ms:
            raise ConfigError("tick_ms", f"heartbeat_ms and election_ms must be multiples of it, {self.tick_ms}")
        if self.election_ms < 5 * self.heartbeat_ms:
            raise ConfigError(
                "election_ms", f"{self.election_ms} must be at least 5 x heartbeat_ms, that is {5 * self.heartbeat_ms}"
            )
        if self.max_key_bytes > self.max_request_bytes:
            raise ConfigError("max_key_bytes", f"{self.max_key_bytes} exceeds max_request_bytes")
        if self.inflight_bytes_max < self.max_request_bytes:
            raise ConfigError(
                "inflight_bytes_max", f"must hold one request of max_request_bytes, {self.max_request_bytes}"
            )

    @property
    def peers(self) -> dict[str, str]:
        """The other members: name to peer address, in the order given."""
        return {name: address for name, address in self.initial_cluster.items() if name != self.name}

    @property
    def member_id(self) -> int:
        """This node's member id, as the initial cluster makes it."""
        return member_id(self.name, self.initial_cluster[self.name], self.initial_cluster_token)

    @property
    def cluster_id(self) -> int:
        """The cluster's id, as the initial cluster makes it."""
        return cluster_id(self.initial_cluster, self.initial_cluster_token)


def member_id(name: str, peer_address: str, token: str) -> int:
    """The id of a member of an initial cluster: the same on each node, above 0, below 2**64."""
    return _hash("member", token, name, peer_address)


def cluster_id(initial_cluster: Mapping[str, str], token: str) -> int:
    """The id of a cluster: from its first members, in whatever order they are named. Above 0, below 2**64."""
    return _hash("cluster", token, *(f"{name}={address}" for name, address in sorted(initial_cluster.items())))


def parse_address(field_name: str, text: str) -> str:
    """`host:port` from `host:port` or `http://host:port`; IPv6 hosts are in brackets.

    Raises:
        ConfigError: naming `field_name`.
    """
    address = text.strip()
    scheme, separator, rest = address.partition("://")
    if separator:
        if scheme.lower() == "https":
            raise ConfigError(field_name, f"{text!r}: TLS is not supported yet; use host:port or http://host:port")
        if scheme.lower() != "http":
            raise ConfigError(field_name, f"{text!r}: only host:port or http://host:port is understood")
        address = rest.removesuffix("/")
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(field_name, f"{text!r} must be host:port with a port from 1 to 65535")
    return f"{_parse_host(field_name, text, host)}:{int(port)}"


def parse_initial_cluster(text: str, field_name: str = "initial_cluster") -> dict[str, str]:
    """The members from `n1=host:port,n2=host:port`, in order.

    Raises:
        ConfigError: a part is malformed, or a name or an address is there twice.
    """
    members: dict[str, str] = {}
    for part in text.split(","):
        if not part.strip():
            continue
        name, separator, address = part.strip().partition("=")
        if not separator:
            raise ConfigError(field_name, f"{part.strip()!r} must be NAME=host:port")
        if name in members:
            raise ConfigError(field_name, f"{name} is named twice; a member has one peer address here")
        members[name] = address
    return _check_members(members, field_name)


def closest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_bounds(config: NodeConfig) -> None:
    for each in fields(config):
        value = getattr(config, each.name)
        rule = each.metadata
        if "choices" in rule and value not in rule["choices"]:
            raise ConfigError(each.name, f"{value!r} must be one of {', '.join(rule['choices'])}")
        if "least" not in rule or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float if isinstance(rule["least"], float) else int):
            raise ConfigError(each.name, f"{value!r} must be a number")
        if not rule["least"] <= value <= rule["most"]:
            raise ConfigError(each.name, f"{value} must be from {rule['least']} to {rule['most']}")


def _check_members(members: Mapping[str, str], field_name: str) -> dict[str, str]:
    checked: dict[str, str] = {}
    owner: dict[str, str] = {}
    if len(members) > _MEMBERS_MAX:
        raise ConfigError(field_name, f"{len(members)} members; at most {_MEMBERS_MAX}")
    for name, text in members.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(field_name, f"the name {name!r} must be 1 to 63 letters, digits, '.', '_' or '-'")
        address = parse_address(field_name, text)
        if address in owner:
            raise ConfigError(field_name, f"{owner[address]} and {name} have the same peer address {address}")
        owner[address] = name
        checked[name] = address
    return checked


def _check_cluster(config: NodeConfig) -> dict[str, str]:
    members = _check_members(config.initial_cluster, "initial_cluster")
    if not members:
        return {config.name: config.listen_peer}
    if config.name not in members:
        hint = closest(config.name, members)
        raise ConfigError("initial_cluster", f"this node, {config.name}, is not in it: {', '.join(members)}{hint}")
    own, listen = members[config.name], config.listen_peer
    # A node may listen on every interface and be known by one of them; the port is then what must agree.
    wildcard = listen.rpartition(":")[0] in ("0.0.0.0", "[::]")
    if own != listen and not (wildcard and own.rpartition(":")[2] == listen.rpartition(":")[2]):
        raise ConfigError(
            "initial_cluster", f"it says {config.name}={own}, but listen_peer is {listen}; make them agree"
        )
    return members


def _parse_host(field_name: str, text: str, host: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
        except ValueError:
            raise ConfigError(field_name, f"{text!r}: {host} is no IPv6 address") from None
    if ":" in host:
        raise ConfigError(field_name, f"{text!r}: write an IPv6 address in brackets, [{host}]")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ConfigError(field_name, f"{text!r}: {host} is no IPv4 address") from None
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise ConfigError(field_name, f"{text!r}: {host!r} is no host name")
    return host.lower()


def _hash(*words: str) -> int:
    digest = hashlib.sha256()
    for word in words:
        raw = word.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)  # lengths, so that no two lists of words look the same
    return int.from_bytes(digest.digest()[:8], "little") or 1
