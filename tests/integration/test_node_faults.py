"""What a node does when its disk, its ports or its peers are not what they should be. Real processes throughout."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import raftkv
from raftkv._pb import kv_pb2, raft_pb2
from raftkv.local import LocalCluster
from raftkv.local.ports import lease_free

pytestmark = pytest.mark.integration

Factory = Callable[..., LocalCluster]
NODE = (sys.executable, "-m", "raftkv", "node")


def facts(cluster: LocalCluster, name: str) -> list[dict[str, Any]]:
    lines = cluster.log(name).read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def events(cluster: LocalCluster, name: str) -> list[str]:
    return [each["event"] for each in facts(cluster, name)]


def pid_of(cluster: LocalCluster, name: str) -> int:
    return next(row.pid for row in cluster.status() if row.name == name)  # type: ignore[return-value]


def term_of(cluster: LocalCluster, name: str) -> int:
    term = next(row.term for row in cluster.status(timeout_s=20) if row.name == name)
    assert term is not None
    return term


def peer_address(cluster: LocalCluster, name: str) -> str:
    with raftkv.Client(cluster.endpoints, timeout=10) as client:
        member = next(member for member in client.cluster.members() if member.name == name)
    return member.peer_urls[0].removeprefix("http://")


def until(holds: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def test_a_follower_whose_entries_are_gone_gets_a_snapshot(raftkv_cluster_factory: Factory) -> None:
    """The log is cut everywhere, and every memory of the entries lost, before the follower comes back."""
    cluster = raftkv_cluster_factory(nodes=3, arguments=("--snapshot-entries", "20", "--snapshot-catchup-entries", "5"))
    with raftkv.Client(cluster.endpoints, timeout=20) as client:
        client.put("before", "1")
        leader = cluster.wait_leader()
        late = next(name for name in cluster.names if name != leader)
        cluster.kill(late)
        for number in range(120):
            client.put(f"k{number % 50}", f"value {number}" * 50)
        for name in cluster.names:  # their caches of recent entries would still have what the log has not
            if name != late:
                cluster.restart(name)
        cluster.wait_leader()
        client.put("after", "2")
        cluster.restart(late)
        until(lambda: "snapshot_installed" in events(cluster, late), "the snapshot is installed")
        client.delete("before")
        cluster.wait_healthy()
        with raftkv.Client(cluster.endpoints, timeout=10) as fresh:  # no connection of it is in back-off
            until(
                lambda: len({each.hash for each in fresh.maintenance.hash_kv()}) == 1,
                "all nodes have the same content",
            )
        # What was installed is what a restart finds.
        cluster.kill(late)
        cluster.restart(late)
        cluster.wait_healthy()
        with raftkv.Client([cluster.endpoint(late)], timeout=10) as alone:
            assert alone.get("after").text == "2"  # type: ignore[union-attr]
            assert alone.get("before") is None
            assert alone.range("k", prefix=True, count_only=True).count == 50


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is of Linux")
def test_a_failed_write_ends_the_node_with_its_own_code_and_loses_nothing(raftkv_cluster_factory: Factory) -> None:
    """Rule Z1, by a real failing write: the process may not make its files longer."""
    cluster = raftkv_cluster_factory(nodes=3)
    leader = cluster.wait_leader()
    victim = next(name for name in cluster.names if name != leader)
    # Not through the victim: a caller whose node dies cannot know what became of its write.
    with raftkv.Client([cluster.endpoint(name) for name in cluster.names if name != victim], timeout=20) as client:
        client.put("k", "1")
        resource.prlimit(pid_of(cluster, victim), resource.RLIMIT_FSIZE, (1024, 1024))
        written = {}
        for number in range(20):
            client.put(f"w{number}", str(number))
            written[f"w{number}"] = str(number)
        until(lambda: not cluster.process(victim).alive, "the node whose disk fails has ended")
        assert cluster.process(victim).exit_code == 70
        last = [line for line in cluster.log(victim).read_text().splitlines() if line.startswith("raftkv: fatal:")]
        assert len(last) == 1
        assert "failed" in last[0]
        cluster.restart(victim)  # with its limit gone it may go on: everything it had promised is there
        cluster.wait_healthy()
        with raftkv.Client([cluster.endpoint(victim)], timeout=10) as alone:
            assert {item.key.decode(): item.text for item in alone.range("w", prefix=True)} == written


def test_bytes_that_are_no_http2_harm_neither_port(raftkv_cluster: LocalCluster) -> None:
    name = raftkv_cluster.names[0]
    pid = pid_of(raftkv_cluster, name)
    for address in (raftkv_cluster.endpoint(name), peer_address(raftkv_cluster, name)):
        host, _, port = address.rpartition(":")
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(4096),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 512,
            b"",
        ):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(garbage)
    with raftkv.Client([raftkv_cluster.endpoint(name)], timeout=10) as client:
        client.put("still", "here")
    assert pid_of(raftkv_cluster, name) == pid


def test_a_peer_of_another_cluster_and_a_crafted_one_change_nothing(raftkv_cluster: LocalCluster) -> None:
    name = raftkv_cluster.names[0]
    before = term_of(raftkv_cluster, name)
    pid = pid_of(raftkv_cluster, name)
    with raftkv.Client(raftkv_cluster.endpoints, timeout=10) as client:
        ids = {each.name: each.id for each in client.cluster.members()}
    me, other = ids.pop(name), next(iter(ids.values()))
    with grpc.insecure_channel(raftkv_cluster.endpoint(name)) as channel:
        ask = channel.unary_unary(
            "/etcdserverpb.KV/Range",
            request_serializer=kv_pb2.RangeRequest.SerializeToString,
            response_deserializer=kv_pb2.RangeResponse.FromString,
        )
        cluster_id = ask(kv_pb2.RangeRequest(key=b"k"), timeout=10).header.cluster_id
    batch = raft_pb2.PeerBatch()
    batch.messages.add().vote.term = 1 << 40
    with grpc.insecure_channel(peer_address(raftkv_cluster, name)) as channel:
        stream = channel.stream_unary(
            "/raftkv.v1.Peer/Stream",
            request_serializer=raft_pb2.PeerBatch.SerializeToString,
            response_deserializer=raft_pb2.PeerClosed.FromString,
        )
        for metadata, code in (
            ((), grpc.StatusCode.INVALID_ARGUMENT),
            (
                (
                    ("raftkv-cluster", f"{cluster_id ^ 1:x}"),
                    ("raftkv-from", f"{other:x}"),
                    ("raftkv-to", f"{me:x}"),
                ),
                grpc.StatusCode.FAILED_PRECONDITION,
            ),
            (
                (
                    ("raftkv-cluster", f"{cluster_id:x}"),
                    ("raftkv-from", "1234"),
                    ("raftkv-to", f"{me:x}"),
                ),
                grpc.StatusCode.FAILED_PRECONDITION,
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stream(iter([batch]), metadata=metadata, timeout=10)
            assert caught.value.code() is code
    # An election meanwhile, on a machine that stood still, is no harm; the term of the crafted message would be.
    assert before <= term_of(raftkv_cluster, name) < before + 100
    assert pid_of(raftkv_cluster, name) == pid


def test_an_oversize_request_is_refused_and_the_node_goes_on(raftkv_cluster: LocalCluster) -> None:
    endpoint = raftkv_cluster.endpoint(raftkv_cluster.names[0])
    with grpc.insecure_channel(endpoint, options=[("grpc.max_send_message_length", -1)]) as channel:
        put = channel.unary_unary("/etcdserverpb.KV/Put", request_serializer=kv_pb2.PutRequest.SerializeToString)
        for size, code, text in (
            (1_600_000, grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large"),
            (8 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                put(kv_pb2.PutRequest(key=b"big", value=b"x" * size), timeout=10)
            assert caught.value.code() is code
            assert text in caught.value.details()
        put(kv_pb2.PutRequest(key=b"big", value=b"x" * 1_500_000), timeout=10)


def start_node(name: str, directory: Path, *more: str) -> subprocess.CompletedProcess[str]:
    lease = lease_free(2)
    client, peer = lease.ports
    try:
        return subprocess.run(
            (*NODE, "--name", name, "--data-dir", str(directory), "--listen-client", f"127.0.0.1:{client}",
             "--listen-peer", f"127.0.0.1:{peer}", *more),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        lease.release()


def test_a_second_process_on_a_data_directory_is_refused(raftkv_cluster: LocalCluster) -> None:
    name = raftkv_cluster.names[0]
    data = raftkv_cluster.directory / name / "data"
    result = start_node(name, data)
    assert result.returncode == 1
    assert "open in another process" in result.stderr
    assert str(data) in result.stderr
    assert "Traceback" not in result.stderr
    raftkv_cluster.wait_healthy()


def test_a_foreign_and_a_damaged_data_directory_are_refused(
    raftkv_fresh_cluster: LocalCluster,
) -> None:
    cluster = raftkv_fresh_cluster
    with raftkv.Client(cluster.endpoints, timeout=10) as client:
        for number in range(30):
            client.put(f"k{number}", "x" * 1000)
    name = cluster.names[0]
    data = cluster.directory / name / "data"
    cluster.kill(name)

    foreign = start_node("somebody", data)
    assert foreign.returncode == 1
    assert "Traceback" not in foreign.stderr
    assert name in foreign.stderr  # whose it is

    log = max((data / "log").glob("*.l*"), key=lambda path: path.stat().st_size)
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 0x10
    log.write_bytes(content)
    with pytest.raises(raftkv.local.LocalClusterError):
        cluster.restart(name, timeout_s=60)
    lines = cluster.log(name).read_text()
    assert "Traceback" not in lines
    assert str(data / "log") in lines
    assert "restore this directory from a backup" in lines
    assert cluster.process(name).exit_code == 1


def test_a_frozen_leader_is_replaced_and_follows_when_it_wakes(raftkv_fresh_cluster: LocalCluster) -> None:
    cluster = raftkv_fresh_cluster
    with raftkv.Client(cluster.endpoints, timeout=20) as client:
        client.put("k", "before")
        (frozen,) = cluster.pause("leader")
        client.get("k")
        client.put("k", "while it was frozen")
        assert cluster.wait_leader() != frozen
        cluster.resume(frozen)
        with raftkv.Client([cluster.endpoint(frozen)], timeout=20) as old:
            assert old.get("k").text == "while it was frozen"  # type: ignore[union-attr]
        cluster.wait_healthy()


def test_a_node_that_is_told_to_stop_hands_leadership_over_first(raftkv_fresh_cluster: LocalCluster) -> None:
    cluster = raftkv_fresh_cluster
    with raftkv.Client(cluster.endpoints, timeout=20) as client:
        client.put("k", "1")
        leader = cluster.wait_leader()
        before = {name: len(facts(cluster, name)) for name in cluster.names}
        os.kill(pid_of(cluster, leader), signal.SIGTERM)
        client.put("k", "2")
        until(lambda: not cluster.process(leader).alive, "the node has stopped")
        assert cluster.process(leader).exit_code == 0
        assert {"node_stopping", "transfer_started", "node_stopped"} <= set(events(cluster, leader))
        # The next one stood because it was told to, not because it missed the leader.
        since = [each for name in cluster.names if name != leader for each in facts(cluster, name)[before[name] :]]
        campaigns = [each["detail"] for each in since if each["event"] == "campaign"]
        assert "transfer" in campaigns, campaigns


def test_a_minority_refuses_what_it_cannot_know_and_drops_the_late(
    raftkv_fresh_cluster: LocalCluster,
) -> None:
    cluster = raftkv_fresh_cluster
    names = cluster.names
    with raftkv.Client(cluster.endpoints, timeout=10) as client:
        client.put("k", "before")
    survivor = names[0]
    with raftkv.Client([cluster.endpoint(survivor)], timeout=10) as alone:
        assert alone.get("k") is not None  # it has applied the put
    for name in names[1:]:
        cluster.kill(name)
    # If it led, it took what comes until it has missed the others; and what it took then, they might accept later.
    until(lambda: "no leader" in {row.role for row in cluster.status()}, "the survivor has missed the others")
    with raftkv.Client([cluster.endpoint(survivor)], timeout=1.5) as alone:
        with pytest.raises(raftkv.Unavailable):
            alone.get("k")
        with pytest.raises((raftkv.Unavailable, raftkv.OutcomeUnknown)):
            alone.put("k", "too late")
        stale = alone.with_options(consistency="serializable", timeout=20)
        assert stale.get("k").text == "before"  # type: ignore[union-attr]
    for name in names[1:]:
        cluster.restart(name, wait=False)
    cluster.wait_healthy()
    with raftkv.Client(cluster.endpoints, timeout=10) as client:
        # It had no leader, so it was never proposed, and its time ran out before there was one.
        assert client.get("k").text == "before"  # type: ignore[union-attr]
