"""`--guard KEY:TOKEN`: a write that is refused as a whole once the lock it is made under has moved on.

Sent as the condition of a transaction, not in the requests' own field for guards: etcd would not know that field, pass
over it and write. A transaction means the same on both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raftkv.cli.options import ID_MAX, Settings
from raftkv.cli.ranges import key_bytes

if TYPE_CHECKING:
    from raftkv._pb import kv_pb2

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """A lock's key, and its fencing token: the revision in which that key came into being."""

    key: bytes
    token: int


class GuardType(click.ParamType[Guard]):
    """KEY:TOKEN, as `raftkv lock` puts it into RAFTKV_GUARD; the key may have colons of its own."""

    name = "guard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Guard:
        """To a guard."""
        if isinstance(value, Guard):
            return value
        key, colon, token = str(value).rpartition(":")
        if not colon or not key or not token.isascii() or not token.isdigit():
            self.fail(f"{value!r} is not KEY:TOKEN, such as \"$RAFTKV_GUARD\" of 'raftkv lock'", param, ctx)
        if not 1 <= int(token) <= ID_MAX:
            self.fail(f"{value!r}: a token is a revision, from 1 to {ID_MAX}", param, ctx)
        return Guard(key_bytes(key), int(token))


def guard_option(command: F) -> F:
    """The option, of every command that writes."""
    option: Callable[[F], F] = click.option(
        "--guard",
        "guards",
        type=GuardType(),
        multiple=True,
        metavar="KEY:TOKEN",
        help="Do nothing unless this lock is still held ($RAFTKV_GUARD under 'raftkv lock'); may be given again.",
    )
    return option(command)


def guarded(settings: Settings, request: kv_pb2.TxnRequest, guards: Sequence[Guard]) -> kv_pb2.TxnResponse:
    """Carry out `request` if all guards hold: in the same step, so that no lock can be lost between.

    Raises:
        click.ClickException: a lock is not held any more; nothing was done.
    """
    from raftkv._pb import kv_pb2
    from raftkv.cli.session import call
    from raftkv.client.methods import TXN
    from raftkv.client.routing import Purpose

    _Pb = kv_pb2.Compare
    outer = kv_pb2.TxnRequest(
        compare=[
            _Pb(key=guard.key, target=_Pb.CREATE, result=_Pb.EQUAL, create_revision=guard.token) for guard in guards
        ]
    )
    nested = bool(request.compare or request.failure)
    if nested:
        outer.success.add(request_txn=request)
    else:
        outer.success.extend(request.success)
    response = call(settings, TXN, outer, Purpose.WRITE)
    if not response.succeeded:
        named = ", ".join(guard.key.decode("utf-8", "backslashreplace") for guard in guards)
        raise click.ClickException(f"lock lost: {named} is not held with this token any more; nothing was written")
    if not nested:
        return response
    answer = response.responses[0].response_txn
    answer.header.CopyFrom(response.header)
    return answer
