"""Mutations over the session stream: how they are sent, and where to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.client import (
    AsyncClient,
    DeadlineExceeded,
    RequestTooLarge,
    pipeline,
)
from raftkv.client import session as sessions
from raftkv.client.lookout import LEAVE_S
from raftkv.client.pipeline import BATCH_BYTES_MAX, PROOF_S, SILENCE_S
from raftkv.client.session import WINDOW, ServerSession
from raftkv.client.session_stream import ChannelStream, WireStream
from tests.unit.client.conftest import FakeCluster, FakeNode, Proxy, Tools
from tests.unit.client.session_nodes import SessionNode, Table, nodes_of, puts_only, refusal, with_sessions

MakeClient = Callable[..., AsyncClient]


@pytest.fixture(params=[WireStream, ChannelStream])
def make_client(request: pytest.FixtureRequest, make_client: MakeClient) -> MakeClient:
    """Clients whose stream is carried the one way or the other."""
    if request.param is WireStream:
        return make_client
    return partial(make_client, channel_options=[("grpc.primary_user_agent", "test")])


@pytest.fixture
async def table(cluster: FakeCluster) -> Table:
    """Three nodes with the session stream instead of the fixture's own."""
    return await with_sessions(cluster)


async def test_concurrent_calls_leave_together(cluster: FakeCluster, table: Table, make_client: MakeClient) -> None:
    client = make_client()
    results = await asyncio.gather(*(client.put(f"k{number}", "v") for number in range(500)))
    assert len({result.revision for result in results}) == 500
    assert sorted(table.executed) == sorted(b"k%d" % number for number in range(500))
    assert table.kept_most <= WINDOW
    batches = [size for node in nodes_of(cluster) for size in node.batches]
    assert len(batches) < 100
    assert sum(node.count("Put") for node in cluster.nodes) == 0


@pytest.mark.parametrize("how", ["break", "break-before"])
async def test_a_broken_stream_repeats_what_it_left_open_and_nothing_is_done_twice(
    cluster: FakeCluster, table: Table, make_client: MakeClient, how: str
) -> None:
    for node in nodes_of(cluster):
        node.rule = puts_only(how, 2)
    client = make_client()
    results = await asyncio.gather(*(client.put(f"k{number}", "v") for number in range(100)))
    assert sorted(table.executed) == sorted(b"k%d" % number for number in range(100))
    assert len({result.revision for result in results}) == 100
    assert client.stats().outcomes_unknown == 0
    assert client.stats().retries > 0


@pytest.mark.parametrize("how", ["break", "break-before"])
async def test_a_large_put_is_repeated_through_a_broken_stream_and_done_once(
    cluster: FakeCluster, table: Table, make_client: MakeClient, how: str
) -> None:
    for node in nodes_of(cluster):
        node.rule = puts_only(how, 1)
    client = make_client()
    await asyncio.gather(*(client.put(f"k{number}", bytes(1_000_000 if number % 3 else 1)) for number in range(9)))
    assert sorted(table.executed) == [b"k%d" % number for number in range(9)]
    assert client.stats().outcomes_unknown == 0
    assert client.stats().retries > 0
    assert sum(node.count("Put") for node in cluster.nodes) == 0


async def test_a_large_request_goes_alone(cluster: FakeCluster, table: Table, make_client: MakeClient) -> None:
    node = nodes_of(cluster)[0]
    client = make_client(node)
    await client.put("a", "1")
    sizes = (1, 1, BATCH_BYTES_MAX + 1, 1, BATCH_BYTES_MAX // 2, BATCH_BYTES_MAX // 2, 1, 1)
    await asyncio.gather(*(client.put(f"k{number}", bytes(size)) for number, size in enumerate(sizes)))
    assert node.batches[2:] == [2, 1, 2, 3]  # after those of the session and of the first put


async def test_a_request_that_grpc_refuses_is_refused_alone(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    """It ends the stream, and would again: what was under way beside it goes out again without it."""
    for node in nodes_of(cluster):
        await node.stop()
        node.options = (("grpc.max_receive_message_length", 1_000_000),)
        await node.start()
    client = make_client()
    await client.put("a", "1")
    sizes = {"small": 1, "large": 900_000, "too large": 1_000_001, "larger": 3_000_000, "medium": 400_000}
    results = await asyncio.gather(
        *(client.put(key, bytes(size)) for key, size in sizes.items()), return_exceptions=True
    )
    refused = {key for key, result in zip(sizes, results, strict=True) if isinstance(result, RequestTooLarge)}
    assert refused == {"too large", "larger"}
    assert sorted(table.executed) == [b"a", b"large", b"medium", b"small"]
    assert client.stats().failures == 2


async def test_a_request_that_is_too_large_and_given_up_takes_no_other_with_it(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools]
) -> None:
    for node in nodes_of(cluster):
        await node.stop()
        node.options = (("grpc.max_receive_message_length", 1_000_000),)
        await node.start()
    client = make_client()
    await client.put("a", "1")
    at = client._context.pool.parts["pipeline"]
    given_up = asyncio.create_task(client.put("too large", bytes(2_000_000)))
    await tools.until(lambda: at._largest is not None)
    given_up.cancel()
    await asyncio.gather(client.put("large", bytes(900_000)), client.put("small", "1"))
    assert sorted(table.executed) == [b"a", b"large", b"small"]


async def test_a_call_that_is_given_up_between_two_attempts_makes_room_for_the_next(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sessions are full, and nothing is under way that could be answered: nobody else wakes the sender."""
    monkeypatch.setattr(sessions, "WINDOW", 1)
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 1)
    once = puts_only(refusal("TOO_MANY_REQUESTS", 8, retry_after_ms=60_000), 1)
    for node in nodes_of(cluster):
        node.rule = once
    client = make_client()
    first = asyncio.create_task(client.put("first", "1", timeout=3))
    await tools.until(lambda: client.stats().retries > 0)
    following = asyncio.create_task(client.put("next", "1", timeout=20))
    with pytest.raises(DeadlineExceeded):
        await first
    await following
    assert table.executed == [b"next"]


async def test_a_cancelled_call_that_was_not_sent_is_never_sent(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools]
) -> None:
    client = make_client()
    await client.put("a", "1")
    tasks = [asyncio.create_task(client.put("dropped", "1"))]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.put("b", "1")
    assert table.executed == [b"a", b"b"]
    once = puts_only("mute", 1)
    for node in nodes_of(cluster):
        node.rule = once
    sent = asyncio.create_task(client.put("told", "1"))
    await tools.until(lambda: b"told" in table.executed)
    sent.cancel()
    await tools.until(lambda: any(node.cancelled for node in nodes_of(cluster)))


async def test_the_session_is_ended_with_the_client(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools]
) -> None:
    client = make_client()
    await client.put("a", "1")
    assert table.answers
    await client.close()
    await tools.until(lambda: not table.answers)


async def test_from_a_leader_that_froze_the_stream_goes_to_a_follower_and_waits_there_for_the_election(
    cluster: FakeCluster,
    table: Table,
    make_client: MakeClient,
    make_proxy: Callable[[FakeNode], Awaitable[Proxy]],
    tools: type[Tools],
) -> None:
    leader, *followers = nodes_of(cluster)
    proxy = await make_proxy(leader)
    client = make_client(proxy, *followers)
    await client.put("before", "1")
    pool = client._context.pool
    at = pool.parts["pipeline"]
    while at._connection is not pool.router.leader():
        await client.put("before", "1")

    proxy.freeze()
    for node in followers:
        node.rule = lambda request: "mute"  # they hold what they are asked for until there is a leader
        node.set_serving(False)
    waiting = asyncio.create_task(client.put("meanwhile", "1"))

    def asked_for_it(node: SessionNode) -> bool:
        return any(b"meanwhile" in request.payload for request in node.requests)

    await tools.until(lambda: any(map(asked_for_it, followers)))
    mine, other = sorted(followers, key=asked_for_it, reverse=True)
    asked = len(mine.requests)
    await asyncio.sleep(3 * LEAVE_S)
    assert at._connection.endpoint == mine.endpoint  # the frozen one is the only one that never said it cannot serve
    assert len(mine.requests) == asked
    assert not waiting.done()

    other.rule = None
    other.set_serving(True)  # so it is this node that is cut off
    async with asyncio.timeout(10):
        await waiting
    assert at._connection.endpoint == other.endpoint


async def test_a_node_that_is_only_slow_keeps_the_stream(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PROOF_S", 10.0)  # the node stands still when the machine does
    client = make_client()
    await client.put("a", "1")
    pool = client._context.pool
    at = pool.parts["pipeline"]
    while at._connection is not pool.router.leader():
        await client.put("a", "1")
    (leader,) = (node for node in nodes_of(cluster) if node.endpoint == at._connection.endpoint)
    leader.rule = lambda request: "mute"
    waiting = asyncio.create_task(client.put("b", "1"))
    await asyncio.sleep(5 * (SILENCE_S + PROOF_S))
    assert at._connection.endpoint == leader.endpoint
    assert [request.seq for request in leader.requests].count(leader.requests[-1].seq) == 1  # not sent again
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_stream_that_had_ended_when_it_was_abandoned_is_followed_by_another(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its reader is told of a cancellation of which the stream itself knows nothing."""
    client = make_client()
    await client.put("a", "1")
    at = client._context.pool.parts["pipeline"]
    stream = at._stream
    if isinstance(stream, ChannelStream):
        monkeypatch.setattr(type(stream._call), "cancelled", lambda call: False)
    for connection in client._context.pool.connections:
        connection.abandon_streams()
    await tools.until(lambda: at._stream is not stream)
    await client.put("b", "1")
    assert table.executed == [b"a", b"b"]


@pytest.mark.parametrize("turns", range(8))
async def test_a_client_that_is_closed_while_its_stream_breaks_does_not_hang(
    cluster: FakeCluster, table: Table, make_client: MakeClient, turns: int
) -> None:
    """The cancellation comes while the group of sender and receiver fails, which then does not pass it on."""
    client = make_client()
    await client.put("a", "1")
    for connection in client._context.pool.connections:
        connection.abandon_streams()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await client.close()


async def test_the_stream_follows_the_leader_even_under_load(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    """A write saves a hop there; see ADR 0010."""
    client = make_client()
    puts = 0

    async def write(number: int) -> None:
        nonlocal puts
        while not done.is_set():
            await client.put(f"k{number}/{puts}", "v")
            puts += 1

    def asked() -> list[int]:
        return [len(node.requests) for node in nodes_of(cluster)]

    async def one_serves() -> int:
        """The member that everything goes to, once it is one for a while."""
        while True:
            before, start = asked(), puts
            while puts < start + 50:  # noqa: ASYNC110 - a count of what others do
                await asyncio.sleep(0.01)
            members = [number + 1 for number, (a, b) in enumerate(zip(before, asked(), strict=True)) if b > a]
            if len(members) == 1:
                return members[0]

    done = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(write(number))
        for _ in range(3):
            member = await one_serves() % 3 + 1
            cluster.elect(member)
            while await one_serves() != member:
                pass
        done.set()
    assert len(table.executed) == len(set(table.executed)) == puts
    assert client.stats().outcomes_unknown == 0


async def test_servers_without_the_stream_get_unary_calls(cluster: FakeCluster, make_client: MakeClient) -> None:
    client = make_client()
    await asyncio.gather(*(client.put(f"k{number}", "v") for number in range(20)))
    assert sum(node.count("Put") for node in cluster.nodes) == 20
    assert client.stats().calls == 20


async def test_calls_that_wait_for_room_learn_that_the_stream_is_not_there(
    cluster: FakeCluster, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They came when nobody knew, and get their room when nobody serves the queue any more."""
    monkeypatch.setattr(pipeline, "CALLS_MAX", 1)
    client = make_client()
    async with asyncio.timeout(10):
        await asyncio.gather(*(client.put(f"k{number}", "v", timeout=None) for number in range(5)))
    assert sum(node.count("Put") for node in cluster.nodes) == 5


@given(st.lists(st.integers(0, WINDOW * 2), max_size=300))
def test_numbers_stay_within_the_window_and_are_never_given_twice(choices: list[int]) -> None:
    session = ServerSession(1)
    open_numbers: list[int] = []
    given_out: set[int] = set()
    for choice in choices:
        if choice < len(open_numbers):
            session.complete(open_numbers.pop(choice))
        elif session.has_room():
            seq = session.take()
            assert seq not in given_out
            given_out.add(seq)
            open_numbers.append(seq)
        assert session.first_incomplete == min(open_numbers, default=session.next_seq)
        assert all(session.first_incomplete <= seq < session.first_incomplete + WINDOW for seq in open_numbers)
        assert session.under_way == len(open_numbers)
