from __future__ import annotations

import os
import signal
import subprocess
import sys

from raftkv.local import lifeline

CHILD = "from raftkv.local import lifeline; print(lifeline.attach(), flush=True); import time; time.sleep(60)"


def start(value: str, *descriptors: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        env={**os.environ, lifeline.VARIABLE: value},
        pass_fds=descriptors,
    )


def test_the_pipe_ends_the_child_where_the_kernel_does_not() -> None:
    read_end, write_end = os.pipe()
    with start(lifeline.describe(os.getpid(), read_end), read_end) as child:
        os.close(read_end)
        assert child.stdout is not None
        assert child.stdout.readline() == b"True\n"
        os.close(write_end)
        assert child.wait(10) == -signal.SIGKILL


def test_a_child_whose_parent_is_gone_already_ends_itself() -> None:
    with start(lifeline.describe(1 << 22)) as child:
        assert child.wait(10) == 0


def test_without_a_supervisor_nothing_is_tied() -> None:
    assert lifeline.attach({}) is False
