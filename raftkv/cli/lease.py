"""lease: grant, revoke, keep-alive, timetolive, list; options and output as etcdctl's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from raftkv.cli import fields
from raftkv.cli.options import LeaseId, NearestGroup, Settings, TimeToLive, client_command

if TYPE_CHECKING:
    from raftkv._pb import lease_pb2


class LeaseGroup(NearestGroup):
    """With `ttl` for those who have to type it."""

    aliases = {"ttl": "timetolive", "keepalive": "keep-alive", "ls": "list"}  # noqa: RUF012


@click.group(cls=LeaseGroup)
def lease() -> None:
    """Leases: keys bound to one vanish, all in one revision, when it is not kept alive.

    Bind a key with `raftkv put KEY VALUE --lease ID`. Ids are hexadecimal.
    """


@lease.command()
@click.argument("ttl", type=TimeToLive())
@client_command
def grant(settings: Settings, ttl: float) -> None:
    """Grant a lease of TTL seconds (or 500ms, 2m, 1h); the cluster raises what is too short."""
    from raftkv._pb import lease_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import LEASE_GRANT
    from raftkv.client.routing import Purpose

    request = lease_pb2.LeaseGrantRequest(TTL=math.ceil(ttl), ttl_ms=math.ceil(ttl * 1000))
    response = call(settings, LEASE_GRANT, request, Purpose.WRITE)
    match settings.output:
        case "json":
            output.print_json(
                {**output.header_of(response), "ID": response.ID, "TTL": response.TTL, "Error": response.error}
            )
        case "table":
            output.print_table(("LEASE", "TTL"), [(f"{response.ID:016x}", str(response.TTL))])
        case "fields":
            fields.show(fields.lease(response))
        case _:
            click.echo(f"lease {response.ID:016x} granted with TTL({response.TTL}s)")


@lease.command()
@click.argument("lease_id", metavar="LEASE", type=LeaseId())
@client_command
def revoke(settings: Settings, lease_id: int) -> None:
    """End a lease and delete its keys."""
    from raftkv._pb import lease_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import LEASE_REVOKE
    from raftkv.client.routing import Purpose

    response = call(settings, LEASE_REVOKE, lease_pb2.LeaseRevokeRequest(ID=lease_id), Purpose.WRITE)
    match settings.output:
        case "json":
            output.print_json(output.as_json(response))
        case "table":
            output.print_table(("REVOKED", "REVISION"), [(f"{lease_id:016x}", str(response.header.revision))])
        case "fields":
            fields.show(fields.header(response.header))
        case _:
            click.echo(f"lease {lease_id:016x} revoked")


@lease.command("keep-alive")
@click.argument("lease_id", metavar="LEASE", type=LeaseId())
@click.option("--once", is_flag=True, help="Renew it once and end.")
@client_command
def keep_alive(settings: Settings, lease_id: int, once: bool) -> int:
    """Keep a lease alive until Ctrl-C.

    It is renewed every third of its time, through whatever node answers. Ends with exit code 1 when the lease is gone.
    """
    from raftkv.cli import output
    from raftkv.cli.renewal import renewals

    for response in renewals(settings, lease_id):
        alive = response.TTL > 0 or response.ttl_ms > 0
        if not alive and once:
            raise click.ClickException("etcdserver: requested lease not found")
        if not alive:
            # As etcdctl, to the letter, except that a lease which is gone is no success.
            click.echo(f"lease {lease_id:016x} expired or revoked.", err=settings.output != "simple")
            return 1
        match settings.output:
            case "json":
                output.print_json({**output.header_of(response), "ID": response.ID, "TTL": response.TTL})
            case "table":
                output.print_table(("LEASE", "TTL"), [(f"{response.ID:016x}", str(response.TTL))])
            case "fields":
                fields.show(fields.lease(response))
            case _:
                click.echo(f"lease {response.ID:016x} keepalived with TTL({response.TTL})")
        if once:
            return 0
    raise AssertionError("unreachable: renewals end with an error or with the lease")


@lease.command()
@click.argument("lease_id", metavar="LEASE", type=LeaseId())
@click.option("--keys", is_flag=True, help="Show the keys that are bound to it.")
@client_command
def timetolive(settings: Settings, lease_id: int, keys: bool) -> None:
    """Show what is left of a lease. (Also: lease ttl.)"""
    from raftkv._pb import lease_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import LEASE_TIME_TO_LIVE

    response = call(settings, LEASE_TIME_TO_LIVE, lease_pb2.LeaseTimeToLiveRequest(ID=lease_id, keys=keys))
    match settings.output:
        case "json":
            output.print_json(_time_to_live_json(response))
        case "table":
            shown = " ".join(output.cell(key, hex_=settings.hex) for key in response.keys)
            row = (f"{response.ID:016x}", str(response.grantedTTL), str(response.TTL))
            output.print_table(
                ("LEASE", "GRANTED", "REMAINING", "KEYS")[: 4 if keys else 3],
                [(*row, shown) if keys else row],
            )
        case "fields":
            fields.show(fields.time_to_live(response))
        case _:
            click.echo(_time_to_live_text(response, keys=keys, hex_=settings.hex))


def _time_to_live_json(response: lease_pb2.LeaseTimeToLiveResponse) -> dict[str, Any]:
    from raftkv.cli import output

    return {
        **output.header_of(response),
        "id": response.ID,
        "ttl": response.TTL,
        "granted-ttl": response.grantedTTL,
        "keys": output.base64_list(response.keys) or None,
    }


def _time_to_live_text(response: lease_pb2.LeaseTimeToLiveResponse, *, keys: bool, hex_: bool) -> bytes:
    from raftkv.cli import output

    if response.TTL < 0:
        return b"lease %016x already expired" % response.ID
    text = b"lease %016x granted with TTL(%ds), remaining(%ds)" % (response.ID, response.grantedTTL, response.TTL)
    if keys:
        text += b", attached keys([%s])" % b" ".join(output.shown_bytes(key, hex_=hex_) for key in response.keys)
    return text


@lease.command("list")
@client_command
def list_(settings: Settings) -> None:
    """Show the ids of all leases."""
    from raftkv._pb import lease_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import LEASE_LEASES

    response = call(settings, LEASE_LEASES, lease_pb2.LeaseLeasesRequest())
    match settings.output:
        case "json":
            leases = [{"id": each.ID} for each in response.leases]
            output.print_json({**output.header_of(response), "leases": leases})
        case "table":
            output.print_table(("LEASE",), [(f"{each.ID:016x}",) for each in response.leases])
        case "fields":
            fields.show(fields.leases(response))
        case _:
            click.echo(f"found {len(response.leases)} leases")
            for each in response.leases:
                click.echo(f"{each.ID:016x}")
