"""A test double for `raftkv node`: answers Status as a member of a cluster would, and stores nothing.

The leader is the first node of --initial-cluster whose peer port answers. Behaviour for tests by the environment:
STANDIN_FAIL=TEXT (say TEXT and exit 3 at once), STANDIN_DEAF=1 (ignore SIGTERM).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from raftkv.local import lifeline

lifeline.attach()


def main() -> None:
    words = sys.argv[1:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    if os.environ.get("STANDIN_FAIL"):
        print("starting", file=sys.stderr)
        sys.exit(os.environ["STANDIN_FAIL"])
    import grpc

    from raftkv._pb import maintenance_pb2

    peers = [each.split("=")[1] for each in flags["--initial-cluster"].split(",")]
    own = peers.index(flags["--listen-peer"]) + 1
    host, port = flags["--listen-peer"].rsplit(":", 1)
    listener = socket.create_server((host, int(port)))

    def accept() -> None:
        # Or the queue of those who only look is full some time, and who lives counts as dead.
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()

    def alive(peer: str) -> bool:
        if peer == flags["--listen-peer"]:
            return True
        try:
            host, port = peer.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
        return True

    def status(request: maintenance_pb2.StatusRequest, context: grpc.ServicerContext) -> maintenance_pb2.StatusResponse:
        leader = next(number for number, peer in enumerate(peers, 1) if alive(peer))
        response = maintenance_pb2.StatusResponse(leader=leader, raftTerm=7, raftIndex=12, raftAppliedIndex=12 - own)
        response.header.member_id = own
        return response

    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(
        status,
        request_deserializer=maintenance_pb2.StatusRequest.FromString,
        response_serializer=maintenance_pb2.StatusResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("etcdserverpb.Maintenance", {"Status": handler}),)
    )
    server.add_insecure_port(flags["--listen-client"])
    ended = threading.Event()
    deaf = bool(os.environ.get("STANDIN_DEAF"))
    signal.signal(signal.SIGTERM, lambda *_: None if deaf else ended.set())
    server.start()  # last: whoever finds it healthy may signal it
    while not ended.wait(0.05):
        pass
    listener.close()
    server.stop(0).wait()


main()
