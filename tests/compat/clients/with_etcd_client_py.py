"""What the README of etcd-client-py shows, a binding of Rust's etcd-client.

Its `lease_grant` returns nothing, not even the id: the leases that can be seen at work here are those of its locks.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from etcd_client import (
    Client,
    ClientError,
    Compare,
    CompareOp,
    CondVar,
    EtcdLockOption,
    GRPCStatusError,
    LeaseKeepAliveError,
    Txn,
    TxnOp,
    WatchEventType,
)
from telling import main, persist_async, until_input_ends


def client_of(endpoints: list[str]) -> Client:
    return Client([f"http://{endpoint}" for endpoint in endpoints])


async def readme(prefix: str, endpoints: list[str]) -> None:
    p = prefix.encode()
    etcd = client_of(endpoints)
    async with etcd.connect() as communicator:
        await communicator.put(p + b"testkey", b"testvalue")
        assert bytes(await communicator.get(p + b"testkey")) == b"testvalue"
    for _ in range(2):  # its runtime ends with the last connection, and begins again
        async with etcd.connect() as communicator:
            assert bytes(await communicator.get(p + b"testkey")) == b"testvalue"


async def kv(prefix: str, endpoints: list[str]) -> None:
    p = prefix.encode()
    async with client_of(endpoints).connect() as communicator:
        for key, value in ((b"", b"root"), (b"/1", b"1"), (b"/2", b"2"), (b"/2/3", b"3")):
            await communicator.put(p + b"testdir" + key, value)
        found = [(bytes(key), bytes(value)) for key, value in await communicator.get_prefix(p + b"testdir")]
        assert [(key.removeprefix(p + b"testdir"), value) for key, value in found] == [
            (b"", b"root"), (b"/1", b"1"), (b"/2", b"2"), (b"/2/3", b"3"),
        ]  # fmt: skip
        assert len(await communicator.keys_prefix(p + b"testdir/2")) == 2
        assert await communicator.get(p + b"none") is None
        await communicator.delete(p + b"testdir/1")
        assert await communicator.get(p + b"testdir/1") is None
        await communicator.delete_prefix(p)
        assert not await communicator.get_prefix(p)
        with pytest.raises(GRPCStatusError, match="etcdserver: request is too large"):
            await communicator.put(p + b"k", b"x" * 1_600_000)


async def txn(prefix: str, endpoints: list[str]) -> None:
    p = prefix.encode()
    async with client_of(endpoints).connect() as communicator:
        await communicator.put(p + b"cmpkey1", b"foo")
        await communicator.put(p + b"cmpkey2", b"baz")
        await communicator.put(p + b"successkey", b"asdf")
        compares = [
            Compare.value(p + b"cmpkey1", CompareOp.EQUAL, b"foo"),
            Compare.value(p + b"cmpkey2", CompareOp.GREATER, b"bar"),
        ]
        response = await communicator.txn(Txn().when(compares).and_then([TxnOp.get(p + b"successkey")]))
        assert response.succeeded()
        compares.append(Compare.version(p + b"cmpkey1", CompareOp.NOT_EQUAL, 1))
        operations = Txn().when(compares).and_then([TxnOp.delete(p + b"cmpkey1")]).or_else([TxnOp.put(p + b"f", b"1")])
        assert not (await communicator.txn(operations)).succeeded()
        assert bytes(await communicator.get(p + b"f")) == b"1"
        found = Compare.create_revision(p, CompareOp.GREATER, 0).with_prefix()
        nested = TxnOp.txn(Txn().when([found]).and_then([TxnOp.delete(p + b"f")]))
        assert (await communicator.txn(Txn().when([found]).and_then([nested]))).succeeded()
        assert await communicator.get(p + b"f") is None


async def lease(_: str, endpoints: list[str]) -> None:
    async with client_of(endpoints).connect() as communicator:
        await communicator.lease_grant(5)
        await communicator.lease_time_to_live(77)  # not an error: it tells of -1 seconds
        with pytest.raises(LeaseKeepAliveError):
            await communicator.lease_keep_alive(77)
        with pytest.raises(GRPCStatusError, match="etcdserver: requested lease not found"):
            await communicator.lease_revoke(77)


async def lock(prefix: str, endpoints: list[str]) -> None:
    """With the Lock service of the server."""
    name = f"{prefix}foolock".encode()
    etcd = client_of(endpoints)
    order: list[str] = []
    inside = asyncio.Event()

    async def first() -> None:
        async with etcd.with_lock(EtcdLockOption(lock_name=name)) as communicator, asyncio.timeout(30):
            order.append("first in")
            inside.set()
            while len(await communicator.keys_prefix(name)) < 2:  # noqa: ASYNC110 - a server is asked
                await asyncio.sleep(0.05)
            order.append("first out")

    async def second() -> None:
        await inside.wait()
        async with etcd.with_lock(EtcdLockOption(lock_name=name, timeout=60.0)):
            order.append("second in")

    await asyncio.gather(first(), second())
    assert order == ["first in", "first out", "second in"]

    began = time.monotonic()
    async with etcd.with_lock(EtcdLockOption(lock_name=name, ttl=6)):  # "released after the given seconds"
        with pytest.raises(ClientError, match="deadline has elapsed"):
            async with etcd.with_lock(EtcdLockOption(lock_name=name, timeout=0.5)):
                raise AssertionError("entered")
        async with etcd.with_lock(EtcdLockOption(lock_name=name, timeout=60.0)):
            assert time.monotonic() - began > 5.5
    async with etcd.connect() as communicator:
        await communicator.lock(name)
        await communicator.unlock((await communicator.keys_prefix(name))[0])
        assert not await communicator.keys_prefix(name)


async def watch(prefix: str, endpoints: list[str]) -> None:
    p = prefix.encode()
    async with client_of(endpoints).connect() as communicator:
        ready = CondVar()
        seen: list[tuple[bool, bytes, bytes]] = []

        async def look() -> None:
            async for event in communicator.watch_prefix(p, ready_event=ready):
                seen.append((event.event == WatchEventType.PUT, bytes(event.key).removeprefix(p), bytes(event.value)))
                if len(seen) == 4:
                    return

        watching = asyncio.ensure_future(look())
        await ready.wait()
        await communicator.put(p + b"a", b"1")
        await communicator.put(p + b"b", b"2")
        await communicator.delete(p + b"a")
        await communicator.put(p + b"c/d", b"3")
        async with asyncio.timeout(30):
            await watching
        assert seen == [(True, b"a", b"1"), (True, b"b", b"2"), (False, b"a", b""), (True, b"c/d", b"3")]


async def kills(prefix: str, endpoints: list[str]) -> None:
    """Reads, writes and a lock go on while members die."""
    p = prefix.encode()
    etcd = client_of(endpoints)
    async with (
        etcd.with_lock(EtcdLockOption(lock_name=p + b"l", ttl=60)) as holder,
        etcd.connect() as communicator,
    ):
        (held,) = await holder.keys_prefix(p + b"l/")
        ended = until_input_ends()
        written = 0
        while not ended.is_set():
            await persist_async(lambda key=p + b"n/%d" % written: communicator.put(key, b"v"))
            written += 1
            await asyncio.sleep(0.05)
        assert len(await communicator.keys_prefix(p + b"n/")) == written
        assert await communicator.keys_prefix(p + b"l/") == [held]


if __name__ == "__main__":
    main({story.__name__: story for story in (readme, kv, txn, lease, lock, watch, kills)})
