"""What a load concludes from what it has seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from raftkv.client import AsyncClient
from raftkv.client.results import KeyValue
from raftkv.local.load import Load, percentile
from raftkv.local.timeline import CAMPAIGNED, ELECTED, LogMarks, first


def load_with(times: list[float]) -> Load:
    load = Load(cast("AsyncClient", object()))
    load.writes = [(at - 0.001, at) for at in times]
    return load


def test_the_gap_is_the_longest_silence_that_touches_the_window() -> None:
    load = load_with([1.0, 4.0, 5.0, 5.01, 5.2, 5.21, 9.0])
    gap = load.gap(5.05, 6.0)
    assert (gap.before, gap.after) == (5.21, 9.0)
    assert load.gap(5.05, 5.205).length_ms == pytest.approx(190)  # before the window ends
    assert load.gap(2.0, 4.5).before == 1.0  # begun before the window


def test_a_gap_without_an_end_reaches_to_the_end_of_the_window() -> None:
    assert load_with([1.0]).gap(2.0, 7.0).length_ms == pytest.approx(6000)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 51)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (25.0, 50.0, 50.0)
    assert percentile([], 0.5) == 0.0


class Store:
    """Just enough of a client for `verify`."""

    def __init__(self, items: dict[str, tuple[bytes, int]]) -> None:
        self.items = items

    async def scan(self, prefix: str, *, timeout: float) -> object:
        for key, (value, revision) in self.items.items():
            yield KeyValue(key.encode(), value, revision, revision, 1)


async def verdict_of(
    acknowledged: dict[str, tuple[bytes, int]], unknown: dict[str, bytes], there: dict[str, tuple[bytes, int]]
) -> tuple[bool, list[str]]:
    load = load_with([])
    load._acknowledged, load._unknown = acknowledged, unknown
    verdict = await load.verify(cast("AsyncClient", Store(there)))
    return verdict.kept, verdict.lost


async def test_verify_finds_every_kind_of_loss() -> None:
    promised = {"a": (b"1", 2), "b": (b"2", 3)}
    assert await verdict_of(promised, {}, dict(promised)) == (True, [])
    assert (await verdict_of(promised, {}, {"a": (b"1", 2)}))[1] == ["b: acknowledged with revision 3, not there"]
    kept, lost = await verdict_of(promised, {}, {**promised, "b": (b"2", 9)})
    assert not kept
    assert "with revision 3, found b'2' with 9" in lost[0]
    kept, lost = await verdict_of(promised, {}, {**promised, "b": (b"x", 3)})
    assert not kept
    kept, lost = await verdict_of(promised, {}, {**promised, "ghost": (b"x", 4)})
    assert (kept, lost) == (False, ["ghost: found, but nobody wrote that"])
    assert (await verdict_of(promised, {"u": b"x"}, {**promised, "u": (b"x", 4)}))[0]  # may be there
    assert (await verdict_of(promised, {"u": b"x"}, promised))[0]  # or not


def test_the_timeline_reads_only_what_is_new_and_survives_torn_lines(tmp_path: Path) -> None:
    log = tmp_path / "n1.log"
    log.write_text(json.dumps({"event": "became_leader", "ts": 1.0}) + "\n")
    marks = LogMarks({"n1": log, "n2": tmp_path / "none.log"})
    with log.open("a") as target:
        target.write('{"event": "campaign", "ts": "2026-01-01T00:00:01.5+00:00", "term": 3}\nwords\n{"event": "became')
    (event,) = marks.events()
    assert (event.node, event.name, event.fields["term"], event.at) == ("n1", "campaign", 3, 1767225601.5)
    assert first([event], CAMPAIGNED, not_of="n1") is None
    assert first([event], CAMPAIGNED, of="n1") is event
    assert first([event], ELECTED) is None
