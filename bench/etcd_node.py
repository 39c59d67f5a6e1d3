"""Run one etcd node, told with the flags of `raftkv node`: so that our supervisor runs a cluster of etcd just the same.

AsyncLocalCluster(5, command=(sys.executable, "bench/etcd_node.py"))
"""

from __future__ import annotations

import os
import sys

from raftkv.local import lifeline


def main() -> None:
    words = sys.argv[1:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    members = [each.split("=") for each in given.pop("--initial-cluster").split(",")]
    client, peer = f"http://{given.pop('--listen-client')}", f"http://{given.pop('--listen-peer')}"
    arguments = [
        *("--name", given.pop("--name")),
        *("--data-dir", given.pop("--data-dir")),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", ",".join(f"{name}=http://{address}" for name, address in members)),
        *("--logger", "zap", "--log-level", "warn"),
    ]
    for name, value in given.items():
        arguments += [name, value]
    lifeline.attach()  # the kernel keeps the tie over exec
    os.execvp("etcd", ["etcd", *arguments])


main()
