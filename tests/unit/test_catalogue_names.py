"""docs/proofs.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`([a-z_/]+\.py)::(\w+)`( °)?")


def test_every_named_test_is_there_and_mutants_are_where_it_says_so() -> None:
    named = NAMED.findall((ROOT / "docs" / "proofs.md").read_text())
    assert len(named) > 40
    for path, name, mutated in named:
        text = (ROOT / "tests" / path).read_text()
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{path} has no {name}"
        if not name.startswith("test_"):
            checks = text[text.index("CHECKS") :].split("]\n", 1)[0]
            assert f"    {name},\n" in checks, f"{path} runs no {name}"
        if mutated:
            mutants = text[text.index("MUTANTS") :]
            assert re.search(rf", {name}\),?$", mutants, re.MULTILINE), f"{path} has no mutant for {name}"


def test_every_row_and_promise_has_its_line() -> None:
    lines = (ROOT / "docs" / "proofs.md").read_text()
    for row in range(57, 75):
        assert f"\n| {row} " in lines
    for promise in ("K1", "K2", "K3", *(f"X{n}" for n in range(1, 5)), *(f"W{n}" for n in range(1, 9))):
        assert re.search(rf"^\|[^|]*\b{promise} ", lines, re.MULTILINE), promise
    for number in range(1, 10):
        assert re.search(rf"^\|[^|]*\bL{number} ", lines, re.MULTILINE), number
