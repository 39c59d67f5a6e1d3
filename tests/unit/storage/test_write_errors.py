"""A real failed write, through LevelDB and the kernel: the node stops at the first, and nothing acknowledged is lost.

A limit on file sizes makes writes fail (half of one done, then an error) for any user and on any file system, and can
be lifted again, like a disk that was full for a moment. Those tests run in a process of their own. That LevelDB alone
would go on and lose acknowledged writes is part of the test: otherwise it would prove nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.storage.contracts import everything
from tests.unit.storage.stores import open_log

ROOT = Path(__file__).parents[3]

PRELUDE = """
import os, resource, sys
from pathlib import Path
from raftkv.raft.types import HardState, SnapshotMeta
from raftkv.storage._leveldb import leveldb
from raftkv.storage.errors import NodeFatal, SyncFailed, WriteFailed
from raftkv.storage.state_store import StateStore
from tests.unit.storage.contracts import CONF, entry
from tests.unit.storage.stores import new_log, newest_log_file
data_dir = Path(sys.argv[1])

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def append(log):
    index = log.last_index() + 1
    log.append(HardState(1, 0, index - 1), [entry(index, 1, os.urandom(700))])
    return index
"""


def run(script: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-u", "-c", PRELUDE + script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 70, result.stdout + result.stderr
    return result.stdout


def test_leveldb_alone_loses_acknowledged_writes(tmp_path: Path) -> None:
    """Why the first failed write must be the last."""
    script = """
db = leveldb.DB(str(data_dir / "db"), create_if_missing=True, write_buffer_size=64 << 20)
def put(i):
    batch = db.write_batch(sync=True)
    batch.put(b"%08d" % i, os.urandom(700))
    batch.write()
for i in range(100):
    put(i)
limit(max(file.stat().st_size for file in (data_dir / "db").glob("*.log")) + 300)
try:
    put(100)
except leveldb.Error:
    print("failed")
limit(resource.RLIM_INFINITY)
for i in range(101, 200):
    put(i)
print("acknowledged")
os._exit(70)
"""
    assert run(script, tmp_path) == "failed\nacknowledged\n"
    command = (
        "import sys; from raftkv.storage._leveldb import leveldb\n"
        "try: print(sum(1 for _ in leveldb.DB(sys.argv[1])))\n"
        "except leveldb.Error: print(0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "db")], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(result.stdout) < 199


LOG_SCRIPT = """
log = new_log(data_dir)
for _ in range(100):
    append(log)
limit(newest_log_file(data_dir / "log").stat().st_size + int(sys.argv[2]))
refused = 0
for attempt in range(50):
    try:
        append(log)
        print("acknowledged", log.last_index())
    except SyncFailed as error:
        refused += 1
        limit(resource.RLIM_INFINITY)  # there is space again
        if refused == 1:
            print(error)
for write in (
    lambda: log.compact(SnapshotMeta(10, 1, CONF)),
    lambda: log.install(SnapshotMeta(500, 1, CONF), None, "state-2"),
):
    try:
        write()
        print("acknowledged a write after a failed one")
    except SyncFailed:
        refused += 1
print("refused", refused, "of 52; poisoned", log.poisoned)
log.close()
os._exit(70)
"""


@pytest.mark.parametrize("space", [0, 5, 40, 300, 830, 2000])
def test_a_disk_that_is_full_for_a_moment_costs_nothing_acknowledged(tmp_path: Path, space: int) -> None:
    lines = run(LOG_SCRIPT, tmp_path, space).splitlines()
    acknowledged = [int(line.split()[1]) for line in lines if line.startswith("acknowledged")]
    last = acknowledged[-1] if acknowledged else 100
    assert "synced write failed" in lines[len(acknowledged)]
    assert "the node stops" in lines[len(acknowledged)]
    assert lines[-1] == f"refused {52 - len(acknowledged)} of 52; poisoned True"
    log = open_log(tmp_path)
    assert log.last_index() == last
    assert [one.index for one in everything(log)] == list(range(1, last + 1))
    log.close()


def test_a_state_that_cannot_be_written_stops_the_node(tmp_path: Path) -> None:
    script = """
store = StateStore.open(data_dir / "state-1", create=True)
for i in range(50):
    store.write([(b"%08d" % i, os.urandom(700))], ())
limit(newest_log_file(data_dir / "state-1").stat().st_size + 100)
for attempt in range(10):
    try:
        store.write([(b"later", os.urandom(700))], ())
        print("written")
    except WriteFailed as error:
        print(type(error).__name__)
        limit(resource.RLIM_INFINITY)
try:
    store.sync()
except WriteFailed:
    print("no sync either")
os._exit(70)
"""
    assert run(script, tmp_path).split("\n") == ["WriteFailed"] * 10 + ["no sync either", ""]
    again = """
store = StateStore.open(data_dir / "state-1", create=False)
print([key for key, _ in store.iterate(b"", None)] == [b"%08d" % i for i in range(50)])
os._exit(70)
"""
    assert run(again, tmp_path) == "True\n"


# With root or a compiler: the real things.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.system
def test_a_full_disk(small_disk: Path) -> None:
    script = """
log = new_log(data_dir)
try:
    while True:
        append(log)
except SyncFailed as error:
    assert "No space left" in str(error), error
print(log.last_index())
os.system(f"mount -o remount,size=8m {data_dir}")
refused = 0
for _ in range(500):
    try:
        append(log)
    except SyncFailed:
        refused += 1
print(refused)
os._exit(70)
"""
    last, refused = map(int, run(script, small_disk).split())
    assert refused == 500
    log = open_log(small_disk)
    assert log.last_index() == last
    log.close()


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
static int failing(void) { const char *flag = getenv("SHIM_FLAG"); struct stat s; return flag && stat(flag, &s) == 0; }
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fdatasync");
    if (failing()) { errno = EIO; return -1; }
    return real(fd);
}
int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    if (failing()) { errno = EIO; return -1; }
    return real(fd);
}
"""


@pytest.mark.system
@pytest.mark.parametrize("store", ["log", "state"])
def test_a_disk_that_fails_to_sync(tmp_path: Path, store: str) -> None:
    source, shim, flag = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "flag"
    source.write_text(SHIM)
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    script = """
flag = Path(os.environ["SHIM_FLAG"])
log = new_log(data_dir)
state = StateStore.open(data_dir / "state-1", create=True)
for _ in range(20):
    append(log)
state.write([(b"a", b"b")], ())
flag.write_text("")
write = (lambda: append(log)) if sys.argv[2] == "log" else state.sync
for attempt in range(3):
    try:
        write()
        print("acknowledged")
    except SyncFailed as error:
        print("Input/output error" in str(error))
    flag.unlink(missing_ok=True)
os._exit(70)
"""
    environment = {"LD_PRELOAD": str(shim), "SHIM_FLAG": str(flag)}
    assert run(script, tmp_path / "data", store, environment=environment) == "True\n" * 3
    log = open_log(tmp_path / "data")
    # The write that failed to sync was never acknowledged; it may be there or not.
    assert log.last_index() in (20, 21)
    log.close()
