"""`snapshot status` and `snapshot restore`: forms, errors that name what is wrong, and no traces of what failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftkv.cli import restore
from raftkv.raft.types import ConfState, SnapshotMeta
from raftkv.state.keys import STATE_KEY, Head
from raftkv.state.restoring import BUMP_MIN
from tests.unit.storage.backups import write_backup

META = SnapshotMeta(9, 2, ConfState((7,)))


def write(path: Path, values: int = 3, value_bytes: int = 10) -> Path:
    class Records:
        """A state of many keys, as large as is wanted."""

        def iterate(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
            for number in range(values):
                yield b"c%08d" % number, b"v" * value_bytes
            yield STATE_KEY, Head(9, 2, 42, -1, 0).encode()

    return write_backup(path, Records(), META)


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))}
    return {**kept, **variables}


def run(*arguments: object, prelude: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{prelude}\nfrom raftkv.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=60,
        check=False,
    )


def options(data_dir: Path, name: str = "n1", members: str = "n1=127.0.0.1:1,n2=127.0.0.1:2") -> list[object]:
    return ["--name", name, "--data-dir", data_dir, "--initial-cluster", members]


def test_status_in_its_forms(tmp_path: Path) -> None:
    file = write(tmp_path / "backup")
    size = file.stat().st_size
    number = int.from_bytes(file.read_bytes()[-32:-28], "big")
    assert run("snapshot", "status", file).stdout == f"{number:x}, 42, 3, 544 B\n"
    shown = run("-o", "json", "snapshot", "status", file)
    assert json.loads(shown.stdout) == {"hash": number, "revision": 42, "totalKey": 3, "totalSize": size}
    table = run("snapshot", "status", file, "-w", "table").stdout.splitlines()
    assert [cell.strip() for cell in table[1].split("|")[1:-1]] == ["HASH", "REVISION", "TOTAL KEYS", "TOTAL SIZE"]
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == [f"{number:x}", "42", "3", "544 B"]
    lines = run("snapshot", "status", file, RAFTKV_OUTPUT="fields").stdout
    assert lines == f'"Hash" : {number}\n"Revision" : 42\n"Keys" : 3\n"Size" : {size}\n'


def test_restore_says_what_it_made(tmp_path: Path) -> None:
    file, data_dir = write(tmp_path / "backup"), tmp_path / "data"
    done = run("snapshot", "restore", file, *options(data_dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Restored n1 at {data_dir}: member ")
    assert done.stdout.endswith(f"revision {BUMP_MIN + 42} (of the backup: 42)\n")
    bumped = run("snapshot", "restore", file, *options(tmp_path / "other"), "--bump-revision", 2 * BUMP_MIN)
    assert f"revision {2 * BUMP_MIN + 42} " in bumped.stdout


def test_settings_come_from_the_environment_of_a_node(tmp_path: Path) -> None:
    file, data_dir = write(tmp_path / "backup"), tmp_path / "data"
    variables = {
        "RAFTKV_NAME": "n2",
        "RAFTKV_DATA_DIR": str(data_dir),
        "RAFTKV_INITIAL_CLUSTER": "n1=127.0.0.1:1,n2=127.0.0.1:2",
        "RAFTKV_INITIAL_CLUSTER_TOKEN": "another",
    }
    mine = run("snapshot", "restore", file, **variables)
    assert mine.stdout.startswith(f"Restored n2 at {data_dir}: ")
    same = run("snapshot", "restore", file, *options(tmp_path / "2", "n2"), "--initial-cluster-token", "another")
    assert same.stdout.partition(": ")[2] == mine.stdout.partition(": ")[2]


def test_the_default_is_what_is_needed_at_least() -> None:
    assert restore._BUMP == BUMP_MIN


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (["--name", "n3"], "--name: 'n3' is not in --initial-cluster: n1, n2; did you mean"),
        (["--initial-cluster", "n1"], "--initial-cluster: 'n1' must be NAME=host:port"),
        (["--initial-cluster", "n1=127.0.0.1:x"], "--initial-cluster: '127.0.0.1:x' must be host:port"),
        (["--initial-cluster", ","], "--initial-cluster: names no member"),
        (["--bump-revision", "5"], f"--bump-revision: 5 must be from {BUMP_MIN} to"),
        (["--bump-revision", "x"], "Invalid value for '--bump-revision'"),
        (["--initial-cluster-token", ""], "--initial-cluster-token: must have 1 to 256 characters"),
    ],
)
def test_bad_usage_names_the_flag(tmp_path: Path, changed: list[str], text: str) -> None:
    file = write(tmp_path / "backup")
    done = run("snapshot", "restore", file, *options(tmp_path / "data"), *changed)
    assert done.returncode == 2
    assert text in done.stderr
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("flag", ["--name", "--data-dir", "--initial-cluster"])
def test_a_missing_option_is_named(tmp_path: Path, flag: str) -> None:
    words = options(tmp_path / "data")
    place = words.index(flag)
    done = run("snapshot", "restore", write(tmp_path / "backup"), *words[:place], *words[place + 2 :])
    assert done.returncode == 2
    assert f"Missing option '{flag}'" in done.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for words in (["status"], ["restore", *options(tmp_path / "data")]):
        done = run("snapshot", words[0], tmp_path / "nothing", *words[1:])
        assert done.returncode == 2
        assert f"File '{tmp_path / 'nothing'}' does not exist" in done.stderr


def test_what_failed_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "backup")
    file.write_bytes(file.read_bytes()[:-100])
    told = []
    for words in (["status", file], ["restore", file, *options(tmp_path / "a" / "data")]):
        done = run("snapshot", *words)
        assert (done.returncode, done.stdout) == (1, "")
        told.append(done.stderr)
    assert told == [f"Error: {file}: 444 bytes are not a whole backup: something is cut off or added\n"] * 2
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("package", ["plyvel", "google_crc32c"])
def test_without_the_server_packages_it_says_how_to_get_them(tmp_path: Path, package: str) -> None:
    """What `pip install raftkv` alone gives."""
    file = write(tmp_path / "backup")
    missing = f"sys.modules[{package!r}] = None\nsys.modules['plyvel_next'] = None"
    for words in (["status", file], ["restore", file, *options(tmp_path / "data")]):
        done = run("snapshot", *words, prelude=missing)
        assert done.returncode == 1
        assert done.stderr.endswith("pip install 'raftkv[server]'\n")
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [file]


STOPS_HALF_WAY = """
import glob, os, signal, threading, time

def stop():
    while not glob.glob(os.environ["HALF_DONE"]):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGSTOP)

threading.Thread(target=stop, daemon=True).start()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_back_what_is_half_done(tmp_path: Path, number: signal.Signals) -> None:
    file = write(tmp_path / "backup", values=120, value_bytes=1 << 20)  # takes a second or more
    words = ["snapshot", "restore", file, *options(tmp_path / "data")]
    code = f"import sys\n{STOPS_HALF_WAY}\nfrom raftkv.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, words)]
    around = environment(HALF_DONE=str(tmp_path / "data.restoring-*/state-1/*.log"))
    with subprocess.Popen(command, env=around, stderr=subprocess.DEVNULL) as running:
        # It stops itself: were we to look, it might have ended before a busy machine lets us see anything.
        _, status = os.waitpid(running.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        running.send_signal(number)
        running.send_signal(signal.SIGCONT)
        assert running.wait(60) == (130 if number is signal.SIGINT else 128 + number)
    assert list(tmp_path.iterdir()) == [file]
