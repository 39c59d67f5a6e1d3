"""Tests that need programs of the system are never left out in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def collect(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAFTKV_TEST_SYSTEM"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/compat"],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_the_programs_the_summary_says_what_was_left_out() -> None:
    done = collect(PATH="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_etcdctl_kv.py::" not in done.stdout
    assert "test_aetcd.py::test_get_and_put[raftkv]" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert "etcd and etcdctl" in line
    assert "tests/compat/test_etcdctl_kv.py" in line


def test_a_promised_program_that_is_missing_is_an_error() -> None:
    done = collect(PATH="/nonexistent", RAFTKV_TEST_SYSTEM="1")
    assert done.returncode == 4
    assert "not on PATH: etcd, etcdctl" in done.stderr
