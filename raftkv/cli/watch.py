"""watch: options and output as etcdctl's."""

from __future__ import annotations

import click

from raftkv.cli.options import Settings, client_command
from raftkv.cli.ranges import range_of
from raftkv.cli.runnable import cannot_run


class WatchCommand(click.Command):
    """What follows the first `--` is a command to be run.

    Unless no key stands before it: `watch -- -key -- COMMAND` is how to watch a key that begins with a dash.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click, the command kept apart."""
        own, command = self._divided(ctx, args)
        try:
            rest = super().parse_args(ctx, own)
        except click.UsageError as error:
            if command or not error.message.startswith("Got unexpected extra argument"):
                raise
            text = f"{error.message}; a command to be run goes after --: watch KEY [RANGE_END] -- COMMAND …"
            raise click.UsageError(text, ctx) from None
        ctx.params["command"] = tuple(command)
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """As click, with the command."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]

    def _divided(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str]]:
        if "--" not in args:
            return args, []
        at = args.index("--")
        if not self._has_key(ctx, args[:at]):
            if "--" not in args[at + 1 :]:
                return args, []
            at = args.index("--", at + 1)
        if at == len(args) - 1:
            raise click.UsageError("COMMAND is missing: nothing follows --", ctx)
        return args[:at], args[at + 1 :]

    def _has_key(self, ctx: click.Context, args: list[str]) -> bool:
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        return isinstance(values.get("key"), str)


@click.command(cls=WatchCommand)
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
    command: tuple[str, ...],
) -> int:
    """Show changes of a key, or of the range from KEY up to RANGE_END, until Ctrl-C.

    Goes on through the death of nodes: nothing is left out, shown twice or out of order. Where history has been
    compacted in between it ends with exit code 1.

    COMMAND is run for each change, one after the other, and finds ETCD_WATCH_REVISION, ETCD_WATCH_EVENT_TYPE,
    ETCD_WATCH_KEY and ETCD_WATCH_VALUE in its environment, as from etcdctl: the last three in double quotes, escaped.
    The watch ends with exit code 1 when COMMAND fails; a signal is passed on to COMMAND, and ends the watch with it.
    """
    if len(set(filters)) == 2:
        raise click.UsageError("--filter noput and --filter nodelete together leave nothing to show; choose one")
    code = cannot_run(command[0]) if command else 0
    if code:
        return code
    start, end = range_of(key, range_end, prefix=prefix, from_key=from_key)

    from raftkv._pb import watch_pb2

    request = watch_pb2.WatchCreateRequest(
        key=start,
        range_end=end,
        start_revision=rev,
        prev_kv=prev_kv,
        filters=[watch_pb2.WatchCreateRequest.FilterType.Value(name.upper()) for name in set(filters)],
    )
    if command:
        from raftkv.cli.reacting import follow_with

        return follow_with(settings, request, command, progress=progress_notify)
    from raftkv.cli.following import follow

    follow(settings, request, progress=progress_notify)
    return 0
