"""Mutations over the session stream: what their callers hear when something goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from raftkv._pb import session_pb2
from raftkv.client import (
    AsyncClient,
    Closed,
    ConditionFailed,
    DeadlineExceeded,
    OutcomeUnknown,
    Retry,
    Timeout,
    Unavailable,
)
from tests.unit.client.conftest import FakeCluster, FakeNode, Tools
from tests.unit.client.session_nodes import Table, nodes_of, puts_only, refusal, with_sessions

MakeClient = Callable[..., AsyncClient]


@pytest.fixture
async def table(cluster: FakeCluster) -> Table:
    """Three nodes with the session stream instead of the fixture's own."""
    return await with_sessions(cluster)


@pytest.mark.parametrize(("code", "number"), [("NO_LEADER", 14), ("LEADER_CHANGED", 14), ("TIMEOUT", 14)])
async def test_whatever_passes_is_tried_again_even_if_perhaps_done(
    cluster: FakeCluster, table: Table, make_client: MakeClient, code: str, number: int
) -> None:
    for node in nodes_of(cluster):
        node.rule = puts_only(refusal(code, number, "unknown"), 3)
    client = make_client()
    await client.put("k", "v")
    assert table.executed == [b"k"]


async def test_a_write_that_was_done_is_answered_though_space_ran_out_meanwhile(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    first = puts_only("break", 1)
    full = refusal("NO_SPACE", 8)

    def rule(request: session_pb2.SessionRequest) -> session_pb2.SessionError | str | None:
        is_put = request.method == session_pb2.SESSION_METHOD_PUT
        return first(request) or (full if is_put and not request.perhaps_done else None)

    for node in nodes_of(cluster):
        node.rule = rule
    client = make_client()
    await client.put("a", "1")
    with pytest.raises(Unavailable):
        await client.put("b", "1")
    assert table.executed == [b"a"]


async def test_what_the_state_refuses_for_want_of_space_was_not_done(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    first = puts_only("break-before", 1)
    refused = puts_only(refusal("NO_SPACE", 8), 1)
    for node in nodes_of(cluster):
        node.rule = lambda request: first(request) or refused(request)
    client = make_client()
    with pytest.raises(Unavailable, match="NO_SPACE"):
        await client.put("b", "1")
    assert table.executed == []


async def test_a_refusal_of_the_state_is_an_answer(cluster: FakeCluster, table: Table, make_client: MakeClient) -> None:
    once = puts_only(refusal("LOCK_LOST", 9), 1)  # whichever node is asked
    for node in nodes_of(cluster):
        node.rule = once
    client = make_client()
    with pytest.raises(ConditionFailed):
        await client.put("k", "v")
    assert table.executed == []
    await client.put("k", "v")


async def test_a_write_that_was_done_is_not_called_invalid_because_its_answer_was_too_large_to_keep(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    """Its stream breaks before the answer; repeated, it is told that it was done, and nothing else."""
    first = puts_only("break", 1)
    again = puts_only(refusal("RESULT_NOT_KEPT", 9, "unknown"), 1)
    for node in nodes_of(cluster):
        node.rule = lambda request: first(request) or again(request)
    client = make_client()
    with pytest.raises(OutcomeUnknown, match="was done once, its answer is lost") as caught:
        await client.put("k", "v")
    assert caught.value.code == "RESULT_NOT_KEPT"
    assert table.executed == [b"k"]


async def test_an_expired_session_is_replaced_where_nothing_can_have_been_done(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    client = make_client()
    await client.put("a", "1")
    table.answers.clear()
    await client.put("b", "1")
    assert table.executed == [b"a", b"b"]


async def test_an_expired_session_leaves_what_was_sent_before_unknown(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    """Invariant X3: it is never run again under a new session."""
    client = make_client()
    await client.put("a", "1")

    def expire_and_break(request: session_pb2.SessionRequest) -> str | None:
        if request.method == session_pb2.SESSION_METHOD_PUT:
            table.answers.clear()
            for node in nodes_of(cluster):
                node.rule = None
            return "break-before"
        return None

    for node in nodes_of(cluster):
        node.rule = expire_and_break
    with pytest.raises(OutcomeUnknown):
        await client.put("b", "1")
    assert table.executed == [b"a"]
    await client.put("c", "1")


async def test_an_expired_session_is_replaced_where_all_attempts_were_refused_undone(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    client = make_client()
    await client.put("a", "1")
    refused = 0

    def refuse_then_expire(request: session_pb2.SessionRequest) -> session_pb2.SessionError | None:
        nonlocal refused
        if request.method != session_pb2.SESSION_METHOD_PUT or refused == 2:
            return None
        refused += 1
        if refused == 2:
            table.answers.clear()
        return refusal("NO_LEADER", 14)

    for node in nodes_of(cluster):
        node.rule = refuse_then_expire
    await client.put("b", "1")
    assert table.executed == [b"a", b"b"]
    assert refused == 2


async def test_time_that_runs_out_under_way_is_unknown_and_in_the_queue_is_not(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    client = make_client()
    await client.put("a", "1")
    for node in nodes_of(cluster):
        node.rule = lambda request: "mute"
    with pytest.raises(OutcomeUnknown):
        await client.put("b", "1", timeout=2)
    for node in cluster.nodes:
        await node.stop()
    await asyncio.sleep(0.1)
    with pytest.raises(DeadlineExceeded):
        await client.put("c", "1", timeout=0.3)


@pytest.mark.parametrize("silent_about", ["OPEN", "PUT"])
async def test_a_node_without_the_stream_gets_as_a_unary_call_only_what_was_never_sent(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools], silent_about: str
) -> None:
    """A mixed cluster, whose only node with the stream dies at one request or the other."""
    first, *others = nodes_of(cluster)
    for number, node in enumerate(others, 1):
        await node.stop()
        cluster.nodes[number] = FakeNode(cluster, node.member_id)
        await cluster.nodes[number].start()
    silent = session_pb2.SessionMethod.Value(f"SESSION_METHOD_{silent_about}")
    first.rule = lambda request: "mute" if request.method == silent else None
    client = make_client()
    await client.get("k")
    router = client._context.pool.router
    await tools.until(lambda: getattr(router.leader(), "endpoint", "") == first.endpoint)
    writing = asyncio.create_task(client.put("k", "v", timeout=4))
    await tools.until(lambda: any(request.method == silent for request in first.requests))
    await first.stop()
    if silent_about == "OPEN":
        await writing
    else:
        with pytest.raises(OutcomeUnknown):
            await writing
    assert sum(node.count("Put") for node in cluster.nodes) == (silent_about == "OPEN")
    assert cluster.data[b"k"].version == 1


async def test_what_was_perhaps_done_is_told_as_that_when_there_is_nobody_left_to_ask(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    client = make_client()
    await client.put("a", "1")

    def lose_everybody(request: session_pb2.SessionRequest) -> str:
        for connection in client._context.pool.connections:
            connection.foreign = True
        client._context.pool.router.forget_choices()
        return "break"

    for node in nodes_of(cluster):
        node.rule = lose_everybody
    with pytest.raises(OutcomeUnknown):
        await client.put("b", "1")
    assert table.executed == [b"a", b"b"]


@pytest.mark.parametrize("executed", ["no", "unknown"])
async def test_a_client_that_is_closed_ends_calls_between_two_attempts_and_says_what_is_known(
    cluster: FakeCluster, table: Table, make_client: MakeClient, tools: type[Tools], executed: str
) -> None:
    for node in nodes_of(cluster):
        node.rule = puts_only(refusal("TIMEOUT", 14, executed, retry_after_ms=60_000), 1)
    client = make_client()
    writing = asyncio.create_task(client.put("k", "v", timeout=None))
    await tools.until(lambda: client.stats().retries > 0)
    await client.close()
    with pytest.raises(Closed) as caught:
        async with asyncio.timeout(20):
            await writing
    assert caught.value.perhaps_done is (executed == "unknown")
    assert ("is not known" in str(caught.value)) is caught.value.perhaps_done


async def test_attempts_are_bounded_where_the_caller_says_so(
    cluster: FakeCluster, table: Table, make_client: MakeClient
) -> None:
    for node in nodes_of(cluster):
        node.rule = puts_only(refusal("NO_LEADER", 14), 10)
    client = make_client(retry=Retry(attempts_max=2), timeout=Timeout(total=20))
    with pytest.raises(ConnectionError) as caught:
        await client.put("k", "v")
    assert caught.value.attempts == 2  # type: ignore[attr-defined]
