"""--cacert, --cert, --key: TLS between a command and its cluster, with etcdctl's words for it.

what says so                              a command speaks
--cacert, --cert or --key                 TLS; an endpoint http://… is an error
an endpoint https://…                     TLS; without a file for it, gRPC's own authorities vouch
RAFTKV_CACERT … or ETCDCTL_CACERT …       TLS, except where all endpoints are http://…
nothing of these                          plain text
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from raftkv.client.tls import TLS

_FILES = {
    "cacert": ("ca", "Certificates of the authorities that vouch for the servers."),
    "cert": ("cert", "The certificate that shows who we are."),
    "key": ("key", "Its private key."),
}
PARAMETERS = tuple(f"tls_{name}" for name in _FILES)


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("is empty; it takes the path of a PEM file", ctx, param)
    return value


OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = tuple(
    click.option(
        f"--{name}",
        f"tls_{name}",
        metavar="FILE",
        callback=_not_empty,
        help=f"For TLS: {text[0].lower()}{text[1:]} [env: RAFTKV_{name.upper()}, ETCDCTL_{name.upper()}]",
    )
    for name, (_, text) in _FILES.items()
)


@dataclasses.dataclass(frozen=True, slots=True)
class Secure:
    """What a command needs to speak TLS."""

    tls: TLS
    environment: Mapping[str, str]
    """So that `raftkv` does as well, when the command runs it."""


def secure_from(endpoints: Sequence[str], given: Mapping[str, str | None]) -> Secure | None:
    """What flags, environment and endpoints say; None is plain text.

    Args:
        endpoints: as they were given.
        given: the flags, by `PARAMETERS`.
    Raises:
        click.UsageError: names the flag or the variable whose file is missing or is none.
    """
    found, named = {}, {}
    for name in _FILES:
        path = given[f"tls_{name}"]
        if path is not None:
            found[name], named[name] = path, f"--{name}"
            continue
        for variable in (f"RAFTKV_{name.upper()}", f"ETCDCTL_{name.upper()}"):
            if os.environ.get(variable):
                found[name], named[name] = os.environ[variable], variable
                break
    flags = [f"--{name}" for name in _FILES if named.get(name) == f"--{name}"]
    if flags:
        for endpoint in endpoints:
            if endpoint.startswith("http://"):
                raise click.UsageError(f"{flags[0]} is for TLS, and the endpoint {endpoint} is one without")
    elif all(endpoint.startswith("http://") for endpoint in endpoints):
        return None
    if not found and not any(endpoint.startswith("https://") for endpoint in endpoints):
        return None
    return _loaded(found, named)


def _loaded(found: Mapping[str, str], named: Mapping[str, str]) -> Secure:
    from raftkv.client.errors import ConfigError
    from raftkv.client.tls import TLS

    try:
        tls = TLS(**{field: found.get(name) for name, (field, _) in _FILES.items()})
    except ConfigError as error:
        name = next(name for name, (field, _) in _FILES.items() if error.field == f"tls.{field}")
        problem = error.message.removeprefix(f"{error.field}: ")
        raise click.BadParameter(problem, param_hint=named.get(name, f"--{name}")) from None
    return Secure(tls, {f"RAFTKV_{name.upper()}": str(Path(path).absolute()) for name, path in found.items()})
