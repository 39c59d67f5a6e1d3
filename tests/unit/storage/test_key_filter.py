"""What is certainly not in a database, and that LevelDB is not asked for it."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest

from raftkv.storage import key_filter, state_store
from raftkv.storage.errors import CorruptRecord
from raftkv.storage.key_filter import KeyFilter
from raftkv.storage.state_store import StateStore
from tests.unit.storage.stores import flip


def filled(keys: list[bytes]) -> KeyFilter:
    found = KeyFilter(iter(keys))
    assert not found.step(len(keys) + 1)
    return found


def errors(found: KeyFilter) -> float:
    """In which part of the keys that are not there it errs."""
    tries = 50_000
    return sum(found.may_have(b"absent %d" % number) for number in range(tries)) / tries


def test_what_is_there_is_never_denied_however_often_the_table_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_filter, "WORDS_MIN", 1 << 4)
    keys = [b"key %d" % number for number in range(5000)]
    found = filled([])
    for count, key in enumerate(keys):
        found.add_all([key])
        if count % 100 == 0:
            assert all(map(found.may_have, keys[: count + 1]))
    assert all(map(found.may_have, keys))
    assert errors(found) < 0.1  # after seven doublings


def test_it_errs_rarely() -> None:
    assert errors(filled([])) == 0
    assert errors(filled([b"%d" % number for number in range(130_000)])) < 0.01


def test_a_full_table_stays_as_large_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_filter, "WORDS_MIN", 1)
    monkeypatch.setattr(key_filter, "WORDS_MAX", 1 << 2)
    keys = [b"key %d" % number for number in range(1000)]
    found = filled(keys)
    assert all(map(found.may_have, keys))
    assert len(found._words) == 4


def test_until_it_has_seen_all_every_key_may_be_there() -> None:
    found = KeyFilter(iter([b"1", b"2", b"3"]))
    assert found.may_have(b"absent")
    assert found.step(2)
    assert found.may_have(b"absent")
    found.add_all([b"4"])
    assert found.step(1)  # whether there is more shows at the next
    assert not found.complete
    assert not found.step(1)
    assert found.complete
    assert not found.may_have(b"absent")
    assert all(map(found.may_have, [b"1", b"2", b"3", b"4"]))


def test_a_store_learns_the_keys_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(StateStore.open(tmp_path / "state", create=True, filtered=b"c")) as store:
        assert not store.learning
        store.write([(b"c%04d" % number, b"%d" % number) for number in range(1000)], ())
        store.write([(b"b", b""), (b"d", b"")], [b"c0500"])
    monkeypatch.setattr(state_store, "FILTERED_AT_OPEN", 300)
    with closing(StateStore.open(tmp_path / "state", create=False, filtered=b"c")) as store:
        assert store.learning
        store.write([(b"c2000", b"2000")], [b"c0600"])
        for _ in range(4):
            assert all(store.get(b"c%04d" % number) == b"%d" % number for number in (0, 299, 300, 999, 2000))
            assert store.get(b"c0500") is store.get(b"c0600") is store.get(b"c5000") is None
            assert store.get(b"b") == store.get(b"d") == b""
            store.learn(300)
        assert not store.learning
        assert not store.learn(300)
        store.write([(b"c5000", b"new")], [])
        assert store.get(b"c5000") == b"new"


def test_a_store_that_filters_nothing_has_nothing_to_learn(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(StateStore.open(tmp_path / "state", create=True)) as store:
            assert not store.learning
            assert not store.learn(10)
            store.write([(b"", b"empty"), (b"c", b"c")], ())
            assert (store.get(b""), store.get(b"c"), store.get(b"d")) == (b"empty", b"c", None)


def test_a_key_that_cannot_be_read_is_no_key_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with closing(StateStore.open(path, create=True, filtered=b"c")) as store:
        store.write([(b"c%06d" % number, bytes(100)) for number in range(20_000)], ())
        store.compact()
    flip(max(path.glob("*.ldb"), key=lambda file: file.stat().st_size), 5000)
    with pytest.raises(CorruptRecord, match="block checksum mismatch"):
        StateStore.open(path, create=False, filtered=b"c")
    with closing(StateStore.open(path, create=False)) as store:  # the one before was closed
        assert store.get(b"c019999") == bytes(100)


@pytest.mark.parametrize(("filtered", "merges"), [(b"", True), (b"c", False)])
def test_new_keys_make_leveldb_merge_nothing_before_its_levels_are_full(
    tmp_path: Path, filtered: bytes, merges: bool
) -> None:
    """Without the filter it merges after a few hundred "not there": should that end, the filter may go."""
    with closing(StateStore.open(tmp_path / "state", create=True, filtered=filtered)) as store:
        for number in range(0, 90_000, 100):  # three memtables
            keys = [b"c%08d" % (number * 7919 % 1_000_003 + place) for place in range(100)]
            assert [store.get(key) for key in keys] == [None] * 100
            store.write([pair for key in keys for pair in ((key, bytes(36)), (b"r" + key, bytes(200)))], ())
    told = (tmp_path / "state" / "LOG").read_text()
    assert len(re.findall(r"Level-0 table #\d+: \d+ bytes OK", told)) >= 3
    assert ("Compacting" in told) is merges
