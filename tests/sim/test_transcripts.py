"""The stories in `scenarios/`: run, and compared with what was recorded. `--rewrite` records them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.transcript import BadTranscript, Transcript

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    recorded = path.read_text(encoding="utf-8")
    told = Transcript().run(recorded)
    if request.config.getoption("--rewrite", default=False):
        path.write_text(told, encoding="utf-8")
    else:
        assert told == recorded


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 15


def test_each_scenario_begins_with_what_it_shows() -> None:
    for path in SCENARIOS:
        assert path.read_text(encoding="utf-8").startswith("# "), path.name


@pytest.mark.parametrize("line", ["fly 1", "tick much", "campaign 9", "lose", "change 1 *4"])
def test_nonsense_is_named(line: str) -> None:
    transcript = Transcript()
    transcript.command("nodes 3")
    if line == "lose":
        transcript.command(line)  # nothing to lose is no nonsense
        return
    with pytest.raises(BadTranscript, match=line.split()[0]):
        transcript.command(line)
