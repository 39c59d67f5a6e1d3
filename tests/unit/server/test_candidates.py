"""Calls for a lock or an office that end before they are answered, and those that come after them for the same key.

A client whose call ended asks again, at the same node or another. What the first call made is then the second one's,
and nobody may take it away; and what nobody waits for any more must not stand in the way of others.
"""

from __future__ import annotations

import asyncio

import pytest
from fake_node import Served, failure, trailers, until
from lock_calls import elections, grant, keys, lock, lock_now, locks, revoke, waiting

from raftkv._pb import election_pb2, kv_pb2, lock_pb2
from raftkv.server.errors import NoLeader, RequestError, RequestTimeout, Stopping
from raftkv.server.services.candidates import Candidates, Held
from raftkv.server.services.quota import Quota
from raftkv.server.watch import WatchHub
from raftkv.state.commands import CommandKind

both = pytest.mark.parametrize("value", [None, b"v"], ids=["Lock", "Campaign"])


def node_of(served: Served, *, deaf: bool = False) -> Candidates:
    """Those who ask another node with the same state; a deaf one hears of no changes, as if it stood still."""
    reads = served.services._reads
    hub = served.services.watches
    if deaf:
        hub = WatchHub(lambda: served.node.machine, asyncio.get_running_loop(), reads.begin, served.node.fatal)
    return Candidates(served.node, reads, Quota(served.node), hub)


def hold(at: Candidates, lease: int, value: bytes | None, deadline: float | None = None) -> asyncio.Task[Held]:
    return asyncio.ensure_future(at.hold(b"l", lease, value, deadline))


def transactions(served: Served) -> int:
    return [kind for kind, _ in served.node.proposed].count(CommandKind.TXN)


async def asked(served: Served, count: int) -> None:
    """Until so many proposals wait for a leader."""
    await until(lambda: len(served.node.deadlines) == count)


async def cancel(task: asyncio.Task[Held]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def settled(at: Candidates) -> None:
    """Until nothing is taken back any more."""
    await until(lambda: not at._tasks and not at._callers)


async def queue_of_two(served: Served) -> int:
    """Lease 1 holds, lease 2 is there; the fence of the holder."""
    await grant(served, 1)
    await grant(served, 2)
    return (await lock_now(served, b"l", 1)).fence


@both
async def test_the_same_node_asked_again_while_the_first_call_is_taken_back(
    served: Served, value: bytes | None
) -> None:
    at = node_of(served)
    await grant(served, 1)
    served.node.hold()  # there is no leader
    known = len(served.node.deadlines)
    first = hold(at, 1, value)
    await asked(served, known + 1)
    await cancel(first)
    second = hold(at, 1, value)
    await asked(served, known + 2)
    served.node.release()
    held = await second
    await settled(at)
    assert keys(served, b"l/") == [held.key], "what the second call was told it holds has gone"


@both
async def test_another_node_asked_again_while_the_first_call_is_taken_back(served: Served, value: bytes | None) -> None:
    one, other = node_of(served), node_of(served)
    await grant(served, 1)
    served.node.hold()
    known = len(served.node.deadlines)
    first = hold(one, 1, value)
    await asked(served, known + 1)
    await cancel(first)
    second = hold(other, 1, value)
    await asked(served, known + 2)
    served.node.release()
    held = await second
    await settled(one)
    assert keys(served, b"l/") == [held.key]


@both
async def test_a_slow_node_notices_late_that_its_client_has_gone(served: Served, value: bytes | None) -> None:
    """Its client waits at another node meanwhile, and is told there that it holds."""
    slow, other = node_of(served, deaf=True), node_of(served)
    fence = await queue_of_two(served)
    first = hold(slow, 2, value)
    await until(lambda: len(keys(served, b"l/")) == 2)
    second = hold(other, 2, value)
    await until(lambda: len(served.services.watches) == 2)
    await other.release(b"l/1", fence, None)
    held = await second
    await cancel(first)
    await settled(slow)
    assert keys(served, b"l/") == [held.key]


@both
async def test_whoever_held_elsewhere_is_not_hurt_by_a_call_that_only_adopted_the_key(
    served: Served, value: bytes | None
) -> None:
    slow, other = node_of(served, deaf=True), node_of(served)
    fence = await queue_of_two(served)
    first = hold(other, 2, value)
    await until(lambda: len(served.services.watches) == 2)
    second = hold(slow, 2, value)  # adopts it, and waits
    await until(lambda: transactions(served) == 3)
    await other.release(b"l/1", fence, None)
    held = await first
    await cancel(second)
    await settled(slow)
    assert keys(served, b"l/") == [held.key]
    assert held.create_revision < held.mod_revision, "it had to be claimed"


async def test_who_only_waits_for_a_turn_is_not_hurt_by_a_call_that_adopted_the_key(served: Served) -> None:
    slow, other = node_of(served, deaf=True), node_of(served)
    await queue_of_two(served)
    put = kv_pb2.PutRequest(key=b"l/2", lease=2).SerializeToString()
    await served.node.propose(CommandKind.PUT, put, None)
    created = served.node.machine.revision
    adopting = hold(slow, 2, None)
    await until(lambda: transactions(served) == 2)
    waiter = asyncio.ensure_future(other.await_turn(b"l", 2, created, None))
    await until(lambda: len(served.services.watches) == 2)
    await revoke(served, 1)
    held = await waiter
    await cancel(adopting)
    await settled(slow)
    assert keys(served, b"l/") == [held.key]


@both
async def test_what_was_tried_at_two_nodes_and_given_up_stands_in_nobodys_way(
    served: Served, value: bytes | None
) -> None:
    one, other = node_of(served), node_of(served)
    await queue_of_two(served)
    first = hold(one, 2, value)
    await until(lambda: len(served.services.watches) == 2)
    second = hold(other, 2, value)
    await until(lambda: len(served.services.watches) == 4)
    await cancel(first)
    await settled(one)
    assert len(keys(served, b"l/")) == 2, "the second still waits for it"
    await cancel(second)
    await settled(other)
    assert keys(served, b"l/") == [b"l/1"]


@both
async def test_what_was_tried_twice_at_one_node_and_given_up_stands_in_nobodys_way(
    served: Served, value: bytes | None
) -> None:
    at = node_of(served)
    await grant(served, 1)
    served.node.hold()
    known = len(served.node.deadlines)
    for number in (1, 2):
        call = hold(at, 1, value)
        await asked(served, known + number)
        await cancel(call)
    served.node.release()
    await settled(at)
    assert keys(served, b"l/") == []


@both
async def test_a_call_beside_one_that_holds_takes_nothing_back(served: Served, value: bytes | None) -> None:
    at = node_of(served)
    await queue_of_two(served)
    first = hold(at, 2, value)
    await until(lambda: len(served.services.watches) == 2)
    second = hold(at, 2, value)
    await until(lambda: len(served.services.watches) == 4)
    await revoke(served, 1)
    held = await first
    await cancel(second)
    await settled(at)
    assert keys(served, b"l/") == [held.key]
    again = hold(at, 2, value)  # re-entrant, and given up at once
    await cancel(again)
    await settled(at)
    assert keys(served, b"l/") == [held.key]


async def test_a_free_lock_is_one_write_and_so_is_a_second_call_for_it(served: Served) -> None:
    at = node_of(served)
    await grant(served, 1)
    first = await at.hold(b"l", 1, None, None)
    assert transactions(served) == 1
    second = await at.hold(b"l", 1, None, None)
    assert transactions(served) == 2
    assert (second.key, second.create_revision) == (first.key, first.create_revision)
    assert second.revision == first.revision + 1


async def test_a_key_of_another_lease_is_left_as_it_is(served: Served) -> None:
    await grant(served, 1)
    await served.node.propose(CommandKind.PUT, kv_pb2.PutRequest(key=b"l/1", value=b"?").SerializeToString(), None)
    error = await failure(elections(served).Campaign(election_pb2.CampaignRequest(name=b"l", lease=1, value=b"!")))
    assert error.details() == "election: not leader"
    (kv,) = served.node.machine.range(kv_pb2.RangeRequest(key=b"l/1")).kvs
    assert (kv.value, kv.version, kv.lease) == (b"?", 1, 0)


# What a call that failed says of what it has done.


@both
@pytest.mark.parametrize("fault", [RequestTimeout(executed="no"), NoLeader()], ids=["timeout", "no leader"])
async def test_a_waiter_that_fails_says_that_it_may_have_entered_and_takes_its_key_back(
    served: Served, value: bytes | None, fault: RequestError
) -> None:
    at = node_of(served)
    await queue_of_two(served)
    waiter = hold(at, 2, value, asyncio.get_running_loop().time())  # its time is over when it first asks a quorum
    await until(lambda: len(served.services.watches) == 2)
    await revoke(served, 1)
    served.node.fault = fault  # before the waiter, woken by now, can look
    with pytest.raises(type(fault)) as raised:
        await waiter
    assert raised.value.executed == "unknown"
    served.node.fault = None
    await settled(at)
    assert keys(served, b"l/") == []


async def test_a_failure_behind_the_grant_of_a_lease_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = served.node.propose

    async def once(kind: CommandKind, payload: bytes, deadline: float | None) -> object:
        if kind is CommandKind.TXN:
            raise RequestTimeout(executed="no")
        return await propose(kind, payload, deadline)

    monkeypatch.setattr(served.node, "propose", once)
    await grant(served, 1)
    error = await failure(lock_now(served, b"l", 1))
    assert trailers(error)["raftkv-executed"] == "no", "nothing was made for this one"
    error = await failure(lock_now(served, b"l", 0))
    assert trailers(error)["raftkv-executed"] == "unknown"
    assert len(served.node.machine.leases) == 2


async def test_a_node_that_stops_keeps_the_place_and_says_that_there_is_one(served: Served) -> None:
    await queue_of_two(served)
    waiter = lock(served, b"l", 2)
    await waiting(served, b"l", 2)
    served.services.end_streams()
    error = await failure(waiter)
    assert trailers(error)["raftkv-error"] == "STOPPING"
    assert trailers(error)["raftkv-executed"] == "unknown"
    assert keys(served, b"l/") == [b"l/1", b"l/2"]
    at = node_of(served)
    at.end()
    with pytest.raises(Stopping):
        await at.await_turn(b"l", 2, 3, None)


async def test_who_leads_is_not_waited_for_longer_than_other_reads(served: Served) -> None:
    """Without a deadline, too: what waits holds a place among the requests in flight."""
    served.node.fault = RequestTimeout(executed="no")
    error = await failure(asyncio.wait_for(leader_of(served), 20))
    assert trailers(error)["raftkv-error"] == "TIMEOUT"
    assert served.services.inflight.requests == 0


async def leader_of(served: Served) -> election_pb2.LeaderResponse:
    return await elections(served).Leader(election_pb2.LeaderRequest(name=b"e"))


# Bad input, and bounds.


async def test_an_invalid_call_without_a_lease_grants_none(served: Served) -> None:
    long = b"n" * served.node.config.max_key_bytes
    for call in (
        locks(served).Lock(lock_pb2.LockRequest(name=long)),
        elections(served).Campaign(election_pb2.CampaignRequest(name=long)),
    ):
        error = await failure(call)
        assert trailers(error)["raftkv-error"] == "KEY_TOO_LARGE"
    assert served.node.proposed == []


async def test_names_are_bounded_wherever_they_come(served: Served) -> None:
    long = b"n" * served.node.config.max_key_bytes
    await grant(served, 1)
    for call in (
        locks(served).Lock(lock_pb2.LockRequest(name=long, lease=1)),
        locks(served).Lock(lock_pb2.LockRequest(name=long, lease=1, fence=5)),
        elections(served).Campaign(election_pb2.CampaignRequest(name=long, lease=1)),
        elections(served).Leader(election_pb2.LeaderRequest(name=long)),
        anext(aiter(elections(served).Observe(election_pb2.LeaderRequest(name=long)))),
    ):
        assert trailers(await failure(call))["raftkv-error"] == "KEY_TOO_LARGE"


async def test_an_empty_name_is_a_name(served: Served) -> None:
    """As in etcd."""
    assert (await lock_now(served, b"", await grant(served, 1))).key == b"/1"
    request = election_pb2.CampaignRequest(name=b"", lease=1, value=b"v")
    assert (await elections(served).Campaign(request)).leader.key == b"/1"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (lock_pb2.LockRequest(name=b"l", lease=1, fence=-5), "fence"),
        (lock_pb2.LockRequest(name=b"l", lease=0, fence=5), "lease"),
        (lock_pb2.LockRequest(name=b"l", lease=-1, fence=5), "lease"),
        (lock_pb2.UnlockRequest(key=b"l/1", fence=-5), "fence"),
    ],
)
async def test_tokens_below_zero_are_refused_by_name(
    served: Served, request_: lock_pb2.LockRequest | lock_pb2.UnlockRequest, field: str
) -> None:
    await lock_now(served, b"l", await grant(served, 1))
    method = "Lock" if isinstance(request_, lock_pb2.LockRequest) else "Unlock"
    error = await failure(served.raw(f"/raftkv.v1.Lock/{method}", request_.SerializeToString()))
    assert (trailers(error)["raftkv-error"], trailers(error)["raftkv-field"]) == ("INVALID_FIELD", field)
    assert keys(served, b"l/") == [b"l/1"]


async def test_a_lease_below_zero_is_none(served: Served) -> None:
    """With etcd's answer to it."""
    for call in (
        locks(served).Lock(lock_pb2.LockRequest(name=b"l", lease=-5)),
        elections(served).Campaign(election_pb2.CampaignRequest(name=b"l", lease=-5)),
    ):
        assert (await failure(call)).details() == "etcdserver: requested lease not found"


async def test_waiters_and_observers_are_bounded_in_bytes_and_number(served: Served) -> None:
    services = served.services
    services.waiters.bytes_max = 100
    error = await failure(lock_now(served, b"n" * 100, await grant(served, 1)))
    assert trailers(error)["raftkv-limit"] == "lock_waiters_bytes_max"
    await lock_now(served, b"n" * 50, 1)
    services.observers.requests_max = 1
    observer = elections(served).Observe(election_pb2.LeaderRequest(name=b"e"))
    await until(lambda: services.observers.requests == 1)
    error = await failure(anext(aiter(elections(served).Observe(election_pb2.LeaderRequest(name=b"e")))))
    assert trailers(error)["raftkv-limit"] == "election_observers_max"
    observer.cancel()
    await until(lambda: services.observers.requests == 0)
    services.observers.bytes_max = 10
    error = await failure(anext(aiter(elections(served).Observe(election_pb2.LeaderRequest(name=b"e" * 20)))))
    assert trailers(error)["raftkv-limit"] == "election_observers_bytes_max"
    assert (services.waiters.requests, services.waiters.bytes, services.observers.bytes) == (0, 0, 0)


async def test_an_unlock_says_whether_it_released_anything(served: Served) -> None:
    held = await lock_now(served, b"l", await grant(served, 1))
    unlock = locks(served).Unlock
    assert not (await unlock(lock_pb2.UnlockRequest(key=held.key, fence=held.fence + 1))).released
    assert (await unlock(lock_pb2.UnlockRequest(key=held.key, fence=held.fence))).released
    assert not (await unlock(lock_pb2.UnlockRequest(key=held.key, fence=held.fence))).released
    await lock_now(served, b"l", 1)
    assert (await unlock(lock_pb2.UnlockRequest(key=held.key))).released
    assert not (await unlock(lock_pb2.UnlockRequest(key=held.key))).released


async def test_what_an_earlier_turn_knows_is_of_no_use_on_a_later_one(served: Served) -> None:
    """The same lease has resigned and campaigned again: the same key, created later."""
    await grant(served, 1)
    request = election_pb2.CampaignRequest(name=b"e", lease=1, value=b"one")
    earlier = (await elections(served).Campaign(request)).leader
    await elections(served).Resign(election_pb2.ResignRequest(leader=earlier))
    later = (await elections(served).Campaign(request)).leader
    assert later.key == earlier.key
    for rev in (earlier.rev, later.rev + 1, 0, -5):
        stale = election_pb2.LeaderKey(name=b"e", key=later.key, rev=rev, lease=1)
        error = await failure(elections(served).Proclaim(election_pb2.ProclaimRequest(leader=stale, value=b"two")))
        assert error.details() == "election: not leader"
        await elections(served).Resign(election_pb2.ResignRequest(leader=stale))
    told = await leader_of(served)
    assert (told.kv.create_revision, told.kv.value) == (later.rev, b"one")
