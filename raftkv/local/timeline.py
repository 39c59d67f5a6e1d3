"""What the nodes themselves have logged about an election: read from their JSON logs, from a marked place on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

SUSPECTED = ("leader_suspected", "pre_campaign")
CAMPAIGNED = ("campaign",)
ELECTED = ("became_leader",)


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One line of a node's log."""

    at: float
    """time.time() of the node."""
    node: str
    name: str
    fields: Mapping[str, Any]


class LogMarks:
    """Remembers how far the logs have been written, and reads what came after."""

    def __init__(self, logs: Mapping[str, Path]) -> None:
        self._logs = dict(logs)
        self._offsets: dict[str, int] = {}
        self.mark()

    def mark(self) -> None:
        """What is in the logs now is past."""
        self._offsets = {name: path.stat().st_size if path.exists() else 0 for name, path in self._logs.items()}

    def events(self) -> list[Event]:
        """Everything since the mark, of all nodes, by time."""
        found = [event for name, path in self._logs.items() for event in _read(name, path, self._offsets[name])]
        return sorted(found, key=lambda event: event.at)


def first(events: list[Event], names: tuple[str, ...], *, of: str | None = None, not_of: str = "") -> Event | None:
    """The first event with one of these names, of this node if given and never of `not_of`."""
    for event in events:
        if event.name in names and event.node != not_of and of in (None, event.node):
            return event
    return None


def _read(name: str, path: Path, offset: int) -> Iterator[Event]:
    try:
        with path.open("rb") as log:
            log.seek(offset)
            lines = log.read().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            fields = json.loads(line)
            yield Event(_seconds(fields["ts"]), name, str(fields["event"]), fields)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a kill, or words of Python's own


def _seconds(value: str | float) -> float:
    if isinstance(value, str):
        return datetime.fromisoformat(value).timestamp()
    return float(value)
