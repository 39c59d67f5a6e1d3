"""The `raftkv` command.

Exit codes: 0 done, 1 the operation failed (the reason on stderr, one line), 2 bad usage, 130 interrupted. A command
that runs another one has that one's, see `lock`.
Commands are imported when they are called for, so that `raftkv --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from raftkv import __version__
from raftkv.cli.options import NearestGroup, client_options

# name: (section, module:attribute, help line). The help lines stand here so that showing them imports nothing;
# a test holds that every command is there.
_COMMANDS = {
    "put": ("Keys and values", "kv:put", "Write a key."),
    "get": ("Keys and values", "kv:get", "Read a key, a range or a prefix."),
    "del": ("Keys and values", "kv:delete", "Delete a key, a range or a prefix."),
    "txn": ("Keys and values", "txn:txn", "Run one transaction, read from stdin."),
    "compact": ("Keys and values", "kv:compact", "Forget the history before a revision."),
    "watch": ("Keys and values", "watch:watch", "Show changes of keys as they happen."),
    "lease": ("Coordination", "lease:lease", "Leases: grant, revoke, keep-alive, timetolive, list."),
    "lock": ("Coordination", "lock:lock", "Hold a lock, or run a command under it."),
    "elect": ("Coordination", "lock:elect", "Stand in an election, or see who leads."),
    "status": ("Cluster", "endpoint:status", "Show the state of each endpoint."),
    "health": ("Cluster", "endpoint:health", "Check that each endpoint can serve."),
    "hash": ("Cluster", "endpoint:hashkv", "Compare the content hash of each endpoint."),
    "endpoint": ("Cluster", "endpoint:endpoint", "The same three, as etcdctl spells them."),
    "member": ("Cluster", "member:member", "Show the members."),
    "move-leader": ("Cluster", "member:move_leader", "Hand leadership to another member."),
    "alarm": ("Cluster", "maintenance:alarm", "List or clear alarms."),
    "defrag": ("Cluster", "maintenance:defrag", "Give unused disk space back."),
    "snapshot": ("Cluster", "maintenance:snapshot", "Back the whole state up: save, status, restore."),
    "demo": ("On this machine", "demo:command", "Watch five nodes lose their leader three times."),
    "cluster": (
        "On this machine",
        "cluster:cluster",
        "Run a cluster here: up, status, kill, pause, restart, logs, down.",
    ),
    "node": ("On this machine", "node:command", "Run one node."),
    "version": ("On this machine", "version:version", "Print the versions of raftkv and of what it runs on."),
}
_ALIASES = {"compaction": "compact", "delete": "del"}


class LazyGroup(NearestGroup):
    """A group whose commands are named here and imported when used."""

    aliases = _ALIASES

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        found = _COMMANDS.get(self.aliases.get(cmd_name, cmd_name))
        if found is None:
            return None
        module, _, attribute = found[1].partition(":")
        command: click.Command = getattr(import_module(f"raftkv.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by section, without importing them."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, (section, _, text) in _COMMANDS.items():
            sections.setdefault(section, []).append((name, text))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="raftkv %(version)s")
@client_options
def cli() -> None:
    """A linearizable key-value store that you install with pip.

    Try `raftkv demo`, or start a cluster with `raftkv cluster up` and use it with `raftkv put` and `raftkv get`.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        outcome: Any = cli.main(args=arguments, prog_name="raftkv", standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _failed(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python must not complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last line of defence: one line for the user, not a traceback
        if os.environ.get("RAFTKV_DEBUG"):
            raise
        return 2 * _failed(_reason(error)) if type(error).__name__ == "ConfigError" else _failed(_reason(error))


def _reason(error: Exception) -> str:
    if _is_ours(error):
        return str(error)
    return (
        f"{type(error).__name__}: {error} (RAFTKV_DEBUG=1 shows where)"
        if not isinstance(error, OSError)
        else str(error)
    )


def _is_ours(error: Exception) -> bool:
    return any(kind.__module__.startswith("raftkv.") for kind in type(error).__mro__)


def _failed(reason: str) -> int:
    click.echo(f"Error: {' '.join(reason.split())}", err=True)
    return 1
