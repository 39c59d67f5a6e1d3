"""member list, move-leader: who is in the cluster, and who leads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from raftkv.cli import fields
from raftkv.cli.options import Settings, client_command

if TYPE_CHECKING:
    from raftkv._pb import cluster_pb2

_HEAD = ("ID", "STATUS", "NAME", "PEER ADDRS", "CLIENT ADDRS", "IS LEARNER")


@click.group()
def member() -> None:
    """Show the members."""


@member.command("list")
@client_command
def member_list(settings: Settings) -> None:
    """Show the members."""
    from raftkv.cli import output

    response = _members(settings)
    if settings.output == "json":
        output.print_json(output.as_json(response))
        return
    if settings.output == "fields":
        fields.show(fields.members(response))
        return
    rows = [
        (
            f"{each.ID:x}",
            "started" if each.name else "unstarted",
            each.name,
            ",".join(each.peerURLs),
            ",".join(each.clientURLs),
            str(each.isLearner).lower(),
        )
        for each in response.members
    ]
    if settings.output == "table":
        output.print_table(_HEAD, rows)
    else:
        for row in rows:
            click.echo(", ".join(row))


@click.command()
@click.argument("target")
@client_command
def move_leader(settings: Settings, target: str) -> None:
    """Hand leadership to TARGET: a member's name, or its id in hexadecimal."""
    from raftkv._pb import maintenance_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import MOVE_LEADER
    from raftkv.client.routing import Purpose

    members = _members(settings).members
    named = [each.ID for each in members if each.name == target]
    try:
        target_id = named[0] if named else int(target, 16)
    except ValueError:
        known = ", ".join(each.name or f"{each.ID:x}" for each in members)
        raise click.BadParameter(f"{target!r} is no member; there are {known}", param_hint="TARGET") from None
    if not 0 <= target_id < 1 << 64:
        raise click.BadParameter(f"{target!r} is beyond 64 bits", param_hint="TARGET")
    response = call(settings, MOVE_LEADER, maintenance_pb2.MoveLeaderRequest(targetID=target_id), Purpose.LEADER)
    if settings.output == "json":
        output.print_json(output.as_json(response))
    else:
        click.echo(f"Leadership transferred to {target_id:x}")


def _members(settings: Settings) -> cluster_pb2.MemberListResponse:
    from raftkv._pb import cluster_pb2
    from raftkv.cli.session import call
    from raftkv.client.methods import MEMBER_LIST

    return call(settings, MEMBER_LIST, cluster_pb2.MemberListRequest())
