"""status, health, hash: each endpoint by itself, as `etcdctl endpoint …` shows them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from raftkv.cli import fields
from raftkv.cli.options import Settings, client_command

if TYPE_CHECKING:
    from raftkv.client.errors import RaftkvError

_STATUS_HEAD = (
    *("ENDPOINT", "ID", "VERSION", "DB SIZE", "IS LEADER", "IS LEARNER"),
    *("RAFT TERM", "RAFT INDEX", "RAFT APPLIED INDEX", "ERRORS"),
)
_cluster_option = click.option(
    "--cluster", "whole", is_flag=True, help="Ask every member, not only the given endpoints."
)


@click.command("status")
@_cluster_option
@client_command
def status(settings: Settings, whole: bool) -> int:
    """Show the state of each endpoint."""
    from raftkv._pb import maintenance_pb2
    from raftkv.cli import output
    from raftkv.client.methods import STATUS

    good, code = _ask_all(settings, whole, STATUS, maintenance_pb2.StatusRequest())
    if settings.output == "json":
        output.print_json([{"Endpoint": endpoint, "Status": output.as_json(answer)} for endpoint, answer in good])
        return code
    if settings.output == "fields":
        fields.show(line for endpoint, answer in good for line in fields.status(endpoint, answer))
        return code
    rows = [
        (
            endpoint,
            f"{answer.header.member_id:x}",
            answer.version,
            output.bytes_text(answer.dbSize),
            str(answer.leader == answer.header.member_id != 0).lower(),
            str(answer.isLearner).lower(),
            str(answer.raftTerm),
            str(answer.raftIndex),
            str(answer.raftAppliedIndex),
            ", ".join(answer.errors),
        )
        for endpoint, answer in good
    ]
    if settings.output == "table":
        output.print_table(_STATUS_HEAD, rows)
    else:
        for row in rows:
            click.echo(", ".join(row))
    return code


@click.command("health")
@_cluster_option
@client_command
def health(settings: Settings, whole: bool) -> int:
    """Check that each endpoint can serve: one linearizable read through each."""
    from raftkv._pb import kv_pb2
    from raftkv.cli import output
    from raftkv.cli.session import direct, each_of
    from raftkv.client.errors import RaftkvError
    from raftkv.client.methods import RANGE

    def check(endpoint: str) -> float:
        before = time.perf_counter()
        direct(settings, endpoint, RANGE, kv_pb2.RangeRequest(key=b"health"))
        return time.perf_counter() - before

    answers = each_of(_endpoints(settings, whole), check)
    shown = []
    for endpoint, answer in answers:
        failed = isinstance(answer, RaftkvError)
        entry: dict[str, Any] = {"endpoint": endpoint, "health": not failed}
        entry["took"] = "" if isinstance(answer, RaftkvError) else f"{answer * 1000:.6f}ms"
        if isinstance(answer, RaftkvError):
            entry["error"] = answer.message
        shown.append(entry)
    if settings.output == "json":
        output.print_json(shown)
    elif settings.output == "table":
        rows = [(e["endpoint"], str(e["health"]).lower(), e["took"], e.get("error", "")) for e in shown]
        output.print_table(("ENDPOINT", "HEALTH", "TOOK", "ERROR"), rows)
    elif settings.output == "fields":
        fields.show(line for entry in shown for line in fields.health(entry))
    else:
        for e in shown:
            if e["health"]:
                click.echo(f"{e['endpoint']} is healthy: a linearizable read took {e['took']}")
            else:
                click.echo(f"{e['endpoint']} is unhealthy: {e['error']}", err=True)
    return 0 if all(entry["health"] for entry in shown) else 1


@click.command("hashkv")
@click.option(
    "--rev", type=click.IntRange(min=0), default=0, help="The store as of this revision; 0 is each one's newest."
)
@_cluster_option
@client_command
def hashkv(settings: Settings, rev: int, whole: bool) -> int:
    """Compare the content hash of each endpoint. Equal hashes of one revision: equal content."""
    from raftkv._pb import maintenance_pb2
    from raftkv.cli import output
    from raftkv.client.methods import HASH_KV

    good, code = _ask_all(settings, whole, HASH_KV, maintenance_pb2.HashKVRequest(revision=rev))
    if settings.output == "json":
        output.print_json([{"Endpoint": endpoint, "HashKV": output.as_json(answer)} for endpoint, answer in good])
    elif settings.output == "table":
        output.print_table(("ENDPOINT", "HASH"), [(endpoint, str(answer.hash)) for endpoint, answer in good])
    elif settings.output == "fields":
        fields.show(line for endpoint, answer in good for line in fields.hash_kv(endpoint, answer))
    else:
        for endpoint, answer in good:
            click.echo(f"{endpoint}, {answer.hash}")
    return code


@click.group()
def endpoint() -> None:
    """Ask each endpoint by itself (etcdctl's spelling)."""


endpoint.add_command(status, "status")
endpoint.add_command(health, "health")
endpoint.add_command(hashkv, "hashkv")


def _endpoints(settings: Settings, whole: bool) -> list[str]:
    from raftkv._pb import cluster_pb2
    from raftkv.cli.session import call, endpoints_of
    from raftkv.client.endpoints import parse_endpoint
    from raftkv.client.methods import MEMBER_LIST

    if not whole:
        return list(endpoints_of(settings))
    members = call(settings, MEMBER_LIST, cluster_pb2.MemberListRequest()).members
    return [parse_endpoint(url, tls=settings.tls is not None) for member in members for url in member.clientURLs[:1]]


def _ask_all(settings: Settings, whole: bool, method: Any, request: Any) -> tuple[list[tuple[str, Any]], int]:
    """(endpoint, answer) of those that answered, and the exit code; the others are named on stderr."""
    from raftkv.cli.session import direct, each_of
    from raftkv.client.errors import RaftkvError

    def ask(endpoint: str) -> Any:
        return direct(settings, endpoint, method, request)

    good: list[tuple[str, Any]] = []
    bad: list[tuple[str, RaftkvError]] = []
    for endpoint, answer in each_of(_endpoints(settings, whole), ask):
        if isinstance(answer, RaftkvError):
            bad.append((endpoint, answer))
        else:
            good.append((endpoint, answer))
    for endpoint, error in bad:
        click.echo(f"Error: {endpoint}: {error.message}", err=True)
    return good, 1 if bad else 0
