"""Whether a command that is to be run is there at all: asked before anything is held or watched for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

NOT_FOUND = 127  # as shells and timeout(1) have it
NOT_EXECUTABLE = 126


def cannot_run(command: str) -> int:
    """The exit code if it cannot be run, after saying so; 0 if it seems that it can."""
    if shutil.which(command) is not None:
        return 0
    there = "/" in command and Path(command).exists()
    click.echo(f"Error: {command}: {'cannot be executed' if there else 'command not found'}", err=True)
    return NOT_EXECUTABLE if there else NOT_FOUND
