"""`raftkv demo`: five nodes, a steady load, and a leader that is killed three times."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING

import click

from raftkv import __version__
from raftkv.cli import output
from raftkv.cli.cluster import end_on_signals, table_lines

if TYPE_CHECKING:
    from raftkv.client import AsyncClient
    from raftkv.local.load import Gap, Load, Verdict
    from raftkv.local.supervisor import AsyncLocalCluster
    from raftkv.local.timeline import LogMarks

SETTLE_S = 1.0  # of load before each kill, so that the gap stands out from the ordinary


@click.command()
@click.option("-n", "--nodes", type=click.IntRange(3, 9), default=5, show_default=True, help="How many nodes.")
@click.option(
    "--kills", type=click.IntRange(1, 50), default=3, show_default=True, help="How often the leader is killed."
)
@click.option("--base-port", type=click.IntRange(0, 65535), default=0, help="First port; 0 takes free ones.")
@click.option("--stay", is_flag=True, help="Leave the cluster running at the end, until Ctrl-C.")
def command(nodes: int, kills: int, base_port: int, stay: bool) -> int:
    """Watch five nodes lose their leader three times, and nothing else.

    Starts a cluster in a temporary directory, writes and reads without pause, kills the leader with SIGKILL and
    restarts it, and checks at the end that every acknowledged write is there. Ctrl-C stops everything and removes its
    files.
    """
    try:
        return asyncio.run(_demo(nodes, kills, base_port, stay))
    except KeyboardInterrupt:
        click.echo("\nstopped: all nodes are ended, their files removed", err=True)
        raise


async def _demo(nodes: int, kills: int, base_port: int, stay: bool) -> int:
    from raftkv.local.supervisor import AsyncLocalCluster

    end_on_signals()
    _title(f"raftkv {__version__}: {nodes} nodes on this machine, and a leader that dies {_times(kills)}")
    started = time.monotonic()
    cluster = AsyncLocalCluster(nodes, base_port=base_port)
    try:
        await cluster.start()
        from raftkv.client import AsyncClient

        async with AsyncClient(cluster.endpoints) as client:
            await client.put("demo", "hello")
            _say(f"{nodes} processes up, a leader elected, first write done in {time.monotonic() - started:.1f} s\n")
            for line in table_lines(await cluster.status()):
                _say(f"  {line}")
            _lines_to_copy(cluster)
            verdict, load, gaps = await _run(cluster, client, kills)
        code = _summary(verdict, load, gaps)
        if stay:
            _say("\nThe cluster stays up. Ctrl-C stops it and removes its files.")
            await asyncio.Event().wait()
    finally:
        await cluster.close(grace_s=3.0)
    _say(output.style("all nodes are stopped, their files removed", dim=True))
    return code


async def _run(cluster: AsyncLocalCluster, client: AsyncClient, kills: int) -> tuple[Verdict, Load, list[Gap]]:
    from raftkv.local.load import Load
    from raftkv.local.timeline import LogMarks

    load = Load(client, prefix="demo/")
    async with load:
        await load.wait_writes(100)
        writes, reads, since = len(load.writes), len(load.reads), time.monotonic()
        await asyncio.sleep(SETTLE_S)
        passed = time.monotonic() - since
        rates = f"{(len(load.writes) - writes) / passed:.0f} writes and {(len(load.reads) - reads) / passed:.0f} reads"
        _title(f"\nLoad: {rates} a second, through the SDK, without pause")
        marks = LogMarks({name: cluster.log(name) for name in cluster.names})
        gaps = [await _kill_once(cluster, load, marks, f"{number} of {kills}") for number in range(1, kills + 1)]
    _title("\nThe load ends. Reading everything back …")
    return await load.verify(client), load, gaps


async def _kill_once(cluster: AsyncLocalCluster, load: Load, marks: LogMarks, which: str) -> Gap:
    leader = await cluster.wait_leader()
    term = next(row.term for row in await cluster.status() if row.name == leader)
    pid = cluster.process(leader).pid
    errors = load.errors.total()
    marks.mark()
    killed, killed_wall = time.monotonic(), time.time()
    await cluster.kill(leader)
    _title(f"\nKill {which}: SIGKILL to {leader} (pid {pid}), the leader of term {term}")
    with contextlib.suppress(TimeoutError):
        await load.wait_writes(50, timeout_s=10.0)
    await cluster.wait_leader(other_than=leader)
    await asyncio.sleep(SETTLE_S / 2)
    gap = load.gap(killed, killed + 5.0 if load.writes[-1][1] < killed else load.writes[-1][1])
    _timeline(marks, leader, killed, killed_wall, gap)
    seen = load.errors.total() - errors
    _say(
        f"  {output.style(f'{gap.length_ms:.0f} ms', bold=True, fg='green' if gap.length_ms < 1000 else 'yellow')} "
        f"without a write; errors that callers saw: {seen or 'none'}"
    )
    before = time.monotonic()
    await cluster.restart(leader)
    row = next(row for row in await cluster.status() if row.name == leader)
    _say(f"  {leader} is back as {row.role} (pid {row.pid}) after {time.monotonic() - before:.1f} s")
    await asyncio.sleep(SETTLE_S)
    return gap


def _timeline(marks: LogMarks, killed_node: str, killed: float, killed_wall: float, gap: Gap) -> None:
    from raftkv.local.timeline import CAMPAIGNED, ELECTED, SUSPECTED, first

    events = [event for event in marks.events() if event.at >= killed_wall - 0.001]
    elected = first(events, ELECTED, not_of=killed_node)
    new = elected.node if elected is not None else None
    points: list[tuple[float, str]] = [
        ((gap.before - killed) * 1000, "last write acknowledged"),
        (0.0, f"{killed_node} is killed"),
        ((gap.after - killed) * 1000, "writes are acknowledged again"),
    ]
    suspected = first(events, SUSPECTED, not_of=killed_node)
    if suspected is not None:
        reason = suspected.fields.get("reason") or suspected.fields.get("detail") or ""
        said = f" ({reason})" if reason else ""
        points.append(((suspected.at - killed_wall) * 1000, f"{suspected.node} suspects its leader{said}"))
    campaign = first(events, CAMPAIGNED, of=new, not_of=killed_node)
    if campaign is not None:
        points.append(
            ((campaign.at - killed_wall) * 1000, f"{campaign.node} campaigns in term {campaign.fields.get('term')}")
        )
    if elected is not None:
        points.append(((elected.at - killed_wall) * 1000, f"{elected.node} leads"))
    for at, text in sorted(points, key=lambda point: point[0]):
        _say(f"  {at:+9.1f} ms  {text}")


def _summary(verdict: Verdict, load: Load, gaps: list[Gap]) -> int:
    lengths = ", ".join(f"{gap.length_ms:.0f}" for gap in gaps)
    good = output.style("✓" if _unicode() else "ok", fg="green")
    bad = output.style("✗" if _unicode() else "NOT OK", fg="red")
    _say(f"  {good} {len(gaps)} leaders killed; without a write for {lengths} ms")
    total = load.errors.total()
    _say(f"  {good if not total else bad} errors that callers saw: {total or 'none'}")
    for name, count in load.errors.items():
        _say(f"      {count} x {name}")
    for text in load.error_texts[:5]:
        _say(f"      {text}")
    if verdict.kept:
        _say(f"  {good} all {verdict.acknowledged} acknowledged writes found, with the value and revision promised")
    else:
        _say(f"  {bad} {len(verdict.lost)} of {verdict.acknowledged} acknowledged writes are wrong:")
        for line in verdict.lost[:10]:
            _say(f"      {line}")
    return 0 if verdict.kept else 1


def _lines_to_copy(cluster: AsyncLocalCluster) -> None:
    endpoints = ",".join(cluster.endpoints)
    _title("\nTry it while it runs (raftkv demo --stay leaves it up):")
    _say(f"  export ETCDCTL_API=3 ETCDCTL_ENDPOINTS={endpoints}   # raftkv reads it too")
    _say("  raftkv put greeting hello && raftkv get greeting")
    _say("  etcdctl get greeting -w json                # any etcd client will do")
    _say("  python3 -c 'import raftkv; print(raftkv.Client().get(\"greeting\").text)'")


def _times(count: int) -> str:
    return {1: "once", 2: "twice", 3: "three times"}.get(count, f"{count} times")


def _unicode() -> bool:
    return (sys.stdout.encoding or "").lower().startswith("utf")


def _title(text: str) -> None:
    _say(output.style(text, bold=True))


def _say(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()
