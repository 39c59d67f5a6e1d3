"""A million keys do not live in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("state_million.py")
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_keys_with_256_bytes_each(tmp_path: Path) -> None:
    """The node's whole budget is 400 MB; the state's share of it stays far below."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "state"), "1000000", "256"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert figures["keys"] == 1_000_000
    assert figures["revision"] == 1_000_001
    assert figures["rss_peak"] - figures["rss_before"] < 200 * MIB, figures
    assert figures["anonymous_end"] < 100 * MIB, figures
    assert figures["open_s"] < 10, figures
