"""Each rule of etcd's key space by itself: put, range, delete, and what they say of revisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from state_driver import Driver, command

from raftkv._pb.common_pb2 import KeyValue
from raftkv._pb.kv_pb2 import DeleteRangeRequest, PutRequest, PutResponse, RangeRequest, TxnRequest
from raftkv._pb.state_pb2 import MemberAttributes
from raftkv.state import mvcc
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.keys import RECORD, STATE_KEY
from raftkv.state.machine import StateMachine
from raftkv.state.ranges import RangeTooLong
from raftkv.state.results import Done, Refusal, RefusalCode, Refused
from raftkv.state.store import MemoryStore, StoreDamaged
from raftkv.storage.state_store import StateStore

SORT = RangeRequest.SortTarget
ALL = {"key": b"\0", "range_end": b"\0"}


@pytest.fixture(params=["memory", "leveldb"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    if request.param == "memory":
        yield Driver()
        return
    store = StateStore.open(tmp_path / "state", create=True)
    yield Driver(store)
    store.close()


def keys_of(response: Any) -> list[bytes]:
    return [item.key for item in response.kvs]


def refusal(result: Any) -> RefusalCode:
    assert isinstance(result, Refusal), result
    return result.code


def test_an_empty_store_has_revision_1_and_the_first_write_makes_2(kv: Driver) -> None:
    assert kv.range(b"a").header.revision == 1
    assert kv.put(b"a").header.revision == 2
    assert kv.range(b"a").header.revision == 2


def test_version_counts_since_creation_and_a_delete_begins_anew(kv: Driver) -> None:
    kv.put(b"a", b"1")
    kv.put(b"a", b"2")
    assert list(kv.range(b"a").kvs) == [KeyValue(key=b"a", value=b"2", create_revision=2, mod_revision=3, version=2)]
    kv.delete(b"a")
    kv.put(b"a", b"3")
    assert list(kv.range(b"a").kvs) == [KeyValue(key=b"a", value=b"3", create_revision=5, mod_revision=5, version=1)]


def test_deleting_nothing_makes_no_revision(kv: Driver) -> None:
    kv.put(b"a")
    response = kv.delete(b"b")
    assert (response.deleted, response.header.revision) == (0, 2)
    assert kv.delete(b"a").header.revision == 3


def test_a_delete_of_many_is_one_revision_and_gives_what_was_there(kv: Driver) -> None:
    for key in (b"a", b"b", b"c"):
        kv.put(key, key)
    response = kv.delete(b"a", b"c", prev_kv=True)
    assert (response.deleted, response.header.revision) == (2, 5)
    assert [(item.key, item.value, item.mod_revision) for item in response.prev_kvs] == [
        (b"a", b"a", 2),
        (b"b", b"b", 3),
    ]
    assert kv.values() == {b"c": b"c"}


@pytest.mark.parametrize(
    ("key", "range_end", "found"),
    [
        (b"a", b"", [b"a"]),
        (b"a", b"b", [b"a", b"a\0", b"aa"]),
        (b"a\0", b"b", [b"a\0", b"aa"]),
        (b"aa", b"\0", [b"aa", b"b", b"\xff"]),
        (b"\0", b"\0", [b"\0", b"a", b"a\0", b"aa", b"b", b"\xff"]),
        (b"b", b"a", []),
        (b"a", b"a", []),
        (b"\xff", b"\0", [b"\xff"]),
        (b"zz", b"", []),
    ],
)
def test_ranges(kv: Driver, key: bytes, range_end: bytes, found: list[bytes]) -> None:
    for each in (b"b", b"\xff", b"a", b"aa", b"a\0", b"\0"):
        kv.put(each)
    past = kv.machine.revision
    response = kv.range(key, range_end)
    assert keys_of(response) == found
    assert response.count == len(found)
    assert kv.delete(key, range_end).deleted == len(found)
    assert kv.range(key, range_end).count == 0
    assert keys_of(kv.range(key, range_end, revision=past)) == found


def test_limit_counts_all_and_tells_of_more(kv: Driver) -> None:
    for key in (b"a", b"b", b"c"):
        kv.put(key)
    for limit, found, more in ((1, 1, True), (2, 2, True), (3, 3, False), (4, 3, False), (0, 3, False), (-1, 3, False)):
        response = kv.range(**ALL, limit=limit)
        assert (len(response.kvs), response.count, response.more) == (found, 3, more)
        response = kv.range(**ALL, limit=limit, sort_order=RangeRequest.DESCEND)
        assert keys_of(response) == [b"c", b"b", b"a"][:found]
        assert (response.count, response.more) == (3, more)


def test_count_only_and_keys_only(kv: Driver) -> None:
    kv.put(b"a", b"1")
    kv.put(b"b", b"2")
    response = kv.range(**ALL, count_only=True, limit=1)
    assert (response.count, len(response.kvs), response.more) == (2, 0, False)
    response = kv.range(**ALL, keys_only=True)
    assert [(item.key, item.value, item.mod_revision) for item in response.kvs] == [(b"a", b"", 2), (b"b", b"", 3)]
    assert kv.range(b"a", count_only=True).count == 1
    assert not kv.range(b"a", count_only=True).kvs


@pytest.mark.parametrize(
    ("target", "order"),
    [
        (SORT.Value("KEY"), b"abcd"),
        (SORT.Value("VERSION"), b"bcda"),
        (SORT.Value("CREATE"), b"abcd"),
        (SORT.Value("MOD"), b"bcda"),
        (SORT.Value("VALUE"), b"dbca"),
    ],
)
def test_sorting_keeps_key_order_among_equals(kv: Driver, target: int, order: bytes) -> None:
    for key, value in ((b"a", b"0"), (b"b", b"5"), (b"c", b"5"), (b"d", b"1"), (b"a", b"9")):
        kv.put(key, value)
    expected = [bytes((key,)) for key in order]
    assert keys_of(kv.range(**ALL, sort_target=target, sort_order=RangeRequest.ASCEND)) == expected
    if target != RangeRequest.KEY:
        assert keys_of(kv.range(**ALL, sort_target=target)) == expected
    descending = keys_of(kv.range(**ALL, sort_target=target, sort_order=RangeRequest.DESCEND))
    if target in (RangeRequest.VALUE, RangeRequest.VERSION):
        equals = [b"b", b"c", b"d"] if target == RangeRequest.VERSION else [b"b", b"c"]
        assert [key for key in descending if key in equals] == equals
        assert sorted(descending) == sorted(expected)
    else:
        assert descending == expected[::-1]


def test_a_sort_target_without_order_sorts_what_the_limit_fetched(kv: Driver) -> None:
    """As etcd: it fetches limit + 1 keys in key order, sorts those, and cuts."""
    for key, value in ((b"a", b"3"), (b"b", b"2"), (b"c", b"1")):
        kv.put(key, value)
    assert keys_of(kv.range(**ALL, limit=1, sort_target=RangeRequest.VALUE)) == [b"b"]
    assert keys_of(kv.range(**ALL, limit=1, sort_target=RangeRequest.VALUE, sort_order=RangeRequest.ASCEND)) == [b"c"]


def test_revision_filters_come_before_the_limit(kv: Driver) -> None:
    for key in (b"a", b"b", b"c", b"a"):
        kv.put(key)
    response = kv.range(**ALL, min_mod_revision=4, limit=1)
    assert (keys_of(response), response.count, response.more) == ([b"a"], 3, True)
    assert keys_of(kv.range(**ALL, max_mod_revision=4)) == [b"b", b"c"]
    assert keys_of(kv.range(**ALL, min_create_revision=3, max_create_revision=3)) == [b"b"]
    assert keys_of(kv.range(b"a", max_mod_revision=4)) == []
    assert kv.range(b"a", max_mod_revision=4).count == 1


def test_revisions_that_can_be_read(kv: Driver) -> None:
    for value in (b"1", b"2", b"3"):
        kv.put(b"a", value)
    assert kv.values(revision=-1) == kv.values(revision=0) == kv.values(revision=4) == {b"a": b"3"}
    assert kv.values(revision=2) == {b"a": b"1"}
    assert kv.values(revision=1) == {}
    assert kv.range(b"a", revision=2).header.revision == 4
    assert refusal(kv.range(b"a", revision=5)) is RefusalCode.FUTURE_REVISION
    with pytest.raises(Refused) as refused:
        kv.machine.range(RangeRequest(key=b"a", revision=5))
    assert refused.value.refusal == Refusal(RefusalCode.FUTURE_REVISION, revision=4, compact_revision=-1)


def test_put_with_prev_kv(kv: Driver) -> None:
    assert not kv.put(b"a", b"1", prev_kv=True).HasField("prev_kv")
    assert kv.put(b"a", b"2", prev_kv=True).prev_kv == KeyValue(
        key=b"a", value=b"1", create_revision=2, mod_revision=2, version=1
    )


def test_ignore_value_keeps_it_and_needs_the_key(kv: Driver) -> None:
    assert refusal(kv.put(b"a", ignore_value=True)) is RefusalCode.KEY_NOT_FOUND
    assert refusal(kv.put(b"a", ignore_lease=True)) is RefusalCode.KEY_NOT_FOUND
    assert kv.machine.revision == 1
    kv.put(b"a", b"1")
    assert kv.put(b"a", ignore_value=True).header.revision == 3
    assert list(kv.range(b"a").kvs) == [KeyValue(key=b"a", value=b"1", create_revision=2, mod_revision=3, version=2)]
    assert kv.put(b"a", b"2", ignore_lease=True).header.revision == 4
    assert kv.values() == {b"a": b"2"}


@pytest.mark.parametrize("lease", [1, -1, 2**63 - 1, -(2**63)])
def test_an_unknown_lease_is_refused(kv: Driver, lease: int) -> None:
    assert refusal(kv.put(b"a", lease=lease)) is RefusalCode.LEASE_NOT_FOUND
    assert refusal(kv.put(b"missing", lease=lease, ignore_value=True)) is RefusalCode.LEASE_NOT_FOUND
    assert kv.machine.revision == 1


def test_large_and_awkward_keys_and_values(kv: Driver) -> None:
    awkward = [b"\0", b"\0\1", b"\0\xff", b"\0\0\1", b"a\0\1\2", b"k" * 32768, b"\xff" * 9]
    for number, key in enumerate(awkward):
        kv.put(key, b"old")
        kv.put(key, bytes([number]) * 100_000)
    past = kv.machine.revision
    for number, key in enumerate(awkward):
        assert kv.range(key).kvs[0].value == bytes([number]) * 100_000
        assert kv.range(key, revision=2 * number + 2).kvs[0].value == b"old"
    assert keys_of(kv.range(**ALL)) == sorted(awkward)
    kv.delete(**ALL)
    assert keys_of(kv.range(**ALL, revision=past)) == sorted(awkward)
    assert keys_of(kv.range(**ALL, revision=2)) == [b"\0"]


def test_commands_of_one_entry_see_each_other(kv: Driver) -> None:
    results = kv.apply(
        PutRequest(key=b"a", value=b"1"),
        PutRequest(key=b"a", value=b"2", prev_kv=True),
        DeleteRangeRequest(**ALL, prev_kv=True),
        PutRequest(key=b"b", value=b"3"),
        DeleteRangeRequest(**ALL),
        DeleteRangeRequest(**ALL),
    )
    assert [result.header.revision for result in results] == [2, 3, 4, 5, 6, 6]
    assert results[1].prev_kv.value == b"1"
    assert results[2].prev_kvs[0].value == b"2"
    assert kv.values() == {}
    assert [kv.values(revision=revision) for revision in range(1, 6)] == [
        {}, {b"a": b"1"}, {b"a": b"2"}, {}, {b"b": b"3"},
    ]  # fmt: skip


def test_a_key_with_a_long_history_is_found_by_seeking(kv: Driver) -> None:
    """More versions than are stepped over, on both sides of the revision, between two other keys."""
    kv.put(b"a", b"first")
    kv.put(b"c", b"last")
    for number in range(3 * mvcc._SEEK_AFTER):
        kv.put(b"b", b"%d" % number)
    kv.delete(b"\0", b"\0")
    for number in range(3 * mvcc._SEEK_AFTER):
        revision = 4 + number
        assert kv.values(revision=revision) == {b"a": b"first", b"b": b"%d" % number, b"c": b"last"}
    assert kv.values() == {}


def test_malformed_and_unknown_commands_are_refused_and_change_nothing(kv: Driver) -> None:
    kv.put(b"a", b"1")
    garbage = (b"\xff", b"\x0a\x05a", b"\x08", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    commands = [Command(1, kind, payload) for kind in CommandKind for payload in garbage]
    commands += [Command(1, kind, b"") for kind in (0, 7, 31, 255)]
    commands += [command(MemberAttributes(name="nobody"))]
    results = kv.machine.apply(2, 1, [Group(1, 1, tuple(commands))])[0]
    codes = [refusal(result) for result in results]
    assert codes[:-5] == [RefusalCode.MALFORMED] * (len(codes) - 5)
    assert codes[-5:] == [RefusalCode.UNKNOWN_COMMAND] * 4 + [RefusalCode.MALFORMED]
    assert kv.machine.revision == 2
    assert kv.values() == {b"a": b"1"}
    assert kv.machine.members == {}


def test_a_transaction_nested_too_deep_for_the_decoder_is_refused(kv: Driver) -> None:
    payload = b""
    for _ in range(500):
        op = b"\x22" + varint(len(payload)) + payload
        payload = b"\x12" + varint(len(op)) + op
    (result,) = kv.machine.apply(1, 1, [Group(1, 1, (Command(1, CommandKind.TXN, payload),))])[0]
    assert refusal(result) is RefusalCode.MALFORMED


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def test_entries_without_commands_pass(kv: Driver) -> None:
    assert kv.machine.apply(1, 1, []) == []
    assert kv.machine.apply(5, 2, [Group(1, 1, ())]) == [[]]
    assert (kv.machine.applied_index, kv.machine.applied_term, kv.machine.revision) == (5, 2, 1)
    with pytest.raises(AssertionError):
        kv.machine.apply(5, 2, [])


def test_everything_is_there_after_a_restart(kv: Driver) -> None:
    kv.put(b"a", b"1")
    kv.put(b"a", b"2")
    kv.compact(2)
    kv.apply(MemberAttributes(id=7, name="n7", client_urls=["http://h:1"]))
    before = kv.machine
    after = StateMachine(kv.store)
    for name in (
        "applied_index",
        "applied_term",
        "revision",
        "compact_revision",
        "rolling_hash",
        "sweeping",
        "members",
    ):
        assert getattr(before, name) == getattr(after, name), name
    assert list(before.dump()) == list(after.dump())
    assert after.members[7].name == "n7"


def test_member_attributes_replace_each_other_by_id(kv: Driver) -> None:
    assert kv.apply(MemberAttributes(id=2**64 - 1, name="b")) == [Done(1)]
    kv.apply(MemberAttributes(id=3, name="a"))
    kv.apply(MemberAttributes(id=3, name="aa", client_urls=["x"]))
    assert [(member_id, member.name) for member_id, member in kv.machine.members.items()] == [
        (3, "aa"),
        (2**64 - 1, "b"),
    ]


def test_a_range_can_be_given_up_before_it_costs(kv: Driver) -> None:
    for number in range(10):
        kv.put(b"%d" % number)
    for fields in ({}, {"count_only": True}, {"limit": 3}, {"sort_order": RangeRequest.DESCEND}):
        request = RangeRequest(**ALL, **fields)
        with pytest.raises(RangeTooLong):
            kv.machine.range(request, walk_max=9)
        assert kv.machine.range(request, walk_max=10) == kv.machine.range(request)


def test_changes_give_whole_revisions_in_order(kv: Driver) -> None:
    kv.apply(PutRequest(key=b"a", value=b"1"), PutRequest(key=b"b", value=b"2"), DeleteRangeRequest(**ALL))
    changes = list(kv.machine.changes(1, 10))
    assert [(revision, [(event.type, event.kv.key) for event in events]) for revision, events in changes] == [
        (2, [(0, b"a")]),
        (3, [(0, b"b")]),
        (4, [(1, b"a"), (1, b"b")]),
    ]
    assert list(kv.machine.changes(4, 1)) == changes[2:]
    assert list(kv.machine.changes(5, 10)) == []
    assert list(kv.machine.changes(2, 0)) == []


def test_a_store_that_contradicts_itself_is_damaged() -> None:
    store = MemoryStore()
    kv = Driver(store)
    kv.put(b"a", b"1")
    record = next(key for key, _ in store.iterate(RECORD, b"s"))
    store.write((), [record])
    with pytest.raises(StoreDamaged, match="no record of change 0 of revision 2"):
        kv.range(b"a")
    for bad in (b"", b"\x02" + bytes(48), b"\x01" * 10):
        store.write([(STATE_KEY, bad)], ())
        with pytest.raises(StoreDamaged, match="not of format 2"):
            StateMachine(store)


def test_responses_carry_the_revision_and_leave_the_rest_of_the_header(kv: Driver) -> None:
    response = kv.put(b"a")
    assert response == PutResponse(header={"revision": 2})
    assert isinstance(kv.call(TxnRequest()).header.revision, int)
