"""`raftkv node`: run one node.

The flags are made from the fields of `NodeConfig`. A value comes from: flag, else RAFTKV_* variable, else the file
of --config, else the default. The names of etcd's flags are understood where they mean the same.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from raftkv.cli.extras import needing_server
from raftkv.server.config import NodeConfig, closest, parse_initial_cluster
from raftkv.server.errors import ConfigError

_ENVIRONMENT = "RAFTKV_"


class _Option(click.Option):
    """An option some of whose names are not in the help."""

    def __init__(self, declarations: list[str], *, other_names: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__([*declarations, *other_names], **settings)
        self._other_names = other_names

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names = self.opts
        self.opts = [name for name in names if name not in self._other_names]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def _option(each: Field[Any]) -> click.Option:
    rule = each.metadata
    required = each.default is MISSING and each.default_factory is MISSING
    default = None if each.default is MISSING else each.default
    kind: Any = str
    if "choices" in rule:
        kind = click.Choice(rule["choices"])
    elif "least" in rule:
        kind = float if isinstance(rule["least"], float) else int
    elif each.name == "data_dir":
        kind = click.Path(path_type=Path)
    help_text = rule["help"]
    if rule.get("unit"):
        help_text += f" In {rule['unit']}."
    return _Option(
        [f"--{each.name.replace('_', '-')}", each.name],
        other_names=(f"--{rule['etcd']}",) if "etcd" in rule else (),
        type=kind,
        **({"required": True} if required else {"default": default}),
        hidden=rule.get("hidden", False),
        help=help_text,
        show_default=default not in (None, ""),
        envvar=None if rule.get("hidden") else _ENVIRONMENT + each.name.upper(),
        metavar=None if "choices" in rule else {int: "N", float: "N"}.get(kind, "TEXT"),
    )


def _read_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Make the file's values the defaults; flags and the environment come before them."""
    if path is None:
        return None
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as fault:
        raise click.BadParameter(f"{path} cannot be read: {fault}", ctx, param) from fault
    except tomllib.TOMLDecodeError as fault:
        raise click.BadParameter(f"{path} is no TOML: {fault}", ctx, param) from fault
    known = {each.name: each for each in fields(NodeConfig) if not each.metadata.get("hidden")}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            raise click.UsageError(f"{path}: unknown key {key!r}{closest(name, known)}", ctx)
        if name == "initial_cluster" and isinstance(value, dict):
            value = ",".join(f"{member}={address}" for member, address in value.items())
        numeric = "least" in known[name].metadata
        if isinstance(value, bool) or not isinstance(value, int | float if numeric else str):
            wanted = "a number" if numeric else "a string"
            raise click.UsageError(f"{path}: {key} must be {wanted}, not {value!r}", ctx)
        values[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _config(values: dict[str, Any]) -> NodeConfig:
    values["initial_cluster"] = parse_initial_cluster(values["initial_cluster"] or "")
    return NodeConfig(**values)


@click.pass_context
def _run(ctx: click.Context, /, config: Path | None, **values: Any) -> None:
    if not __debug__:
        # The assertions are part of what makes a node safe: they stop it before it spreads what cannot be.
        raise click.ClickException("a node does not run under python -O or PYTHONOPTIMIZE: its assertions must be on")
    try:
        settings = _config(values)
    except ConfigError as fault:
        flag = "--" + fault.field.replace("_", "-")
        raise click.UsageError(f"{flag}: {fault.problem}", ctx) from fault
    with needing_server("running a node"):
        from raftkv.server import node
    ctx.exit(node.run(settings))


command = click.Command(
    "node",
    callback=_run,
    params=[
        click.Option(
            ["--config"],
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            envvar=_ENVIRONMENT + "CONFIG",
            is_eager=True,
            callback=_read_file,
            help="A TOML file with any of these settings; flags and the environment come before it.",
        ),
        *(_option(each) for each in fields(NodeConfig)),
    ],
    help="Run one node.\n\nEach setting is also read from the environment: RAFTKV_ and its name in capitals.",
    short_help="Run one node.",
    context_settings={"max_content_width": 120},
)
