"""The package as a user meets it: light to import, complete, typed."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import raftkv

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("asyncio", "grpc", "google.protobuf", "plyvel", "plyvel_next", "structlog", "stamina", "rich", "psutil")


def modules_loaded_by(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(run.stdout.split("\n")[-2].split())


def test_importing_raftkv_does_not_pay_for_grpc() -> None:
    assert modules_loaded_by("import raftkv").isdisjoint(HEAVY)


def test_help_of_the_command_line_does_not_pay_for_grpc() -> None:
    """`raftkv --help` answers at once; what it must not load says so on any machine, a stopwatch does not."""
    code = "import contextlib, raftkv.cli\nwith contextlib.suppress(SystemExit): raftkv.cli.main(['--help'])"
    assert modules_loaded_by(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", sorted(set(raftkv.__all__) - {"__version__"}))
def test_what_the_package_promises_is_in_the_client(name: str) -> None:
    client = importlib.import_module("raftkv.client")
    assert getattr(raftkv, name) is getattr(client, name)


def test_everything_the_client_offers_is_at_the_top() -> None:
    client = importlib.import_module("raftkv.client")
    assert set(raftkv.__all__) == {*client.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        raftkv.no_such_thing  # noqa: B018


def test_version_is_plain_numbers() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", raftkv.__version__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(raftkv.__file__).parent / "py.typed").exists()


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = PYPROJECT["project"]
    everything = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for dependency in everything:
        if dependency.startswith("raftkv["):
            continue
        line = next(line for line in text.splitlines() if f'"{dependency}"' in line)
        assert "#" in line, line


def test_every_package_is_under_the_import_contracts() -> None:
    """A new package must say what it may import."""
    packages = {path.parent.name for path in (ROOT / "raftkv").glob("*/__init__.py")} - {"_pb"}
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    held = {module.removeprefix("raftkv.") for contract in contracts for module in contract["source_modules"]}
    assert packages <= held
