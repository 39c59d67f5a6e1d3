"""`version`: what a bug report should begin with."""

from __future__ import annotations

import platform
from importlib import metadata

import click

from raftkv import __version__


@click.command()
def version() -> None:
    """Print the versions of raftkv and of what it runs on."""
    click.echo(f"raftkv {__version__}")
    click.echo(f"python {platform.python_version()} ({platform.platform()})")
    for name in ("grpcio", "protobuf", "plyvel", "plyvel-next"):
        try:
            click.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
