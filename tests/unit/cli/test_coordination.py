"""Leases, guards, watches, locks: what their words mean, and how their answers look. No cluster is asked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner

from raftkv._pb import common_pb2, lease_pb2
from raftkv.cli import cli, reacting, renewal
from raftkv.cli.child import Child
from raftkv.cli.following import show
from raftkv.cli.guards import Guard, GuardType
from raftkv.cli.options import Duration, LeaseId, Settings, TimeToLive
from raftkv.cli.signals import Interrupted, Signals
from raftkv.cli.txn import operation
from raftkv.cli.watch import watch

NOWHERE = ["--endpoints", "127.0.0.1:1", "--timeout", "300ms"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lease", "grant"], "Missing argument 'TTL'"),
        (["lease", "grant", "x"], "Invalid value for 'TTL': 'x' is not a time above 0"),
        (["lease", "grant", "0"], "'0' is not a time above 0"),
        (["lease", "grant", "--", "-1"], "'-1' is not a time above 0"),
        (["lease", "grant", "9000000001"], "'9000000001' is more than 9000000000 seconds"),
        (["lease", "revoke", "xyz"], "Invalid value for 'LEASE': 'xyz' is not a lease id"),
        (["lease", "revoke", "f" * 16], f"the greatest is {(1 << 63) - 1:x}"),
        (["lease", "keepalife", "1"], "no such command 'keepalife'. Did you mean 'keepalive'?"),
        (["put", "k", "v", "--guard", "k"], "Invalid value for '--guard': 'k' is not KEY:TOKEN"),
        (["put", "k", "v", "--guard", "k:x"], "'k:x' is not KEY:TOKEN"),
        (["put", "k", "v", "--guard", ":5"], "':5' is not KEY:TOKEN"),
        (["del", "k", "--guard", "k:0"], "a token is a revision, from 1 to"),
        (["txn", "--guard", f"k:{1 << 63}"], "a token is a revision, from 1 to"),
        (["watch"], "Missing argument 'KEY'"),
        (["watch", "a", "b", "--prefix"], "--prefix takes one key"),
        (["watch", "a", "--"], "COMMAND is missing: nothing follows --"),
        (["watch", "--prefix", "--", "-a", "--"], "COMMAND is missing: nothing follows --"),
        (["watch", "--"], "Missing argument 'KEY'"),
        (["watch", "a", "b", "date"], "goes after --: watch KEY [RANGE_END] -- COMMAND"),
        (["watch", "a", "--rev", "-1"], "-1 is not in the range"),
        (["watch", "a", "--filter", "nopt"], "'nopt' is not one of 'noput', 'nodelete'"),
        (["watch", "a", "--filter", "noput", "--filter", "nodelete"], "leave nothing to show; choose one"),
        (["lock"], "Missing argument 'NAME'"),
        (["lock", "//"], "Invalid value for 'NAME': must not be empty, nor slashes alone"),
        (["lock", "n", "--ttl", "0"], "Invalid value for '--ttl': '0' is not a time above 0"),
        (["lock", "n", "--ttl", "9999999999"], "Invalid value for '--ttl'"),
        (["lock", "n", "--wait", "soon"], "'soon' is not a time, such as 5s or 500ms"),
        (["lock", "n", "--wait", "-1"], "'-1' is not a time, such as 5s or 500ms"),
        (["lock", "n", "sh", "-c", "true"], "goes after --: lock NAME -- COMMAND"),
        (["elect", "n"], "VALUE is missing"),
        (["elect", "n", "v", "--listen"], "--listen only looks; leave VALUE out"),
    ],
)
def test_bad_usage_names_what_is_wrong(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert text in result.stderr.replace("\n", " ")


def test_what_cannot_be_reached_is_one_line() -> None:
    for words in (
        ["lease", "list"],
        ["lease", "keep-alive", "5"],
        ["watch", "a"],
        ["lock", "n"],
        ["elect", "n", "v"],
        ["elect", "n", "-l"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "raftkv", *words, *NOWHERE], capture_output=True, text=True, timeout=30, check=False
        )
        assert (done.returncode, done.stdout) == (1, ""), words
        assert done.stderr.startswith("Error: "), words
        assert done.stderr.count("\n") == 1, words
        assert "127.0.0.1:1" in done.stderr, words


def test_a_command_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    for command, code in (("nosuch-command", 127), (str(tmp_path / "nosuch"), 127), (str(plain), 126)):
        for words in (["lock", "n"], ["watch", "k"]):
            result = CliRunner().invoke(cli, [*NOWHERE, *words, "--", command], standalone_mode=False)
            assert result.return_value == code
            assert result.stderr.startswith(f"Error: {command}: ")


@pytest.mark.parametrize(
    ("arguments", "key", "range_end", "prefix", "command"),
    [
        (["a"], "a", None, False, ()),
        (["a", "--", "date"], "a", None, False, ("date",)),
        (["a", "b", "--", "sh", "-c", "x", "--", "y"], "a", "b", False, ("sh", "-c", "x", "--", "y")),
        (["--prefix", "a", "--", "echo", "--prefix"], "a", None, True, ("echo", "--prefix")),
        (["a", "--rev", "5", "--", "date"], "a", None, False, ("date",)),
        (["--", "-a"], "-a", None, False, ()),
        (["--", "-a", "-b"], "-a", "-b", False, ()),
        (["--prefix", "--", "-a", "--", "date", "-u"], "-a", None, True, ("date", "-u")),
    ],
)
def test_what_a_watch_is_told(
    arguments: list[str], key: str, range_end: str | None, prefix: bool, command: tuple[str, ...]
) -> None:
    told = watch.make_context("watch", arguments).params
    assert (told["key"], told["range_end"], told["prefix"], told["command"]) == (key, range_end, prefix, command)


def test_words_and_what_they_mean() -> None:
    assert LeaseId().convert("0694DA1fe95cb1005", None, None) == 0x694DA1FE95CB1005
    assert TimeToLive().convert("500ms", None, None) == 0.5
    assert TimeToLive().convert("9000000000", None, None) == 9e9
    assert Duration(zero=True).convert("0", None, None) == 0
    assert GuardType().convert("a:b/1f:17", None, None) == Guard(b"a:b/1f", 17)
    assert GuardType().convert("\udcff:1", None, None) == Guard(b"\xff", 1)


def test_a_guard_inside_a_transaction_is_refused() -> None:
    with pytest.raises(click.UsageError, match="--guard is for the whole transaction"):
        operation("put k v --guard l/1:5")


# --- how a watch's answers look ---------------------------------------------------------------------------------------

HEADER = common_pb2.ResponseHeader(cluster_id=1, member_id=2, revision=7, raft_term=3)
PUT = common_pb2.Event(
    kv=common_pb2.KeyValue(key=b"k", value=b"\xff\n", create_revision=5, mod_revision=6, version=2),
    prev_kv=common_pb2.KeyValue(key=b"k", value=b"1", create_revision=5, mod_revision=5, version=1),
)
HEADER_FIELDS = b'"ClusterID" : 1\n"MemberID" : 2\n"Revision" : 7\n"RaftTerm" : 3\n'
EXPIRED = common_pb2.Event(type=common_pb2.Event.DELETE, kv=common_pb2.KeyValue(key=b"k", mod_revision=7), expired=True)


def shown(capfdbinary: pytest.CaptureFixture[bytes], form: str, *, hex_: bool = False, empty: bool = False) -> bytes:
    settings = Settings(endpoints=(), output=form, timeout_s=1, hex=hex_)
    show([] if empty else [PUT, EXPIRED], HEADER, settings, revision=7)
    return capfdbinary.readouterr().out


def test_events_as_etcdctl_shows_them(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert shown(capfdbinary, "simple") == b"PUT\nk\n1\nk\n\xff\n\nDELETE\nk\n\n"
    assert shown(capfdbinary, "simple", hex_=True) == b"PUT\n\\x6b\n\\x31\n\\x6b\n\\xff\\x0a\nDELETE\n\\x6b\n\n"
    assert shown(capfdbinary, "simple", empty=True) == b"progress notify: 7\n"
    answer = json.loads(shown(capfdbinary, "json"))
    assert list(answer) == ["Header", "Events", "CompactRevision", "Canceled", "Created"]
    assert answer["Events"][1] == {"type": 1, "kv": {"key": "aw==", "mod_revision": 7}}
    assert shown(capfdbinary, "fields", empty=True) == b"progress notify: 7\n" + HEADER_FIELDS
    assert shown(capfdbinary, "fields") == HEADER_FIELDS + (
        b'"Type" : PUT\n"PrevKey" : "k"\n"PrevCreateRevision" : 5\n"PrevModRevision" : 5\n"PrevVersion" : 1\n'
        b'"PrevValue" : "1"\n"PrevLease" : 0\n"Key" : "k"\n"CreateRevision" : 5\n"ModRevision" : 6\n"Version" : 2\n'
        b'"Value" : "\\xff\\n"\n"Lease" : 0\n'
        b'"Type" : DELETE\n"Key" : "k"\n"CreateRevision" : 0\n"ModRevision" : 7\n"Version" : 0\n'
        b'"Value" : ""\n"Lease" : 0\n'
    )
    table = shown(capfdbinary, "table").decode().splitlines()
    assert table[3].split() == ["|", "PUT", "|", "k", "|", "\\\\xff\\n", "|", "6", "|", "1", "|"]
    assert table[4].split() == ["|", "EXPIRE", "|", "k", "|", "|", "7", "|", "|"]


# --- renewals ---------------------------------------------------------------------------------------------------------


def test_a_node_that_is_slow_is_heard_out_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No try as long as the first would ever do."""
    monkeypatch.setattr(renewal, "TRY_MIN_S", 0.2)
    tries = 0

    def answer(requests: Iterator[lease_pb2.LeaseKeepAliveRequest], context: Any) -> Iterator[Any]:
        nonlocal tries
        tries += 1
        for request in requests:
            time.sleep(0.5)
            yield lease_pb2.LeaseKeepAliveResponse(ID=request.ID, TTL=60)

    handler = grpc.stream_stream_rpc_method_handler(
        answer, lease_pb2.LeaseKeepAliveRequest.FromString, lease_pb2.LeaseKeepAliveResponse.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(8))
    service, _, method = renewal.LEASE_KEEP_ALIVE.path.strip("/").partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        endpoint = f"127.0.0.1:{port}"
        settings = Settings(endpoints=(endpoint,), output="simple", timeout_s=1, hex=False)
        response = renewal._renew(settings, [endpoint], 7, 0.2, time.monotonic() + 60)
    finally:
        server.stop(0).wait()
    assert (response.ID, response.TTL) == (7, 60)
    assert tries > 1


# --- the command under a lock -----------------------------------------------------------------------------------------


async def test_a_child_gets_what_a_shell_would_give_it(tmp_path: Path) -> None:
    """Its words as they are, the environment, signals as the system has them (not as Python has set them)."""
    script = 'printf "%s|" "$@" "$MINE" > "$0"; grep SigIgn /proc/$$/status >> "$0" || true; exit 9'
    out = tmp_path / "out"
    child = await Child.start(["sh", "-c", script, str(out), "a b", "", "-c", "\udcff"], {"MINE": "yes"})
    assert await child.wait() == 9
    words, _, ignored = out.read_bytes().rpartition(b"|")
    assert words == b"a b||-c|\xff|yes"
    if ignored:
        assert int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


async def appears(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240 - a file tells nobody
        await asyncio.sleep(0.02)


async def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    child = await Child.start(["sh", "-c", f'trap "" TERM; touch {tmp_path}/on; while :; do sleep 0.05; done'], {})
    await appears(tmp_path / "on")
    await child.end(0.2)
    assert await child.wait() == 128 + signal.SIGKILL


async def test_a_child_that_listens_ends_by_itself_with_its_own_code(tmp_path: Path) -> None:
    child = await Child.start(
        ["sh", "-c", f'trap "exit 3" TERM; touch {tmp_path}/on; while :; do sleep 0.05; done'], {}
    )
    await appears(tmp_path / "on")
    await child.end(20)
    assert await child.wait() == 3
    child.send(signal.SIGTERM)  # to nobody
    child.kill()


async def test_a_signal_is_the_commands_although_we_have_not_been_told_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine it is at work long before."""
    signals = Signals()
    start = Child.start

    async def start_slowly(*arguments: Any, **options: Any) -> Child:
        child = await start(*arguments, **options)
        await appears(tmp_path / "on")
        signals._take(signal.SIGTERM)
        await asyncio.sleep(0)
        return child

    monkeypatch.setattr(Child, "start", start_slowly)
    script = f'trap "echo asked > {tmp_path}/said; exit 3" TERM; touch {tmp_path}/on; while :; do sleep 0.05; done'
    event = common_pb2.Event(kv={"key": b"k", "mod_revision": 2})
    with pytest.raises(Interrupted) as caught:
        async with asyncio.timeout(30):
            await reacting._run_for(event, ["sh", "-c", script], {}, signals)
    assert caught.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "said").read_text() == "asked\n"
    assert not signals.came.done()


def test_help_of_these_imports_nothing_heavy() -> None:
    code = (
        "import sys; from raftkv.cli import run; run(sys.argv[1:]);"
        "print([m for m in ('grpc', 'google.protobuf', 'asyncio', 'raftkv.client') if m in sys.modules], "
        "file=sys.stderr)"
    )
    for words in (["lease", "--help"], ["lease", "grant", "-h"], ["watch", "-h"], ["lock", "-h"], ["elect", "-h"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30, check=True, env=os.environ
        )
        assert done.stderr.splitlines()[-1] == "[]", words
        assert done.stdout.startswith("Usage: raftkv ")
