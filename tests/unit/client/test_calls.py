"""Calls against scripted nodes: what is repeated, where it goes, what the caller sees."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest

from raftkv.client import (
    BreakerConfig,
    BreakerState,
    Closed,
    Compacted,
    ConditionFailed,
    ConfigError,
    ConnectionState,
    DeadlineExceeded,
    InvalidRequest,
    NoLeader,
    OutcomeUnknown,
    Overloaded,
    RequestTooLarge,
    Retry,
    Timeout,
    Unavailable,
    lookout,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
NOT_DONE = ("raftkv-executed", "no")
PERHAPS = ("raftkv-executed", "unknown")


async def settled(client, tools):
    """Wait until the client knows who leads and who is who."""
    pool = client._context.pool
    pool.enter()
    router = pool.router
    await tools.until(
        lambda: (
            router.leader_id
            and all(c.member_id and c.heard_in == router.generation for c in pool.connections if c.is_ready())
        )
    )


# --- the way of a call ------------------------------------------------------------------------------------------------


async def test_writes_go_to_a_follower_and_reads_to_the_leader(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    for number in range(10):
        await client.put(f"k{number}", "v")
        assert (await client.get(f"k{number}")).text == "v"
    leader, *followers = cluster.nodes
    assert leader.count("Put") == 0
    assert leader.count("Range") == 10
    # Sticky: one of the followers got all of them.
    assert sorted(node.count("Put") for node in followers) == [0, 10]


async def test_routing_leader_sends_everything_there(cluster, make_client, tools):
    client = make_client(routing="leader")
    await settled(client, tools)
    await client.put("k", "v")
    await client.get("k", serializable=True)
    assert cluster.nodes[0].count("Put") == 1
    assert cluster.nodes[0].count("Range") == 1


async def test_a_new_leader_is_followed(cluster, make_client, tools):
    seen = []
    client = make_client(event_hooks={"leader": seen.append})
    await settled(client, tools)
    await client.put("k", "v")
    writer = next(node for node in cluster.nodes if node.count("Put"))
    cluster.elect(writer.member_id)
    await client.put("k", "v")  # its answer tells
    await settled(client, tools)
    for _ in range(5):
        await client.put("k", "v")
        await client.get("k")
    assert writer.count("Put") == 2
    assert writer.count("Range") == 5
    assert [news.member_id for news in seen] == [1, writer.member_id]
    assert seen[-1].endpoint == writer.endpoint
    assert client.stats().leader_changes == 2


async def test_a_server_that_does_not_name_the_leader_is_asked_for_it(cluster, make_client, tools):
    """etcd has no such field; its Status names the leader, and a newer term says that it is time to ask."""
    for node in cluster.nodes:
        node.shows_leader = False
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    assert cluster.nodes[0].count("Put") == 1  # to the leader, see ADR 0010
    cluster.elect(2)
    await client.get("k")
    await tools.until(lambda: client._context.pool.router.leader_id == 2)
    await client.get("k")
    assert cluster.nodes[1].count("Range") == 1


async def test_one_endpoint_gets_everything(cluster, make_client):
    client = make_client(cluster.nodes[0])
    await client.put("k", "v")
    assert (await client.get("k")).text == "v"
    assert await client.get("none") is None


async def test_a_node_of_another_cluster_is_not_used(cluster, make_client, tools, caplog):
    client = make_client(cluster.nodes[0], cluster.nodes[1])
    original = cluster.nodes[1].fill

    def foreign(header):
        original(header)
        header.cluster_id = 99

    cluster.nodes[1].fill = foreign
    await client.connect()
    pool = client._context.pool
    await tools.until(lambda: any(c.foreign for c in pool.connections))
    for _ in range(5):
        await client.put("k", "v")
    used = [node.count("Put") for node in cluster.nodes[:2]]
    assert sorted(used) == [0, 5]
    assert "another cluster" in caplog.text


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_write_with_an_unknown_outcome_is_never_repeated(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    for node in cluster.nodes:
        node.script = tools.failing(UNAVAILABLE, "perhaps", ("raftkv-error", "TIMEOUT"), PERHAPS)
    with pytest.raises(OutcomeUnknown) as caught:
        await client.put("k", "v")
    assert sum(node.count("Put") for node in cluster.nodes) == 1
    assert caught.value.attempts == 1
    assert caught.value.code == "TIMEOUT"
    assert caught.value.endpoint in client.endpoints
    assert client.stats().outcomes_unknown == 1


async def test_a_write_that_provably_was_not_done_is_repeated(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    for node in cluster.nodes:
        node.script = tools.failing(UNAVAILABLE, "no", ("raftkv-error", "NO_LEADER"), NOT_DONE, times=2)
    assert (await client.put("k", "v")).revision == 2
    assert client.stats().retries >= 2
    assert len(cluster.data) == 1


async def test_a_server_that_dies_under_a_write_leaves_its_outcome_unknown(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    held = asyncio.Event()
    for node in cluster.nodes:
        node.script = tools.holding(held, "Put")
    writing = asyncio.create_task(client.put("k", "v"))
    await tools.until(lambda: any(node.count("Put") for node in cluster.nodes))
    victim = next(node for node in cluster.nodes if node.count("Put"))
    await victim.stop()
    with pytest.raises(OutcomeUnknown) as caught:
        await writing
    assert caught.value.endpoint == victim.endpoint
    held.set()
    # The next write goes elsewhere at once: nobody has to wait for the dead node.
    retries = client.stats().retries
    await client.put("k", "v")
    assert client.stats().retries == retries


async def test_a_server_that_dies_under_a_read_is_not_noticed(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    cluster.nodes[0].script = tools.holding(asyncio.Event(), "Range")
    reads = [asyncio.create_task(client.get("k", timeout=Timeout(total=5, attempt=None))) for _ in range(20)]
    await tools.until(lambda: cluster.nodes[0].count("Range") == 20)
    await cluster.nodes[0].stop()
    assert all(item.text == "v" for item in await asyncio.gather(*reads))


async def test_a_frozen_leader_is_left_behind_by_reads(cluster, make_client, make_proxy, tools):
    """Its TCP connection stands and says nothing: only time tells."""
    proxy = await make_proxy(cluster.nodes[0])
    client = make_client(proxy, cluster.nodes[1], cluster.nodes[2])
    await settled(client, tools)
    await client.put("k", "v")
    proxy.freeze()
    assert (await client.get("k")).text == "v"
    # Later calls know: nobody else pays the time of an attempt.
    retries = client.stats().retries
    assert retries
    for _ in range(5):
        await client.get("k")
    assert client.stats().retries == retries
    # And when it is back, the probe finds out, and reads go to the leader again.
    proxy.thaw()
    before = cluster.nodes[0].count("Range")
    pool = client._context.pool
    await tools.until(lambda: not any(c.suspect for c in pool.connections))
    await client.get("k")
    assert cluster.nodes[0].count("Range") == before + 1


async def test_a_socket_that_accepts_and_never_answers_is_never_used(cluster, make_client, tools):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = make_client(f"127.0.0.1:{mute.getsockname()[1]}", cluster.nodes[0], cluster.nodes[1])
        await client.put("k", "v")
        assert (await client.get("k")).text == "v"
        assert client.stats().retries == 0


async def test_only_a_mute_socket_ends_in_time_with_nothing_done(make_client):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = make_client(f"127.0.0.1:{mute.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await client.put("k", "v", timeout=0.3)
        assert 0.29 < time.monotonic() - started < 15  # its own time-out would have been 20
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.attempts == 0


async def test_refused_connections_are_waited_for_within_the_time(cluster, make_client):
    for node in cluster.nodes:
        await node.stop()
    client = make_client()
    with pytest.raises(Unavailable):
        await client.put("k", "v", timeout=Timeout(total=5, connect=0.1))
    writing = asyncio.create_task(client.put("k", "v"))
    await asyncio.sleep(0.3)
    await cluster.nodes[1].start()
    await writing


@pytest.mark.parametrize("total_s", [0.8, 1.6])
async def test_no_call_outlives_its_deadline(cluster, make_client, tools, total_s):
    client = make_client()
    await settled(client, tools)
    never = asyncio.Event()
    for node in cluster.nodes:
        node.script = tools.holding(never, "Put", "Range")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.get("k", timeout=total_s)
    assert total_s - 0.01 < time.monotonic() - started < total_s + 10  # the client's own would be 20
    started = time.monotonic()
    with pytest.raises(OutcomeUnknown):
        await client.put("k", "v", timeout=total_s)
    assert total_s - 0.01 < time.monotonic() - started < total_s + 10


async def test_reads_go_on_through_an_election(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    for node in cluster.nodes:
        node.script = tools.failing(UNAVAILABLE, "etcdserver: no leader", ("raftkv-error", "NO_LEADER"), NOT_DONE)

    async def elect():
        await asyncio.sleep(0.2)
        for node in cluster.nodes:
            node.script = None

    electing = asyncio.create_task(elect())
    assert (await client.get("k")).text == "v"
    await electing


async def test_no_leader_within_the_time_says_so(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    for node in cluster.nodes:
        node.script = tools.failing(UNAVAILABLE, "etcdserver: no leader", ("raftkv-error", "NO_LEADER"), NOT_DONE)
    with pytest.raises(NoLeader) as caught:
        await client.get("k", timeout=2)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(NoLeader):
        await client.put("k", "v", timeout=2)


async def test_overload_waits_as_long_as_the_server_asks(cluster, make_client, tools):
    client = make_client(cluster.nodes[0])
    await settled(client, tools)
    trailers = (("raftkv-error", "TOO_MANY_REQUESTS"), NOT_DONE, ("grpc-retry-pushback-ms", "200"))
    cluster.nodes[0].script = tools.failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", *trailers, times=1)
    started = time.monotonic()
    await client.put("k", "v")
    assert time.monotonic() - started >= 0.2
    cluster.nodes[0].script = tools.failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", *trailers)
    with pytest.raises(Overloaded) as caught:
        await client.with_options(retry=None).put("k", "v")
    assert caught.value.retry_after_s == 0.2


async def test_a_refused_request_is_not_repeated(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    trailers = (("raftkv-error", "COMPACTED"), NOT_DONE, ("raftkv-compact-revision", "17"))
    for node in cluster.nodes:
        node.script = tools.failing(grpc.StatusCode.OUT_OF_RANGE, "compacted", *trailers)
    with pytest.raises(Compacted) as caught:
        await client.get("k", revision=3)
    assert caught.value.compact_revision == 17
    assert sum(node.count("Range") for node in cluster.nodes) == 1


async def test_an_error_nobody_understands_is_tried_three_times_and_not_for_ever(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    for node in cluster.nodes:
        node.script = tools.failing(grpc.StatusCode.INTERNAL, "boom")
    with pytest.raises(Unavailable, match="boom"):
        await client.get("k")
    assert sum(node.count("Range") for node in cluster.nodes) == 3


async def test_without_a_retry_policy_everything_is_tried_once(cluster, make_client, tools):
    client = make_client(retry=None)
    await settled(client, tools)
    for node in cluster.nodes:
        node.script = tools.failing(UNAVAILABLE, "no", ("raftkv-error", "NO_LEADER"), NOT_DONE)
    with pytest.raises(NoLeader):
        await client.get("k")
    with pytest.raises(NoLeader):
        await client.with_options(retry=Retry(attempts_max=2)).get("k")
    assert sum(node.count("Range") for node in cluster.nodes) == 3


async def test_every_failed_attempt_is_told(cluster, make_client, tools):
    told = []
    client = make_client(cluster.nodes[0], event_hooks={"attempt_failed": [told.append, (1).__truediv__]})
    cluster.nodes[0].script = tools.failing(UNAVAILABLE, "no", ("raftkv-error", "NO_LEADER"), NOT_DONE, times=2)
    await client.put("k", "v")  # the hook that raises harms nobody
    assert [(event.method, event.code, event.attempt) for event in told] == [
        ("Put", "NO_LEADER", 1),
        ("Put", "NO_LEADER", 2),
    ]
    assert all(event.delay_s is not None for event in told)


# --- health, breaker, state -------------------------------------------------------------------------------------------


async def test_a_node_that_says_it_does_not_serve_is_avoided(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    writer = next(node for node in cluster.nodes if node.count("Put"))
    pool = client._context.pool
    writer.set_serving(False)
    await tools.until(
        lambda: any(c.health.name == "NOT_SERVING" and pool.router.better_than(c) for c in pool.connections)
    )
    for _ in range(5):
        await client.put("k", "v")
    assert writer.count("Put") == 1
    # When none serves, somebody is asked all the same: a node holds requests until there is a leader.
    for node in cluster.nodes:
        node.set_serving(False)
    await tools.until(lambda: all(c.health.name == "NOT_SERVING" for c in pool.connections))
    await client.put("k", "v")


async def test_a_server_without_health_service_counts_as_serving(cluster, make_client, tools):
    for node in cluster.nodes:
        await node.stop()
        node.has_health = False
        node.port = 0
        await node.start()
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    assert client.stats().failures == 0


async def test_repeated_breaks_open_the_breaker_and_a_new_connection_closes_it(cluster, make_client, make_proxy, tools):
    events = []
    proxy = await make_proxy(cluster.nodes[0])
    client = make_client(
        proxy, breaker=BreakerConfig(failures_max=3, trials_max=2), event_hooks={"breaker": events.append}
    )
    await settled(client, tools)
    held = asyncio.Event()
    cluster.nodes[0].script = tools.holding(held, "Put")
    writes = [asyncio.create_task(client.put("k", "v")) for _ in range(4)]
    await tools.until(lambda: cluster.nodes[0].count("Put") == 4)
    changes = []
    client._context.pool.on_change(changes.append)
    proxy.cut()
    assert all(isinstance(e, OutcomeUnknown) for e in await asyncio.gather(*writes, return_exceptions=True))
    assert client.stats().breakers_opened == 1
    await tools.until(lambda: changes)  # calls may fail a moment before their connection is known to be gone
    held.set()
    started = time.monotonic()
    await client.put("k", "v")
    await client.put("k", "v")
    assert time.monotonic() - started < 15  # not the 30 s of the breaker
    assert [event.state for event in events] == [BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED]


async def test_the_state_is_connected_suspended_lost(cluster, make_client, tools):
    states = []
    client = make_client(cluster.nodes[0], lost_after_s=0.2)
    assert client.state.current is ConnectionState.LOST
    stop = client.state.on_change(states.append)
    await client.put("k", "v")
    assert client.state.current is ConnectionState.CONNECTED
    await cluster.nodes[0].stop()
    await tools.until(lambda: client.state.current is ConnectionState.LOST)
    await cluster.nodes[0].start()
    await tools.until(lambda: client.state.current is ConnectionState.CONNECTED)
    assert [state.name for state in states] == ["CONNECTED", "SUSPENDED", "LOST", "CONNECTED"]
    stop()
    await client.close()
    assert client.state.current is ConnectionState.LOST
    assert len(states) == 4


# --- life -------------------------------------------------------------------------------------------------------------


async def test_closing_ends_everything(cluster, make_client, tools):
    before = asyncio.all_tasks()
    client = make_client()
    await settled(client, tools)
    never = asyncio.Event()
    for node in cluster.nodes:
        node.script = tools.holding(never, "Put", "Range")
    calls = [asyncio.create_task(client.put("k", "v")), asyncio.create_task(client.get("k"))]
    await tools.until(lambda: sum(node.count("Put") + node.count("Range") for node in cluster.nodes) == 2)
    await client.close()
    assert [type(e) for e in await asyncio.gather(*calls, return_exceptions=True)] == [Closed, Closed]
    with pytest.raises(Closed):
        await client.get("k")
    await client.close()
    never.set()
    await asyncio.sleep(0.05)
    ours = {task for task in asyncio.all_tasks() - before if "raftkv" in task.get_name()}
    assert not ours


async def test_a_call_that_waits_for_a_connection_ends_with_the_client(cluster, make_client):
    await cluster.nodes[0].stop()
    client = make_client(cluster.nodes[0])
    waiting = asyncio.create_task(client.get("k"))
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(Closed):
        await waiting


async def test_cancelling_a_call_cancels_it_on_the_server(cluster, make_client, tools):
    client = make_client(cluster.nodes[0])
    await settled(client, tools)
    ended = asyncio.Event()

    async def script(name, request, context):
        if name == "Put":
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    cluster.nodes[0].script = script
    call = asyncio.create_task(client.put("k", "v"))
    await tools.until(lambda: cluster.nodes[0].count("Put") == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(ended.wait(), 2)
    cluster.nodes[0].script = None
    await client.put("k", "v")


async def test_clones_share_connections_and_closing_one_leaves_the_others_open(cluster, make_client):
    client = make_client()
    async with client.with_options(namespace="team/", timeout=2) as clone:
        await clone.put("k", "v")
        assert (await clone.get("k")).key == b"k"
    assert (await client.get("team/k")).text == "v"
    assert clone._context.pool is client._context.pool


def test_a_client_belongs_to_one_event_loop(cluster_in_thread):
    from raftkv.client import AsyncClient

    client = AsyncClient(cluster_in_thread)
    runner = asyncio.Runner()
    runner.run(client.put("k", "v"))

    async def elsewhere():
        with pytest.raises(ConfigError, match="another event loop"):
            await client.put("k", "v")
        with pytest.raises(ConfigError, match="event loop"):
            await client.close()
        # A client of this loop works beside it.
        async with AsyncClient(cluster_in_thread) as other:
            await other.put("k", "v")

    with asyncio.Runner() as second:
        second.run(elsewhere())
    runner.run(client.put("k", "v"))
    runner.run(client.close())
    runner.close()


# --- operations -------------------------------------------------------------------------------------------------------


async def test_conditional_writes_say_what_is_there(make_client):
    client = make_client()
    first = await client.put("k", "1", if_absent=True)
    with pytest.raises(ConditionFailed) as caught:
        await client.put("k", "2", if_absent=True)
    assert caught.value.key == b"k"
    assert caught.value.current is not None
    assert caught.value.current.mod_revision == first.revision
    await client.put("k", "2", if_revision=first.revision)
    with pytest.raises(ConditionFailed):
        await client.delete("k", if_revision=first.revision)
    current = await client.get("k")
    assert (await client.delete("k", if_revision=current.mod_revision)).deleted == 1
    with pytest.raises(ConditionFailed, match="does not exist"):
        await client.put("k", "3", if_revision=current.mod_revision)
    with pytest.raises(InvalidRequest):
        await client.put("k", "3", if_revision=4, if_absent=True)


async def test_update_starts_again_when_somebody_was_faster(make_client):
    client = make_client()

    async def add() -> None:
        for _ in range(10):
            await client.update("n", lambda item: str(int(item.text) + 1 if item else 1), max_retries=1000)

    await asyncio.gather(*(add() for _ in range(5)))
    assert (await client.get("n")).text == "50"


async def test_update_gives_up_when_somebody_is_always_faster(cluster, make_client):
    client = make_client()
    await client.put("n", "0")
    changes = 0

    def change(item):
        nonlocal changes
        changes += 1
        cluster.revision += 1
        cluster.data[b"n"].mod_revision = cluster.revision
        return "1"

    with pytest.raises(ConditionFailed):
        await client.update("n", change, max_retries=3)
    assert changes == 4


async def test_a_scan_reads_all_pages_at_one_revision(cluster, make_client):
    client = make_client()
    for number in range(25):
        await client.put(f"p/{number:02}", str(number))
    await client.put("q", "other")
    revisions = []

    async def script(name, request, context):
        if name == "Range":
            revisions.append(request.revision)

    for node in cluster.nodes:
        node.script = script
    assert [item.text async for item in client.scan("p/", page_size=10)] == [str(number) for number in range(25)]
    assert revisions == [0, cluster.revision, cluster.revision]
    assert [item async for item in client.scan("none")] == []
    with pytest.raises(InvalidRequest):
        await anext(client.scan("p/", page_size=0))


async def test_what_cannot_be_encoded_is_refused_before_it_is_sent(cluster, make_client):
    client = make_client()
    with pytest.raises(InvalidRequest):
        await client.get("k", revision=2**70)
    with pytest.raises(InvalidRequest):
        await client.put("k", "v", lease=2**64)
    with pytest.raises(InvalidRequest):
        await client.put("\ud800", "v")
    with pytest.raises(InvalidRequest):
        await client.put("", "v")
    with pytest.raises(InvalidRequest):
        await client.range("k", sort="size")
    with pytest.raises(InvalidRequest):
        await client.range("a", "b", prefix=True)
    with pytest.raises(TypeError, match="value must be str or bytes, not int"):
        await client.put("k", 5)
    assert not any(node.calls for node in cluster.nodes)


async def test_an_answer_over_the_limit_of_the_client_is_too_large(cluster, make_client):
    client = make_client(channel_options=[("grpc.max_receive_message_length", 1000)])
    await client.put("k", "v" * 5000)
    with pytest.raises(RequestTooLarge):
        await client.get("k")


async def test_members_status_and_moving_the_leader(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    members = await client.cluster.members()
    assert [(member.id, member.name) for member in members] == [(1, "n1"), (2, "n2"), (3, "n3")]
    await client.cluster.move_leader("n3")
    assert cluster.nodes[0].count("MoveLeader") == 1
    assert cluster.leader == 3
    await cluster.nodes[0].stop()
    statuses = await client.cluster.status(timeout=2)
    assert [status.endpoint for status in statuses] == list(client.endpoints)
    assert statuses[0].status is None
    assert statuses[0].error
    assert [status.status.is_leader for status in statuses[1:]] == [False, True]
    with pytest.raises(InvalidRequest, match="no member named 'n9'"):
        await client.cluster.move_leader("n9")


async def test_a_frozen_follower_does_not_get_the_writes_that_follow(cluster, make_client, make_proxy, tools):
    """The write that was under way may be done or not; the next one must not join it in waiting for the deadline."""
    proxies = [await make_proxy(node) for node in cluster.nodes]
    client = make_client(*proxies, timeout=Timeout(total=8))
    await settled(client, tools)
    await client.put("k", "v")
    writer = next(proxy for proxy, node in zip(proxies, cluster.nodes, strict=True) if node.count("Put"))
    writer.freeze()
    stuck = asyncio.create_task(client.put("stuck", "v"))
    pool = client._context.pool
    await tools.until(lambda: any(c.suspect for c in pool.connections), timeout_s=6)  # long before its time is up
    await client.put("k", "v")
    assert not stuck.done()
    with pytest.raises(OutcomeUnknown):
        await stuck


async def test_a_slow_node_that_answers_its_probe_is_no_suspect(cluster, make_client, tools, monkeypatch):
    monkeypatch.setattr(lookout, "PROGRESS_PROBE_TIMEOUT_S", 10.0)  # the node stands still when the machine does
    client = make_client()
    await settled(client, tools)

    async def slow(name, request, context):
        if name == "Put":
            await asyncio.sleep(1)

    for node in cluster.nodes:
        node.script = slow
    await client.put("k", "v")
    assert sum(node.count("Check") for node in cluster.nodes) >= 1
    assert not any(c.suspect for c in client._context.pool.connections)
    assert all(c.inflight == 0 for c in client._context.pool.connections)


async def test_when_no_node_serves_a_read_says_that_there_is_no_leader(cluster, make_client, tools):
    """A node without leader holds the request; that its health says so is the best reason there is."""
    client = make_client()
    await settled(client, tools)
    never = asyncio.Event()
    for node in cluster.nodes:
        node.script = tools.holding(never, "Range")
        node.set_serving(False)
    with pytest.raises(NoLeader) as caught:
        await client.get("k", timeout=Timeout(total=3, attempt=0.2))
    assert isinstance(caught.value, DeadlineExceeded)
    assert caught.value.attempts > 1


async def test_no_stream_outlives_its_client_or_its_connection(cluster, make_client, make_proxy, tools):
    """grpc.aio does not cancel abandoned streams (grpc #43462); ours are cancelled where they end."""
    proxy = await make_proxy(cluster.nodes[0])
    client = make_client(proxy)
    await client.put("k", "v")
    node = cluster.nodes[0]
    await tools.until(lambda: node.watching == 1)
    states = []
    client.state.on_change(states.append)
    for breaks in range(1, 6):
        proxy.cut()
        await tools.until(lambda breaks=breaks: states.count(ConnectionState.SUSPENDED) == breaks)
        await client.put("k", "v")
    await tools.until(lambda: node.watching == 1)
    await client.close()
    await tools.until(lambda: node.watching == 0)
    for _ in range(20):
        short = make_client()
        await short.put("k", "v")
        await short.close()
    await tools.until(lambda: all(node.watching == 0 for node in cluster.nodes))


async def test_a_node_that_says_it_is_stopping_gets_no_more(cluster, make_client, tools):
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    writer = next(node for node in cluster.nodes if node.count("Put"))
    stopping = (("raftkv-error", "STOPPING"), NOT_DONE)
    writer.script = tools.failing(UNAVAILABLE, "etcdserver: server stopped", *stopping)
    for _ in range(5):
        await client.put("k", "v")
    assert writer.count("Put") == 2
    assert client.stats().failures == 0


async def test_a_server_that_cancels_what_comes_too_late_gets_no_more(cluster, make_client, tools):
    """A gRPC server that shuts down cancels new calls without a word; a write may have been done for all we know."""
    client = make_client()
    await settled(client, tools)
    await client.put("k", "v")
    writer = next(node for node in cluster.nodes if node.count("Put"))
    writer.script = tools.failing(grpc.StatusCode.CANCELLED, "")
    with pytest.raises(OutcomeUnknown):
        await client.put("k", "v")
    for _ in range(5):
        await client.put("k", "v")
    assert writer.count("Put") == 2
    cluster.nodes[0].script = tools.failing(grpc.StatusCode.CANCELLED, "")
    assert (await client.get("k")).text == "v"
