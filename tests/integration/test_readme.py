"""What the README shows is run as it stands there."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raftkv.local import LocalCluster
from raftkv.local.errors import PortInUse
from raftkv.local.ports import lease_fixed

# A session of a dozen commands, on a busy machine of seconds each.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
CONSOLE = [text for language, text in BLOCKS if language == "console"]
SCRIPTS = [text for text in PYTHON if "def test_" not in text]
TESTS = [text for text in PYTHON if "def test_" in text]
BIN = Path(sys.executable).parent


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run to the end, must succeed; what it printed."""
    environment = {**os.environ, **variables, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_has_the_examples_meant_here() -> None:
    assert (len(SCRIPTS), len(TESTS)) == (2, 1)
    assert any("raftkv cluster up" in text for text in CONSOLE)


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_script(number: int, raftkv_cluster: LocalCluster, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(SCRIPTS[number])
    out = run(
        [sys.executable, "-W", "error", str(script)], tmp_path, RAFTKV_ENDPOINTS=",".join(raftkv_cluster.endpoints)
    )
    assert out


@pytest.mark.parametrize("number", range(len(TESTS)))
def test_pytest_example(number: int, tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(TESTS[number])
    assert "1 passed" in run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], tmp_path)


def free_ports(count: int) -> int:
    """The first of so many in a row. Anywhere: others who look for them at this moment do not find the same."""
    while True:
        first = random.randrange(20000, 30000 - count)
        try:
            lease_fixed([(first + number, "") for number in range(count)]).release()
        except PortInUse:
            continue
        return first


def test_commands(tmp_path: Path) -> None:
    """The session with `raftkv cluster up`, on free ports and in a folder of the test's own."""
    block = next(text for text in CONSOLE if "raftkv cluster up" in text)
    commands = [line.removeprefix("$ ").split("#")[0].strip() for line in block.splitlines()]
    base = free_ports(10)
    adapted = []
    for command in commands:
        command = re.sub(r"^raftkv cluster (\w+)", rf"raftkv cluster \1 --dir {tmp_path}/cluster", command)
        command = re.sub(r"--dir (\S+) -n 5", rf"--dir \1 --base-port {base} -n 5", command)
        adapted.append(re.sub(r":23(\d\d)", lambda found: f":{base + int(found[1]) - 79}", command))
    script = f"set -e\ntrap 'raftkv cluster down --dir {tmp_path}/cluster >/dev/null 2>&1 || true' EXIT\n"
    out = run(["bash", "-c", script + "\n".join(adapted)], tmp_path)
    assert out.count("hello") >= 1
    assert "leader" in out
