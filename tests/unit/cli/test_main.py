"""The command as such: its help, its exit codes, what it imports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import click
import pytest

from raftkv import cli

HEAVY = (
    "grpc",
    "google.protobuf",
    "asyncio",
    "rich",
    "structlog",
    "plyvel",
    "raftkv.client",
    "raftkv.server",
    "raftkv._pb",
)


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))}
    return subprocess.run(
        [sys.executable, "-m", "raftkv", *arguments],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["put", "--help"], ["cluster", "--help"], ["nosuch"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from raftkv.cli import run; run(sys.argv[1:]);"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    if arguments[0] == "cluster":
        code = code.replace("'asyncio', ", "")
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    assert shown.stderr.splitlines()[-1] == "[]"


def test_every_command_of_the_overview_is_there_and_has_help() -> None:
    context = click.Context(cli.cli)
    for name, (_, place, text) in cli._COMMANDS.items():
        module = f"raftkv.cli.{place.partition(':')[0]}"
        assert importlib.util.find_spec(module) is not None, module
        found = cli.cli.get_command(context, name)
        assert isinstance(found, click.Command), name
        assert found.help, name
        assert text.endswith(".")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nosuch"], "no such command 'nosuch'."),
        (["statsu"], "no such command 'statsu'. Did you mean 'status'?"),
        (["put"], "Missing argument 'KEY'"),
        (["put", "k", "v", "--ignore-value"], "--ignore-value keeps the key's value"),
        (["put", "k", "v", "--lease", "xyz"], "'xyz' is not a lease id"),
        (["get", "a", "--prefx"], "--prefix"),
        (["get", "a", "b", "--prefix"], "--prefix takes one key; leave out the range end 'b'"),
        (["get", "a", "--prefix", "--from-key"], "exclude each other"),
        (["get", "a", "--limit", "-1"], "-1 is not in the range"),
        (["get", "a", "-o", "yaml"], "'yaml' is not one of"),
        (["get", "a", "--timeout", "0"], "'0' is not a time above 0"),
        (["get", "a", "--timeout", "5 apples"], "'5 apples' is not a time above 0"),
        (["get", "a", "--endpoints", ","], "names no endpoint"),
        (["get", "a", "--endpoints", "h:port"], "port 'port' is not a number from 1 to 65535"),
        (["compact", "0"], "0 is not in the range"),
        (["cluster", "up", "-n", "0"], "0 is not in the range"),
        (["cluster", "kill"], "Missing argument 'TARGET'"),
    ],
)
def test_bad_usage_is_2_and_says_what_is_wrong(arguments: list[str], text: str) -> None:
    shown = command(*arguments)
    assert shown.returncode == 2, shown.stderr
    assert text in shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stdout == ""


def test_what_fails_is_1_with_one_line() -> None:
    shown = command("--endpoints", "127.0.0.1:1", "--timeout", "300ms", "get", "a")
    assert shown.returncode == 1
    assert shown.stdout == ""
    assert shown.stderr.startswith("Error: no endpoint could be reached: 127.0.0.1:1")
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "endpoint"),
    [
        ([], {"RAFTKV_ENDPOINTS": "127.0.0.1:2", "ETCDCTL_ENDPOINTS": "127.0.0.1:3"}, "127.0.0.1:2"),
        ([], {"ETCDCTL_ENDPOINTS": "http://127.0.0.1:3"}, "127.0.0.1:3"),
        (["--endpoints", "127.0.0.1:4"], {"RAFTKV_ENDPOINTS": "127.0.0.1:2"}, "127.0.0.1:4"),
        ([], {"XDG_STATE_HOME": "/nonexistent"}, "127.0.0.1:2379"),
    ],
)
def test_where_endpoints_come_from(
    arguments: list[str], variables: dict[str, str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raftkv.cli.options import endpoints_from

    for name in ("RAFTKV_ENDPOINTS", "ETCDCTL_ENDPOINTS", "RAFTKV_CLUSTER_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (found,) = endpoints_from(arguments[1] if arguments else None)
    assert found.removeprefix("http://") == endpoint


def test_nobody_answers_for_a_directory(tmp_path: object) -> None:
    shown = command("cluster", "status", "--dir", str(tmp_path))
    assert shown.returncode == 1
    assert "no cluster is running in" in shown.stderr
