"""put, get, del, compact: options and output as etcdctl's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from raftkv.cli import fields
from raftkv.cli.guards import Guard, guard_option
from raftkv.cli.options import LeaseId, Settings, client_command
from raftkv.cli.ranges import key_bytes, range_of

if TYPE_CHECKING:
    from raftkv._pb import kv_pb2

SORT_TARGETS = {"KEY": "KEY", "VERSION": "VERSION", "CREATE": "CREATE", "MODIFY": "MOD", "VALUE": "VALUE"}
SORT_ORDERS = ("ASCEND", "DESCEND")


# ---- put ----


def put_request(key: str, value: bytes, options: dict[str, Any]) -> kv_pb2.PutRequest:
    """The request that `put`'s arguments and options mean."""
    from raftkv._pb import kv_pb2

    return kv_pb2.PutRequest(
        key=key_bytes(key),
        value=value,
        lease=options["lease"],
        prev_kv=options["prev_kv"],
        ignore_value=options["ignore_value"],
        ignore_lease=options["ignore_lease"],
    )


@click.command()
@click.argument("key")
@click.argument("value", required=False)
@click.option("--lease", type=LeaseId(), default=0, metavar="ID", help="Bind the key to this lease (hexadecimal).")
@click.option("--prev-kv", is_flag=True, help="Show what was there before.")
@click.option("--ignore-value", is_flag=True, help="Keep the key's value.")
@click.option("--ignore-lease", is_flag=True, help="Keep the key's lease.")
@guard_option
@client_command
def put(settings: Settings, key: str, value: str | None, **options: Any) -> None:
    """Write a key.

    Without VALUE, or with "-", the value is read from stdin. A value that begins with "-" goes after "--".
    """
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import PUT
    from raftkv.client.routing import Purpose

    request = put_request(key, _value_bytes(value, options), options)
    if options["guards"]:
        response = _guarded_put(settings, request, options["guards"])
    else:
        response = call(settings, PUT, request, Purpose.WRITE)
    match settings.output:
        case "json":
            output.print_json(output.as_json(response))
        case "table":
            output.print_table(("KEY", "REVISION"), [(key, str(response.header.revision))])
        case "fields":
            fields.show(fields.put(response))
        case _:
            output.print_put(response, hex_=settings.hex)


def _value_bytes(value: str | None, options: dict[str, Any]) -> bytes:
    if options["ignore_value"]:
        if value is not None:
            raise click.UsageError("--ignore-value keeps the key's value; leave VALUE out")
        return b""
    if value is not None and value != "-":
        return key_bytes(value)
    if value is None and sys.stdin.isatty():
        raise click.UsageError("VALUE is missing (a value can also come from stdin: raftkv put KEY < FILE)")
    return sys.stdin.buffer.read()


def _guarded_put(settings: Settings, request: kv_pb2.PutRequest, guards: Sequence[Guard]) -> kv_pb2.PutResponse:
    from raftkv._pb import kv_pb2
    from raftkv.cli.guards import guarded

    response = guarded(settings, kv_pb2.TxnRequest(success=[kv_pb2.RequestOp(request_put=request)]), guards)
    answer = response.responses[0].response_put
    answer.header.CopyFrom(response.header)
    return answer


# ---- get ----


def range_request(key: str, range_end: str | None, options: dict[str, Any]) -> kv_pb2.RangeRequest:
    """The request that `get`'s arguments and options mean."""
    from raftkv._pb import kv_pb2

    start, end = range_of(key, range_end, prefix=options["prefix"], from_key=options["from_key"])
    if options["print_value_only"] and options["keys_only"]:
        raise click.UsageError("--keys-only and --print-value-only exclude each other; choose one")
    order, target = options["order"], options["sort_by"]
    return kv_pb2.RangeRequest(
        key=start,
        range_end=end,
        limit=options["limit"],
        revision=options["rev"],
        serializable=options["consistency"] == "s",
        keys_only=options["keys_only"],
        count_only=options["count_only"],
        sort_order=kv_pb2.RangeRequest.SortOrder.Value(order or "NONE"),
        sort_target=kv_pb2.RangeRequest.SortTarget.Value(SORT_TARGETS[target or "KEY"]),
    )


@click.command()
@click.argument("key")
@click.argument("range_end", required=False)
@click.option("--prefix", is_flag=True, help="All keys that begin with KEY.")
@click.option("--from-key", is_flag=True, help="All keys from KEY on, in byte order.")
@click.option("--limit", type=click.IntRange(min=0), default=0, help="At most so many keys; 0 is all.")
@click.option("--rev", type=int, default=0, help="The store as of this revision; 0 is now.")
@click.option("--order", type=click.Choice(SORT_ORDERS, case_sensitive=False), help="Order of the answer.")
@click.option("--sort-by", type=click.Choice(list(SORT_TARGETS), case_sensitive=False), help="What to order by.")
@click.option("--keys-only", is_flag=True, help="Leave the values out.")
@click.option("--count-only", is_flag=True, help="Only count.")
@click.option("--print-value-only", is_flag=True, help="Show values without keys.")
@click.option(
    "--consistency",
    type=click.Choice(["l", "s"]),
    default="l",
    show_default=True,
    help="l: linearizable. s: serializable, whatever the asked node has applied, quorum or not.",
)
@client_command
def get(settings: Settings, key: str, range_end: str | None, **options: Any) -> None:
    """Read a key, or the range from KEY up to RANGE_END."""
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import RANGE
    from raftkv.client.routing import Purpose

    if options["print_value_only"] and settings.output != "simple":
        raise click.UsageError("--print-value-only goes with the output format 'simple' only")
    request = range_request(key, range_end, options)
    response = call(settings, RANGE, request, Purpose.STALE_READ if request.serializable else Purpose.READ)
    match settings.output:
        case "json":
            output.print_json(output.as_json(response))
        case "table" if request.count_only:
            output.print_table(("COUNT",), [(str(response.count),)])
        case "table":
            output.print_kv_table(response.kvs, hex_=settings.hex)
        case "fields":
            fields.show(fields.get(response))
        case _ if request.count_only:
            click.echo(str(response.count))
        case _:
            output.print_range(response, hex_=settings.hex, value_only=options["print_value_only"])


# ---- del ----


def delete_request(key: str, range_end: str | None, options: dict[str, Any]) -> kv_pb2.DeleteRangeRequest:
    """The request that `del`'s arguments and options mean."""
    from raftkv._pb import kv_pb2

    start, end = range_of(key, range_end, prefix=options["prefix"], from_key=options["from_key"])
    return kv_pb2.DeleteRangeRequest(key=start, range_end=end, prev_kv=options["prev_kv"])


@click.command("del")
@click.argument("key")
@click.argument("range_end", required=False)
@click.option("--prefix", is_flag=True, help="All keys that begin with KEY.")
@click.option("--from-key", is_flag=True, help="All keys from KEY on, in byte order.")
@click.option("--prev-kv", is_flag=True, help="Show what was deleted.")
@guard_option
@client_command
def delete(settings: Settings, key: str, range_end: str | None, **options: Any) -> None:
    """Delete a key, or the range from KEY up to RANGE_END. Prints how many there were."""
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import DELETE_RANGE
    from raftkv.client.routing import Purpose

    request = delete_request(key, range_end, options)
    if options["guards"]:
        response = _guarded_delete(settings, request, options["guards"])
    else:
        response = call(settings, DELETE_RANGE, request, Purpose.WRITE)
    match settings.output:
        case "json":
            output.print_json(output.as_json(response))
        case "table" if options["prev_kv"]:
            output.print_kv_table(response.prev_kvs, hex_=settings.hex)
        case "table":
            output.print_table(("DELETED", "REVISION"), [(str(response.deleted), str(response.header.revision))])
        case "fields":
            fields.show(fields.deleted(response))
        case _:
            output.print_deleted(response, hex_=settings.hex)


def _guarded_delete(
    settings: Settings, request: kv_pb2.DeleteRangeRequest, guards: Sequence[Guard]
) -> kv_pb2.DeleteRangeResponse:
    from raftkv._pb import kv_pb2
    from raftkv.cli.guards import guarded

    response = guarded(settings, kv_pb2.TxnRequest(success=[kv_pb2.RequestOp(request_delete_range=request)]), guards)
    answer = response.responses[0].response_delete_range
    answer.header.CopyFrom(response.header)
    return answer


# ---- compact ----


@click.command()
@click.argument("revision", type=click.IntRange(min=1))
@click.option("--physical", is_flag=True, help="Wait until the space is really freed.")
@client_command
def compact(settings: Settings, revision: int, physical: bool) -> None:
    """Forget the history before REVISION; the newest value of every key stays."""
    from raftkv._pb import kv_pb2
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import COMPACT
    from raftkv.client.routing import Purpose

    request = kv_pb2.CompactionRequest(revision=revision, physical=physical)
    response = call(settings, COMPACT, request, Purpose.WRITE)
    if settings.output == "json":
        output.print_json(output.as_json(response))
    else:
        click.echo(f"compacted revision {revision}")
