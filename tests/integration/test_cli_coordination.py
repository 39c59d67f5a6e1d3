"""`raftkv lease`, `watch`, `lock` and `elect` as they are used: real processes on a cluster whose nodes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftkv.client import Client
from raftkv.local import LocalCluster

# Up to fifteen commands in a test, each a process: on a busy machine the start of one takes seconds.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


class Terminal:
    """Runs commands against one cluster, and ends what a test leaves running."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.started: list[subprocess.Popen[str]] = []
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))}
        # What a call may take is not what is tested, and an election on a busy machine takes its time, too.
        self.environment = {**mine, "RAFTKV_ENDPOINTS": ",".join(cluster.endpoints), "RAFTKV_TIMEOUT": "30s"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        self.started.append(
            subprocess.Popen(
                [sys.executable, "-m", "raftkv", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=self.environment,
                cwd=self.directory,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def run(self, *arguments: str, code: int = 0, stdin: str | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "raftkv", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.directory,
            timeout=100,
            check=False,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def wait_for(self, name: str) -> str:
        """Wait until a command has written this file; its content."""
        until(lambda: (self.directory / name).exists(), name)
        return (self.directory / name).read_text()


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """The next lines of its output. One that does not come in time ends the process, and reads as empty."""
    assert process.stdout is not None
    end = threading.Timer(100, process.kill)
    end.start()
    try:
        return [process.stdout.readline().rstrip("\n") for _ in range(count)]
    finally:
        end.cancel()


BY_CTRL_C = (130, "", "\n")  # the line end is for the terminal, which shows ^C


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=100)
    return process.returncode, out, error


@pytest.fixture
def terminal(raftkv_cluster: LocalCluster, tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(raftkv_cluster, tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


@pytest.fixture
def client(raftkv_cluster: LocalCluster) -> Iterator[Client]:
    with Client(raftkv_cluster.endpoints, timeout=20) as client:
        yield client


def leases(client: Client) -> set[int]:
    return set(client.leases())


def left_behind(client: Client, before: set[int]) -> set[int]:
    """Leases that are there since; of those that were there before some may have run out, whosever they were."""
    return leases(client) - before


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_from_grant_to_revoke(terminal: Terminal, client: Client) -> None:
    granted = terminal.run("lease", "grant", "3600")  # nobody keeps it alive meanwhile, however long that takes
    id_ = granted.split()[1]
    assert granted == f"lease {id_} granted with TTL(3600s)\n"
    assert terminal.run("put", "lease/k", "v", "--lease", id_) == "OK\n"
    assert f"{id_}\n" in terminal.run("lease", "list")
    assert "attached keys([lease/k])" in terminal.run("lease", "ttl", id_, "--keys")
    shown = json.loads(terminal.run("lease", "timetolive", id_, "-o", "json"))
    assert (shown["id"], shown["granted-ttl"], shown["keys"]) == (int(id_, 16), 3600, None)
    assert terminal.run("lease", "keep-alive", id_, "--once") == f"lease {id_} keepalived with TTL(3600)\n"
    assert "| " in terminal.run("lease", "ttl", id_, "-o", "table")
    assert terminal.run("lease", "revoke", id_) == f"lease {id_} revoked\n"
    assert terminal.run("get", "lease/k") == ""
    assert "requested lease not found" in terminal.run("lease", "revoke", id_, code=1)
    assert "requested lease not found" in terminal.run("lease", "keep-alive", id_, "--once", code=1)
    assert terminal.run("lease", "timetolive", id_) == f"lease {id_} already expired\n"


def test_keep_alive_outlives_the_leader_and_ends_with_the_lease(terminal: Terminal, client: Client) -> None:
    lease = client.grant_lease(10)
    renewed = f"lease {lease.id:016x} keepalived with TTL(10)"
    keeping = terminal.start("lease", "keep-alive", f"{lease.id:x}")
    assert lines(keeping, 1) == [renewed]
    terminal.cluster.kill("leader")
    assert lines(keeping, 4) == [renewed] * 4  # longer than its time
    assert lease.id in leases(client)
    client.revoke_lease(lease.id)
    code, out, error = ended(keeping)
    assert (code, error) == (1, "")
    assert out.endswith(f"lease {lease.id:016x} expired or revoked.\n")


def test_keep_alive_ends_clean_on_ctrl_c_and_leaves_the_lease(terminal: Terminal, client: Client) -> None:
    lease = client.grant_lease(100)
    keeping = terminal.start("lease", "keep-alive", f"{lease.id:x}", "-o", "json")
    assert json.loads(lines(keeping, 1)[0])["TTL"] == 100
    keeping.send_signal(signal.SIGINT)
    assert ended(keeping) == BY_CTRL_C
    assert lease.id in leases(client)
    client.revoke_lease(lease.id)


# --- watch ------------------------------------------------------------------------------------------------------------


def test_a_watch_loses_nothing_while_leaders_die(terminal: Terminal, client: Client) -> None:
    first = client.put("w/start", "").revision
    watching = terminal.start("watch", "w/", "--prefix", "--rev", str(first + 1), "-o", "json")
    written = []
    for number in range(60):
        if number in (20, 40):
            gone = terminal.cluster.kill("leader")[0]
        written.append((client.put(f"w/{number % 3}", str(number)).revision, str(number)))
        if number in (30, 50):
            terminal.cluster.restart(gone)
    seen: list[tuple[int, str]] = []
    while len(seen) < len(written):
        (line,) = lines(watching, 1)
        assert line, f"seen {len(seen)} of {len(written)}, not: {sorted(set(written) - set(seen))}, {watching.poll()}"
        answer: dict[str, Any] = json.loads(line)
        seen += [(each["kv"]["mod_revision"], _text(each["kv"]["value"])) for each in answer["Events"]]
        assert answer["Header"]["revision"] >= seen[-1][0]
    assert seen == written
    watching.send_signal(signal.SIGINT)
    assert ended(watching) == BY_CTRL_C


def _text(base64: str) -> str:
    import base64 as codec

    return codec.b64decode(base64).decode()


def test_a_watch_shows_what_it_is_asked_for(terminal: Terminal, client: Client) -> None:
    begin = client.put("f/a", "1").revision
    client.put("f/a", "2")
    client.delete("f/a")
    client.put("f/b", "\n")
    expected = {
        ("--filter", "nodelete"): ["PUT", "f/a", "1", "PUT", "f/a", "2", "PUT", "f/b", "", ""],
        ("--filter", "noput", "--prev-kv"): ["DELETE", "f/a", "2", "f/a", ""],
        ("--hex", "--filter", "noput"): ["DELETE", r"\x66\x2f\x61", ""],
    }
    for options, shown in expected.items():
        watching = terminal.start("watch", "f/", "--prefix", "--rev", str(begin), *options)
        assert lines(watching, len(shown)) == shown
        watching.terminate()
    watching = terminal.start("watch", "f/a", "f/c", "--rev", str(begin), "-o", "table")
    table = lines(watching, 8)
    assert [line.split()[1] for line in table if line.startswith("| ")] == ["EVENT", "PUT", "PUT", "DELETE", "PUT"]


def test_a_watch_tells_an_expired_key_in_its_table(terminal: Terminal, client: Client) -> None:
    lease = client.grant_lease(6)  # long enough to put a key under it in whatever way we are held up
    begin = client.put("expiring", "1", lease=lease.id).revision
    watching = terminal.start("watch", "expiring", "--rev", str(begin), "--filter", "noput", "-o", "table")
    assert "EXPIRE" in lines(watching, 4)[3]


def test_a_watch_of_history_that_is_gone_says_from_where_on(terminal: Terminal, client: Client) -> None:
    begin = client.put("c", "1").revision
    now = client.put("c", "2").revision
    client.compact(now)
    for endpoint in client.endpoints:  # whichever serves the watch has compacted, then
        with Client(endpoint) as one:
            one.get("c")
    error = terminal.run("watch", "c", "--rev", str(begin), code=1)
    assert f"history before revision {now} is gone: watch from --rev {now} on" in error
    watching = terminal.start("watch", "c", "--rev", str(begin), "-o", "json")
    code, out, _ = ended(watching)
    answer = json.loads(out)
    assert (code, answer["Canceled"], answer["CompactRevision"]) == (1, True, now)


def test_a_watch_whose_reader_has_seen_enough_ends(terminal: Terminal, client: Client) -> None:
    begin = client.put("pipe", "0").revision
    watching = terminal.start("watch", "pipe", "--rev", str(begin))
    assert lines(watching, 3) == ["PUT", "pipe", "0"]
    assert watching.stdout is not None
    watching.stdout.close()
    client.put("pipe", "1")
    assert watching.wait(100) == 1
    assert watching.stderr is not None
    assert watching.stderr.read() == ""


def test_a_watch_runs_a_command_for_each_change_while_leaders_die(terminal: Terminal, client: Client) -> None:
    begin = client.put("c/0", "0").revision
    watching = terminal.start(
        *("watch", "c/", "--prefix", "--rev", str(begin), "--", "sh", "-c", 'echo "$ETCD_WATCH_KEY" >> ran')
    )
    terminal.wait_for("ran")
    for number in range(1, 12):
        if number == 5:
            gone = terminal.cluster.kill("leader")[0]
        client.put(f"c/{number}", "x")
    expected = [f'"c/{number}"' for number in range(12)]
    until(lambda: terminal.wait_for("ran").splitlines() == expected, "all commands, in order")
    terminal.cluster.restart(gone)
    watching.send_signal(signal.SIGINT)
    code, out, error = ended(watching)
    assert (code, error) == (130, "")
    assert out.splitlines() == [word for n in range(12) for word in ("PUT", f"c/{n}", "x" if n else "0")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_watch_with_its_command(terminal: Terminal, client: Client, number: signal.Signals) -> None:
    begin = client.put("s", "1").revision
    script = 'trap "echo asked; exit 3" INT TERM; echo $$ > inner; touch started; while :; do sleep 0.1; done'
    watching = terminal.start("watch", "s", "--rev", str(begin), "--", "sh", "-c", script)
    terminal.wait_for("started")
    watching.send_signal(number)
    code, out, _ = ended(watching)  # the shell may say what became of its sleep
    assert code == 128 + number
    assert out == "PUT\ns\n1\nasked\n"
    assert not _runs(int(terminal.wait_for("inner")))


def test_a_value_that_no_environment_can_hold_ends_the_watch(terminal: Terminal, client: Client) -> None:
    begin = client.put("large", "x" * 300_000).revision
    error = terminal.run("watch", "large", "--rev", str(begin), "--", "true", code=1)
    assert error.startswith(f'Error: true cannot be run for PUT of "large" in revision {begin}, with 300')
    assert error.count("\n") == 1


# --- lock -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_lock_is_given_back_at_a_signal(terminal: Terminal, client: Client, number: signal.Signals) -> None:
    before = leases(client)
    name = f"l/{number.name}"
    holder = terminal.start("lock", name)
    key, value = lines(holder, 2)
    assert key.startswith(name + "/")
    assert value == ""
    assert client.get(key) is not None
    waiter = terminal.start("lock", name)
    until(lambda: client.range(name, prefix=True).count == 2, "the waiter's key")
    holder.send_signal(number)
    assert ended(holder) == (0, "", "")
    assert client.get(key) is None
    second, _ = lines(waiter, 2)
    assert second.startswith(name + "/")
    waiter.terminate()
    assert ended(waiter)[0] == 0
    assert not left_behind(client, before)


def test_who_is_interrupted_while_waiting_leaves_the_queue(terminal: Terminal, client: Client) -> None:
    lock = ("lock", "busy", "--ttl", "600")  # what is not given back would be there still
    with client.lock("busy", ttl=30):
        before = leases(client)

        def has_left() -> bool:
            return client.range("busy/", prefix=True).count == 1 and not left_behind(client, before)

        for number in (signal.SIGINT, signal.SIGTERM):
            waiter = terminal.start(*lock, "--", "touch", "ran")
            until(lambda: client.range("busy/", prefix=True).count == 2, "the waiter's key")
            waiter.send_signal(number)
            assert ended(waiter) == (128 + number, "", "")
            until(has_left, "what the waiter gave back")
        error = terminal.run(*lock, "--wait", "300ms", "--", "touch", "ran", code=124)
        assert error == "Error: busy was not free within 0.3 s\n"
        assert terminal.run(*lock, "--wait", "300ms", code=1) == error
        error = terminal.run(*lock, "--wait", "0", "--", "touch", "ran", code=124)
        assert error == "Error: busy is not free\n"
        until(has_left, "what the others gave back")
    assert not (terminal.directory / "ran").exists()


def test_a_command_under_a_lock_knows_it_and_its_code_comes_through(terminal: Terminal, client: Client) -> None:
    before = leases(client)
    shown = terminal.run("lock", "env", "--ttl", "5", "--", "env")
    variables = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert variables["RAFTKV_LOCK_KEY"].startswith("env/")
    assert variables["ETCD_LOCK_KEY"] == variables["RAFTKV_LOCK_KEY"]
    assert variables["ETCD_LOCK_REV"] == variables["RAFTKV_FENCE"]
    assert variables["RAFTKV_GUARD"] == f"{variables['RAFTKV_LOCK_KEY']}:{variables['RAFTKV_FENCE']}"
    later = terminal.run("lock", "env", "--", "sh", "-c", "echo $RAFTKV_FENCE")
    assert int(later) > int(variables["RAFTKV_FENCE"])
    assert terminal.run("lock", "env", "--", "sh", "-c", "echo out; echo err >&2; exit 7", code=7) == "err\n"
    terminal.run("lock", "env", "--", "sh", "-c", "kill -9 $$", code=137)
    assert terminal.run("lock", "env", "--", "nosuch", code=127) == "Error: nosuch: command not found\n"
    plain = terminal.directory / "plain"
    plain.write_text("")
    assert "cannot be executed" in terminal.run("lock", "env", "--", str(plain), code=126)
    plain.chmod(0o755)
    plain.write_text("#!/nonexistent/interpreter\n")
    assert "No such file" in terminal.run("lock", "env", "--", str(plain), code=127)
    assert not left_behind(client, before)


def test_guarded_writes_end_with_the_lock(terminal: Terminal, client: Client) -> None:
    raftkv = f"{sys.executable} -m raftkv"
    script = f"""
        {raftkv} put g/k under --guard "$RAFTKV_GUARD" && echo "$RAFTKV_GUARD" &&
        {raftkv} del g/other --guard "$RAFTKV_GUARD"
    """
    ok, guard, deleted = terminal.run("lock", "g/lock", "--", "sh", "-c", script).splitlines()
    assert (ok, deleted) == ("OK", "0")
    for words in (["put", "g/k", "late"], ["del", "g/k"]):
        assert "lock lost: g/lock/" in terminal.run(*words, "--guard", guard, code=1)
    put = 'version("g/k") > "0"\n\nput g/k late\n\n'
    assert "lock lost: g/lock/" in terminal.run("txn", "--guard", guard, stdin=put, code=1)
    with client.lock("g/lock") as lock:
        held = f"{lock.key.decode()}:{lock.fence}"
        assert terminal.run("txn", "--guard", held, stdin=put) == "SUCCESS\n\nOK\n"
        assert "lock lost" in terminal.run("put", "g/k", "x", "--guard", held, "--guard", guard, code=1)
    item = client.get("g/k")
    assert item is not None
    assert item.value == b"late"


LOOP = 'trap "echo terminated; exit 5" TERM; touch started; while :; do sleep 0.1; done'
DEAF = 'trap ": > asked" TERM; touch started; while :; do sleep 0.1; done'


def test_a_command_whose_lock_is_lost_gets_sigterm(terminal: Terminal, client: Client) -> None:
    holder = terminal.start("lock", "lost", "--ttl", "6", "--", "sh", "-c", LOOP)
    terminal.wait_for("started")
    (item,) = client.range("lost/", prefix=True).items
    client.revoke_lease(item.lease)
    code, out, error = ended(holder)
    assert (code, out) == (125, "terminated\n")
    assert "the lock is lost, the command gets SIGTERM" in error
    assert f"Error: {item.key.decode()} is not held: " in error


def test_a_command_that_does_not_listen_is_killed_with_all_it_started(terminal: Terminal, client: Client) -> None:
    script = f"sleep 1000 & echo $! > inner; {DEAF}"
    holder = terminal.start("lock", "deaf", "--ttl", "6", "--grace", "4s", "--", "sh", "-c", script)
    terminal.wait_for("started")
    inner = int(terminal.wait_for("inner"))
    (item,) = client.range("deaf/", prefix=True).items
    client.delete(item.key)  # by hand: the lease lives on, the lock is lost all the same
    assert ended(holder)[0] == 125
    assert (terminal.directory / "asked").exists()
    until(lambda: not _runs(inner), "the end of what the command had started")
    assert item.lease not in leases(client)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_signals_go_to_the_command(terminal: Terminal, client: Client) -> None:
    before = leases(client)
    holder = terminal.start("lock", "passed", "--", "sh", "-c", LOOP)
    terminal.wait_for("started")
    holder.send_signal(signal.SIGTERM)
    assert ended(holder)[:2] == (5, "terminated\n")
    (terminal.directory / "started").unlink()
    holder = terminal.start("lock", "passed", "--", "sh", "-c", "touch started; sleep 1000")
    terminal.wait_for("started")
    holder.send_signal(signal.SIGINT)
    assert ended(holder) == (130, "", "")
    assert not left_behind(client, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must tell")
def test_a_command_does_not_outlive_the_process_that_keeps_its_lock(terminal: Terminal, client: Client) -> None:
    holder = terminal.start("lock", "orphan", "--ttl", "6", "--", "sh", "-c", f"echo $$ > inner; {LOOP}")
    terminal.wait_for("started")
    holder.kill()
    inner = int((terminal.directory / "inner").read_text())
    until(lambda: not _runs(inner), "the end of the command")
    until(lambda: not client.range("orphan/", prefix=True).count, "the end of its lease, which others would count")


def test_a_lock_survives_the_leader_and_excludes_all_the_while(terminal: Terminal, client: Client) -> None:
    """Ten commands add one to a file each, not atomically; the leader dies meanwhile, twice."""
    (terminal.directory / "sum").write_text("0")
    script = "n=$(cat sum); sleep 0.2; echo $((n + 1)) > sum"
    holders = [terminal.start("lock", "sum", "--ttl", "30", "--", "sh", "-c", script) for _ in range(10)]
    for _ in range(2):
        time.sleep(0.8)
        gone = terminal.cluster.kill("leader")[0]
        time.sleep(0.8)
        terminal.cluster.restart(gone)
    for holder in holders:
        assert ended(holder) == (0, "", "")
    assert int((terminal.directory / "sum").read_text()) == 10
    assert client.range("sum/", prefix=True).count == 0


def test_a_stopped_holder_does_not_go_on(terminal: Terminal, client: Client) -> None:
    """SIGSTOP to the holder and its command beyond the ttl: when they go on, the lock is another's."""
    holder = terminal.start("lock", "stopped", "--ttl", "6", "--", "sh", "-c", LOOP)
    terminal.wait_for("started")
    holder.send_signal(signal.SIGSTOP)
    with client.lock("stopped", ttl=30, timeout=60) as lock:
        assert lock.held
        holder.send_signal(signal.SIGCONT)
        code, out, error = ended(holder)
        assert (code, out) == (125, "terminated\n")
        assert "is lost" in error
        assert lock.held


# --- elect ------------------------------------------------------------------------------------------------------------


def test_an_election_and_who_looks_on(terminal: Terminal, client: Client) -> None:
    before = leases(client)
    looking = terminal.start("elect", "e", "--listen")
    first = terminal.start("elect", "e", "one")
    key, value = lines(first, 2)
    assert (key[:2], value) == ("e/", "one")
    assert lines(looking, 2) == [key, "one"]
    second = terminal.start("elect", "e", "two", "-o", "json")
    until(lambda: client.range("e/", prefix=True).count == 2, "the second candidate")
    terminal.cluster.kill("leader")
    first.send_signal(signal.SIGINT)
    assert ended(first) == (0, "", "")
    shown = json.loads(lines(second, 1)[0])["kvs"][0]
    assert _text(shown["value"]) == "two"
    assert lines(looking, 2) == [_text(shown["key"]), "two"]
    client.revoke_lease(shown["lease"])
    code, out, error = ended(second)
    assert (code, out) == (1, "")
    assert error.startswith(f"Error: {_text(shown['key'])} is not held: ")
    looking.send_signal(signal.SIGINT)
    assert ended(looking) == BY_CTRL_C
    assert not left_behind(client, before)
