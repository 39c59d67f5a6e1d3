"""What a node asks of its interpreter and of the kernel: in a process of its own, because it is for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

REFUSED = """
def refuse(*_):
    raise PermissionError("not here")
os.sched_setscheduler = refuse
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows batch work")
@pytest.mark.parametrize(("before", "policy"), [("", "SCHED_BATCH"), (REFUSED, "SCHED_OTHER")])
def test_a_node_is_batch_work_where_it_may_be(before: str, policy: str) -> None:
    program = f"""
import gc, os, sys
from raftkv.server import interpreter
{before}
interpreter.tune()
assert os.sched_getscheduler(0) == os.{policy}, os.sched_getscheduler(0)
assert sys.getswitchinterval() == interpreter.SWITCH_INTERVAL_S
assert gc.get_freeze_count() > 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
