"""The options that every client command shares, before or after the command's name, as etcdctl's fingers know them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raftkv.cli.secure import OPTIONS as TLS_OPTIONS
from raftkv.cli.secure import PARAMETERS as TLS_PARAMETERS
from raftkv.cli.secure import Secure, secure_from

if TYPE_CHECKING:
    from raftkv.client.tls import TLS

R = TypeVar("R")

DEFAULT_ENDPOINT = "127.0.0.1:2379"
FORMATS = ("simple", "json", "table")
CLIENT_FORMATS = (*FORMATS, "fields")
TTL_MAX_S = 9_000_000_000
ID_MAX = (1 << 63) - 1
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


class NearestGroup(click.Group):
    """A group of commands with second names, which answers an unknown name with the nearest known one."""

    aliases: Mapping[str, str] = {}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """By either name."""
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, with the suggestion."""
        name = args[0] if args else ""
        known = [*self.list_commands(ctx), *self.aliases]
        if name and not name.startswith("-") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            ctx.fail(f"no such command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


class Duration(click.ParamType[float]):
    """Seconds as a plain number, or with a unit: 500ms, 5s, 2m, 1h."""

    name = "duration"

    def __init__(self, *, zero: bool = False) -> None:
        """
        Args:
            zero: 0 is one, too.
        """
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """To seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|)", str(value).strip())
        if match is None or (float(match[1]) == 0 and not self._zero):
            above = "" if self._zero else " above 0"
            self.fail(f"{value!r} is not a time{above}, such as 5s or 500ms", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class TimeToLive(Duration):
    """How long a lease lives unless it is kept alive; etcd's upper limit is ours."""

    name = "ttl"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """To seconds."""
        seconds = super().convert(value, param, ctx)
        if seconds > TTL_MAX_S:
            self.fail(f"{value!r} is more than {TTL_MAX_S} seconds, the longest that a lease may live", param, ctx)
        return seconds


class LeaseId(click.ParamType[int]):
    """A lease's id, hexadecimal as etcdctl shows it."""

    name = "lease id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """To a number."""
        if isinstance(value, int):
            return value
        if re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", str(value)) is None:
            self.fail(f"{value!r} is not a lease id (hexadecimal, as 'lease grant' shows it)", param, ctx)
        number = int(str(value), 16)
        if number > ID_MAX:
            self.fail(f"{value!r} is not a lease id: the greatest is {ID_MAX:x}", param, ctx)
        return number


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How a client command reaches the cluster and shows its answer."""

    endpoints: tuple[str, ...]
    output: str
    timeout_s: float
    hex: bool
    secure: Secure | None = None

    @property
    def tls(self) -> TLS | None:
        """For the SDK; None speaks plain text."""
        return None if self.secure is None else self.secure.tls

    def environment(self, endpoints: Iterable[str]) -> dict[str, str]:
        """What `raftkv` needs to reach the same cluster, in a command that we run."""
        scheme = "http" if self.secure is None else "https"
        found = {"RAFTKV_ENDPOINTS": ",".join(f"{scheme}://{endpoint}" for endpoint in endpoints)}
        return found if self.secure is None else {**found, **self.secure.environment}


def endpoints_from(given: str | None) -> tuple[str, ...]:
    """The endpoints to use: given, else RAFTKV_ENDPOINTS, else ETCDCTL_ENDPOINTS, else the cluster of
    `raftkv cluster up` if one runs, else etcd's default."""
    for text in (given, os.environ.get("RAFTKV_ENDPOINTS"), os.environ.get("ETCDCTL_ENDPOINTS")):
        if text is not None:
            endpoints = tuple(word.strip() for word in text.split(",") if word.strip())
            if endpoints:
                return endpoints
            if text is given:
                raise click.BadParameter("names no endpoint", param_hint="--endpoints")
    from raftkv.local.control import running_endpoints
    from raftkv.local.layout import default_directory

    # Their nodes speak plain text, whatever the environment says of TLS.
    return tuple(f"http://{each}" for each in running_endpoints(default_directory())) or (DEFAULT_ENDPOINT,)


output_option = click.option(
    "-o",
    "-w",
    "--output",
    "--write-out",
    "output",
    type=click.Choice(CLIENT_FORMATS),
    envvar=["RAFTKV_OUTPUT", "ETCDCTL_WRITE_OUT"],
    help="Form of the answer.  [default: simple]",
)


def output_from(given: str | None) -> str:
    """The form of the answer: given to the command, else before its name, else etcdctl's `simple`."""
    before = click.get_current_context().find_object(dict) or {}
    return given or before.get("output") or "simple"


_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--endpoints",
        metavar="HOST:PORT,…",
        help="Where the cluster is. [env: RAFTKV_ENDPOINTS, ETCDCTL_ENDPOINTS; default: the running local cluster, "
        f"else {DEFAULT_ENDPOINT}]",
    ),
    output_option,
    click.option(
        "--timeout",
        "--command-timeout",
        "timeout_s",
        type=Duration(),
        envvar=["RAFTKV_TIMEOUT", "ETCDCTL_COMMAND_TIMEOUT"],
        help="Limit for the whole call, retries included.  [default: 5s]",
    ),
    click.option("--hex", "hex_", is_flag=True, help="Show keys and values in hexadecimal."),
    *TLS_OPTIONS,
)
_SHARED = ("endpoints", "output", "timeout_s", "hex_", *TLS_PARAMETERS)


def client_options(function: Callable[..., R]) -> Callable[..., R]:
    """Give the group the shared options; what they say waits in `ctx.obj` for the command."""

    @functools.wraps(function)
    def with_options(*args: Any, **kwargs: Any) -> R:
        context = click.get_current_context()
        context.obj = {name: kwargs.pop(name) for name in _SHARED}
        return function(*args, **kwargs)

    return _add(with_options)


def client_command(function: Callable[..., R]) -> Callable[..., R]:
    """Give a command the shared options and hand it `Settings` as its first argument."""

    @functools.wraps(function)
    def with_settings(*args: Any, **kwargs: Any) -> R:
        before = click.get_current_context().find_object(dict) or {}
        own = {name: kwargs.pop(name) for name in _SHARED}
        chosen: dict[str, Any] = {name: own[name] or before.get(name) for name in own}
        endpoints = endpoints_from(chosen["endpoints"])
        settings = Settings(
            endpoints=endpoints,
            output=chosen["output"] or "simple",
            timeout_s=chosen["timeout_s"] or 5.0,
            hex=bool(chosen["hex_"]),
            secure=secure_from(endpoints, chosen),
        )
        return function(settings, *args, **kwargs)

    return _add(with_settings)


def _add(function: Callable[..., R]) -> Callable[..., R]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
