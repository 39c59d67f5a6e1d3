"""`raftkv cluster`: a cluster of node processes on this machine, seen and disturbed from any terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raftkv.cli import output
from raftkv.cli.options import FORMATS

if TYPE_CHECKING:
    from raftkv.local.layout import Topology
    from raftkv.local.status import NodeRow
    from raftkv.local.supervisor import AsyncLocalCluster

REFRESH_S = 0.5
HEAD = ("NODE", "ROLE", "PID", "CLIENTS", "TERM", "COMMIT", "APPLIED", "LAG", "MEMORY")
RIGHT = (2, 4, 5, 6, 7, 8)

_directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where logs and data live.  [env: RAFTKV_CLUSTER_DIR; default: raftkv/cluster under $XDG_STATE_HOME, "
    "which is ~/.local/state]",
)


@click.group()
def cluster() -> None:
    """Run a cluster on this machine.

    `up` starts it; the other commands reach it from any terminal. A target is a node (n2), a list (n1,n3), `leader`,
    `followers` or `all`.
    """


@cluster.command()
@click.option(
    "-n", "--nodes", type=click.IntRange(1, 99), help="How many nodes.  [default: as before in --dir, else 5]"
)
@_directory_option
@click.option(
    "--base-port",
    type=click.IntRange(0, 65535),
    help="First port; each node takes two, for clients and peers. 0 takes free ones.  "
    "[default: as before in --dir, else 2379]",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take nodes, base_port, host and the nodes' settings from a TOML file (see cluster/local.toml).",
)
@click.option("--detach", is_flag=True, help="Leave it running and return; `raftkv cluster down` ends it.")
@click.option("--supervise", type=int, hidden=True, help="The detached half: say 'ready' on this descriptor.")
def up(
    nodes: int | None,
    directory: Path | None,
    base_port: int | None,
    config: Path | None,
    detach: bool,
    supervise: int | None,
) -> None:
    """Start the cluster, and go on with the data that --dir holds.

    Shows a live table until Ctrl-C, which stops all nodes.
    """
    from raftkv.local import layout as layouts

    chosen = (directory or layouts.default_directory()).expanduser().absolute()
    settings = layouts.read_topology(config) if config is not None else layouts.Topology()
    settings = settings.with_options(nodes, base_port)
    if settings.base_port is None and layouts.load(chosen) is None:
        settings = settings.with_options(None, layouts.DEFAULT_BASE_PORT)
    if detach and supervise is None:
        _detach(chosen, settings, config)
        return
    asyncio.run(_supervise(chosen, settings, supervise))


async def _supervise(directory: Path, settings: Topology, ready_fd: int | None) -> None:
    from raftkv.local.control import ControlServer
    from raftkv.local.errors import LocalClusterError
    from raftkv.local.supervisor import AsyncLocalCluster, remove_cluster

    local = AsyncLocalCluster(
        settings.nodes,
        directory=directory,
        base_port=settings.base_port,
        host=settings.host,
        arguments=settings.arguments,
    )
    tell = _Ready(ready_fd)
    end_on_signals()
    started = time.monotonic()
    try:
        if ready_fd is None:
            click.echo(f"starting the nodes in {directory} …", err=True)
        await local.start()
    except LocalClusterError as error:
        tell(str(error))
        raise
    layout = local.layout
    control = ControlServer(local)
    remove = False
    try:
        async with control:
            tell(None)
            if ready_fd is None:
                await _live_table(local, control.down, time.monotonic() - started)
            remove = await control.down
    finally:
        if ready_fd is None:
            click.echo("stopping the nodes …", err=True)
        await local.close()
        if remove:
            remove_cluster(layout)
        await control.finish()
        if ready_fd is None:
            click.echo(
                "stopped" if remove else f"stopped; `raftkv cluster up` goes on with the data in {directory}", err=True
            )


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end the running task as Ctrl-C does, so that everything is cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


class _Ready:
    """Tells the process that waits for the detached half how the start went."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __call__(self, error: str | None) -> None:
        if self._descriptor is not None:
            # If nobody waits any more, the launcher was killed; the cluster is still what it was asked for.
            with contextlib.suppress(OSError):
                os.write(self._descriptor, json.dumps({"error": error}).encode())
            os.close(self._descriptor)
            self._descriptor = None


def _detach(directory: Path, settings: Topology, config: Path | None) -> None:
    from raftkv.local import layout as layouts
    from raftkv.local.control import rows

    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "supervisor.log"
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "raftkv", "cluster", "up", "--dir", str(directory), "--supervise", str(write_end)]
    command += [] if settings.nodes is None else ["--nodes", str(settings.nodes)]
    command += [] if settings.base_port is None else ["--base-port", str(settings.base_port)]
    command += [] if config is None else ["--config", str(config)]
    with log.open("ab") as target:
        supervisor = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=target,
            start_new_session=True,
            pass_fds=(write_end,),
        )
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb") as answer:
            told = answer.read()
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise
    error = json.loads(told)["error"] if told else f"the supervisor ended at once; see {log}"
    if error is not None:
        supervisor.wait()
        raise click.ClickException(error)
    loaded = layouts.load(directory)
    assert loaded is not None
    endpoints = ",".join(loaded[0].client(node) for node in loaded[0].nodes)
    for line in table_lines(rows(directory)):
        click.echo(line)
    click.echo()
    click.echo(f"running in {directory} (supervisor pid {supervisor.pid}); `raftkv cluster down` ends it")
    click.echo(f"export RAFTKV_ENDPOINTS={endpoints}")
    supervisor.returncode = 0  # it runs on without us: Popen must not complain that nobody waited for it


# ---- looking ----


@cluster.command("status")
@_directory_option
@click.option("-o", "-w", "--output", "form", type=click.Choice(FORMATS), default="simple", help="Form of the answer.")
@click.option("--watch", is_flag=True, help="Show it again and again until Ctrl-C.")
def status(directory: Path | None, form: str, watch: bool) -> None:
    """Show the nodes: role, term, commit and applied index, lag, memory."""
    from raftkv.local.control import rows

    chosen = _chosen(directory)
    if watch and form == "simple":
        screen = Screen()
        while True:
            screen.show(table_lines(rows(chosen)))
            time.sleep(REFRESH_S)
    found = rows(chosen)
    match form:
        case "json":
            output.print_json([row.as_dict() for row in found])
        case "table":
            output.print_table(HEAD, [[click.unstyle(cell) for cell in _cells(row)] for row in found])
        case _:
            for line in table_lines(found):
                click.echo(line)


@cluster.command("logs")
@click.argument("node")
@_directory_option
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="Begin so many lines back."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until Ctrl-C.")
@click.option("--raw", is_flag=True, help="The JSON lines as they are.")
def logs(node: str, directory: Path | None, lines: int, follow: bool, raw: bool) -> None:
    """Show what a node has logged. Works on a stopped cluster too."""
    from raftkv.local import layout as layouts
    from raftkv.local.errors import ClusterNotRunning, UnknownNode

    loaded = layouts.load(_chosen(directory))
    if loaded is None:
        raise ClusterNotRunning(_chosen(directory))
    if node not in loaded[0].names:
        raise UnknownNode(node, loaded[0].names)
    for line in _tail(loaded[0].log(node), lines, follow):
        click.echo(line if raw else readable(line))


def _tail(path: Path, count: int, follow: bool) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as log:
            last = log.readlines()
            yield from (line.rstrip("\n") for line in (last[-count:] if count else []))
            while follow:
                line = log.readline()
                if line:
                    yield line.rstrip("\n")
                else:
                    time.sleep(0.1)
    except FileNotFoundError:
        return


def readable(line: str) -> str:
    """A JSON log line as words: time, level, event, then the other fields. What is no JSON stays as it is."""
    try:
        fields = json.loads(line)
        shown_time = str(fields.pop("ts", fields.pop("timestamp", "")))
        level = str(fields.pop("level", "info"))
        event = str(fields.pop("event"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return line
    rest = " ".join(f"{name}={value}" for name, value in fields.items())
    colour = {"warning": "yellow", "error": "red", "critical": "red"}.get(level)
    return f"{shown_time} {output.style(f'{level:<7}', fg=colour)} {output.style(event, bold=True)} {rest}".rstrip()


# ---- disturbing ----


def _verb(name: str, past: str, text: str) -> Callable[..., Any]:
    @cluster.command(name, help=text)
    @click.argument("target")
    @_directory_option
    def command(target: str, directory: Path | None) -> int:
        from raftkv.local.control import ask

        names: list[str] = ask(_chosen(directory), name, target=target)
        if not names:
            click.echo(f"Error: {target}: not running", err=True)
            return 1
        click.echo(f"{past} {', '.join(names)}")
        return 0

    return command


_verb("kill", "killed", "SIGKILL: the process is gone at once.")
_verb("stop", "stopped", "SIGTERM: the node hands over what it leads, and ends.")
_verb("pause", "paused", "SIGSTOP: the process is frozen and keeps its connections.")
_verb("resume", "resumed", "SIGCONT: a paused process goes on.")
_verb("restart", "restarted", "Start nodes again on their data; stop them first if they run.")


@cluster.command()
@_directory_option
@click.option("--remove", is_flag=True, help="Delete logs and data too.")
def down(directory: Path | None, remove: bool) -> None:
    """Stop all nodes. The data stays, unless --remove."""
    from raftkv.local import layout as layouts
    from raftkv.local.control import ask
    from raftkv.local.errors import ClusterNotRunning
    from raftkv.local.supervisor import remove_cluster

    chosen = _chosen(directory)
    try:
        ask(chosen, "down", remove=remove)
    except ClusterNotRunning:
        loaded = layouts.load(chosen)
        if not remove or loaded is None:
            raise
        remove_cluster(loaded[0])
    click.echo(f"removed {chosen}" if remove else f"stopped; the data stays in {chosen}")


def _chosen(directory: Path | None) -> Path:
    from raftkv.local.layout import default_directory

    return (directory or default_directory()).expanduser().absolute()


# ---- the table ----


def table_lines(rows: Sequence[NodeRow]) -> list[str]:
    """The nodes as lines for people."""
    head = [output.style(name, bold=True) for name in HEAD]
    return output.columns(head, [_cells(row) for row in rows], right=RIGHT)


def _cells(row: NodeRow) -> list[str]:
    def number(value: int | None) -> str:
        return "-" if value is None else str(value)

    role = row.role
    if row.process == "exited":
        code = row.exit_code or 0
        role = f"exited ({signal.Signals(-code).name})" if code < 0 else f"exited ({code})"
    elif row.process == "paused":
        role = "paused"
    colour = output.COLOURS.get(row.role if row.process == "running" else row.process)
    return [
        row.name,
        output.style(role, fg=colour, bold=role == "leader"),
        number(row.pid),
        row.client,
        number(row.term),
        number(row.commit),
        number(row.applied),
        number(row.lag),
        output.bytes_text(row.rss_bytes),
    ]


class Screen:
    """Lines that are drawn over the last ones on a terminal; elsewhere they appear when something changed."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._height = 0
        self._last: list[str] = []

    def show(self, lines: Sequence[str], *, key: Sequence[str] | None = None) -> None:
        """Show these lines. `key`: what must differ for them to be shown again where nothing can be drawn over."""
        if self._live:
            move_up = f"\x1b[{self._height}F" if self._height else ""
            click.echo(move_up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", nl=False)
            self._height = len(lines)
        elif list(key or lines) != self._last:
            self._last = list(key or lines)
            click.echo("\n".join(lines))


async def _live_table(local: AsyncLocalCluster, down: asyncio.Future[bool], took_s: float) -> None:
    click.echo(f"{len(local.names)} nodes up in {took_s:.1f} s. Ctrl-C stops them all. From another terminal:\n")
    where = "" if os.environ.get("RAFTKV_CLUSTER_DIR") else f" --dir {local.directory}"
    from raftkv.local.layout import default_directory

    where = "" if local.directory == default_directory().expanduser().absolute() else where
    click.echo(f"  export RAFTKV_ENDPOINTS={','.join(local.endpoints)}")
    click.echo("  raftkv put greeting hello; raftkv get greeting")
    click.echo(f"  raftkv cluster kill leader{where}; raftkv cluster restart n1{where}\n")
    screen = Screen()
    while not down.done():
        rows = await local.status()
        screen.show(table_lines(rows), key=[f"{row.name} {row.process} {row.role} {row.pid}" for row in rows])
        await asyncio.wait([down], timeout=REFRESH_S)
