"""`raftkv node`: flags, then environment, then file, then defaults; and what is wrong is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from raftkv.cli.node import command
from raftkv.server import node
from raftkv.server.config import NodeConfig


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[NodeConfig]:
    """What the command would have run."""
    seen: list[NodeConfig] = []

    def run(config: NodeConfig) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(node, "run", run)
    return seen


def call(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(command, [str(each) for each in arguments], env=environment)


def test_flags_win_over_the_environment_over_the_file_over_defaults(started: list[NodeConfig], tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(
        'name = "file"\ndata-dir = "here"\nheartbeat_ms = 40\nelection_ms = 600\nmax_txn_ops = 7\n'
        '[initial_cluster]\nflag = "127.0.0.1:2380"\nother = "127.0.0.1:2480"\n'
    )
    result = call(
        "--config", file, "--name", "flag", "--election-ms", 800, RAFTKV_ELECTION_MS="700", RAFTKV_HEARTBEAT_MS="20"
    )
    assert result.exit_code == 0, result.output
    (config,) = started
    assert (config.name, config.election_ms, config.heartbeat_ms, config.max_txn_ops) == ("flag", 800, 20, 7)
    assert config.data_dir == Path("here")
    assert list(config.initial_cluster) == ["flag", "other"]
    assert config.max_request_bytes == 1_572_864


def test_names_of_etcds_flags_are_understood_but_not_advertised(started: list[NodeConfig], tmp_path: Path) -> None:
    result = call(
        *("--name", "n1", "--data-dir", tmp_path, "--listen-client-urls", "http://127.0.0.1:3379"),
        *("--listen-peer-urls", "http://127.0.0.1:3380", "--initial-cluster", "n1=http://127.0.0.1:3380"),
        *("--advertise-client-urls", "http://localhost:3379", "--heartbeat-interval", 100, "--election-timeout", 1000),
        *("--snapshot-count", 50, "--initial-cluster-state", "new", "--quota-backend-bytes", 1 << 30),
    )
    assert result.exit_code == 0, result.output
    (config,) = started
    assert (config.listen_client, config.advertise_client) == ("127.0.0.1:3379", "localhost:3379")
    assert (config.heartbeat_ms, config.election_ms, config.snapshot_entries) == (100, 1000, 50)
    assert "listen-client-urls" not in call("--help").output


def test_every_setting_is_a_flag_with_help() -> None:
    shown = call("--help").output
    for each in fields(NodeConfig):
        assert (f"--{each.name.replace('_', '-')}" in shown) != each.metadata.get("hidden", False), each.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--name'"),
        (("--name", "n1"), "Missing option '--data-dir'"),
        (("--name", "n1", "--data-dir", "d", "--nmae", "x"), "--name"),
        (("--name", "n1", "--data-dir", "d", "--tick-ms", "soon"), "'--tick-ms'"),
        (("--name", "n 1", "--data-dir", "d"), "--name: 'n 1' must be"),
        (("--name", "n1", "--data-dir", "d", "--election-ms", "60"), "--election-ms: 60 must be at least"),
        (("--name", "n1", "--data-dir", "d", "--initial-cluster", "n1"), "--initial-cluster: 'n1' must be NAME="),
        (("--name", "n1", "--data-dir", "d", "--listen-client", "https://h:1"), "--listen-client: 'https://h:1': TLS"),
        (("--name", "n1", "--data-dir", "d", "--config", "no-such-file"), "no-such-file"),
        (("--name", "n1", "--data-dir", "d", "extra"), "extra"),
    ],
)
def test_bad_usage_is_code_2_and_starts_nothing(
    started: list[NodeConfig], arguments: tuple[str, ...], message: str
) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert started == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("elction_ms = 5", "unknown key 'elction_ms'; did you mean 'election_ms'?"),
        ("[members]\nx = 1", "unknown key 'members'"),
        ("lifeline_fd = 3", "unknown key 'lifeline_fd'"),
        ("name = 5", "name must be a string, not 5"),
        ('tick_ms = "fast"', "tick_ms must be a number, not 'fast'"),
        ("tick_ms = true", "tick_ms must be a number, not True"),
        ("name = [", "is no TOML"),
        ('name = "\xff"'.encode("latin-1"), "cannot be read"),
        ("tick_ms = 5000", "--tick-ms: 5000 must be from 1 to 1000"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_key(
    started: list[NodeConfig], tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = call("--config", file, "--name", "n1", "--data-dir", tmp_path / "data")
    assert result.exit_code == 2
    assert message in result.output
    assert started == []


def test_the_exit_code_is_the_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node, "run", lambda config: 1)
    assert call("--name", "n1", "--data-dir", tmp_path).exit_code == 1


def test_a_node_does_not_run_without_its_assertions(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "raftkv", "node", "--name", "n1", "--data-dir", str(tmp_path / "d")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "python -O" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "d").exists()
