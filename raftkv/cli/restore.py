"""`snapshot status` and `snapshot restore`: what is done with a backup file, without any cluster.

They read and write what nodes store, so they need what a node needs; it is imported when they run.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from raftkv.cli import fields
from raftkv.cli.extras import needing_server
from raftkv.cli.options import output_from, output_option

if TYPE_CHECKING:
    from raftkv.server.restore import RestoreConfig

_BUMP = 1_000_000_000

_file = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))


@click.command("status")
@_file
@output_option
def status(file: Path, output: str | None) -> None:
    """Verify all of FILE and show what it holds.

    The hash is the beginning of its SHA-256, the keys are those that have a value.
    """
    with needing_server("reading a snapshot"):
        from raftkv.server.restore import inspect
    from raftkv.cli.output import bytes_text, print_json, print_table

    found = inspect(file)
    row = (f"{found.hash:x}", str(found.revision), str(found.keys), bytes_text(found.size))
    match output_from(output):
        case "json":
            names = {"hash": found.hash, "revision": found.revision, "totalKey": found.keys, "totalSize": found.size}
            print_json(names)
        case "table":
            print_table(("HASH", "REVISION", "TOTAL KEYS", "TOTAL SIZE"), [row])
        case "fields":
            fields.show(fields.backup(found.hash, found.revision, found.keys, found.size))
        case _:
            click.echo(", ".join(row))


@click.command("restore")
@_file
@click.option("--name", required=True, envvar="RAFTKV_NAME", help="The node, one of --initial-cluster.")
@click.option(
    "--data-dir",
    required=True,
    type=click.Path(path_type=Path),
    envvar="RAFTKV_DATA_DIR",
    help="Its data directory, which must be empty or not exist yet.",
)
@click.option(
    "--initial-cluster",
    required=True,
    envvar="RAFTKV_INITIAL_CLUSTER",
    metavar="NAME=HOST:PORT,…",
    help="All nodes of the new cluster with their peer addresses.",
)
@click.option(
    "--initial-cluster-token",
    default="raftkv-cluster",
    show_default=True,
    envvar="RAFTKV_INITIAL_CLUSTER_TOKEN",
    help="As for `raftkv node`. Another one than the old cluster's keeps apart what is left of that.",
)
@click.option(
    "--bump-revision",
    type=int,
    default=_BUMP,
    show_default=True,
    metavar="N",
    help="How far revisions jump ahead: beyond all that the old cluster has given out since the backup.",
)
def restore(
    file: Path, name: str, data_dir: Path, initial_cluster: str, initial_cluster_token: str, bump_revision: int
) -> None:
    """Make the data directory of one node of a new cluster from FILE.

    Run it once for each node, with the same FILE and options but --name and --data-dir, then start the nodes with
    `raftkv node` and the same --name, --data-dir, --initial-cluster and --initial-cluster-token. Stop the old cluster
    before.

    Locks and leases are as they were in FILE. Every later fencing token is greater than all that the old cluster has
    given out. When the same FILE is restored again, or an older one than the last time, give a greater --bump-revision.
    """
    with needing_server("restoring a snapshot"):
        from raftkv.server.restore import restore as make

    config = _config(name, data_dir, initial_cluster, initial_cluster_token, bump_revision)
    with _ended_in_order():
        made = make(file, config)
    click.echo(
        f"Restored {name} at {data_dir}: member {made.node_id:x} of cluster {made.cluster_id:x}, "
        f"revision {made.revision} (of the backup: {made.backup_revision})"
    )


def _config(name: str, data_dir: Path, initial_cluster: str, token: str, bump: int) -> RestoreConfig:
    from raftkv.server.config import parse_initial_cluster
    from raftkv.server.errors import ConfigError
    from raftkv.server.restore import RestoreConfig

    try:
        return RestoreConfig(
            name=name,
            data_dir=data_dir,
            initial_cluster=parse_initial_cluster(initial_cluster),
            initial_cluster_token=token,
            bump_revision=bump,
        )
    except ConfigError as fault:
        raise click.UsageError(f"--{fault.field.replace('_', '-')}: {fault.problem}") from fault


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end us as Ctrl-C does, so that what is half done is taken back."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
