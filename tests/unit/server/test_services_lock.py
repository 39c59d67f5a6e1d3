"""Lock and Election over the wire: order, fences, leases that end, callers that go."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fake_node import Served, failure, trailers, until
from lock_calls import campaign, elections, grant, keys, lock, lock_now, locks, revoke, waiting

from raftkv._pb import election_pb2, kv_pb2, lock_pb2
from raftkv.server.errors import RequestTimeout
from raftkv.server.services import candidates
from raftkv.state.commands import CommandKind

Code = grpc.StatusCode


@pytest.mark.parametrize("name", ["raftkv.v1.Lock", "v3lockpb.Lock"])
async def test_a_free_lock(served: Served, name: str) -> None:
    await grant(served, 0xABC)
    raw = lock_pb2.LockRequest(name=b"l", lease=0xABC).SerializeToString()
    response = lock_pb2.LockResponse.FromString(await served.raw(f"/{name}/Lock", raw))
    assert (response.key, response.fence, response.header.revision) == (b"l/abc", 2, 2)
    assert response.header.member_id == served.node.node_id
    again = lock_pb2.LockResponse.FromString(await served.raw(f"/{name}/Lock", raw))  # re-entrant
    assert (again.key, again.fence) == (b"l/abc", 2)
    await served.raw(f"/{name}/Unlock", lock_pb2.UnlockRequest(key=response.key).SerializeToString())
    assert keys(served, b"l/") == []


async def test_waiters_come_in_their_order_and_fences_rise(served: Served) -> None:
    holder = await lock_now(served, b"l", await grant(served, 1))
    waiters = []
    for number in range(2, 6):
        waiters.append(lock(served, b"l", await grant(served, number)))
        await waiting(served, b"l", number)
    fences = [holder.fence]
    for waiter in waiters:
        assert not any(
            each.done() for each in waiters if each is not waiter and waiters.index(each) > waiters.index(waiter)
        )
        await locks(served).Unlock(lock_pb2.UnlockRequest(key=holder.key, fence=holder.fence))
        holder = await asyncio.wait_for(waiter, 20)
        fences.append(holder.fence)
        assert holder.fence < holder.header.revision
    assert fences == sorted(set(fences))
    assert len(served.services.watches) == 0


async def test_a_waiter_in_the_middle_whose_lease_ends_fails_at_once_and_the_queue_moves_on(served: Served) -> None:
    holder = await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    third = lock(served, b"l", await grant(served, 3))
    await waiting(served, b"l", 3)
    await revoke(served, 2)
    error = await failure(asyncio.wait_for(second, 20))
    assert error.details() == "mutex: session is expired"
    assert trailers(error)["raftkv-error"] == "LEASE_EXPIRED"
    await asyncio.sleep(0.05)
    assert not third.done(), "the one before it has gone, but the holder has not"
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=holder.key))
    assert (await asyncio.wait_for(third, 20)).key == b"l/3"


async def test_a_holder_whose_lease_ends_makes_room(served: Served) -> None:
    await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    await revoke(served, 1)
    assert (await asyncio.wait_for(second, 20)).key == b"l/2"


async def test_an_unlock_never_removes_a_later_holder(served: Served) -> None:
    """Row 71: a repeated unlock must not take away what the same session has acquired since."""
    await grant(served, 1)
    first = await lock_now(served, b"l", 1)
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=first.key, fence=first.fence))
    second = await lock_now(served, b"l", 1)
    assert (second.key, second.fence > first.fence) == (first.key, True)
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=first.key, fence=first.fence))
    assert keys(served, b"l/") == [b"l/1"]
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=first.key))  # as etcd: whatever is there
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=first.key))
    assert keys(served, b"l/") == []


async def test_no_lease_and_no_such_lease(served: Served) -> None:
    response = await lock_now(served, b"l", 0)
    (lease,) = served.node.machine.leases
    assert response.key == b"l/%x" % lease
    assert served.node.machine.leases[lease].ttl_ms == 60_000
    error = await failure(lock_now(served, b"l", 12345))
    assert (error.code(), error.details()) == (Code.NOT_FOUND, "etcdserver: requested lease not found")
    error = await failure(locks(served).Unlock(lock_pb2.UnlockRequest()))
    assert error.details() == "etcdserver: key is not provided"


async def test_a_caller_who_goes_takes_his_key_with_him(served: Served) -> None:
    await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    second.cancel()
    await until(lambda: len(served.services.watches) == 0)
    await until(lambda: keys(served, b"l/") == [b"l/1"])
    late = await failure(lock_now(served, b"l", 2, timeout=0.3))
    assert late.code() is Code.DEADLINE_EXCEEDED
    await until(lambda: keys(served, b"l/") == [b"l/1"])


async def test_a_caller_who_goes_while_his_key_is_being_made(served: Served) -> None:
    await grant(served, 1)
    served.node.hold()
    call = lock(served, b"l", 1, timeout=20)
    await until(lambda: served.node.deadlines and served.node.deadlines[-1] is not None)
    call.cancel()
    await asyncio.sleep(0.1)
    served.node.release()
    await until(lambda: [kind for kind, _ in served.node.proposed].count(CommandKind.TXN) == 2)
    assert keys(served, b"l/") == []


async def test_one_of_two_calls_for_the_same_key_goes(served: Served) -> None:
    await lock_now(served, b"l", await grant(served, 1))
    await grant(served, 2)
    calls = [lock(served, b"l", 2)]
    await waiting(served, b"l", 2)
    calls.append(lock(served, b"l", 2))
    await until(lambda: len(served.services.watches) == 4)
    calls[0].cancel()
    await until(lambda: len(served.services.watches) == 2)
    assert keys(served, b"l/") == [b"l/1", b"l/2"], "the other still waits for it"
    await locks(served).Unlock(lock_pb2.UnlockRequest(key=b"l/1"))
    assert (await asyncio.wait_for(calls[1], 20)).key == b"l/2"
    held = lock(served, b"l", 2)  # again, and gone: what is held stays
    held.cancel()
    await asyncio.sleep(0.1)
    assert keys(served, b"l/") == [b"l/2"]


async def enter(served: Served, lease: int) -> int:
    """Make a key as our SDK does, by itself; its create revision."""
    await grant(served, lease)
    put = kv_pb2.PutRequest(key=b"l/%x" % lease, lease=lease).SerializeToString()
    await served.node.propose(CommandKind.PUT, put, None)
    return served.node.machine.revision


async def turn(served: Served, lease: int, fence: int) -> lock_pb2.LockResponse:
    """Wait for the turn of a key that is there."""
    return await locks(served).Lock(lock_pb2.LockRequest(name=b"l", lease=lease, fence=fence))


async def test_who_has_entered_already_only_waits_and_whoever_stops_waiting_keeps_his_place(served: Served) -> None:
    first, second = await enter(served, 1), await enter(served, 2)
    before = served.node.machine.applied_index
    assert (await turn(served, 1, first)).fence == first
    waiter = asyncio.ensure_future(turn(served, 2, second))
    await until(lambda: len(served.services.watches) == 2)
    assert served.node.machine.applied_index == before, "waiting writes nothing"
    waiter.cancel()
    await until(lambda: len(served.services.watches) == 0)
    waiter = asyncio.ensure_future(turn(served, 2, second))
    await until(lambda: len(served.services.watches) == 2)
    assert keys(served, b"l/") == [b"l/1", b"l/2"]
    await revoke(served, 1)
    response = await asyncio.wait_for(waiter, 20)
    assert (response.key, response.fence) == (b"l/2", second)


@pytest.mark.parametrize("off", [-1, 1, 1 << 40])
async def test_who_waits_with_another_token_has_no_key(served: Served, off: int) -> None:
    first, second = await enter(served, 1), await enter(served, 2)
    assert first < second
    error = await failure(asyncio.wait_for(turn(served, 2, second + off), 20))
    assert trailers(error)["raftkv-error"] == "LEASE_EXPIRED"
    assert keys(served, b"l/") == [b"l/1", b"l/2"]


async def test_the_turn_is_told_only_after_a_linearizable_look(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this node has may be old: whom to wait for it can tell, but not that the turn has come."""
    monkeypatch.setattr(candidates, "RETRY_S", 0.2)
    first = await enter(served, 1)
    served.node.fault = RequestTimeout(executed="no")
    waiter = asyncio.ensure_future(turn(served, 1, first))
    await asyncio.sleep(0.1)
    assert not waiter.done()
    served.node.fault = None
    await revoke(served, 1)  # before the waiter asks again
    error = await failure(asyncio.wait_for(waiter, 20))
    assert trailers(error)["raftkv-error"] == "LEASE_EXPIRED"


async def test_a_key_that_is_not_bound_to_the_lease_is_no_lock(served: Served) -> None:
    await grant(served, 1)
    await served.node.propose(CommandKind.PUT, kv_pb2.PutRequest(key=b"l/1", value=b"?").SerializeToString(), None)
    error = await failure(lock_now(served, b"l", 1))
    assert error.details() == "mutex: session is expired"


async def test_a_waiter_outlives_a_time_without_leader(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "RETRY_S", 0.01)
    await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    await revoke(served, 1)
    served.node.fault = RequestTimeout(executed="no")  # before the waiter, woken by now, can look again
    await asyncio.sleep(0.1)
    assert not second.done()
    served.node.fault = None
    assert (await asyncio.wait_for(second, 20)).key == b"l/2"


async def test_on_a_leader_the_release_itself_proves_that_the_turn_has_come(served: Served) -> None:
    """It was appended after the waiter had come, so no round of heartbeats has to show that this node still leads."""
    served.node.is_leader = True
    await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    barriers = served.node.barriers
    await revoke(served, 1)
    assert (await asyncio.wait_for(second, 20)).key == b"l/2"
    assert served.node.barriers == barriers


async def test_elsewhere_a_quorum_is_asked_when_the_turn_has_come(served: Served) -> None:
    await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    barriers = served.node.barriers
    await revoke(served, 1)
    assert (await asyncio.wait_for(second, 20)).key == b"l/2"
    assert served.node.barriers == barriers + 1


async def test_who_comes_when_the_name_is_free_already_asks_a_quorum_on_a_leader_too(served: Served) -> None:
    """What was applied before it came proves nothing about the time since."""
    served.node.is_leader = True
    lease = await grant(served, 1)
    held = await lock_now(served, b"l", lease)
    barriers = served.node.barriers
    again = lock_pb2.LockRequest(name=b"l", lease=lease, fence=held.fence)
    assert (await locks(served).Lock(again)).fence == held.fence
    assert served.node.barriers == barriers + 1


async def test_waiters_are_bounded_and_end_when_the_node_stops(served: Served) -> None:
    served.services.waiters.requests_max = 1
    await lock_now(served, b"l", await grant(served, 1))
    second = lock(served, b"l", await grant(served, 2))
    await waiting(served, b"l", 2)
    assert served.services.inflight.requests == 0
    error = await failure(lock_now(served, b"l", await grant(served, 3)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    served.services.end_streams()
    error = await failure(asyncio.wait_for(second, 20))
    assert (error.code(), error.details()) == (Code.UNAVAILABLE, "etcdserver: server stopped")
    assert keys(served, b"l/") == [b"l/1", b"l/2"], "the place is kept, for another node"


@pytest.mark.parametrize("name", ["raftkv.v1.Election", "v3electionpb.Election"])
async def test_an_election(served: Served, name: str) -> None:
    async def call(method: str, request: Any) -> bytes:
        return await served.raw(f"/{name}/{method}", request.SerializeToString())

    error = await failure(call("Leader", election_pb2.LeaderRequest(name=b"e")))
    assert error.details() == "election: no leader"
    await grant(served, 0x1F)
    request = election_pb2.CampaignRequest(name=b"e", lease=0x1F, value=b"one")
    won = election_pb2.CampaignResponse.FromString(await call("Campaign", request)).leader
    assert (won.name, won.key, won.rev, won.lease) == (b"e", b"e/1f", 2, 0x1F)
    await call("Proclaim", election_pb2.ProclaimRequest(leader=won, value=b"two"))
    told = election_pb2.LeaderResponse.FromString(await call("Leader", election_pb2.LeaderRequest(name=b"e")))
    assert (told.kv.key, told.kv.value, told.kv.lease, told.header.revision) == (b"e/1f", b"two", 0x1F, 3)
    request.value = b"three"  # again, with the same lease: the same key with another value
    again = election_pb2.CampaignResponse.FromString(await call("Campaign", request)).leader
    assert again == won
    told = election_pb2.LeaderResponse.FromString(await call("Leader", election_pb2.LeaderRequest(name=b"e")))
    assert told.kv.value == b"three"
    await call("Resign", election_pb2.ResignRequest(leader=won))
    await call("Resign", election_pb2.ResignRequest(leader=won))
    error = await failure(call("Proclaim", election_pb2.ProclaimRequest(leader=won, value=b"four")))
    assert error.details() == "election: not leader"
    for method, request in (("Proclaim", election_pb2.ProclaimRequest()), ("Resign", election_pb2.ResignRequest())):
        assert (await failure(call(method, request))).details() == '"leader" field must be provided'


async def test_a_candidate_whose_lease_ends_does_not_win(served: Served) -> None:
    """In etcd it does: a campaign does not look at its own key after it waited."""
    first = (
        await elections(served).Campaign(election_pb2.CampaignRequest(name=b"e", lease=await grant(served, 1)))
    ).leader
    second = asyncio.ensure_future(
        campaign(served, election_pb2.CampaignRequest(name=b"e", lease=await grant(served, 2), value=b"v"))
    )
    await waiting(served, b"e", 2)
    await revoke(served, 2)
    assert (await failure(asyncio.wait_for(second, 20))).details() == "election: not leader"
    await elections(served).Resign(election_pb2.ResignRequest(leader=first))
    assert keys(served, b"e/") == []


async def test_observers_see_every_leader(served: Served) -> None:
    observed = elections(served).Observe(election_pb2.LeaderRequest(name=b"e"))
    seen = aiter(observed)
    following = asyncio.ensure_future(anext(seen))
    await until(lambda: len(served.services.watches) == 1)
    first = await campaign(served, election_pb2.CampaignRequest(name=b"e", lease=await grant(served, 1), value=b"one"))
    assert (await asyncio.wait_for(following, 20)).kv.value == b"one"
    await elections(served).Proclaim(election_pb2.ProclaimRequest(leader=first.leader, value=b"one more"))
    told = await asyncio.wait_for(anext(seen), 20)
    assert (told.kv.value, told.header.revision) == (b"one more", told.kv.mod_revision)
    second = asyncio.ensure_future(
        campaign(served, election_pb2.CampaignRequest(name=b"e", lease=await grant(served, 2), value=b"two"))
    )
    await waiting(served, b"e", 2)
    await elections(served).Resign(election_pb2.ResignRequest(leader=first.leader))
    await asyncio.wait_for(second, 20)
    assert (await asyncio.wait_for(anext(seen), 20)).kv.value == b"two"
    observed.cancel()
    await until(lambda: len(served.services.watches) == 0)
    ended = elections(served).Observe(election_pb2.LeaderRequest(name=b"e"))
    assert (await asyncio.wait_for(anext(aiter(ended)), 20)).kv.value == b"two"
    served.services.end_streams()
    error = await failure(asyncio.wait_for(anext(aiter(ended)), 20))
    assert error.details() == "etcdserver: server stopped"
