"""The same log in processes with other hash seeds, time zones and locales gives the same state, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPLAY = Path(__file__).with_name("state_replay.py")
ENVIRONMENTS = (
    {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"},
    {"PYTHONHASHSEED": "1", "TZ": "Pacific/Chatham", "LC_ALL": "C.UTF-8"},
    {"PYTHONHASHSEED": "4242424242", "TZ": "America/St_Johns", "LC_ALL": "tr_TR.UTF-8", "PYTHONUTF8": "0"},
)


def replay(log: Path, environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(REPLAY), str(log)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_replay_under_other_environments(tmp_path: Path) -> None:
    log = tmp_path / "log"
    subprocess.run([sys.executable, str(REPLAY), str(log), "--write", "5"], check=True, timeout=60)
    results = [replay(log, environment) for environment in ENVIRONMENTS]
    assert results[0]["revision"] > 200
    assert results[1] == results[0]
    assert results[2] == results[0]
