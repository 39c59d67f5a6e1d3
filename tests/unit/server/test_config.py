"""Settings are checked at start, and an error names the field and what would be right."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from raftkv.server.config import NodeConfig, cluster_id, member_id, parse_address, parse_initial_cluster
from raftkv.server.errors import ConfigError

THREE = {"n1": "127.0.0.1:2380", "n2": "127.0.0.1:2480", "n3": "127.0.0.1:2580"}


def config(tmp_path: Path, **settings: Any) -> NodeConfig:
    return NodeConfig(**{"name": "n1", "data_dir": tmp_path, **settings})


def test_the_defaults_are_a_node_alone(tmp_path: Path) -> None:
    node = config(tmp_path)
    assert node.initial_cluster == {"n1": "127.0.0.1:2380"}
    assert node.advertise_client == node.listen_client == "127.0.0.1:2379"
    assert node.peers == {}


def test_urls_of_etcd_are_understood(tmp_path: Path) -> None:
    node = config(
        tmp_path,
        listen_peer="http://127.0.0.1:2380/",
        initial_cluster={name: f"http://{address}" for name, address in THREE.items()},
    )
    assert node.initial_cluster == THREE
    assert list(node.peers) == ["n2", "n3"]


def test_ids_are_the_same_on_every_node_whatever_the_order(tmp_path: Path) -> None:
    backwards = dict(reversed(THREE.items()))
    assert cluster_id(THREE, "t") == cluster_id(backwards, "t")
    assert cluster_id(THREE, "t") != cluster_id(THREE, "u")
    ids = {member_id(name, address, "t") for name, address in THREE.items()}
    assert len(ids) == 3
    assert all(0 < each < 2**64 for each in ids)
    assert member_id("a", "b:1", "t") != member_id("ab", ":1", "t")
    here = config(tmp_path, initial_cluster=THREE)
    there = config(tmp_path, name="n2", listen_peer=THREE["n2"], initial_cluster=backwards)
    assert here.cluster_id == there.cluster_id
    # Written down: an id that changed with a release would make a node refuse its own data directory.
    assert member_id("n1", "127.0.0.1:2380", "raftkv-cluster") == 13182441079986459120
    assert cluster_id({"n1": "127.0.0.1:2380", "n2": "127.0.0.1:2480"}, "raftkv-cluster") == 1450823048283149228


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"name": ""}, "name", "must be 1 to 63"),
    ({"name": "a b"}, "name", "must be 1 to 63"),
    ({"name": "n" * 64}, "name", "must be 1 to 63"),
    ({"name": "../x"}, "name", "must be 1 to 63"),
    ({"data_dir": Path(__file__)}, "data_dir", "is not a directory"),
    ({"listen_client": "127.0.0.1"}, "listen_client", "must be host:port"),
    ({"listen_client": ":2379"}, "listen_client", "must be host:port"),
    ({"listen_client": "127.0.0.1:0"}, "listen_client", "from 1 to 65535"),
    ({"listen_client": "127.0.0.1:65536"}, "listen_client", "from 1 to 65535"),
    ({"listen_client": "127.0.0.1:x"}, "listen_client", "from 1 to 65535"),
    ({"listen_client": "127.0.0.999:1"}, "listen_client", "no IPv4 address"),
    ({"listen_client": "::1:2379"}, "listen_client", "in brackets"),
    ({"listen_client": "[::g]:2379"}, "listen_client", "no IPv6 address"),
    ({"listen_client": "a b:2379"}, "listen_client", "no host name"),
    ({"listen_client": "https://127.0.0.1:2379"}, "listen_client", "TLS is not supported yet"),
    ({"listen_client": "unix:///x"}, "listen_client", "only host:port"),
    ({"listen_client": "127.0.0.1:2380"}, "listen_peer", "must be two ports"),
    ({"advertise_client": "nowhere"}, "advertise_client", "must be host:port"),
    ({"initial_cluster": {"n2": "127.0.0.1:2480"}}, "initial_cluster", "this node, n1, is not in it"),
    ({"initial_cluster": {"n1": "127.0.0.1:9999"}}, "initial_cluster", "but listen_peer is 127.0.0.1:2380"),
    ({"initial_cluster": {"n1": "10.0.0.1:2380"}}, "initial_cluster", "make them agree"),
    ({"initial_cluster": {**THREE, "n4": THREE["n2"]}}, "initial_cluster", "n2 and n4 have the same peer address"),
    ({"initial_cluster": {**THREE, "": "127.0.0.1:1"}}, "initial_cluster", "the name ''"),
    ({"initial_cluster": {f"n{n}": f"127.0.0.1:{3000 + n}" for n in range(65)}}, "initial_cluster", "at most 64"),
    ({"initial_cluster_state": "old"}, "initial_cluster_state", "new, existing"),
    ({"initial_cluster_token": ""}, "initial_cluster_token", "1 to 256"),
    ({"tick_ms": 0}, "tick_ms", "from 1 to 1000"),
    ({"tick_ms": 30}, "tick_ms", "must be multiples"),
    ({"heartbeat_ms": 100}, "election_ms", "at least 5 x heartbeat_ms, that is 500"),
    ({"election_ms": 999_999_999}, "election_ms", "from 10 to 600000"),
    ({"request_timeout_s": 0.0}, "request_timeout_s", "from 0.1"),
    ({"max_request_bytes": 10}, "max_request_bytes", "from 1024"),
    ({"max_txn_ops": 0}, "max_txn_ops", "from 1"),
    ({"max_txn_ops": True}, "max_txn_ops", "must be a number"),
    ({"max_txn_ops": "many"}, "max_txn_ops", "must be a number"),
    ({"max_key_bytes": 4096, "max_request_bytes": 2048}, "max_key_bytes", "exceeds max_request_bytes"),
    ({"inflight_bytes_max": 1 << 20}, "inflight_bytes_max", "must hold one request"),
    ({"inflight_requests_max": -1}, "inflight_requests_max", "from 1"),
    ({"quota_backend_bytes": 5}, "quota_backend_bytes", "from 1048576"),
    ({"log_level": "loud"}, "log_level", "debug, info"),
    ({"log_format": "xml"}, "log_format", "auto, console, json"),
    ({"lifeline_fd": -1}, "lifeline_fd", "from 0"),
]


@pytest.mark.parametrize(("settings", "field", "problem"), WRONG)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **settings)
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nearly_right_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'n2'"):
        config(tmp_path, name="n22", initial_cluster=THREE)


def test_a_node_may_listen_everywhere_and_be_known_by_one_name(tmp_path: Path) -> None:
    members = {"n1": "node-1.example.org:2380", "n2": "node-2.example.org:2380"}
    assert config(tmp_path, listen_peer="0.0.0.0:2380", initial_cluster=members).member_id
    assert config(tmp_path, listen_peer="[::]:2380", initial_cluster=members).member_id
    with pytest.raises(ConfigError, match="make them agree"):
        config(tmp_path, listen_peer="0.0.0.0:2381", initial_cluster=members)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("n1", "must be NAME=host:port"), ("n1=127.0.0.1:1,n1=127.0.0.1:2", "n1 is named twice"), ("n1=x", "host:port")],
)
def test_an_initial_cluster_that_cannot_be_read(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_initial_cluster(text)


def test_an_initial_cluster_keeps_its_order() -> None:
    assert list(parse_initial_cluster(" b=h:1, a=h:2 ,")) == ["b", "a"]
    assert parse_address("x", " [0:0::1]:02379") == "[::1]:2379"


def test_every_field_says_what_it_is() -> None:
    for each in fields(NodeConfig):
        assert each.metadata["help"].endswith((".", "-")), each.name
