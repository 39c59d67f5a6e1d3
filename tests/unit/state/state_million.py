"""Fills a state on LevelDB with many keys and prints, as JSON, what that took; run as a program.

state_million.py FOLDER KEYS VALUE_BYTES
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from raftkv._pb.kv_pb2 import CompactionRequest, PutRequest, RangeRequest
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.machine import StateMachine
from raftkv.storage.state_store import StateStore

COMMANDS = 100


def memory_bytes(field: str) -> int:
    """A line of /proc/self/status: VmHWM is the peak of the resident size, RssAnon what no file can take back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def fill(machine: StateMachine, keys: int, value_bytes: int) -> None:
    value = bytes(range(256)) * (value_bytes // 256 + 1)
    for first in range(0, keys, 5 * COMMANDS):
        entries = []
        for start in range(first, min(first + 5 * COMMANDS, keys), COMMANDS):
            commands = tuple(
                # 7919 and the number of keys have no common divisor: every key once, in no order.
                Command(
                    number,
                    CommandKind.PUT,
                    PutRequest(
                        key=b"/registry/pods/%012d" % (number * 7919 % keys),
                        value=value[number % 251 : number % 251 + value_bytes],
                    ).SerializeToString(),
                )
                for number in range(start, start + COMMANDS)
            )
            entries.append((machine.applied_index + 1 + len(entries), 1, [Group(1, 1, commands)]))
        machine.apply_many(entries)


def main(folder: str, keys: int, value_bytes: int) -> None:
    out: dict[str, float] = {"rss_before": memory_bytes("VmRSS")}
    store = StateStore.open(Path(folder), create=True)
    machine = StateMachine(store)
    started = time.perf_counter()
    fill(machine, keys, value_bytes)
    out["fill_us_a_put"] = (time.perf_counter() - started) / keys * 1e6
    out["rss_filled"] = memory_bytes("VmRSS")
    started = time.perf_counter()
    for number in range(10000):
        machine.range(RangeRequest(key=b"/registry/pods/%012d" % (number * 104729 % keys)))
    out["get_us"] = (time.perf_counter() - started) / 10000 * 1e6
    started = time.perf_counter()
    count = machine.range(RangeRequest(key=b"\0", range_end=b"\0", count_only=True)).count
    out["count_s"] = time.perf_counter() - started
    started = time.perf_counter()
    machine.hash_kv(0)
    out["hash_kv_s"] = time.perf_counter() - started
    compaction = CompactionRequest(revision=machine.revision).SerializeToString()
    machine.apply(machine.applied_index + 1, 1, [Group(1, 1, (Command(1, CommandKind.COMPACT, compaction),))])
    started = time.perf_counter()
    while machine.sweep(1000):
        pass
    out["sweep_s"] = time.perf_counter() - started
    out["rss_end"] = memory_bytes("VmRSS")
    out["rss_peak"] = memory_bytes("VmHWM")
    out["anonymous_end"] = memory_bytes("RssAnon")
    store.close()
    started = time.perf_counter()
    store = StateStore.open(Path(folder), create=False)
    again = StateMachine(store)
    out["open_s"] = time.perf_counter() - started
    out["keys"] = count
    out["revision"] = again.revision
    out["disk_bytes"] = store.size_bytes()
    store.close()
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
