"""Exactly once, end to end: what the SDK and the sessions of the state promise, while real nodes are killed.

Invariants X1 to X4, K3; catalogue rows 73 and 74.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from raftkv._pb import kv_pb2, session_pb2, state_pb2
from raftkv.client import AsyncClient, Event, Key, OutcomeUnknown, Put, RaftkvError, RequestTooLarge, Unavailable
from raftkv.local import AsyncLocalCluster

pytestmark = pytest.mark.integration


class Writers:
    """Many callers of one client, each kind of write, until told to stop; what each was told is kept."""

    def __init__(self, client: AsyncClient, each: int) -> None:
        self._client = client
        self._each = each
        self._stopped = False
        self.counts: Counter[str] = Counter()
        self.revisions: dict[tuple[bytes, bytes], int] = {}  # of each (key, value) that was put

    def stop(self) -> None:
        self._stopped = True

    def tasks(self) -> list[Awaitable[None]]:
        kinds = (self._put, self._put_and_delete, self._transact, self._update, self._update_shared)
        return [self._repeat(kind, number) for kind in kinds for number in range(self._each)]

    async def _repeat(self, write: Callable[[int, int], Awaitable[None]], writer: int) -> None:
        number = 0
        while not self._stopped:
            number += 1
            await write(writer, number)

    def _was_put(self, key: str, value: str, revision: int) -> None:
        assert self.revisions.setdefault((key.encode(), value.encode()), revision) == revision

    async def _put(self, writer: int, number: int) -> None:
        key = f"x/put/{writer}"
        self._was_put(key, str(number), (await self._client.put(key, str(number))).revision)
        self.counts[key] += 1

    async def _put_and_delete(self, writer: int, number: int) -> None:
        """A delete that is done twice finds nothing the second time."""
        key = f"x/delete/{writer}"
        self._was_put(key, str(number), (await self._client.put(key, str(number))).revision)
        assert (await self._client.delete(key)).deleted == 1
        self.counts[key] += 1

    async def _transact(self, writer: int, number: int) -> None:
        """A transaction that is done twice finds its own mark and fails (row 73)."""
        mark, key = f"x/mark/{writer}/{number}", f"x/txn/{writer}"
        txn = self._client.txn().when(Key(mark).create_revision == 0).then(Put(mark, ""), Put(key, str(number)))
        result = await txn.commit()
        assert result.succeeded, "done before, by the same call"
        self._was_put(key, str(number), result.revision)
        self.counts[key] += 1

    async def _update(self, writer: int, number: int) -> None:
        """One that is done twice and then told that somebody was faster counts twice."""
        key = f"x/update/{writer}"
        written = await self._client.update(key, lambda old: str(int(old.text) + 1 if old else 1))
        self._was_put(key, written.text, written.mod_revision)
        self.counts[key] += 1

    async def _update_shared(self, writer: int, number: int) -> None:
        """All count on one key, so that most are told that somebody was faster."""
        key = "x/shared"
        mine = json.dumps([writer, number])
        await self._client.update(
            key, lambda old: f"{int(old.text.split()[0]) + 1 if old else 1} {mine}", max_retries=10_000
        )
        self.counts[key] += 1


async def disturb(cluster: AsyncLocalCluster, rounds: int) -> None:
    """Kill leaders, stop them, kill two at a time, freeze one, and once all nodes together."""
    rng = random.Random(rounds)
    for number in range(rounds):
        how = ("kill", "stop", "two", "pause", "all")[number % 5]
        leader = await cluster.wait_leader(timeout_s=30)
        names = {"two": f"{leader},{rng.choice([n for n in cluster.names if n != leader])}", "all": "all"}
        target = names.get(how, leader)
        if how == "pause":
            await cluster.pause(target)
            await asyncio.sleep(2)
            await cluster.resume(target)
        else:
            await (cluster.stop if how == "stop" else cluster.kill)(target)
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            await cluster.restart(target, timeout_s=60)
        await asyncio.sleep(rng.uniform(0.2, 0.6))


async def history(client: AsyncClient) -> list[Event]:
    """All changes under x/, from the first on."""
    await client.put("x0", "")
    events: list[Event] = []
    async with client.watch("x", prefix=True, start_revision=1) as watch, asyncio.timeout(60):
        async for event in watch:
            if event.key == b"x0":
                break
            events.append(event)
    return events


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_every_write_is_done_exactly_once_while_nodes_die() -> None:
    async with AsyncLocalCluster(5) as cluster:
        failed: list[str] = []
        hooks = {"attempt_failed": lambda event: failed.append(event.code)}
        async with AsyncClient(cluster.endpoints, timeout=90, event_hooks=hooks) as client:
            writers = Writers(client, each=8)
            async with asyncio.TaskGroup() as group:
                for task in writers.tasks():
                    group.create_task(_run(task))
                await asyncio.sleep(0.5)
                await disturb(cluster, rounds=10)
                writers.stop()
            stats = client.stats()
            assert stats.outcomes_unknown == stats.failures == 0, "nothing ended but by success"
            assert stats.retries > 20, "nothing had to be repeated: the disturbances missed"
            events = await history(client)
    # X1: as many changes as there were acknowledged writes, of each key.
    puts = Counter(event.key.decode() for event in events if event.kind == "put")
    deletes = Counter(event.key.decode() for event in events if event.kind == "delete")
    marks = {key: puts.pop(key) for key in list(puts) if key.startswith("x/mark/")}
    assert set(marks.values()) == {1}
    assert puts == writers.counts
    assert all(deletes[key] == puts[key] for key in puts if key.startswith("x/delete/"))
    assert min(writers.counts.values()) > 5
    # X2: a repeated call was answered with the revision in which it was done.
    done_in = {(event.key, event.value): event.revision for event in events if event.kind == "put"}
    assert {pair: done_in.get(pair) for pair in writers.revisions} == writers.revisions
    last = {event.key: event.value for event in events if event.kind == "put"}
    for key, count in writers.counts.items():
        if key.startswith(("x/update/", "x/shared")):
            assert int(last[key.encode()].split()[0]) == count


async def _run(work: Awaitable[None]) -> None:
    await work


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_large_writes_are_done_exactly_once_while_nodes_die() -> None:
    """Almost as large as a node takes, so that a kill finds most of them half sent or half replicated."""
    value = bytes(1_400_000)
    done: Counter[str] = Counter()
    revisions: list[int] = []
    async with AsyncLocalCluster(3) as cluster, AsyncClient(cluster.endpoints, timeout=60) as client:
        await client.put("ready", "")

        async def write(key: str, size: int) -> None:
            while not ended:
                revisions.append((await client.put(key, value[:size])).revision)
                done[key] += 1

        ended = False
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(write(f"large/{number}", len(value)))
                group.create_task(write(f"small/{number}", 10))
            for target in (*cluster.names, "leader"):  # whomever the client asks is among them
                before = done.total()
                while done.total() < before + 20:  # noqa: ASYNC110 - a count of what others do
                    await asyncio.sleep(0.02)
                name = await cluster.wait_leader(timeout_s=30) if target == "leader" else target
                await cluster.kill(name)
                await cluster.restart(name, timeout_s=60)
            while min(done[f"large/{number}"] for number in range(3)) <= 5:  # noqa: ASYNC110 - a count, again
                await asyncio.sleep(0.02)
            ended = True
        with pytest.raises(RequestTooLarge):
            await client.put("large/0", bytes(1_600_000))
        with pytest.raises(RequestTooLarge):  # so large that gRPC itself refuses it
            await client.put("large/0", bytes(8_000_000))
        stats = client.stats()
        assert (stats.outcomes_unknown, stats.failures) == (0, 2)
        assert stats.retries > 0, "nothing had to be repeated: the kills missed"
        versions = {key: item.version for key in done if (item := await client.get(key)) is not None}
    assert versions == done
    assert len(set(revisions)) == len(revisions) == done.total()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_what_failed_for_certain_was_never_done() -> None:
    """K3, X3: with short time-outs in a cluster that loses leaders, each error says truly what is known."""
    told: dict[str, str] = {}
    async with AsyncLocalCluster(5) as cluster:
        running = True

        async with AsyncClient(cluster.endpoints, timeout=20) as patient, AsyncClient(cluster.endpoints) as client:
            await patient.put("ready", "")

            async def write(writer: int) -> None:
                number = 0
                while running:
                    number += 1
                    key = f"k/{writer}/{number}"
                    try:
                        await client.put(key, "", timeout=random.choice((0.02, 0.1, 0.4)))
                        told[key] = "done"
                    except OutcomeUnknown:
                        told[key] = "unknown"
                    except Unavailable:
                        told[key] = "not done"
                    await asyncio.sleep(0.005)

            async with asyncio.TaskGroup() as group:
                for writer in range(20):
                    group.create_task(write(writer))
                await asyncio.sleep(0.5)
                await disturb(cluster, rounds=5)
                running = False
            await asyncio.sleep(1)  # what is on its way arrives
            versions = {item.key.decode(): item.version async for item in patient.scan("k/")}
    kinds = Counter(told.values())
    assert kinds["done"] > 100
    assert kinds["not done"] > 10
    assert kinds["unknown"] > 10
    wrong = {
        key: (what, versions.get(key, 0))
        for key, what in told.items()
        if versions.get(key, 0) not in {"done": {1}, "not done": {0}, "unknown": {0, 1}}[what]
    }
    assert wrong == {}


class Talk:
    """A session stream to one node, one request at a time."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        call: grpc.aio.StreamStreamCall[bytes, bytes] = self._channel.stream_stream("/raftkv.v1.Session/Stream")(
            wait_for_ready=True
        )
        self._call = call
        self._next = 1

    async def ask(
        self, method: session_pb2.SessionMethod.ValueType, payload: bytes, **fields: Any
    ) -> session_pb2.SessionResponse:
        request = session_pb2.SessionRequest(id=self._next, method=method, payload=payload, timeout_ms=20_000, **fields)
        self._next += 1
        await self._call.write(session_pb2.SessionRequests(requests=[request]).SerializeToString())
        message = await self._call.read()
        assert isinstance(message, bytes), message
        (response,) = session_pb2.SessionResponses.FromString(message).responses
        return response

    async def open(self, ttl_ms: int = 0) -> int:
        payload = state_pb2.SessionOpen(ttl_ms=ttl_ms).SerializeToString()
        opened = await self.ask(session_pb2.SESSION_METHOD_OPEN, payload)
        session: int = state_pb2.SessionOpened.FromString(opened.payload).session
        return session

    async def put(self, key: str, session: int, seq: int) -> session_pb2.SessionResponse:
        payload = kv_pb2.PutRequest(key=key.encode(), value=b"v").SerializeToString()
        return await self.ask(
            session_pb2.SESSION_METHOD_PUT, payload, session=session, seq=seq, first_incomplete=1 if seq else 0
        )

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


def revision_of(response: session_pb2.SessionResponse) -> int:
    assert response.WhichOneof("result") == "payload", response
    revision: int = kv_pb2.PutResponse.FromString(response.payload).header.revision
    return revision


def installed_a_snapshot(cluster: AsyncLocalCluster, name: str) -> bool:
    lines = cluster.log(name).read_text().splitlines()
    return any(json.loads(line)["event"] == "snapshot_installed" for line in lines if line.startswith("{"))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_sessions_survive_snapshots_and_restarts_of_all_nodes() -> None:
    arguments = ("--snapshot-entries", "20", "--snapshot-catchup-entries", "5")
    async with AsyncLocalCluster(5, arguments=arguments) as cluster:
        leader = await cluster.wait_leader()
        late = next(name for name in cluster.names if name != leader)
        talk = Talk(cluster.endpoint(leader))
        session = await talk.open()
        await cluster.kill(late)
        first = [revision_of(await talk.put("once", session, seq)) for seq in range(1, 33)]
        assert first == sorted(set(first))
        for number in range(100):  # of no session, so that the log is cut behind the calls above
            assert revision_of(await talk.put(f"other/{number % 9}", 0, 0))
        await talk.close()
        survivors = [name for name in cluster.names if name != late]
        await cluster.restart(",".join(survivors))  # their caches of recent entries would still have them
        await cluster.wait_leader()
        await cluster.restart(late)
        async with asyncio.timeout(30):
            while not installed_a_snapshot(cluster, late):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.05)
        await cluster.wait_healthy()

        async def repeated_everywhere() -> None:
            """Each node answers from its own state, and as the first time."""
            for name in cluster.names:
                talk = Talk(cluster.endpoint(name))
                assert [revision_of(await talk.put("once", session, seq)) for seq in range(1, 33)] == first, name
                await talk.close()

        await repeated_everywhere()
        await cluster.kill("all")
        await cluster.restart("all")
        await repeated_everywhere()
        async with AsyncClient(cluster.endpoints, timeout=20) as client:
            item = await client.get("once")
            assert item is not None
            assert item.version == 32


async def test_row_74_what_an_ended_session_sends_is_never_executed() -> None:
    async with AsyncLocalCluster(5) as cluster:
        await cluster.wait_leader()
        talks = [Talk(cluster.endpoint(name)) for name in cluster.names]
        session = await talks[0].open()
        assert revision_of(await talks[0].put("x", session, 1))
        payload = state_pb2.SessionExpire(sessions=[session]).SerializeToString()
        await talks[1].ask(session_pb2.SESSION_METHOD_CLOSE, payload)
        for talk in talks:
            for seq in (1, 2):
                refused = await talk.put("x", session, seq)
                assert (refused.error.reason, refused.error.executed) == ("SESSION_EXPIRED", "no")
        await cluster.kill("all")
        await cluster.restart("all")
        again = Talk(cluster.endpoints[2])
        assert (await again.put("x", session, 3)).error.reason == "SESSION_EXPIRED"
        async with AsyncClient(cluster.endpoints, timeout=20) as client:
            item = await client.get("x")
            assert item is not None
            assert item.version == 1
        for talk in (*talks, again):
            await talk.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_session_that_is_not_used_runs_out_whoever_leads() -> None:
    """X4: its end is an entry of the log; the SDK's next write begins a new session and is done."""
    async with AsyncLocalCluster(3) as cluster, AsyncClient(cluster.endpoints, timeout=20) as client:
        leader = await cluster.wait_leader()
        talk = Talk(cluster.endpoint(next(name for name in cluster.names if name != leader)))
        session = await talk.open(ttl_ms=10_000)
        used = await talk.open(ttl_ms=10_000)
        assert revision_of(await talk.put("x", session, 1))
        await asyncio.sleep(5)
        await cluster.kill(leader)
        await cluster.wait_leader(other_than=leader)
        await cluster.restart(leader)
        term = seq = turns = 0
        while turns < 12:  # 10 s and the 30 s of grace, from when the last leader has begun
            await asyncio.sleep(4)
            seq += 1
            response = await talk.put("used", used, seq)
            assert revision_of(response)
            now = kv_pb2.PutResponse.FromString(response.payload).header.raft_term
            turns = turns + 1 if now == term else 1
            term = now
        assert (await talk.put("x", session, 1)).error.reason == "SESSION_EXPIRED", "not even what was done before"
        assert (await talk.put("x", session, 2)).error.reason == "SESSION_EXPIRED"
        item = await client.get("x")
        assert item is not None
        assert item.version == 1
        await talk.close()


async def test_the_sdk_goes_on_under_a_new_session_where_nothing_was_sent() -> None:
    async with AsyncLocalCluster(5) as cluster, AsyncClient(cluster.endpoints, timeout=20) as client:
        await client.put("a", "1")
        sessions = client._context.pool.parts["pipeline"]._sessions
        talk = Talk(cluster.endpoints[0])
        for number in range(3):
            payload = state_pb2.SessionExpire(sessions=[each.id for each in sessions]).SerializeToString()
            await talk.ask(session_pb2.SESSION_METHOD_CLOSE, payload)
            await client.put("a", str(number))
        await talk.close()
        item = await client.get("a")
        assert item is not None
        assert (item.text, item.version) == ("2", 4)


async def test_a_client_that_was_closed_says_that_it_does_not_know() -> None:
    """A write under way when the client is closed may be done or not: the error is not one that says neither."""
    async with AsyncLocalCluster(3) as cluster:
        client = AsyncClient(cluster.endpoints, timeout=20)
        await client.put("a", "1")
        await cluster.pause("all")
        writing = asyncio.create_task(client.put("a", "2"))
        pipeline = client._context.pool.parts["pipeline"]
        async with asyncio.timeout(30):
            while not pipeline._under_way:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(RaftkvError, match="not known"):
            await writing
        await cluster.resume("all")
