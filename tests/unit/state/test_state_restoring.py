"""A backup becomes a new cluster's first state: nothing the old cluster gave out since is ever given out again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_driver import KINDS, Driver, SessionCall, attachments, op, stored_leases
from state_ops import Chooser, Ops

from raftkv._pb.kv_pb2 import Compare, Guard, PutRequest
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.maintenance_pb2 import NOSPACE, AlarmRequest
from raftkv._pb.state_pb2 import (
    LeaseCheckpoints,
    LeaseRemaining,
    MemberAttributes,
    SessionOpen,
    SessionOpened,
)
from raftkv.state.keys import CONF_KEY, MEMBER, MEMBER_END, RECORD, SESSIONS, SESSIONS_END, STATE_KEY, Head
from raftkv.state.leases import LeaseRecord
from raftkv.state.machine import StateMachine
from raftkv.state.mvcc import Reader
from raftkv.state.restoring import BUMP_MAX, BUMP_MIN, NoRoom, head_of, renew, summarize
from raftkv.state.results import Refusal, RefusalCode, Refused
from raftkv.state.store import MemoryStore, StoreDamaged


def restored(kv: Driver, bump: int = BUMP_MIN) -> Driver:
    """A new cluster that begins with what the old one holds now; the old one can go on."""
    assert isinstance(kv.store, MemoryStore)
    store = kv.store.copy()
    renew(store, bump)
    new = Driver(store)
    new.term = new.machine.applied_term + 1
    return new


def opened(kv: Driver) -> int:
    answer = kv.call(SessionOpen())
    assert isinstance(answer, SessionOpened)
    return answer.session


def call_of(session: int, seq: int, request: Any) -> SessionCall:
    return SessionCall(session=session, seq=seq, kind=KINDS[type(request)], payload=request.SerializeToString())


def refusal(result: Any) -> RefusalCode | None:
    return result.code if isinstance(result, Refusal) else None


def acquire(kv: Driver, lock: bytes = b"lock", **fields: Any) -> int:
    token: int = kv.put(lock, **fields).header.revision
    return token


def test_keys_are_as_they_were_and_the_numbers_jump() -> None:
    old = Driver()
    old.put(b"a", b"1")
    old.put(b"a", b"2")
    old.put(b"gone")
    old.delete(b"gone")
    new = restored(old)
    assert list(new.range(b"\0", b"\0").kvs) == list(old.range(b"\0", b"\0").kvs)
    before, after = head_of(old.store), head_of(new.store)
    for field in ("revision", "applied_index", "applied_term"):
        assert getattr(after, field) == getattr(before, field) + BUMP_MIN, field
    put = new.put(b"a", b"3", prev_kv=True)
    assert put.header.revision == before.revision + BUMP_MIN + 1
    assert (put.prev_kv.value, put.prev_kv.version) == (b"2", 2)


def test_everything_before_counts_as_compacted() -> None:
    """S5, W3: who wants to go on from an old revision, whether before the backup or lost with it, is told."""
    old = Driver()
    first = acquire(old, b"a")
    new = restored(old)
    lost = acquire(old, b"b")
    begin = new.machine.revision
    for revision in (1, first, lost, begin - 1):
        with pytest.raises(Refused) as caught:
            new.machine.changes(revision, 10)
        assert caught.value.refusal == Refusal(RefusalCode.COMPACTED, begin, begin)
        assert refusal(new.range(b"a", revision=revision)) is RefusalCode.COMPACTED
    assert [kv.key for kv in new.range(b"\0", b"\0", revision=begin).kvs] == [b"a"]
    assert list(new.machine.changes(begin, 10)) == []
    new.put(b"c")
    assert [revision for revision, _ in new.machine.changes(begin, 10)] == [begin + 1]


def test_a_lock_in_the_backup_is_held_by_its_token_and_every_later_token_is_greater() -> None:
    """L1, L7, over a restore: what the old cluster's later holder writes is refused, in the old way and any order."""
    old = Driver()
    old.call(LeaseGrantRequest(ID=1, TTL=5))
    held = acquire(old, lease=1)
    new = restored(old)
    for _ in range(100):
        old.delete(b"lock")
        lost = acquire(old)

    def write(kv: Driver, token: int) -> RefusalCode | None:
        return refusal(kv.put(b"x", guards=[Guard(key=b"lock", token=token)]))

    assert write(new, held) is None
    assert write(new, lost) is RefusalCode.GUARD_FAILED
    new.call(LeaseRevokeRequest(ID=1))
    later = acquire(new)
    assert held < lost < later
    assert [write(new, token) for token in (held, lost)] == [RefusalCode.GUARD_FAILED] * 2
    assert write(new, later) is None
    # As etcd's own recipes compare it.
    mine = Compare(key=b"lock", target=Compare.CREATE, result=Compare.EQUAL, create_revision=lost)
    assert not new.txn([mine], [PutRequest(key=b"x")]).succeeded


def test_sessions_are_gone_and_their_ids_never_come_again() -> None:
    """X3: neither what was open in the backup nor what was opened later is known, or mistaken for a new one."""
    old = Driver()
    in_backup = opened(old)
    assert not isinstance(old.call(call_of(in_backup, 1, PutRequest(key=b"a", value=b"1"))), Refusal)
    new, other = restored(old), restored(old)
    lost = [opened(old) for _ in range(50)]
    assert opened(other) > max(lost)
    assert new.machine.sessions == {}
    assert list(new.store.iterate(SESSIONS, SESSIONS_END)) == []
    for session in (in_backup, *lost):
        for seq in (1, 2):
            again = new.call(call_of(session, seq, PutRequest(key=b"a", value=b"2")))
            assert refusal(again) is RefusalCode.SESSION_EXPIRED
    assert new.values() == {b"a": b"1"}


def test_leases_have_their_whole_time_again_and_their_keys() -> None:
    """L2: what a checkpoint before the backup had left says nothing about renewals after it."""
    old = Driver()
    old.call(LeaseGrantRequest(ID=1, TTL=60))
    old.call(LeaseGrantRequest(ID=2, TTL=30))
    old.put(b"a", lease=1)
    left = [LeaseRemaining(id=1, remaining_ms=3000)]
    old.call(LeaseCheckpoints(proposer_term=old.term, leases=left))
    assert old.machine.leases[1].remaining_ms == 3000
    new = restored(old)
    expected = {1: LeaseRecord(60_000, 0), 2: LeaseRecord(30_000, 0)}
    assert new.machine.leases == stored_leases(new.store) == expected
    assert attachments(new.store) == {(1, b"a")}
    new.call(LeaseRevokeRequest(ID=1))
    assert new.values() == {}


def test_members_are_the_new_clusters_and_alarms_stay() -> None:
    old = Driver()
    old.call(MemberAttributes(id=7, name="n7", peer_urls=["http://old:2380"]))
    old.machine.apply_many([(old.machine.applied_index + 1, 1, [])], b"who voted")
    old.call(AlarmRequest(action=AlarmRequest.ACTIVATE, memberID=7, alarm=NOSPACE))
    new = restored(old)
    assert new.machine.members == {}
    assert list(new.store.iterate(MEMBER, MEMBER_END)) == []
    assert new.machine.conf == b""
    assert new.store.get(CONF_KEY) is None
    assert new.machine.alarms == {(7, NOSPACE)}
    new.call(AlarmRequest(action=AlarmRequest.DEACTIVATE))
    assert new.machine.alarms == frozenset()


def test_the_history_is_taken_out_by_the_sweep() -> None:
    """Also what an unfinished one of the old cluster had left."""
    old = Driver()
    for number in range(50):
        old.put(b"a", b"%d" % number)
    old.delete(b"a")
    old.put(b"b")
    old.compact(20)
    assert old.machine.sweep(budget=5)
    new = restored(old)
    assert new.machine.sweeping
    before = new.machine.hash_kv(0)
    new.sweep()
    assert new.machine.hash_kv(0) == before
    assert [key for key, _ in new.store.iterate(RECORD, b"s")] != []
    reader = Reader(new.store, new.machine.revision, new.machine.compact_revision, swept=True)
    assert [place for place, _ in reader.records(new.machine.revision)] == [
        place for place, _ in new.machine.reader().records(new.machine.revision)
    ]
    assert len(list(reader.records(new.machine.revision))) == 1, "the one of b"


def test_nodes_begin_alike_and_differ_from_any_other_beginning() -> None:
    old = Driver()
    old.put(b"a")
    opened(old)
    first, second, other = restored(old), restored(old), restored(old, BUMP_MIN + 1)
    assert list(first.store.iterate(b"", None)) == list(second.store.iterate(b"", None))
    assert list(first.machine.dump()) == list(second.machine.dump())
    hashes = {kv.machine.rolling_hash for kv in (old, first, other)}
    assert len(hashes) == 3


def test_a_restored_cluster_can_be_backed_up_and_restored() -> None:
    old = Driver()
    token = acquire(old)
    once = restored(old)
    opened(once)
    again = restored(once, BUMP_MAX)
    assert again.machine.revision == token + BUMP_MIN + BUMP_MAX
    assert again.range(b"lock").kvs[0].create_revision == token


@pytest.mark.parametrize("field", ["revision", "applied_index", "applied_term"])
def test_numbers_that_would_run_out_are_refused(field: str) -> None:
    kv = Driver()
    kv.put(b"a")
    high = 1 << 62 if field != "applied_index" else 1 << 43
    kv.store.write([(STATE_KEY, head_of(kv.store)._replace(**{field: high}).encode())], ())
    before = list(kv.store.iterate(b"", None))
    with pytest.raises(NoRoom, match=str(high)):
        renew(kv.store, BUMP_MIN)
    assert list(kv.store.iterate(b"", None)) == before


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(StoreDamaged, match="no record"):
        renew(MemoryStore(), BUMP_MIN)
    with pytest.raises(StoreDamaged, match="no record"):
        summarize([(b"ca", b"")])
    store = MemoryStore()
    store.write([(STATE_KEY, b"\x63" + Head(1, 1, 1, -1, 0).encode()[1:])], ())
    with pytest.raises(StoreDamaged, match="not of format 2"):
        renew(store, BUMP_MIN)


def test_a_summary_counts_living_keys() -> None:
    kv = Driver()
    for key in (b"a", b"a", b"b", b"c"):
        kv.put(key)
    kv.delete(b"b")
    summary = summarize(kv.store.iterate(b"", None))
    assert (summary.keys, summary.head) == (2, head_of(kv.store))
    assert summary.head.revision == kv.machine.revision


def handed_out(kv: Driver, seed: int) -> tuple[set[int], set[int]]:
    """Revisions (so tokens, too) and sessions that a cluster gives out while random things happen."""
    revisions, sessions = set[int](), set[int]()
    for number in range(30):
        ops = Ops(Chooser(seed + number))
        ops.revision, ops.compact_revision = kv.machine.revision, kv.machine.compact_revision
        before = kv.machine.revision
        result = kv.call(ops.any_request(kv.term, sorted(kv.machine.sessions)))
        revisions.update(range(before + 1, kv.machine.revision + 1))
        if isinstance(result, SessionOpened):
            sessions.add(result.session)
    return revisions, sessions


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32), st.integers(0, 2**32))
def test_nothing_is_given_out_twice(before: int, lost: int, after: int) -> None:
    old = Driver()
    handed_out(old, before)
    new = restored(old)
    old_revisions, old_sessions = handed_out(old, lost)
    new_revisions, new_sessions = handed_out(new, after)
    assert old_revisions.isdisjoint(new_revisions)
    assert old_sessions.isdisjoint(new_sessions)
    StateMachine(new.store)
    # Every key is still readable, whatever the backup caught in the middle.
    assert isinstance(new.txn([], [op(PutRequest(key=b"z"))]).header.revision, int)
    assert new.values().keys() >= {b"z"}
