"""The command as such: its help, its exit codes, what it imports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from raftkv import cli
from raftkv.cli.options import Settings
from raftkv.cli.secure import PARAMETERS, secure_from

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


def command(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))}
    return subprocess.run(
        [sys.executable, "-m", "raftkv", *arguments],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        timeout=30,
        check=False,
        cwd=cwd,
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


PEM = "-----BEGIN CERTIFICATE-----\n"
SECURE = "https://127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "variables", "text"),
    [
        (["--cacert", "nosuch"], {}, "Invalid value for --cacert: cannot read 'nosuch': No such file or directory"),
        (["--cacert", "."], {}, "Invalid value for --cacert: cannot read '.': Is a directory"),
        (["--cacert", "empty"], {}, "Invalid value for --cacert: 'empty': no certificate in PEM form in it"),
        (["--cert", "pem"], {}, "Invalid value for --key: missing: a certificate and its private key go together"),
        (["--key", "pem"], {}, "Invalid value for --cert: missing"),
        (["--cert", "pem", "--key", "pem"], {}, "Invalid value for --key: 'pem': no private key in PEM form in it"),
        (["--key", ""], {}, "Invalid value for '--key': is empty"),
        ([], {"RAFTKV_CACERT": "nosuch", "ETCDCTL_CACERT": "pem"}, "Invalid value for RAFTKV_CACERT: cannot read"),
        ([], {"ETCDCTL_CERT": "pem", "ETCDCTL_KEY": "nosuch"}, "Invalid value for ETCDCTL_KEY: cannot read 'nosuch'"),
        (
            ["--cacert", "pem", "--endpoints", "http://127.0.0.1:1"],
            {},
            "--cacert is for TLS, and the endpoint http://127.0.0.1:1 is one without",
        ),
        (["--endpoints", "http://127.0.0.1:1,https://127.0.0.1:2"], {}, "is an endpoint without TLS"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_what_is_wrong_with_a_file_for_tls_names_its_flag(
    arguments: list[str], variables: dict[str, str], text: str, before: bool, tmp_path: Path
) -> None:
    (tmp_path / "pem").write_text(PEM)
    (tmp_path / "empty").touch()
    words = [*arguments, "get", "a"] if before else ["get", "a", *arguments]
    shown = command(*words, cwd=tmp_path, **variables)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert text in shown.stderr.replace("\n", " ")
    assert "Traceback" not in shown.stderr


def test_who_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CACERT", "CERT", "KEY"):
        monkeypatch.delenv(f"RAFTKV_{name}", raising=False)
        monkeypatch.delenv(f"ETCDCTL_{name}", raising=False)
    given = dict.fromkeys(PARAMETERS)
    (tmp_path / "pem").write_text(PEM)
    assert secure_from(["127.0.0.1:1"], given) is None
    assert secure_from(["http://127.0.0.1:1"], given) is None
    plain = secure_from([SECURE], given)
    assert plain is not None
    assert (plain.tls.ca, plain.environment) == (None, {})
    flagged = secure_from(["127.0.0.1:1"], {**given, "tls_cacert": "pem"})
    assert flagged is not None
    assert flagged.tls.ca == PEM.encode()
    settings = Settings(endpoints=("127.0.0.1:1",), output="simple", timeout_s=1, hex=False, secure=flagged)
    assert settings.environment(["127.0.0.1:1"]) == {
        "RAFTKV_ENDPOINTS": SECURE,
        "RAFTKV_CACERT": str(tmp_path / "pem"),
    }
    monkeypatch.setenv("ETCDCTL_CACERT", "pem")
    assert secure_from(["127.0.0.1:1"], given) is not None
    assert secure_from(["http://127.0.0.1:1"], given) is None


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
