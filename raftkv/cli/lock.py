"""lock and elect: options and output as etcdctl's; a command under a lock also learns when it is lost."""

from __future__ import annotations

from typing import Any

import click

from raftkv.cli.options import Duration, Settings, TimeToLive, client_command
from raftkv.cli.ranges import key_bytes
from raftkv.cli.runnable import cannot_run


class CommandAfterDashes(click.Command):
    """Says where the options of the command to be run belong."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if "--" in args:
                raise
            text = f"{error.format_message()} A command with options of its own goes after --: lock NAME -- COMMAND …"
            raise click.UsageError(text, ctx) from None


_ttl_option = click.option(
    "--ttl",
    type=TimeToLive(),
    default="10s",
    show_default=True,
    help="Whoever holds it and is not heard of for so long has lost it; the cluster raises what is too short.",
)


def _checked_name(ctx: click.Context, param: click.Parameter, value: str) -> bytes:
    name = key_bytes(value)
    if not name.strip(b"/"):
        raise click.BadParameter("must not be empty, nor slashes alone", ctx, param)
    return name


@click.command(cls=CommandAfterDashes)
@click.argument("name", callback=_checked_name)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@_ttl_option
@click.option(
    "--wait",
    "wait_s",
    type=Duration(zero=True),
    help="Give up when it is not free so soon; 0 takes it if it is free.  [default: never]",
)
@click.option(
    "--grace",
    "grace_s",
    type=Duration(),
    default="5s",
    show_default=True,
    help="When the lock is lost: from SIGTERM to SIGKILL for the command.",
)
@client_command
def lock(
    settings: Settings, name: bytes, command: tuple[str, ...], ttl: float, wait_s: float | None, grace_s: float
) -> int:
    """Hold the lock NAME until Ctrl-C, or while COMMAND runs.

    Without COMMAND the lock's key is printed, and the lock given back at SIGINT or SIGTERM.

    COMMAND finds RAFTKV_LOCK_KEY, RAFTKV_FENCE (a number, greater for each later holder) and RAFTKV_GUARD (for --guard
    of put, del and txn) in its environment; also RAFTKV_ENDPOINTS, and ETCD_LOCK_KEY and ETCD_LOCK_REV as from etcdctl.
    It gets SIGTERM when the lock is lost, and SIGKILL after the grace.

    The exit code is COMMAND's (128+N when signal N ended it); 124 when the lock was not free in time, 125 when it could
    not be had or was lost, 126 or 127 when COMMAND cannot be run.
    """
    if not command:
        from raftkv.cli.holding import hold

        return hold(settings, name, ttl_s=ttl, wait_s=wait_s)
    code = cannot_run(command[0])
    if code:
        return code

    from raftkv.cli.holding import run_under

    return run_under(settings, name, command, ttl_s=ttl, wait_s=wait_s, grace_s=grace_s)


@click.command()
@click.argument("name", callback=_checked_name)
@click.argument("value", required=False)
@click.option("-l", "--listen", is_flag=True, help="Do not stand; show the leader, and every later one.")
@_ttl_option
@client_command
def elect(settings: Settings, name: bytes, value: str | None, listen: bool, **options: Any) -> int:
    """Stand for leader in the election NAME, with VALUE for the others to see; hold it until Ctrl-C.

    Prints the key and the value once it leads. Ends with exit code 1 when leadership is lost.
    """
    if listen and value is not None:
        raise click.UsageError(f"--listen only looks; leave VALUE out ({value!r})")
    if not listen and value is None:
        raise click.UsageError("VALUE is missing: what the others see of the leader (or --listen, to look only)")

    from raftkv.cli import holding

    if value is None:
        holding.listen(settings, name)
        return 0
    return holding.lead(settings, name, key_bytes(value), ttl_s=options["ttl"])
