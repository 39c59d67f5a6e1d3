"""What every log and every key-value store must do: run against LevelDB and against the in-memory fakes.

`check_log_store(make)` and `check_key_value_store(make)` take a function that makes an empty store. A fake that passes
can stand in for the real one in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from raftkv.raft.types import Compacted, ConfState, Entry, EntryKind, HardState, LogReader, SnapshotMeta
from raftkv.state.store import KeyValueStore

CONF = ConfState((1, 2, 3))


class Log(LogReader, Protocol):
    """The writing half of a log, beside the reading half that consensus knows."""

    @property
    def state_name(self) -> str: ...
    def append(self, hard_state: HardState | None, entries: Sequence[Entry], *, sync: bool = True) -> None: ...
    def compact(self, meta: SnapshotMeta) -> None: ...
    def install(self, meta: SnapshotMeta, hard_state: HardState | None, state_name: str) -> None: ...


def entry(index: int, term: int, data: bytes | None = None, kind: EntryKind = EntryKind.NORMAL) -> Entry:
    return Entry(index, term, kind, b"%d/%d" % (index, term) if data is None else data)


def entries(first: int, *terms: int) -> list[Entry]:
    """Entries from index `first` on, of these terms."""
    return [entry(first + place, term) for place, term in enumerate(terms)]


def everything(log: Log) -> list[Entry]:
    return log.entries(log.first_index(), log.last_index() + 1, 1 << 40)


def check_log_store(make: Callable[[], Log]) -> None:
    """All of the contract; `make` gives an empty log whose conf state is `CONF`."""
    for check in (
        _starts_empty,
        _gives_back_what_was_appended,
        _replaces_a_suffix,
        _cuts_at_bytes_max,
        _keeps_the_hard_state,
        _compacts,
        _installs_over_everything,
        _installs_and_keeps_what_follows,
        _installs_below_a_commit_index_that_has_moved_on,
    ):
        check(make())
    for mistake in MISTAKES:
        log = make()
        prepare_for_mistakes(log)
        with pytest.raises(AssertionError):
            mistake(log)


def _starts_empty(log: Log) -> None:
    assert log.initial_state() == (HardState(0, 0, 0), CONF)
    assert (log.first_index(), log.last_index(), log.term(0)) == (1, 0, 0)
    assert log.snapshot() == SnapshotMeta(0, 0, CONF)
    with pytest.raises(LookupError):
        log.term(1)
    with pytest.raises(LookupError):
        log.entries(1, 2, 100)
    assert log.entries(1, 1, 100) == []


def _gives_back_what_was_appended(log: Log) -> None:
    change = entry(2, 1, b"\x00\x01change", EntryKind.CONF_CHANGE)
    written = [entry(1, 1, b""), change, entry(3, 4, bytes(100_000))]
    log.append(HardState(4, 2, 1), written)
    assert everything(log) == written
    assert log.entries(2, 3, 1 << 20) == [change]
    assert [log.term(index) for index in range(4)] == [0, 1, 1, 4]
    assert log.last_index() == 3
    with pytest.raises(LookupError) as caught:
        log.term(4)
    assert not isinstance(caught.value, Compacted)


def _replaces_a_suffix(log: Log) -> None:
    log.append(HardState(2, 0, 1), entries(1, 1, 1, 1, 2, 2))
    log.append(HardState(3, 0, 1), entries(3, 3))
    assert everything(log) == entries(1, 1, 1, 3)
    log.append(None, entries(4, 3, 3))
    assert everything(log) == entries(1, 1, 1, 3, 3, 3)
    log.append(HardState(5, 0, 1), entries(2, 5))
    assert everything(log) == entries(1, 1, 5)
    assert (log.last_index(), log.term(2)) == (2, 5)


def _cuts_at_bytes_max(log: Log) -> None:
    log.append(HardState(1, 0, 0), [entry(index, 1, bytes(10)) for index in range(1, 6)])
    assert [e.index for e in log.entries(1, 6, 30)] == [1, 2, 3]
    assert [e.index for e in log.entries(1, 6, 29)] == [1, 2]
    assert [e.index for e in log.entries(2, 6, 0)] == [2]  # at least one
    assert [e.index for e in log.entries(2, 4, 1 << 20)] == [2, 3]
    assert log.entries(3, 3, 100) == []


def _keeps_the_hard_state(log: Log) -> None:
    log.append(HardState(2, 3, 0), ())
    assert log.initial_state()[0] == HardState(2, 3, 0)
    log.append(None, entries(1, 2))
    assert log.initial_state()[0] == HardState(2, 3, 0)
    log.append(HardState(2, 3, 1), (), sync=False)
    assert log.initial_state()[0] == HardState(2, 3, 1)


def _compacts(log: Log) -> None:
    log.append(HardState(3, 0, 5), entries(1, 1, 1, 2, 2, 3, 3))
    meta = SnapshotMeta(3, 2, ConfState((1, 2), (1, 2, 3), (4,), (3,), auto_leave=True))
    log.compact(meta)
    assert (log.first_index(), log.last_index()) == (4, 6)
    assert log.snapshot() == meta
    assert log.initial_state()[1] == meta.conf
    assert everything(log) == entries(4, 2, 3, 3)
    assert [log.term(index) for index in (3, 4, 5, 6)] == [2, 2, 3, 3]
    for index in (0, 1, 2):
        with pytest.raises(Compacted):
            log.term(index)
    with pytest.raises(Compacted):
        log.entries(3, 5, 100)
    log.compact(SnapshotMeta(2, 1, CONF))  # older than what is compacted: nothing
    assert log.snapshot() == meta
    log.compact(SnapshotMeta(6, 3, CONF))  # all of it
    assert (log.first_index(), log.last_index(), log.term(6)) == (7, 6, 3)
    log.append(None, entries(7, 3))
    assert everything(log) == entries(7, 3)


def _installs_over_everything(log: Log) -> None:
    log.append(HardState(3, 1, 2), entries(1, 1, 2, 2))
    meta = SnapshotMeta(10, 4, ConfState((1, 2, 5)))
    log.install(meta, HardState(5, 0, 10), "state-2")
    assert (log.first_index(), log.last_index(), log.term(10)) == (11, 10, 4)
    assert log.initial_state() == (HardState(5, 0, 10), meta.conf)
    assert log.state_name == "state-2"
    with pytest.raises(Compacted):
        log.term(3)
    # The entry at the snapshot's index is of another term: what follows it does not follow the snapshot.
    log.append(None, entries(11, 5, 5, 5))
    log.install(SnapshotMeta(12, 6, CONF), HardState(6, 0, 12), "state-3")
    assert (log.first_index(), log.last_index(), log.term(12)) == (13, 12, 6)
    log.append(None, entries(13, 6))
    assert everything(log) == entries(13, 6)


def _installs_below_a_commit_index_that_has_moved_on(log: Log) -> None:
    """A snapshot, and entries behind it that are committed already, may come in one turn (seed 2001, seven nodes)."""
    log.append(HardState(3, 1, 1), entries(1, 1, 1))
    hard_state = HardState(3, 1, 11)
    log.install(SnapshotMeta(10, 3, CONF), hard_state, "state-2")
    assert log.initial_state() == (HardState(3, 1, 10), CONF)
    log.append(hard_state, entries(11, 3, 3))
    assert log.initial_state() == (hard_state, CONF)
    assert everything(log) == entries(11, 3, 3)


def _installs_and_keeps_what_follows(log: Log) -> None:
    log.append(HardState(2, 0, 1), entries(1, 1, 1, 2, 2))
    log.install(SnapshotMeta(2, 1, CONF), HardState(2, 0, 2), "state-7")
    assert everything(log) == entries(3, 2, 2)
    assert log.state_name == "state-7"


MISTAKES: list[Callable[[Log], None]] = [
    lambda log: log.append(None, entries(5, 3)),  # a gap
    lambda log: log.append(None, [entry(4, 3), entry(6, 3)]),
    lambda log: log.append(None, entries(4, 2)),  # a term that falls
    lambda log: log.append(None, entries(2, 3)),  # over a committed entry
    lambda log: log.append(HardState(2, 0, 2), ()),
    lambda log: log.append(HardState(3, 2, 2), ()),  # a second vote
    lambda log: log.append(HardState(3, 1, 4), ()),  # commit behind the end
    lambda log: log.append(None, entries(4, 3), sync=False),
    lambda log: log.compact(SnapshotMeta(4, 3, CONF)),
    lambda log: log.compact(SnapshotMeta(2, 7, CONF)),
    lambda log: log.install(SnapshotMeta(1, 7, CONF), None, "state-9"),
]
"""What consensus never asks for once `prepare_for_mistakes` was done."""


def prepare_for_mistakes(log: Log) -> None:
    log.append(HardState(3, 1, 2), entries(1, 1, 2, 3))


def check_key_value_store(make: Callable[[], KeyValueStore]) -> None:
    """All of the contract; `make` gives an empty store."""
    for check in (_reads_what_was_written, _iterates_in_order, _views_are_consistent):
        check(make())


def _reads_what_was_written(store: KeyValueStore) -> None:
    assert store.get(b"a") is None
    store.write([(b"a", b"1"), (b"b", b""), (b"\x00", b"zero"), (b"\xff\xff", bytes(100_000))], ())
    assert [store.get(key) for key in (b"a", b"b", b"\x00")] == [b"1", b"", b"zero"]
    assert store.get(b"\xff\xff") == bytes(100_000)
    store.write([(b"a", b"2")], [b"b", b"never there"])
    assert (store.get(b"a"), store.get(b"b")) == (b"2", None)
    store.write((), ())
    store.write(iter([(b"c", b"3")]), iter([b"a"]))
    assert (store.get(b"a"), store.get(b"c")) == (None, b"3")


def _iterates_in_order(store: KeyValueStore) -> None:
    keys = [b"", b"\x00", b"a", b"a\x00", b"ab", b"b", b"\xff"]
    store.write([(key, b"v" + key) for key in reversed(keys)], ())
    pairs = [(key, b"v" + key) for key in keys]
    assert list(store.iterate(b"", None)) == pairs
    assert list(store.iterate(b"", None, reverse=True)) == pairs[::-1]
    for low in keys:
        for high in keys:
            expected = [pair for pair in pairs if low <= pair[0] < high]
            assert list(store.iterate(low, high)) == expected
            assert list(store.iterate(low, high, reverse=True)) == expected[::-1]
    assert list(store.iterate(b"aa", b"ab")) == []
    assert next(store.iterate(b"a", None)) == (b"a", b"va")  # and leave it


def _views_are_consistent(store: KeyValueStore) -> None:
    store.write([(b"a", b"1"), (b"b", b"1")], ())
    view = store.view()
    store.write([(b"a", b"2"), (b"c", b"2")], [b"b"])
    assert [view.get(key) for key in (b"a", b"b", b"c")] == [b"1", b"1", None]
    assert list(view.iterate(b"", None)) == [(b"a", b"1"), (b"b", b"1")]
    assert list(view.iterate(b"b", None, reverse=True)) == [(b"b", b"1")]
    later = store.view()
    view.close()
    store.write([(b"a", b"3")], ())
    assert later.get(b"a") == b"2"
    later.close()
    assert store.get(b"a") == b"3"
