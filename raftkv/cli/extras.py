"""What is not in the base install, asked for when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click


@contextlib.contextmanager
def needing_server(doing: str) -> Iterator[None]:
    """Around the imports of what runs or stores a node: without the packages for that, say how to get them."""
    try:
        yield
    except ModuleNotFoundError as fault:
        if fault.name and fault.name.split(".")[0] == "raftkv":
            raise
        raise click.ClickException(f"{doing} needs the package {fault.name}: pip install 'raftkv[server]'") from fault
