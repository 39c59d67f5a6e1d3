"""Leases: what is attached to one vanishes with it, on every replica, and only by who may say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from state_driver import Driver, attachments, stored_leases

from raftkv._pb.common_pb2 import Event
from raftkv._pb.kv_pb2 import Compare, DeleteRangeRequest, PutRequest, TxnRequest
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest
from raftkv._pb.maintenance_pb2 import NOSPACE, AlarmRequest
from raftkv._pb.state_pb2 import LeaseCheckpoints, LeaseExpire, LeaseRemaining
from raftkv.state.leases import TTL_MS_MAX, TTL_MS_MIN, LeaseChange, LeaseRecord
from raftkv.state.machine import StateMachine
from raftkv.state.results import Done, Refusal, RefusalCode
from raftkv.state.store import MemoryStore
from raftkv.storage.state_store import StateStore

INT64_MAX = 2**63 - 1


@pytest.fixture(params=["memory", "leveldb"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    if request.param == "memory":
        yield Driver()
        return
    store = StateStore.open(tmp_path / "state", create=True)
    yield Driver(store)
    store.close()


def grant(kv: Driver, lease: int, ttl: int = 10, **fields: Any) -> Any:
    return kv.call(LeaseGrantRequest(ID=lease, TTL=ttl, **fields))


def expire(kv: Driver, *leases: int, term: int = 1) -> Any:
    return kv.call(LeaseExpire(proposer_term=term, ids=leases))


def checkpoint(kv: Driver, *leases: tuple[int, int], term: int = 1) -> Any:
    remaining = [LeaseRemaining(id=lease, remaining_ms=left) for lease, left in leases]
    return kv.call(LeaseCheckpoints(proposer_term=term, leases=remaining))


def code(result: Any) -> RefusalCode:
    assert isinstance(result, Refusal), result
    return result.code


def deletes(kv: Driver, from_revision: int) -> list[tuple[int, list[tuple[bytes, bool]]]]:
    return [
        (revision, [(event.kv.key, event.expired) for event in events if event.type == Event.DELETE])
        for revision, events in kv.machine.changes(from_revision, 1 << 30)
    ]


def test_a_grant_changes_no_revision_and_says_what_it_gave(kv: Driver) -> None:
    kv.put(b"a")
    response = grant(kv, 7, 60)
    assert response == LeaseGrantResponse(header={"revision": 2}, ID=7, TTL=60, ttl_ms=60_000)
    assert dict(kv.machine.leases) == {7: LeaseRecord(60_000, 0)}
    assert kv.machine.revision == 2
    assert code(grant(kv, 7, 5)) is RefusalCode.LEASE_EXISTS
    assert kv.machine.leases[7].ttl_ms == 60_000


@pytest.mark.parametrize(
    ("fields", "ttl_ms"),
    [
        ({"TTL": 3}, 3000),
        ({"TTL": 3, "ttl_ms": 4500}, 4500),
        ({}, TTL_MS_MIN),
        ({"TTL": -5}, TTL_MS_MIN),
        ({"ttl_ms": -1}, TTL_MS_MIN),
        ({"ttl_ms": 500}, TTL_MS_MIN),
        ({"TTL": INT64_MAX}, TTL_MS_MAX),
        ({"ttl_ms": INT64_MAX}, TTL_MS_MAX),
        ({"TTL": -INT64_MAX - 1}, TTL_MS_MIN),
    ],
)
def test_the_time_to_live_is_within_bounds(fields: Any, ttl_ms: int) -> None:
    kv = Driver()
    response = kv.call(LeaseGrantRequest(ID=1, **fields))
    assert (response.ttl_ms, response.TTL) == (ttl_ms, ttl_ms // 1000)
    assert StateMachine(kv.store).leases[1].ttl_ms == ttl_ms


@pytest.mark.parametrize("lease", [0, -1, -INT64_MAX - 1])
def test_row_56_an_id_that_is_not_positive_is_refused_everywhere(lease: int) -> None:
    kv = Driver()
    grant(kv, 1)
    assert code(grant(kv, lease)) is RefusalCode.MALFORMED
    assert code(kv.call(LeaseRevokeRequest(ID=lease))) is RefusalCode.LEASE_NOT_FOUND
    if lease:
        assert code(kv.put(b"a", lease=lease)) is RefusalCode.LEASE_NOT_FOUND
    assert expire(kv, lease) == Done(1)
    assert checkpoint(kv, (lease, 5)) == Done(1)
    assert kv.machine.lease_keys(lease) == []
    assert dict(kv.machine.leases) == stored_leases(kv.store) == {1: LeaseRecord(10_000, 0)}


def test_row_56_the_greatest_ids_are_ids_like_others(kv: Driver) -> None:
    for lease in (INT64_MAX - 1, INT64_MAX):
        grant(kv, lease)
        kv.put(b"k%d" % lease, lease=lease)
    assert kv.machine.lease_keys(INT64_MAX) == [b"k%d" % INT64_MAX]
    kv.call(LeaseRevokeRequest(ID=INT64_MAX - 1))
    assert kv.machine.lease_keys(INT64_MAX - 1) == []
    assert kv.values() == {b"k%d" % INT64_MAX: b""}
    expire(kv, INT64_MAX)
    assert kv.values() == {}


def test_row_56_nothing_of_a_lease_is_left_after_a_restart(kv: Driver) -> None:
    """A restored store neither loses an attachment nor keeps one of a lease that has gone."""
    for lease in (1, 2, 3):
        grant(kv, lease)
        kv.put(b"a%d" % lease, lease=lease)
        kv.put(b"b", lease=lease)
    kv.machine = StateMachine(kv.store)
    assert set(kv.machine.leases) == {1, 2, 3}
    assert [kv.machine.lease_keys(lease) for lease in (1, 2, 3)] == [[b"a1"], [b"a2"], [b"a3", b"b"]]
    kv.call(LeaseRevokeRequest(ID=3))
    expire(kv, 1)
    kv.machine = StateMachine(kv.store)
    assert set(kv.machine.leases) == {2}
    assert kv.values() == {b"a2": b""}
    assert attachments(kv.store) == {(2, b"a2")}


def test_a_revoke_deletes_all_keys_in_one_revision_in_their_order(kv: Driver) -> None:
    grant(kv, 7)
    kv.apply(*(PutRequest(key=key, lease=7) for key in (b"c", b"a", b"b\0", b"", b"b")))
    kv.put(b"other")
    before = kv.machine.revision
    response = kv.call(LeaseRevokeRequest(ID=7))
    assert response.header.revision == kv.machine.revision == before + 1
    keys = [(key, False) for key in (b"", b"a", b"b", b"b\0", b"c")]
    assert deletes(kv, before + 1) == [(before + 1, keys)]
    assert kv.values() == {b"other": b""}
    assert code(kv.call(LeaseRevokeRequest(ID=7))) is RefusalCode.LEASE_NOT_FOUND
    assert code(kv.put(b"a", lease=7)) is RefusalCode.LEASE_NOT_FOUND
    assert grant(kv, 7).ID == 7


def test_a_revoke_without_keys_makes_no_revision(kv: Driver) -> None:
    grant(kv, 7)
    assert kv.call(LeaseRevokeRequest(ID=7)).header.revision == 1
    assert kv.machine.revision == 1


def test_expiry_gives_each_lease_its_revision_and_marks_the_events(kv: Driver) -> None:
    for lease in (9, 5, 6):
        grant(kv, lease)
    kv.apply(*(PutRequest(key=b"%d-%d" % (lease, number), lease=lease) for lease in (9, 5) for number in (1, 0)))
    before = kv.machine.revision
    assert expire(kv, 9, 404, 5, 6, 9) == Done(before + 2)
    assert deletes(kv, before + 1) == [
        (before + 1, [(b"9-0", True), (b"9-1", True)]),
        (before + 2, [(b"5-0", True), (b"5-1", True)]),
    ]
    assert kv.values() == {}
    assert not kv.machine.leases
    kv.compact(before + 2)
    kv.sweep()
    assert [revision for revision, _ in deletes(kv, before + 2)] == [before + 2]


def test_row_66_an_expiry_proposed_in_another_term_is_of_no_effect(kv: Driver) -> None:
    """A deposed leader's belief, committed late: the lease was kept alive by the next leader, and lives."""
    grant(kv, 7)
    kv.put(b"a", lease=7)
    for term in (0, 2, 2**64 - 1):
        assert code(expire(kv, 7, term=term)) is RefusalCode.STALE_TERM
        assert code(checkpoint(kv, (7, 1), term=term)) is RefusalCode.STALE_TERM
    assert kv.machine.leases[7] == LeaseRecord(10_000, 0)
    assert kv.values() == {b"a": b""}
    kv.term = 2
    assert code(expire(kv, 7, term=1)) is RefusalCode.STALE_TERM
    assert expire(kv, 7, term=2) == Done(3)
    assert kv.values() == {}


def test_checkpoints_are_kept_over_a_restart_and_cleared(kv: Driver) -> None:
    for lease in (1, 2):
        grant(kv, lease, 10)
    checkpoint(kv, (1, 4000), (2, 10_000), (3, 5))
    assert dict(StateMachine(kv.store).leases) == {1: LeaseRecord(10_000, 4000), 2: LeaseRecord(10_000, 0)}
    checkpoint(kv, (1, 0), (2, -7))
    assert dict(StateMachine(kv.store).leases) == {1: LeaseRecord(10_000, 0), 2: LeaseRecord(10_000, 0)}


def test_a_key_belongs_to_the_lease_of_its_last_put(kv: Driver) -> None:
    grant(kv, 1)
    grant(kv, 2)
    steps: list[tuple[Any, set[tuple[int, bytes]]]] = [
        (PutRequest(key=b"a", lease=1), {(1, b"a")}),
        (PutRequest(key=b"a", lease=1, value=b"x"), {(1, b"a")}),
        (PutRequest(key=b"a", lease=2), {(2, b"a")}),
        (PutRequest(key=b"a", value=b"y", ignore_lease=True), {(2, b"a")}),
        (PutRequest(key=b"a", lease=1, ignore_value=True), {(1, b"a")}),
        (PutRequest(key=b"a", value=b"plain"), set()),
        (PutRequest(key=b"a", lease=1), {(1, b"a")}),
        (DeleteRangeRequest(key=b"a"), set()),
        (PutRequest(key=b"a", lease=2), {(2, b"a")}),
    ]
    for request, expected in steps:
        kv.call(request)
        assert attachments(kv.store) == expected, request
    expire(kv, 1)
    assert kv.values() == {b"a": b""}


def test_transactions_attach_and_detach(kv: Driver) -> None:
    grant(kv, 1)
    grant(kv, 2)
    kv.txn([], [PutRequest(key=b"a", lease=1), PutRequest(key=b"b", lease=2)])
    assert attachments(kv.store) == {(1, b"a"), (2, b"b")}
    kv.txn([], [DeleteRangeRequest(key=b"a"), PutRequest(key=b"b", value=b"v", ignore_lease=True)])
    assert attachments(kv.store) == {(2, b"b")}
    refused = kv.txn([], [PutRequest(key=b"c", lease=1), PutRequest(key=b"d", lease=3)])
    assert code(refused) is RefusalCode.LEASE_NOT_FOUND
    assert attachments(kv.store) == {(2, b"b")}


def test_a_transaction_that_is_taken_back_takes_back_attachments(kv: Driver) -> None:
    grant(kv, 1)
    kv.put(b"a", lease=1)
    refused = kv.txn(
        [],
        [
            PutRequest(key=b"b", lease=1),
            DeleteRangeRequest(key=b"a"),
            PutRequest(key=b"a", ignore_lease=True),
        ],
    )
    assert code(refused) is RefusalCode.KEY_NOT_FOUND
    assert attachments(kv.store) == {(1, b"a")}
    assert kv.machine.leases


def test_one_entry_grants_attaches_and_expires(kv: Driver) -> None:
    """Later commands of an entry see the earlier ones, before anything is written."""
    results = kv.apply(
        LeaseGrantRequest(ID=1, TTL=5),
        PutRequest(key=b"b", lease=1),
        PutRequest(key=b"a", lease=1),
        LeaseExpire(proposer_term=1, ids=[1]),
        PutRequest(key=b"c", lease=1),
        LeaseGrantRequest(ID=1, TTL=6),
    )
    assert code(results[4]) is RefusalCode.LEASE_NOT_FOUND
    assert deletes(kv, 4) == [(4, [(b"a", True), (b"b", True)])]
    assert dict(kv.machine.leases) == stored_leases(kv.store) == {1: LeaseRecord(6000, 0)}
    assert attachments(kv.store) == set()


def test_compares_see_the_lease(kv: Driver) -> None:
    grant(kv, 1)
    kv.put(b"a", lease=1)
    request = TxnRequest(compare=[Compare(key=b"a", target=Compare.LEASE, lease=1)])
    assert kv.call(request).succeeded
    assert kv.range(b"a").kvs[0].lease == 1


def test_no_space_refuses_a_grant_and_lets_leases_go(kv: Driver) -> None:
    grant(kv, 1)
    kv.put(b"a", lease=1)
    kv.call(AlarmRequest(action=AlarmRequest.ACTIVATE, memberID=1, alarm=NOSPACE))
    assert code(grant(kv, 2)) is RefusalCode.NO_SPACE
    assert kv.call(LeaseRevokeRequest(ID=1)).header.revision == 3


def test_events_are_gathered_from_the_first_question_on(kv: Driver) -> None:
    grant(kv, 1)
    assert kv.machine.take_lease_events() == []
    grant(kv, 2)
    kv.put(b"a", lease=2)
    checkpoint(kv, (1, 3000))
    kv.call(LeaseRevokeRequest(ID=2))
    expire(kv, 1, 2)
    assert kv.machine.take_lease_events() == [
        (LeaseChange.GRANTED, 2),
        (LeaseChange.CHECKPOINTED, 1),
        (LeaseChange.REVOKED, 2),
        (LeaseChange.EXPIRED, 1),
    ]
    assert kv.machine.take_lease_events() == []


def test_leases_count_in_the_hash_and_in_the_dump() -> None:
    def history(*requests: Any) -> StateMachine:
        driver = Driver()
        driver.apply(*requests)
        return driver.machine

    base = LeaseGrantRequest(ID=1, TTL=10)
    machines = [
        history(base),
        history(LeaseGrantRequest(ID=1, TTL=11)),
        history(LeaseGrantRequest(ID=2, TTL=10)),
        history(base, LeaseCheckpoints(proposer_term=1, leases=[LeaseRemaining(id=1, remaining_ms=5)])),
        history(base, LeaseRevokeRequest(ID=1)),
        history(base, LeaseExpire(proposer_term=1, ids=[1])),
        history(),
    ]
    assert len({machine.rolling_hash for machine in machines}) == len(machines)
    dumps = {b"|".join(part for part in machine.dump() if part.startswith(b"lease ")) for machine in machines}
    assert len(dumps) == len(machines) - 2  # both ends of the lease leave nothing, as in the machine without one


def test_a_write_that_is_lost_in_a_crash_is_applied_again(kv: Driver) -> None:
    store = MemoryStore()
    driver = Driver(store)
    requests: list[Any] = [
        LeaseGrantRequest(ID=1, TTL=5),
        PutRequest(key=b"a", lease=1),
        LeaseCheckpoints(proposer_term=1, leases=[LeaseRemaining(id=1, remaining_ms=1000)]),
        PutRequest(key=b"b", lease=1),
        LeaseExpire(proposer_term=1, ids=[1]),
        LeaseGrantRequest(ID=1, TTL=7),
    ]
    copies = [store.copy()]
    for request in requests:
        driver.call(request)
        copies.append(store.copy())
    for copy in copies:
        machine = StateMachine(copy)
        for entry in driver.entries[machine.applied_index :]:
            machine.apply(*entry)
        assert machine.rolling_hash == driver.machine.rolling_hash
        assert list(machine.dump()) == list(driver.machine.dump())
        assert machine.leases == driver.machine.leases
