"""alarm, defrag, snapshot save: what an operator does now and then."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raftkv.cli import fields, restore
from raftkv.cli.options import Settings, client_command

if TYPE_CHECKING:
    from raftkv._pb import maintenance_pb2


@click.group()
def alarm() -> None:
    """List or clear alarms."""


@alarm.command("list")
@client_command
def alarm_list(settings: Settings) -> None:
    """List the alarms that are on."""
    _alarm(settings, disarm=False)


@alarm.command("disarm")
@client_command
def alarm_disarm(settings: Settings) -> None:
    """Clear all alarms."""
    _alarm(settings, disarm=True)


def _alarm(settings: Settings, *, disarm: bool) -> None:
    from raftkv._pb import maintenance_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import ALARM
    from raftkv.client.routing import Purpose

    request = maintenance_pb2.AlarmRequest()
    if disarm:
        request.action = maintenance_pb2.AlarmRequest.DEACTIVATE
    response = call(settings, ALARM, request, Purpose.WRITE if disarm else Purpose.READ)
    if settings.output == "json":
        output.print_json(output.as_json(response))
        return
    if settings.output == "fields":
        fields.show(fields.alarms(response.header, ((each.memberID, _alarm_name(each)) for each in response.alarms)))
        return
    for each in response.alarms:
        click.echo(f"memberID:{each.memberID} alarm:{_alarm_name(each)} ")


def _alarm_name(each: maintenance_pb2.AlarmMember) -> str:
    from raftkv._pb import maintenance_pb2

    return maintenance_pb2.AlarmType.Name(each.alarm)


@click.command()
@client_command
def defrag(settings: Settings) -> int:
    """Give unused disk space of each endpoint back to the file system."""
    from raftkv._pb import maintenance_pb2
    from raftkv.cli.session import direct, each
    from raftkv.client.errors import RaftkvError
    from raftkv.client.methods import DEFRAGMENT

    def one(endpoint: str) -> maintenance_pb2.DefragmentResponse:
        return direct(settings, endpoint, DEFRAGMENT, maintenance_pb2.DefragmentRequest())

    failed = False
    for endpoint, answer in each(settings, one):
        if isinstance(answer, RaftkvError):
            failed = True
            click.echo(f"Error: {endpoint}: {answer.message}", err=True)
        else:
            click.echo(f"Finished defragmenting member[{endpoint}]")
    return 1 if failed else 0


@click.group()
def snapshot() -> None:
    """Save the whole state to a file, look at it, and begin a new cluster with it."""


snapshot.add_command(restore.status)
snapshot.add_command(restore.restore)


@snapshot.command("save")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@client_command
def snapshot_save(settings: Settings, file: Path) -> None:
    """Save the state of the first endpoint to FILE, whole or not at all."""
    import grpc

    from raftkv._pb import maintenance_pb2
    from raftkv.cli.session import channel, endpoints_of, failure
    from raftkv.client.methods import SNAPSHOT

    endpoint = endpoints_of(settings)[0]
    partial = file.with_name(file.name + ".part")
    with channel(settings, endpoint) as connection, partial.open("wb") as target:
        stream = connection.unary_stream(
            SNAPSHOT.path, request_serializer=SNAPSHOT.serialize, response_deserializer=SNAPSHOT.parse
        )
        digest, last = hashlib.sha256(), b""
        try:
            # No overall limit: how long it takes depends on the size. The connection's keepalive ends a dead one.
            for part in stream(maintenance_pb2.SnapshotRequest()):
                digest.update(last)
                last = part.blob
                target.write(part.blob)
        except grpc.RpcError as error:
            partial.unlink(missing_ok=True)
            raise failure(error, endpoint) from error
        target.flush()
        os.fsync(target.fileno())
    # The stream ends with the SHA-256 of all before it.
    if last != digest.digest():
        partial.unlink(missing_ok=True)
        raise click.ClickException(f"the snapshot from {endpoint} is damaged or incomplete; nothing was saved")
    partial.replace(file)
    click.echo(f"Snapshot saved at {file}")
