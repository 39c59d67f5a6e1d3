"""What the SDK costs above gRPC: puts by 100 concurrent callers, through `AsyncClient` and through the bare stub.

The server answers from memory and runs in a process of its own. Rounds alternate, so that what the machine does
otherwise meets both. The CPU of this process is the figure to look at: the rate depends on the server too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
from common import machine

from raftkv._pb import kv_pb2
from raftkv.client import AsyncClient
from raftkv.client.connection import CHANNEL_OPTIONS
from raftkv.client.methods import PUT

VALUE = b"x" * 256


async def serve() -> None:
    """Answer every put; print the port."""
    header = kv_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=3, raft_term=2, leader=1)
    answer = kv_pb2.PutResponse(header=header).SerializeToString()

    async def put(request: bytes, context: object) -> bytes:
        return answer

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(put)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("etcdserverpb.KV", {"Put": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def round_of(put: Callable[[], Awaitable[object]], puts: int, callers: int) -> tuple[float, float]:
    """Returns puts a second, and microseconds of this process's CPU a put."""
    left = puts

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await put()

    started, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return puts / (time.perf_counter() - started), (time.process_time() - cpu) / puts * 1e6


async def compare(port: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure both, in turn."""
    endpoint = f"127.0.0.1:{port}"
    results: dict[str, list[tuple[float, float]]] = {"stub": [], "sdk": []}
    async with grpc.aio.insecure_channel(endpoint, options=list(CHANNEL_OPTIONS.items())) as channel:
        stub = channel.unary_unary(PUT.path, request_serializer=PUT.serialize, response_deserializer=PUT.parse)
        async with AsyncClient(endpoint) as client:
            ways: dict[str, Callable[[], Awaitable[object]]] = {
                "stub": lambda: stub(kv_pb2.PutRequest(key=b"key", value=VALUE), timeout=5),
                "sdk": lambda: client.put(b"key", VALUE),
            }
            for number in range(options.rounds + 1):
                for name, put in ways.items():
                    figures = await round_of(put, options.puts, options.callers)
                    if number:  # the first round warms up
                        results[name].append(figures)
    return {
        name: {
            "puts_per_s": round(statistics.median(rate for rate, _ in figures)),
            "cpu_us_per_put": round(statistics.median(cpu for _, cpu in figures), 1),
        }
        for name, figures in results.items()
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--callers", type=int, default=100)
    parser.add_argument("--puts", type=int, default=5000, help="puts a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        results = asyncio.run(compare(int(server.stdout.readline()), options))
    finally:
        server.kill()
        server.wait()
    overhead = results["sdk"]["cpu_us_per_put"] / results["stub"]["cpu_us_per_put"] - 1
    for name, figures in results.items():
        print(f"{name:5} {figures['puts_per_s']:7} puts/s   {figures['cpu_us_per_put']:6} us CPU a put")
    print(f"the SDK adds {overhead:.1%} of CPU")
    if options.json:
        report = {"machine": machine(), "callers": options.callers, "results": results, "overhead": round(overhead, 4)}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
