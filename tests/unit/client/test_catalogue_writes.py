"""Bugs of others' clients, rows 73 and 74 of the catalogue: the SDK must not have them, and the checks must see them.

A mutant is our own code with the bug put in; it must fail the check that is named for the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from raftkv._pb import session_pb2
from raftkv.client import AsyncClient, DeadlineExceeded, OutcomeUnknown, RaftkvError, Unavailable
from raftkv.client.connection import Connection
from raftkv.client.faults import Fault
from raftkv.client.pipeline import Pipeline
from raftkv.client.waiting import Call
from tests.unit.client.conftest import FakeCluster
from tests.unit.client.session_nodes import Rule, nodes_of, puts_only, refusal, with_sessions

MakeClient = Callable[..., AsyncClient]


def rule_everywhere(cluster: FakeCluster, rule: Rule | None) -> None:
    for node in nodes_of(cluster):
        node.rule = rule


async def repeated_writes_are_done_once(cluster: FakeCluster, make_client: MakeClient) -> None:
    """Row 73, X1 and X2: streams break after the write was done and before it was answered."""
    table = await with_sessions(cluster)
    for node in nodes_of(cluster):
        node.rule = puts_only("break", 2)
    client = make_client()
    results = await asyncio.gather(*(client.put(f"k{number}", "v") for number in range(60)))
    assert client.stats().retries > 0, "nothing was repeated"
    assert sorted(table.executed) == sorted(b"k%d" % number for number in range(60))
    assert len({result.revision for result in results}) == 60
    assert client.stats().outcomes_unknown == 0


async def an_ended_session_is_not_followed_by_the_same_write_under_another(
    cluster: FakeCluster, make_client: MakeClient
) -> None:
    """Row 74, X3: done, the answer lost, and the session ended before the write comes again."""
    table = await with_sessions(cluster)
    client = make_client()
    await client.put("a", "1")
    ended = False

    def lose_the_answer(request: session_pb2.SessionRequest) -> str | None:
        nonlocal ended
        if request.method == session_pb2.SESSION_METHOD_PUT and not ended:
            ended = True
            asyncio.get_running_loop().call_soon(table.answers.clear)
            return "break"
        return None

    rule_everywhere(cluster, lose_the_answer)
    with pytest.raises(OutcomeUnknown):
        await client.put("b", "1")
    assert table.executed == [b"a", b"b"]
    await client.put("c", "1")
    assert table.executed == [b"a", b"b", b"c"]


async def what_was_perhaps_done_is_not_called_undone(cluster: FakeCluster, make_client: MakeClient) -> None:
    """K3: nodes that refuse the second attempt do not know whether the first one was carried out."""
    table = await with_sessions(cluster)
    client = make_client()
    await client.put("ready", "1")

    def then_refuse(refused: session_pb2.SessionError) -> Rule:
        broken = False

        def rule(request: session_pb2.SessionRequest) -> session_pb2.SessionError | str | None:
            nonlocal broken
            if request.method != session_pb2.SESSION_METHOD_PUT:
                return None
            if not broken:
                broken = True
                return "break"
            # Without space, only what the node is told may have been done goes on to who knows.
            return None if refused.reason == "NO_SPACE" and request.perhaps_done else refused

        return rule

    rule_everywhere(cluster, then_refuse(refusal("NO_LEADER", 14)))
    with pytest.raises(OutcomeUnknown):
        await client.put("k", "v", timeout=3.0)
    rule_everywhere(cluster, then_refuse(refusal("NO_SPACE", 8)))
    await client.put("l", "v")
    assert table.executed == [b"ready", b"k", b"l"]


async def what_was_not_done_is_called_undone(cluster: FakeCluster, make_client: MakeClient) -> None:
    """K3, the other way: a caller who may safely repeat is told so."""
    table = await with_sessions(cluster)
    rule_everywhere(cluster, puts_only(refusal("NO_SPACE", 8), 1))
    client = make_client()
    with pytest.raises(Unavailable):
        await client.put("k", "v")
    # It comes back to us before the time is up, and stays: what is under way at that moment would be unknown.
    rule_everywhere(cluster, puts_only(refusal("NO_LEADER", 14, retry_after_ms=10_000), 1000))
    with pytest.raises(DeadlineExceeded):
        await client.put("k", "v", timeout=3.0)
    assert table.executed == []


def numbers_anew_what_it_sends_again(patch: pytest.MonkeyPatch) -> None:
    """M-73: what etcd's and jetcd's retries did, which know nothing of the first attempt."""
    original = Pipeline._take_back

    def take_back(self: Pipeline) -> None:
        for call in self._under_way.values():
            self._complete(call)
            call.session = None
        original(self)

    patch.setattr(Pipeline, "_take_back", take_back)


def goes_on_under_a_new_session(patch: pytest.MonkeyPatch) -> None:
    """M-74."""
    original = Pipeline._session_is_gone

    def session_is_gone(self: Pipeline, connection: Connection, call: Call, fault: Fault) -> None:
        call.perhaps_done = False
        original(self, connection, call, fault)

    patch.setattr(Pipeline, "_session_is_gone", session_is_gone)


def forgets_that_an_attempt_may_have_been_done(patch: pytest.MonkeyPatch) -> None:
    original = Pipeline._take_back

    def take_back(self: Pipeline) -> None:
        original(self)
        for call in self._queue:
            call.perhaps_done = False

    patch.setattr(Pipeline, "_take_back", take_back)


Check = Callable[[FakeCluster, MakeClient], Awaitable[None]]
CHECKS = [
    repeated_writes_are_done_once,
    an_ended_session_is_not_followed_by_the_same_write_under_another,
    what_was_perhaps_done_is_not_called_undone,
    what_was_not_done_is_called_undone,
]
MUTANTS = [
    (numbers_anew_what_it_sends_again, repeated_writes_are_done_once),
    (goes_on_under_a_new_session, an_ended_session_is_not_followed_by_the_same_write_under_another),
    (forgets_that_an_attempt_may_have_been_done, what_was_perhaps_done_is_not_called_undone),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_sound(check: Check, cluster: FakeCluster, make_client: MakeClient) -> None:
    await check(cluster, make_client)


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda each: each.__name__)
async def test_mutant_is_found(
    mutant: Callable[[pytest.MonkeyPatch], None],
    check: Check,
    cluster: FakeCluster,
    make_client: MakeClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, RaftkvError)):
        await check(cluster, make_client)
