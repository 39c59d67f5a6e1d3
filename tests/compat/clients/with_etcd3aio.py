"""What etcd3aio's README shows, and the services it names there."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from etcd3aio import Etcd3Client
from etcd3aio._protobuf import Compare
from etcd3aio.kv import KVService, SortOrder, SortTarget, prefix_range_end
from etcd3aio.watch import WatchFilter
from telling import check_seen, main, persist_async, until_input_ends, wait_until


async def readme(prefix: str, endpoints: list[str]) -> None:
    async with Etcd3Client(endpoints) as client:
        await client.ping()
        await client.kv.put(f"{prefix}greeting", "hello")
        resp = await client.kv.get(f"{prefix}greeting")
        assert resp.kvs[0].value.decode() == "hello"
        async with client.lock(f"{prefix}resource"):
            pass
        async with client.election(f"{prefix}leader", value=b"node-1") as election:
            leader = await election.leader()
            assert leader.kvs[0].value == b"node-1"


async def kv(prefix: str, endpoints: list[str]) -> None:
    async with Etcd3Client(endpoints) as client:
        for number in (3, 1, 2):
            await client.kv.put(f"{prefix}{number}", str(9 - number))
        old = await client.kv.put(f"{prefix}1", "one", prev_kv=True)
        assert old.prev_kv.value == b"8"
        end = prefix_range_end(prefix)
        found = await client.kv.get(prefix, end, sort_order=SortOrder.DESCEND, sort_target=SortTarget.MOD, limit=2)
        assert [pair.key.decode()[-1] for pair in found.kvs] == ["1", "2"]
        assert (found.count, found.more) == (3, True)
        assert (await client.kv.get(prefix, end, count_only=True)).count == 3
        past = await client.kv.get(f"{prefix}1", revision=old.prev_kv.mod_revision)
        assert past.kvs[0].value == b"8"
        assert (await client.kv.get(f"{prefix}1", serializable=True)).kvs
        gone = await client.kv.delete(prefix, end, prev_kv=True)
        assert (gone.deleted, [pair.value for pair in gone.prev_kvs]) == (3, [b"one", b"7", b"6"])


async def txn(prefix: str, endpoints: list[str]) -> None:
    async with Etcd3Client(endpoints) as client:
        key = f"{prefix}k"
        compare = [KVService.txn_compare_version(key, 0)]
        success, failure = [KVService.txn_op_put(key, "v")], [KVService.txn_op_get(key)]
        assert (await client.kv.txn(compare, success, failure)).succeeded
        second = await client.kv.txn(compare, success, failure)
        assert not second.succeeded
        assert second.responses[0].response_range.kvs[0].value == b"v"
        greater = [KVService.txn_compare_value(key, "u", result=Compare.GREATER)]
        assert (await client.kv.txn(greater, [KVService.txn_op_delete(key)])).succeeded


async def lease(prefix: str, endpoints: list[str]) -> None:
    async with Etcd3Client(endpoints) as client:
        granted = await client.lease.grant(ttl=6)
        assert granted.TTL == 6
        await client.kv.put(f"{prefix}k", "v", lease=granted.ID)
        async with client.lease.keep_alive_context(granted.ID, ttl=6) as kept:
            await asyncio.sleep(8)
            assert kept.alive
        look = await client.lease.time_to_live(granted.ID, keys=True)
        assert (look.grantedTTL, list(look.keys)) == (6, [f"{prefix}k".encode()])
        assert granted.ID in {each.ID for each in (await client.lease.leases()).leases}
        await client.lease.revoke(granted.ID)
        assert not (await client.kv.get(f"{prefix}k")).kvs
        assert (await client.lease.time_to_live(granted.ID)).TTL == -1
        async with client.lease.keep_alive_context(granted.ID, ttl=3) as kept:
            await asyncio.to_thread(wait_until, lambda: not kept.alive)


async def lock(prefix: str, endpoints: list[str]) -> None:
    inside = 0
    turns = 0

    async def work() -> None:
        nonlocal inside, turns
        async with Etcd3Client(endpoints) as client, client.lock(f"{prefix}l", ttl=20):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0.1)
            inside -= 1
            turns += 1

    await asyncio.gather(*(work() for _ in range(5)))
    assert turns == 5
    async with Etcd3Client(endpoints) as client:
        crashed = client.lock(f"{prefix}l", ttl=2)
        await crashed.acquire()  # and never released: its lease, which nobody keeps, runs out
        async with asyncio.timeout(30), client.lock(f"{prefix}l"):
            pass


async def election(prefix: str, endpoints: list[str]) -> None:
    async with Etcd3Client(endpoints) as client:
        values: list[bytes] = []

        async def observe() -> None:
            async for response in client.election(f"{prefix}e").observe():
                values.extend(event.kv.value for event in response.events)

        async def observed(value: bytes) -> None:  # what comes and goes between two looks is not
            await asyncio.to_thread(wait_until, lambda: value in values)

        observer = asyncio.create_task(observe())
        async with client.election(f"{prefix}e", value=b"one") as first:
            await observed(b"one")
            second = client.election(f"{prefix}e", value=b"two")
            campaign = asyncio.create_task(second.__aenter__())
            await asyncio.sleep(0.3)
            assert not campaign.done()
            await first.proclaim(b"one, still")
            await observed(b"one, still")
        async with asyncio.timeout(30):
            await campaign
        await observed(b"two")
        assert (await second.leader()).kvs[0].value == b"two"
        await second.__aexit__(None, None, None)
        assert not (await second.leader()).kvs
        observer.cancel()
        with suppress(asyncio.CancelledError):
            await observer


async def watch(prefix: str, endpoints: list[str]) -> None:
    async with Etcd3Client(endpoints) as client:
        first = (await client.kv.put(f"{prefix}a", "1")).header.revision
        await client.kv.put(f"{prefix}b", "2")
        await client.kv.put(f"{prefix}a", "3")
        await client.kv.delete(f"{prefix}a")
        seen = []
        async for response in client.watch.watch(prefix, prefix_range_end(prefix), start_revision=first, prev_kv=True):
            seen += [
                (event.type, event.kv.key.decode()[-1], event.kv.value, event.prev_kv.value)
                for event in response.events
            ]
            if len(seen) == 4:
                break
        assert seen == [(0, "a", b"1", b""), (0, "b", b"2", b""), (0, "a", b"3", b"1"), (1, "a", b"", b"3")]
        filtered = client.watch.watch(f"{prefix}a", start_revision=first, filters=[WatchFilter.NOPUT])
        async for response in filtered:
            if response.events:
                assert [event.type for event in response.events] == [1]
                break


async def kills(prefix: str, endpoints: list[str]) -> None:
    """Reads, writes, a lease, a lock and a watch go on while members die."""
    async with Etcd3Client(endpoints, rpc_max_attempts=10) as client:
        seen: list[tuple[int, str]] = []

        async def look() -> None:
            start = (await client.kv.get("none")).header.revision + 1
            watched = f"{prefix}n/"
            async for response in client.watch.watch(watched, prefix_range_end(watched), start_revision=start):
                seen.extend((event.kv.mod_revision, event.kv.key.decode()[len(watched) :]) for event in response.events)

        watching = asyncio.create_task(look())
        granted = await client.lease.grant(ttl=10)
        await client.kv.put(f"{prefix}leased", "v", lease=granted.ID)
        async with client.lease.keep_alive_context(granted.ID, ttl=10) as kept, client.lock(f"{prefix}l", ttl=60):
            ended = until_input_ends()
            written = 0
            while not ended.is_set():
                key = f"{prefix}n/{written}"
                await persist_async(lambda key=key: client.kv.put(key, "v", timeout=5))
                written += 1
                await asyncio.sleep(0.05)
            assert kept.alive
        assert (await client.kv.get(f"{prefix}leased")).kvs
        found = await client.kv.get(f"{prefix}n/", prefix_range_end(f"{prefix}n/"), count_only=True)
        assert found.count == written
        await asyncio.to_thread(wait_until, lambda: seen and seen[-1][1] == str(written - 1))
        watching.cancel()
        check_seen(seen, written)


if __name__ == "__main__":
    main({story.__name__: story for story in (readme, kv, txn, lease, lock, election, watch, kills)})
