from __future__ import annotations

from pathlib import Path

import pytest

from raftkv.local import LocalClusterError
from raftkv.local.layout import Layout, NodeSpec, Topology, default_directory, fixed_ports, load, read_topology

SHIPPED = Path(__file__).parents[3] / "cluster" / "local.toml"


def test_the_shipped_topology_is_read() -> None:
    topology = read_topology(SHIPPED)
    assert (topology.nodes, topology.base_port, topology.host) == (5, 2379, "127.0.0.1")
    assert topology.arguments == ("--heartbeat-ms", "50", "--election-ms", "400")


def test_options_come_before_the_file() -> None:
    assert Topology(nodes=5, base_port=1).with_options(3, None) == Topology(nodes=3, base_port=1)
    assert Topology(nodes=5, base_port=1).with_options(None, 0) == Topology(nodes=5, base_port=0)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("node_count = 5", r"unknown key 'node_count' \(known: "),
        ("base-port = 5", r"unknown key 'base-port' \(known: base_port\)"),
        ('nodes = "5"', "nodes: '5' is not int"),
        ("nodes = true", "nodes: True is not int"),
        ("node = 5", "node: 5 is not a table"),
        ("[node]\nlisten-peer = 'x'", "node.listen-peer: the supervisor sets it"),
        ("nodes = ", "Invalid value"),
    ],
)
def test_what_is_wrong_in_a_topology_is_named(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(LocalClusterError, match=error):
        read_topology(path)


def test_the_state_file_gives_back_what_it_took(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "127.0.0.1", fixed_ports(3, 2379))
    layout.save({"pid": 1, "socket": "/s"})
    assert load(tmp_path) == (layout, {"pid": 1, "socket": "/s"})
    assert layout.nodes[1] == NodeSpec("n2", 2381, 2382)
    assert (tmp_path / "cluster.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{}", '{"version": 9}', "[]", '{"version": 1, "nodes": 3}', "\x00"])
def test_a_foreign_or_damaged_state_file_is_said_to_be_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text(text)
    with pytest.raises(LocalClusterError, match=r"cluster\.json"):
        load(tmp_path)


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    monkeypatch.delenv("RAFTKV_CLUSTER_DIR", raising=False)
    assert default_directory() == Path("/x/raftkv/cluster")
    monkeypatch.setenv("RAFTKV_CLUSTER_DIR", "/y")
    assert default_directory() == Path("/y")
