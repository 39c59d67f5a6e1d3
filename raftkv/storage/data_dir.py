"""What lies in a node's data directory, and what of it is left over from a step that was cut short.

A state directory counts only if the log names it; one that it does not name was being built, or was replaced, when
the process ended. An incoming snapshot is no leftover: its transfer may be resumed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_STATE = re.compile(r"state-(\d+)(\.tmp)?")


def next_state_name(data_dir: Path) -> str:
    """A name for a new state directory, later than all that exist."""
    numbers = [int(match.group(1)) for path in data_dir.iterdir() if (match := _STATE.fullmatch(path.name))]
    return f"state-{max(numbers, default=0) + 1}"


def remove_leftovers(data_dir: Path, state_name: str) -> list[str]:
    """Remove the state directories that are not the current one; returns their names. Only while none of them is open.

    Args:
        data_dir: the node's data directory.
        state_name: `LogStore.state_name`, read after the log was opened: that holds the directory's lock.
    """
    removed = []
    for path in sorted(data_dir.iterdir()):
        if _STATE.fullmatch(path.name) and path.name != state_name:
            shutil.rmtree(path)
            removed.append(path.name)
    return removed
