"""watch: options and output as etcdctl's."""

from __future__ import annotations

import click

from raftkv.cli.options import Settings, client_command
from raftkv.cli.ranges import range_of


@click.command()
@click.argument("key")
@click.argument("range_end", required=False)
@click.option("--prefix", is_flag=True, help="All keys that begin with KEY.")
@click.option("--from-key", is_flag=True, help="All keys from KEY on, in byte order.")
@click.option(
    "--rev", type=click.IntRange(0, (1 << 63) - 1), default=0, help="The first revision to show; 0 is from now on."
)
@click.option("--prev-kv", is_flag=True, help="Show also what was there before.")
@click.option(
    "--filter",
    "filters",
    type=click.Choice(["noput", "nodelete"], case_sensitive=False),
    multiple=True,
    help="Leave puts or deletes out.",
)
@click.option("--progress-notify", is_flag=True, help="Show now and then up to which revision all is shown.")
@client_command
def watch(
    settings: Settings,
    key: str,
    range_end: str | None,
    prefix: bool,
    from_key: bool,
    rev: int,
    prev_kv: bool,
    filters: tuple[str, ...],
    progress_notify: bool,
) -> None:
    """Show changes of a key, or of the range from KEY up to RANGE_END, until Ctrl-C.

    Goes on through the death of nodes: nothing is left out, shown twice or out of order. Where history has been
    compacted in between it ends with exit code 1.
    """
    if len(set(filters)) == 2:
        raise click.UsageError("--filter noput and --filter nodelete together leave nothing to show; choose one")
    start, end = range_of(key, range_end, prefix=prefix, from_key=from_key)

    from raftkv._pb import watch_pb2
    from raftkv.cli.following import follow

    request = watch_pb2.WatchCreateRequest(
        key=start,
        range_end=end,
        start_revision=rev,
        prev_kv=prev_kv,
        filters=[watch_pb2.WatchCreateRequest.FilterType.Value(name.upper()) for name in set(filters)],
    )
    follow(settings, request, progress=progress_notify)
