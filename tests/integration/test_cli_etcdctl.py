"""Our command line beside etcdctl: the same words to the same server print the same.

Both are asked of a raftkv cluster and of a real etcd.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raftkv.local import LocalCluster

# Up to thirty commands in a test, each a process: on a busy machine the start of one takes seconds.
pytestmark = [pytest.mark.integration, pytest.mark.system, pytest.mark.timeout(300)]

# Fields of etcd 3.6, which we send and show; the etcdctl here may be older and not know them.
NEWER = re.compile(rb',"(storageVersion|dbSizeQuota|downgradeInfo|hash_revision)":("[^"]*"|\d+|\{[^}]*\})')

ETCD_NODE = Path(__file__).parents[2] / "bench" / "etcd_node.py"


@pytest.fixture(scope="module", params=["raftkv", "etcd"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    command = {} if request.param == "raftkv" else {"command": (sys.executable, str(ETCD_NODE))}
    with LocalCluster(1, **command) as cluster:
        yield cluster.endpoints[0]


def environment(endpoint: str) -> dict[str, str]:
    """For either tool. What a call may take is not what is tested: etcdctl gives up a connection after two seconds."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))}
    patient = {"ETCDCTL_DIAL_TIMEOUT": "30s", "ETCDCTL_COMMAND_TIMEOUT": "30s"}
    return {**mine, **patient, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": endpoint}


def ask(tool: list[str], endpoint: str, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [*tool, *arguments],
        input=stdin,
        capture_output=True,
        timeout=100,
        check=False,
        env=environment(endpoint),
    )
    # etcdctl's own client logs each retry as JSON before it says what was wrong.
    error = b"\n".join(line for line in done.stderr.splitlines() if not line.startswith(b"{"))
    return done.returncode, done.stdout, error


def ours(endpoint: str, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    return ask([sys.executable, "-m", "raftkv"], endpoint, *arguments, stdin=stdin)


def theirs(endpoint: str, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    return ask(["etcdctl"], endpoint, *arguments, stdin=stdin)


def of_one_state(endpoint: str, *arguments: str) -> tuple[tuple[int, bytes, bytes], tuple[int, bytes, bytes]]:
    """What ours and theirs print. Status tells of the log too: where that went on between, both are asked again."""
    mine = ours(endpoint, *arguments)
    while True:
        told = theirs(endpoint, *arguments)
        again = ours(endpoint, *arguments) if arguments[:2] == ("endpoint", "status") else mine
        if again == mine:
            return mine, told
        mine = again


@pytest.fixture(scope="module")
def filled(endpoint: str) -> str:
    for key, value in [
        ("a", "1"),
        ("a", "2"),
        ("b", "<x> & é"),
        ("c", ""),
        ("c/1", "one"),
        ("c/2", "two\nlines"),
        ("a", "3"),
    ]:
        assert ours(endpoint, "put", "--", key, value) == (0, b"OK\n", b"")
    return endpoint


@pytest.mark.parametrize("form", ["simple", "json", "fields"])
@pytest.mark.parametrize(
    "words",
    [
        "get a",
        "get nope",
        "get a c",
        "get c/ --prefix",
        "get  --prefix",
        "get  --prefix --limit 2",
        "get  --from-key",
        "get b --from-key --keys-only",
        "get c/ --prefix --order DESCEND",
        "get  --prefix --sort-by MODIFY",
        "get  --prefix --sort-by VALUE --order=DESCEND",
        "get a --rev 2",
        "get a --consistency s",
        "get c --hex",
        "endpoint status",
        "endpoint hashkv",
        "member list",
        "alarm list",
    ],
)
def test_what_only_looks_prints_the_same(filled: str, words: str, form: str) -> None:
    arguments = [*words.split(" "), "-w", form]
    (code, out, error), told = of_one_state(filled, *arguments)
    if form == "json":
        out = NEWER.sub(b"", out)
    if (words, form) == ("alarm list", "fields") and told[0] == 2:
        # etcdctl 3.4 trips over an answer without a header, such as etcd's own.
        assert (code, error, b"panic" in told[2]) == (0, b"", True)
    else:
        assert (code, out, error) == told


def test_values_alone(filled: str) -> None:
    arguments = ("get", "c/", "--prefix", "--print-value-only")
    assert ours(filled, *arguments) == theirs(filled, *arguments)


@pytest.mark.parametrize("words", ["endpoint status", "endpoint hashkv", "member list"])
def test_tables_are_the_same(filled: str, words: str) -> None:
    mine, told = of_one_state(filled, *words.split(" "), "-w", "table")
    assert mine == told


def plain(text: bytes) -> bytes:
    """Fields without what differs from run to run."""
    return re.sub(rb'^("(?:\w*Revision|Lease|ID|TTL)") : \d+$', rb"\1", text, flags=re.MULTILINE)


TXN = b"""mod("t/a") > "0"
value("t/a") = "quoted \\"x\\""

put t/b "one\\ttwo"
get t/ --prefix
del t/a --prev-kv

put t/a "quoted \\"x\\""
get t/a

"""


@pytest.mark.parametrize("form", ["simple", "json", "fields"])
def test_what_changes_prints_the_same_on_the_same_data(endpoint: str, form: str) -> None:
    """Each tool runs the same story on keys of its own; only revisions differ, and are made alike."""

    def story(tool: list[str], prefix: str) -> list[tuple[int, list[bytes]]]:
        told = []
        for words, stdin in [
            (["put", prefix + "k", "1"], b""),
            (["put", prefix + "k", "2", "--prev-kv"], b""),
            (["put", prefix + "k"], b"from stdin"),
            (["put", prefix + "l", "--", "-x"], b""),
            (["txn"], TXN.replace(b"t/", prefix.encode())),
            (["txn"], TXN.replace(b"t/", prefix.encode())),
            (["del", prefix + "k", "--prev-kv"], b""),
            (["del", prefix + "k"], b""),
            (["del", prefix, "--prefix"], b""),
        ]:
            code, out, error = ask(tool, endpoint, "-w", form, *words, stdin=stdin)
            assert error == b""
            told.append((code, out))
        return told

    ask(["etcdctl"], endpoint, "del", "", "--prefix")
    first = story([sys.executable, "-m", "raftkv"], "t/")
    second = story(["etcdctl"], "t/")
    if form == "simple":
        assert first == second
    elif form == "fields":
        assert [plain(text) for _, text in first] == [plain(text) for _, text in second]
        assert [code for code, _ in first] == [code for code, _ in second]
    else:

        def alike(text: bytes) -> object:
            return json.loads(re.sub(rb'"(\w*revision)":\d+', rb'"\1":0', text))

        assert [(code, alike(text)) for code, text in first] == [(code, alike(text)) for code, text in second]
        # And the fields come in the same order.
        assert [re.sub(rb"\d+", b"", text) for _, text in first] == [re.sub(rb"\d+", b"", text) for _, text in second]


@pytest.mark.parametrize(
    "words", ["get a --rev 99999", "compact 99999", "put  1", "get ", "del ", "put k v --lease 123", "move-leader 1"]
)
def test_refusals_carry_the_same_words(filled: str, words: str) -> None:
    arguments = words.split(" ")
    code, out, error = ours(filled, *arguments)
    their_code, their_out, their_error = theirs(filled, *arguments)
    assert (code, out) == (1, b"")
    assert their_code == 1
    assert their_out == b""
    assert error.startswith(their_error)  # ours adds which endpoint said so


def test_compaction(endpoint: str) -> None:
    for number in range(4):
        ours(endpoint, "put", "compacted", str(number))
    revision = int(ours(endpoint, "get", "compacted", "-w", "json")[1].split(b'"mod_revision":')[1].split(b",")[0])
    assert ours(endpoint, "compact", str(revision)) == (0, f"compacted revision {revision}\n".encode(), b"")
    assert ours(endpoint, "get", "compacted", "--rev", str(revision - 1))[0] == 1
    code, _, error = ours(endpoint, "compaction", str(revision))
    assert code == 1
    assert error.startswith(theirs(endpoint, "compaction", str(revision))[2])


def test_a_snapshot_is_one_that_etcdctl_accepts(filled: str, tmp_path: Path) -> None:
    code, out, _ = ours(filled, "snapshot", "save", str(tmp_path / "snap"))
    assert (code, out) == (0, f"Snapshot saved at {tmp_path / 'snap'}\n".encode())
    assert (tmp_path / "snap").stat().st_size % 512 == 32
    assert not list(tmp_path.glob("*.part"))


# --- leases, watches, locks, elections --------------------------------------------------------------------------------


def alike(told: tuple[int, bytes, bytes]) -> tuple[int, bytes, bytes]:
    """Ids and revisions are each run's own."""
    code, out, error = told
    out = re.sub(rb'"(\w*revision|ID|id|lease|ttl)":\d+', rb'"\1":0', out)
    # A lock's key holds its lease's id, in base64 too; ids that begin with a 0 are shorter in keys.
    out = re.sub(rb'"key":"[^"]*"', b'"key":""', out)
    out = re.sub(rb"\b(\w*/)?[0-9a-f]{13,16}\b", rb"\1ID", plain(out))
    return code, re.sub(rb"remaining\(\d+s\)", b"remaining", out), error


@pytest.mark.parametrize("form", ["simple", "json", "fields"])
def test_leases_are_shown_the_same(endpoint: str, form: str) -> None:
    def story(tool: list[str]) -> list[tuple[int, bytes, bytes]]:
        for line in ask(["etcdctl"], endpoint, "lease", "list")[1].splitlines()[1:]:
            ask(["etcdctl"], endpoint, "lease", "revoke", line.decode())
        told = [ask(tool, endpoint, "-w", form, "lease", "list")]
        told.append(ask(tool, endpoint, "-w", form, "lease", "grant", "100"))
        id_ = ask(["etcdctl"], endpoint, "lease", "list")[1].split()[-1].decode()
        told.append(ask(tool, endpoint, "-w", form, "put", "leased", "1", "--lease", id_))
        further = (
            ["timetolive", id_],
            ["timetolive", id_, "--keys"],
            ["keep-alive", id_, "--once"],
            ["list"],
            ["revoke", id_],
            ["timetolive", id_],
            ["list"],
        )
        told += [ask(tool, endpoint, "-w", form, "lease", *words) for words in further]
        return told

    first, second = story([sys.executable, "-m", "raftkv"]), story(["etcdctl"])
    assert [alike(each) for each in first] == [alike(each) for each in second]


def output_of(tool: list[str], endpoint: str, *arguments: str, lines: int) -> tuple[int, bytes, bytes]:
    """The first lines of a command that goes on until it is interrupted."""
    with subprocess.Popen(
        [*tool, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment(endpoint),
    ) as process:
        guard = threading.Timer(100, process.kill)
        guard.start()
        assert process.stdout is not None
        out = b"".join(process.stdout.readline() for _ in range(lines))
        process.send_signal(signal.SIGINT)
        process.wait()
        guard.cancel()
    return process.returncode, out, b""


@pytest.mark.parametrize("form", ["simple", "json", "fields"])
@pytest.mark.parametrize("options", ["", "--prev-kv", "--hex --prev-kv"])
def test_watches_are_shown_the_same(endpoint: str, form: str, options: str) -> None:
    first = b""
    for value in ("1", "<2> & é", ""):
        first = first or ours(endpoint, "put", "seen/a", value, "-w", "json")[1]
        ours(endpoint, "put", "seen/a", value)
    ours(endpoint, "del", "seen/a")
    begin = str(json.loads(first)["header"]["revision"])
    words = ["watch", "seen/", "--prefix", "--rev", begin, "-w", form, *options.split()]
    before = 4 if options else 0  # those of the five that have a value before them
    count = {"json": 1, "simple": 5 * 3 + 2 * before, "fields": 4 + 5 * 7 + 6 * before}[form]
    mine = output_of([sys.executable, "-m", "raftkv"], endpoint, *words, lines=count)
    assert mine[1] == output_of(["etcdctl"], endpoint, *words, lines=count)[1]
    assert mine[0] == 130


@pytest.mark.parametrize("form", ["simple", "json", "fields"])
@pytest.mark.parametrize("words", ["lock held", "elect led me"])
def test_locks_and_elections_are_shown_the_same(endpoint: str, form: str, words: str) -> None:
    tools = ([sys.executable, "-m", "raftkv"], ["etcdctl"])
    count = {"simple": 2, "json": 1, "fields": 12}[form]
    told = [output_of(tool, endpoint, *words.split(), "-w", form, lines=count) for tool in tools]
    assert alike(told[0]) == alike(told[1])
    assert told[0][0] == 0


@pytest.mark.parametrize("form", ["simple", "fields"])
def test_commands_of_watches_are_run_the_same(endpoint: str, form: str, tmp_path: Path) -> None:
    """Output and environment of a command for each event, up to the one that fails."""
    values = ["1", 'a "b" \\ é\t$x', "two\nlines", "\udcff", "fail", "never"]
    begin = ""
    for value in values:
        _, out, _ = ours(endpoint, "put", "run/k é", value, "-w", "json")
        begin = begin or str(json.loads(out)["header"]["revision"])
        if value == values[0]:
            ours(endpoint, "del", "run/k é")
    script = 'env | grep ETCD_WATCH | sort; read x; echo "$x."; case "$ETCD_WATCH_VALUE" in *fail*) exit 7; esac'
    words = ["watch", "run/", "--prefix", "--rev", begin, "-w", form, "--", "sh", "-c", script]
    code, out, error = ours(endpoint, *words)
    assert out.count(b"ETCD_WATCH_REVISION=") == 6
    assert (code, out) == theirs(endpoint, *words)[:2]
    assert error.startswith(b'Error: sh ended with exit code 7 for PUT of "run/k \xc3\xa9" in revision ')


def test_a_lock_of_ours_keeps_etcdctl_out_and_the_other_way_round(endpoint: str, tmp_path: Path) -> None:
    """Each adds one to a file under the lock, not atomically, all at once."""
    total = tmp_path / "sum"
    total.write_text("0")
    script = f"n=$(cat {total}); sleep 0.1; echo $((n + 1)) > {total}; test -n $ETCD_LOCK_KEY -a $ETCD_LOCK_REV -gt 0"
    with ThreadPoolExecutor(8) as threads:
        done = threads.map(lambda tool: tool(endpoint, "lock", "both", "--", "sh", "-c", script), [ours, theirs] * 4)
    assert list(done) == [(0, b"", b"")] * 8
    assert total.read_text() == "8\n"
