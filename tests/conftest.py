"""What holds for every test.

Tests that need a program pip does not install carry the mark `system`. They are left out, visibly, unless
RAFTKV_TEST_SYSTEM=1 says that this machine is meant to have those programs; then a missing one is an error.
"""

from __future__ import annotations

import os
import shutil
import signal
from typing import Any

import pytest

SYSTEM_PROGRAMS = ("etcd", "etcdctl")
LEFT_OUT = pytest.StashKey[list[str]]()


def system_tests_wanted() -> bool:
    return os.environ.get("RAFTKV_TEST_SYSTEM", "") not in {"", "0"}


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell ignores it for what it runs in the background, and every process that tests start would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not system_tests_wanted():
        return
    missing = [name for name in SYSTEM_PROGRAMS if shutil.which(name) is None]
    if missing:
        raise pytest.UsageError(f"RAFTKV_TEST_SYSTEM is set, but not on PATH: {', '.join(missing)}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if system_tests_wanted():
        return
    left_out = [item for item in items if item.get_closest_marker("system")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT].extend(item.nodeid for item in left_out)
        items[:] = [item for item in items if not item.get_closest_marker("system")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # one of the processes of `-n`, which alone collect
        output["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, [])
    if left_out:
        folders = sorted({nodeid.split("::")[0] for nodeid in left_out})
        terminalreporter.write_line(
            f"left out: {len(left_out)} tests that need {' and '.join(SYSTEM_PROGRAMS)} "
            f"(RAFTKV_TEST_SYSTEM=1 runs them): {', '.join(folders)}",
            yellow=True,
        )
