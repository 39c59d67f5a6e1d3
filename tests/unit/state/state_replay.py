"""Writes a log of random commands to a file, or applies one and prints what came of it; run as a program."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

from state_driver import group
from state_ops import Chooser, Ops

from raftkv._pb.kv_pb2 import RangeRequest
from raftkv._pb.state_pb2 import MemberAttributes
from raftkv.state.commands import decode_batch, encode_batch
from raftkv.state.machine import StateMachine
from raftkv.state.store import MemoryStore

ENTRIES = 200


def write_log(path: Path, seed: int) -> None:
    machine = StateMachine(MemoryStore())
    choose = Chooser(seed)
    ops = Ops(choose)
    out = bytearray()
    for index in range(1, ENTRIES + 1):
        ops.revision, ops.compact_revision = machine.revision, machine.compact_revision
        term = index // 50 + 1
        sessions = list(machine.sessions)
        requests = [ops.any_request(term, sessions) for _ in range(choose.number(0, 8))]
        requests = [ops.put() if isinstance(request, RangeRequest) else request for request in requests]
        if choose.chance(5):
            requests.append(MemberAttributes(id=choose.number(1, 9), name="n\u0131", client_urls=["a", "b"]))
        data = encode_batch([group(*requests)])
        out += struct.pack("<I", len(data)) + data
        machine.apply(index, term, decode_batch(data))
    path.write_bytes(out)


def replay(path: Path) -> dict[str, object]:
    machine = StateMachine(MemoryStore())
    data = path.read_bytes()
    results = hashlib.sha256()
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<I", data, place)
        place += 4
        groups = decode_batch(data[place : place + length])
        place += length
        for result in machine.apply(machine.applied_index + 1, (machine.applied_index + 1) // 50 + 1, groups):
            results.update(repr(result).encode())
        machine.sweep(7)
    dump = hashlib.sha256()
    for part in machine.dump():
        dump.update(struct.pack("<I", len(part)) + part)
    return {
        "revision": machine.revision,
        "rolling_hash": machine.rolling_hash,
        "hash": machine.hash(),
        "hash_kv": machine.hash_kv(0).hash,
        "results": results.hexdigest(),
        "dump": dump.hexdigest(),
        "members": repr(machine.members),
        "leases": repr(sorted(machine.leases.items())),
        "sessions": repr(sorted(machine.sessions.items())),
    }


if __name__ == "__main__":
    if "--write" in sys.argv:
        write_log(Path(sys.argv[1]), int(sys.argv[3]))
    else:
        json.dump(replay(Path(sys.argv[1])), sys.stdout)
