"""The generated code: fresh, private to us, and etcd's to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from raftkv._pb import (
    auth_pb2,
    cluster_pb2,
    common_pb2,
    election_pb2,
    kv_pb2,
    lease_pb2,
    lock_pb2,
    maintenance_pb2,
    raft_pb2,
    state_pb2,
    watch_pb2,
)

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (
    common_pb2,
    kv_pb2,
    watch_pb2,
    lease_pb2,
    lock_pb2,
    election_pb2,
    cluster_pb2,
    maintenance_pb2,
    auth_pb2,
)


def test_generated_code_is_what_the_sources_generate() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "proto", "--check"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_message_lives_in_our_package() -> None:
    for module in (*PUBLIC, raft_pb2, state_pb2):
        assert module.DESCRIPTOR.package == "raftkv.v1"
        assert module.DESCRIPTOR.name.startswith("raftkv/v1/")


def test_an_etcd_client_library_fits_in_the_same_process_in_either_order() -> None:
    ours = "from raftkv._pb import kv_pb2, kv_pb2_grpc, auth_pb2, election_pb2, lock_pb2, watch_pb2"
    # aetcd's own generated code warns about the old protobuf that made it.
    for first, second in ((ours, "import aetcd"), ("import aetcd", ours)):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"{first}\n{second}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("library", ["kv", "rpc"])
def test_fields_are_those_of_an_independent_etcd_client(library: str) -> None:
    """aetcd carries its own copy of etcd's messages: names, numbers and types must agree wherever both have one."""
    script = f"""
import json, importlib
module = importlib.import_module("aetcd.rpc.{library}_pb2")
print(json.dumps({{
    name: {{field.number: [field.name, field.type, field.is_repeated] for field in message.fields}}
    for name, message in module.DESCRIPTOR.message_types_by_name.items()
}}))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    ours = {name: message for module in PUBLIC for name, message in module.DESCRIPTOR.message_types_by_name.items()}
    theirs = json.loads(run.stdout)
    assert theirs
    for name, fields in theirs.items():
        for number, (field_name, kind, repeated) in fields.items():
            field = ours[name].fields_by_number[int(number)]
            assert [field.name, field.type, field.is_repeated] == [field_name, kind, repeated], f"{name}.{field_name}"


def test_fields_of_our_own_start_at_100() -> None:
    own = {
        f"{message.name}.{field.name}": field.number
        for module in PUBLIC
        for message in module.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.number > 64
    }
    # What README's users may rely on beside etcd's fields: a change here is one of the interface.
    assert own == dict.fromkeys(
        (
            "ResponseHeader.leader",
            "PutRequest.guards",
            "DeleteRangeRequest.guards",
            "TxnRequest.guards",
            "Event.expired",
            "LeaseGrantRequest.ttl_ms",
            "LeaseGrantResponse.ttl_ms",
            "LeaseKeepAliveResponse.ttl_ms",
            "LeaseTimeToLiveResponse.ttl_ms",
            "LockRequest.fence",
            "LockResponse.fence",
            "UnlockRequest.fence",
            "UnlockResponse.released",
        ),
        100,
    )


def methods(service: ServiceDescriptor) -> set[str]:
    return {method.name for method in service.methods}


def test_services_have_etcds_methods() -> None:
    services = {
        name: methods(service) for module in PUBLIC for name, service in module.DESCRIPTOR.services_by_name.items()
    }
    assert services.keys() == {"KV", "Watch", "Lease", "Lock", "Election", "Cluster", "Maintenance", "Auth"}
    assert services["KV"] == {"Range", "RangeStream", "Put", "DeleteRange", "Txn", "Compact"}
    assert services["Maintenance"] == {
        "Alarm",
        "Status",
        "Defragment",
        "Hash",
        "HashKV",
        "Snapshot",
        "MoveLeader",
        "Downgrade",
    }
    assert {name: len(found) for name, found in services.items()} == {
        "KV": 6,
        "Watch": 1,
        "Lease": 5,
        "Cluster": 5,
        "Maintenance": 8,
        "Auth": 17,
        "Lock": 2,
        "Election": 5,
    }


def test_bytes_are_etcds() -> None:
    """Encodings written out by hand from etcd's field numbers."""
    put = kv_pb2.PutRequest(key=b"k", value=b"v", lease=7, prev_kv=True)
    assert put.SerializeToString() == bytes.fromhex("0a016b 120176 1807 2001")
    compare = kv_pb2.Compare(
        result=kv_pb2.Compare.GREATER, target=kv_pb2.Compare.MOD, key=b"k", mod_revision=3, range_end=b"l"
    )
    assert compare.SerializeToString() == bytes.fromhex("0801 1002 1a016b 3003 8204016c")
    watch = watch_pb2.WatchResponse(watch_id=1, events=[common_pb2.Event(type=common_pb2.Event.DELETE)])
    assert watch.SerializeToString() == bytes.fromhex("1001 5a020801")


def test_shared_messages_are_found_where_they_are_used() -> None:
    assert kv_pb2.KeyValue is common_pb2.KeyValue
    assert cluster_pb2.ResponseHeader is common_pb2.ResponseHeader
