"""What the README of etcd-sdk-python (module pyetcd) shows: python-etcd3, made to work with today's protobuf."""

from __future__ import annotations

import itertools
import threading
import time

import pyetcd
import pytest
from telling import check_seen, main, persist, until_input_ends, wait_until


def client_of(endpoints: list[str]) -> pyetcd.MultiEndpointEtcd3Client:
    pairs = [endpoint.split(":") for endpoint in endpoints]
    # By default it does not ask a member that was unavailable, as etcd has them in an election, for five minutes.
    members = [pyetcd.Endpoint(host=host, port=int(port), secure=False, time_retry=0.2) for host, port in pairs]
    return pyetcd.MultiEndpointEtcd3Client(members, timeout=30, failover=True)


def readme(prefix: str, endpoints: list[str]) -> None:
    host, port = endpoints[0].split(":")
    etcd = pyetcd.client(host=host, port=int(port))
    assert etcd.get(f"{prefix}foo") == (None, None)
    etcd.put(f"{prefix}bar", "doot")
    assert etcd.get(f"{prefix}bar")[0] == b"doot"
    assert etcd.delete(f"{prefix}bar")
    with etcd.lock(f"{prefix}doot-machine") as lock:
        assert lock.is_acquired()
    assert not lock.is_acquired()
    etcd.put(f"{prefix}testing", "doot")
    done, _ = etcd.transaction(
        compare=[
            etcd.transactions.value(f"{prefix}testing") == "doot",
            etcd.transactions.version(f"{prefix}testing") > 0,
        ],
        success=[etcd.transactions.put(f"{prefix}testing", "success")],
        failure=[etcd.transactions.put(f"{prefix}testing", "failure")],
    )
    assert done
    assert etcd.get(f"{prefix}testing")[0] == b"success"


def kv(prefix: str, endpoints: list[str]) -> None:
    etcd = client_of(endpoints)
    assert etcd.put_if_not_exists(f"{prefix}a", "3")
    assert not etcd.put_if_not_exists(f"{prefix}a", "4")
    etcd.put(f"{prefix}b", "1")
    etcd.put(f"{prefix}c", "2")
    assert etcd.put(f"{prefix}c", "2", prev_kv=True).prev_kv.value == b"2"
    assert [value for value, _ in etcd.get_prefix(prefix)] == [b"3", b"1", b"2"]
    by_value = etcd.get_prefix(prefix, sort_order="descend", sort_target="value")
    assert [value for value, _ in by_value] == [b"3", b"2", b"1"]
    assert [meta.key for _, meta in etcd.get_range(f"{prefix}a", f"{prefix}c")] == [
        f"{prefix}a".encode(), f"{prefix}b".encode(),
    ]  # fmt: skip
    assert etcd.replace(f"{prefix}a", "3", "5")
    assert not etcd.replace(f"{prefix}a", "3", "6")
    assert etcd.delete_prefix(prefix).deleted == 3
    assert len(list(etcd.members)) >= len(endpoints)
    assert etcd.status().leader is not None


def lease(prefix: str, endpoints: list[str]) -> None:
    etcd = client_of(endpoints)
    granted = etcd.lease(6)
    assert granted.ttl == 6
    etcd.put(f"{prefix}k", "v", lease=granted)
    for _ in range(4):  # longer than its time
        time.sleep(2)
        assert granted.refresh()[0].TTL == 6
    assert (granted.granted_ttl, list(granted.keys)) == (6, [f"{prefix}k".encode()])
    assert 0 <= granted.remaining_ttl <= 6
    assert etcd.get(f"{prefix}k")[0] == b"v"
    wait_until(lambda: etcd.get(f"{prefix}k")[0] is None)
    assert granted.remaining_ttl == -1
    other = etcd.lease(60, lease_id=4242)
    assert other.id == 4242
    etcd.put(f"{prefix}k", "v", lease=4242)
    other.revoke()
    assert etcd.get(f"{prefix}k")[0] is None


def lock(prefix: str, endpoints: list[str]) -> None:
    first, second = client_of(endpoints), client_of(endpoints)
    held = first.lock(f"{prefix}toot", ttl=20)
    assert held.acquire()
    held.refresh()
    assert not second.lock(f"{prefix}toot").acquire(timeout=1)
    waiter = second.lock(f"{prefix}toot", ttl=20)
    threading.Timer(0.5, held.release).start()
    assert waiter.acquire(timeout=60)
    assert not held.is_acquired()
    assert waiter.release()
    assert first.lock(f"{prefix}toot", ttl=2).acquire()  # left alone: it runs out
    assert waiter.acquire(timeout=15)


def watch(prefix: str, endpoints: list[str]) -> None:
    etcd = client_of(endpoints)
    start = etcd.put(f"{prefix}a", "0").header.revision + 1
    events, cancel = etcd.watch_prefix(prefix, start_revision=start, prev_kv=True)
    etcd.put(f"{prefix}a", "1")
    etcd.put(f"{prefix}b", "2")
    etcd.delete(f"{prefix}a")
    seen = [(type(each).__name__, each.value, each.prev_value) for each in itertools.islice(events, 3)]
    assert seen == [("PutEvent", b"1", b"0"), ("PutEvent", b"2", b""), ("DeleteEvent", b"", b"1")]
    cancel()
    told: list[bytes] = []
    number = etcd.add_watch_callback(
        f"{prefix}c", lambda response: told.extend(event.value for event in response.events)
    )
    etcd.put(f"{prefix}c", "called")
    wait_until(lambda: told == [b"called"])
    etcd.cancel_watch(number)
    etcd.compact(etcd.put(f"{prefix}a", "3").header.revision)
    with pytest.raises(pyetcd.exceptions.RevisionCompactedError) as caught:
        list(itertools.islice(etcd.watch(f"{prefix}a", start_revision=start)[0], 1))
    assert caught.value.compacted_revision > start


def kills(prefix: str, endpoints: list[str]) -> None:
    """Reads, writes, a lease, a lock and a watch go on while other members die."""
    etcd = client_of(endpoints[:1])
    granted = etcd.lease(10)
    etcd.put(f"{prefix}leased", "v", lease=granted)
    held = etcd.lock(f"{prefix}l", ttl=60)
    assert held.acquire()
    seen: list[tuple[int, str]] = []
    watched = f"{prefix}n/"
    etcd.add_watch_prefix_callback(
        watched,
        lambda response: seen.extend(
            (event.mod_revision, event.key.decode().removeprefix(watched)) for event in response.events
        ),
    )
    ended = until_input_ends()
    written = 0
    while not ended.is_set():
        persist(lambda key=f"{watched}{written}": etcd.put(key, "v"))
        persist(granted.refresh)
        written += 1
        time.sleep(0.05)
    assert etcd.get(f"{prefix}leased")[0] == b"v"
    assert held.is_acquired()
    assert len(list(etcd.get_prefix(watched))) == written
    wait_until(lambda: seen and seen[-1][1] == str(written - 1))
    check_seen(seen, written)


if __name__ == "__main__":
    main({story.__name__: story for story in (readme, kv, lease, lock, watch, kills)})
