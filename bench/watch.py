"""Watchers: how fast 1,000 of them hear of a change, and what 1,000 that never read cost.

Delivery: all watch one key, in some processes; each put carries the moment it was sent, and every watcher takes the
time until it has it. Twice: as watches of their own on the wire, plain gRPC, spread over the nodes and several to a
stream; and as watches of the SDK, which those of one client share as long as they read. Unread: each has a stream of
its own, plain gRPC, which nobody reads after its first answer, while so many megabytes of events pass: how much the
nodes' memory grows, and how long puts take compared with before. All is the same for raftkv and etcd.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from typing import Any

import grpc
import grpc.aio
from common import Report, arguments, cluster_of, cpu_s, kinds, spread

from raftkv import AsyncClient
from raftkv._pb import watch_pb2
from raftkv.local import AsyncLocalCluster

WATCH = "/etcdserverpb.Watch/Watch"
KEY = b"watched"
DELIVERY_P99_MS = 50.0
EXTRA_MB = 64.0
PUT_RATIO = 1.5
READ_S = 15.0
SETTLE_S = 1.0  # for what has begun and not ended when all watch
GROWING_WINDOWS = [("grpc.use_local_subchannel_pool", 1)]
SMALL_WINDOWS = [
    *GROWING_WINDOWS,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
]
"""Else each client takes in 4 MB unread: gigabytes on this machine, and the nodes grow while that passes (ADR 0013)."""


def open_watch(channel: grpc.aio.Channel) -> Any:
    """A stream of raw responses."""
    return channel.stream_stream(
        WATCH, request_serializer=watch_pb2.WatchRequest.SerializeToString, response_deserializer=bytes
    )()


def create(watch_id: int, key: bytes) -> watch_pb2.WatchRequest:
    """A request for a watch; ids begin with 1, or the server chooses."""
    return watch_pb2.WatchRequest(create_request=watch_pb2.WatchCreateRequest(key=key, watch_id=watch_id))


# --- readers, in processes of their own -------------------------------------------------------------------------------


async def read(endpoints: list[str], watchers: int, per_stream: int, events: int) -> None:
    """Watch; say `ready`; when all events have come, say how long each took to get to each."""
    times_ms: list[float] = []
    ready = 0
    all_ready = asyncio.Event()

    async def stream(channel: grpc.aio.Channel, count: int) -> None:
        nonlocal ready
        call = open_watch(channel)
        for number in range(1, count + 1):
            await call.write(create(number, KEY))
        for _ in range(count):
            await call.read()
        ready += count
        if ready == watchers:
            all_ready.set()
        left = count * events
        while left:
            raw = await call.read()
            now = time.monotonic()
            response = watch_pb2.WatchResponse.FromString(raw)
            for event in response.events:
                times_ms.append((now - float(event.kv.value)) * 1000)
                left -= 1

    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(endpoint)) for endpoint in endpoints]
        counts = [min(per_stream, watchers - begin) for begin in range(0, watchers, per_stream)]
        async with asyncio.TaskGroup() as tasks:
            for number, count in enumerate(counts):
                tasks.create_task(stream(channels[number % len(channels)], count))
            await all_ready.wait()
            print("ready", flush=True)
            cpu = time.process_time()
        print(json.dumps({"times": times_ms, "cpu": time.process_time() - cpu}), flush=True)


async def read_by_sdk(endpoints: list[str], watchers: int, clients: int, events: int) -> None:
    """As `read`, with the SDK's watches, of so many clients."""
    times_ms: list[float] = []
    ready = asyncio.Semaphore(0)

    async def watch(client: AsyncClient) -> None:
        async with client.watch(KEY, timeout=60) as changes:
            ready.release()
            for _ in range(events):
                event = await anext(changes)
                times_ms.append((time.monotonic() - float(event.value)) * 1000)

    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(AsyncClient(endpoints)) for _ in range(clients)]
        async with asyncio.TaskGroup() as tasks:
            for number in range(watchers):
                tasks.create_task(watch(found[number % clients]))
            for _ in range(watchers):
                await ready.acquire()
            await asyncio.sleep(SETTLE_S)
            print("ready", flush=True)
            cpu = time.process_time()
        print(json.dumps({"times": times_ms, "cpu": time.process_time() - cpu}), flush=True)


async def delivery(cluster: AsyncLocalCluster, options: argparse.Namespace, clients: int) -> dict[str, Any]:
    """Part one; without clients, by plain gRPC."""
    endpoints = ",".join(map(cluster.endpoint, cluster.names))
    pids = [row.pid for row in await cluster.status() if row.pid]
    share = options.watchers // options.processes
    readers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--read", str(share), "--per-stream", str(options.per_stream)),
            *("--events", str(options.events), "--endpoints", endpoints, "--clients", str(clients)),
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 30,
        )
        for _ in range(options.processes)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert await asyncio.wait_for(reader.stdout.readline(), 60) == b"ready\n"
        async with AsyncClient(cluster.endpoints) as client:
            await client.put(b"warm", b"")
            nodes = sum(map(cpu_s, pids))
            for _ in range(options.events):
                await client.put(KEY, b"%.6f" % time.monotonic())
                await asyncio.sleep(options.pause_ms / 1000)
        times: list[float] = []
        cpu = 0.0
        for reader in readers:
            assert reader.stdout is not None
            found = json.loads(await asyncio.wait_for(reader.stdout.readline(), READ_S + options.events))
            times += found["times"]
            cpu += found["cpu"]
        nodes = sum(map(cpu_s, pids)) - nodes
    finally:
        for reader in readers:
            if reader.returncode is None:
                reader.kill()
            await reader.wait()
    return {
        "ms": spread(times),
        "lost": share * options.processes * options.events - len(times),
        "cpu_us": {"nodes": round(nodes * 1e6 / len(times)), "readers": round(cpu * 1e6 / len(times))},
    }


# --- those who never read ---------------------------------------------------------------------------------------------


async def puts(cluster: AsyncLocalCluster, options: argparse.Namespace, megabytes: float) -> list[float]:
    """Put so much, by some callers; how long each took, in milliseconds."""
    left = int(megabytes * 1e6 / options.value_bytes)
    times: list[float] = []
    value = os.urandom(options.value_bytes)

    async def caller(client: AsyncClient) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            before = time.monotonic()
            await client.put(b"unread/%d" % (left % 100), value)
            times.append((time.monotonic() - before) * 1000)

    async with AsyncClient(cluster.endpoints, timeout=60.0) as client:
        await client.put(b"warm", b"")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(options.callers):
                tasks.create_task(caller(client))
    return times


async def unread(cluster: AsyncLocalCluster, options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Part two."""

    async def memory() -> list[float]:
        return [round((row.rss_bytes or 0) / 1e6, 1) for row in await cluster.status()]

    await puts(cluster, options, options.megabytes / 10)  # so that what a node needs for puts at all is there
    before_ms = await puts(cluster, options, options.megabytes / 2)
    endpoints = [cluster.endpoint(name) for name in cluster.names]
    rss_before = await memory()
    async with contextlib.AsyncExitStack() as stack:
        calls = []
        for number in range(options.watchers):
            if number % 50 == 0:  # some connections to each node, so that no window but the stream's is in the way
                channel = await stack.enter_async_context(
                    grpc.aio.insecure_channel(
                        endpoints[(number // 50) % len(endpoints)],
                        options=GROWING_WINDOWS if options.growing_windows else SMALL_WINDOWS,
                    )
                )
            call = open_watch(channel)
            request = create(1, b"unread/")
            request.create_request.range_end = b"unread0"
            await call.write(request)
            await call.read()
            calls.append(call)
        rss_watched = await memory()
        report.line(f"{len(calls)} watchers, memory {rss_before} -> {rss_watched} MB")
        during_ms: list[float] = []
        most = rss_watched
        steps = 5
        for _ in range(steps):
            during_ms += await puts(cluster, options, options.megabytes / steps)
            most = list(map(max, most, await memory()))
            report.line(f"{len(during_ms) * options.value_bytes / 1e6:.0f} MB passed, memory {most} MB")
        for call in calls:
            call.cancel()
    return {
        "megabytes": options.megabytes,
        "put_ms_before": spread(before_ms),
        "put_ms_during": spread(during_ms),
        "rss_mb_before": rss_before,
        "rss_mb_watched": rss_watched,
        "rss_mb_most": most,
        "extra_mb": round(max(now - then for now, then in zip(most, rss_before, strict=True)), 1),
        "put_p99_ratio": round(spread(during_ms)["p99"] / spread(before_ms)["p99"], 2),
    }


async def main() -> int:
    """Measure, print, judge."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--watchers", type=int, default=1000, help="how many watch")
    parser.add_argument("--processes", type=int, default=2, help="processes that read")
    parser.add_argument("--per-stream", type=int, default=20, help="watches of a stream that is read by plain gRPC")
    parser.add_argument("--clients", type=int, default=1, help="clients of the SDK in each process that reads")
    parser.add_argument("--events", type=int, default=40, help="changes whose delivery is measured")
    parser.add_argument("--pause-ms", type=float, default=250.0, help="between two of them")
    parser.add_argument("--megabytes", type=float, default=1000.0, help="of events that nobody reads; 0 leaves it out")
    parser.add_argument("--growing-windows", action="store_true", help="of those who never read: as gRPC has them")
    parser.add_argument("--value-bytes", type=int, default=16_384, help="length of a value that nobody reads")
    parser.add_argument("--callers", type=int, default=4, help="who put at the same time")
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)  # these are for the processes that read
    parser.add_argument("--endpoints", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        endpoints = options.endpoints.split(",")
        if options.clients:
            await read_by_sdk(endpoints, options.read, options.clients, options.events)
        else:
            await read(endpoints, options.read, options.per_stream, options.events)
        return 0
    report = Report("watch", options)
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds(options):
        async with cluster_of(kind, options) as cluster:
            found[kind] = {}
            for name, clients in (("delivery", 0), ("delivery_sdk", options.clients)):
                found[kind][name] = await delivery(cluster, options, clients)
                report.line(f"{kind} {name}: {found[kind][name]}")
            if options.megabytes:
                found[kind]["unread"] = await unread(cluster, options, report)
                report.line(f"{kind} unread: {found[kind]['unread']}")
        report.add(kind, found[kind])
    ours = found["raftkv"]
    on_wire, by_sdk = (ours[name]["ms"]["p99"] for name in ("delivery", "delivery_sdk"))
    clients = f"{options.watchers} watchers of {options.clients * options.processes} clients of the SDK"
    for who, p99 in ((f"{options.watchers} watches on the wire", on_wire), (clients, by_sdk)):
        report.goal(f"p99 of the delivery to {who} at most {DELIVERY_P99_MS:g} ms: {p99}", p99 <= DELIVERY_P99_MS)
    if "unread" in ours:
        extra, ratio = ours["unread"]["extra_mb"], ours["unread"]["put_p99_ratio"]
        report.goal(f"at most {EXTRA_MB:g} MB more on any node: {extra}", extra <= EXTRA_MB)
        report.goal(f"p99 of puts at most {PUT_RATIO:g} times what it was: {ratio}", ratio <= PUT_RATIO)
    if "etcd" in found:
        for name, p99 in (("delivery", on_wire), ("delivery_sdk", by_sdk)):
            ratio = p99 / found["etcd"][name]["ms"]["p99"]
            report.add(f"{name}_p99_ratio", round(ratio, 2))
            report.line(f"p99 of the {name}, raftkv to etcd: {ratio:.2f}")
    return report.finish()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
