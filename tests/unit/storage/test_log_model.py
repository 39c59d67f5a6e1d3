"""Any history of a log, with restarts, kills and power losses in it, against a plain list."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raftkv.raft.types import Compacted, ConfState, Entry, EntryKind, HardState, SnapshotMeta
from raftkv.storage.log_store import LogStore
from tests.unit.storage.contracts import CONF
from tests.unit.storage.stores import cut, image, new_log, newest_log_file, open_log

terms = st.integers(0, 2)
payloads = st.lists(st.tuples(terms, st.sampled_from([0, 1, 300, 40_000])), max_size=6)


class LogMachine(RuleBasedStateMachine):
    """The log on disk beside what it must hold."""

    log: LogStore

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="raftkv-log-"))
        self.images = 0
        self.data_dir = self.root / "0"
        self.hard_state = HardState(0, 0, 0)
        self.meta = SnapshotMeta(0, 0, CONF)
        self.state_name = "state-1"
        self.entries: list[Entry] = []  # contiguous behind meta
        self.synced_bytes = 0

    @initialize()
    def open_new(self) -> None:
        self.log = new_log(self.data_dir)

    @property
    def last(self) -> int:
        return self.meta.index + len(self.entries)

    def term(self, index: int) -> int:
        return self.meta.term if index == self.meta.index else self.entries[index - self.meta.index - 1].term

    @rule(back=st.integers(0, 4), new=payloads, raised=terms, vote=st.integers(0, 3), committed=st.integers(0, 9))
    def append(self, back: int, new: list[tuple[int, int]], raised: int, vote: int, committed: int) -> None:
        first = max(self.last + 1 - back, self.hard_state.commit + 1, self.meta.index + 1)
        term = prev = self.term(first - 1)
        added = []
        for place, (rise, size) in enumerate(new):
            term += rise
            index = first + place
            kind = EntryKind.CONF_CHANGE if size == 1 else EntryKind.NORMAL
            added.append(Entry(index, term, kind, b"%d:%d" % (index, term) + bytes(size)))
        term = max(term, self.hard_state.term) + raised
        if added:
            self.entries[first - self.meta.index - 1 :] = added
        if term == self.hard_state.term and self.hard_state.vote:
            vote = self.hard_state.vote
        self.hard_state = HardState(term, vote, min(self.last, self.hard_state.commit + committed))
        self.log.append(self.hard_state, added)
        assert prev <= term

    @rule(data=st.data())
    @precondition(lambda self: self.entries)
    def compact(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(self.meta.index + 1, self.last))
        meta = SnapshotMeta(index, self.term(index), ConfState((1, index + 1)))
        self.log.compact(meta)
        del self.entries[: index - self.meta.index]
        self.meta = meta
        self.hard_state = replace(self.hard_state, commit=max(self.hard_state.commit, index))

    @rule(data=st.data(), ahead=st.integers(0, 5), matches=st.booleans())
    def install(self, data: st.DataObject, ahead: int, matches: bool) -> None:
        if matches and self.entries:
            index = data.draw(st.integers(self.meta.index + 1, self.last))
            term = self.term(index)
            del self.entries[: index - self.meta.index]
        else:
            index = max(self.hard_state.commit, self.meta.index) + ahead
            if index <= self.last:
                term = self.term(index) + 1
            else:
                term = self.hard_state.term
            self.entries = []
        self.meta = SnapshotMeta(index, term, ConfState((index + 2,)))
        self.state_name = f"state-{index}"
        new_term = max(term, self.hard_state.term)
        vote = self.hard_state.vote if new_term == self.hard_state.term else 0
        self.hard_state = HardState(new_term, vote, max(self.hard_state.commit, index))
        self.log.install(self.meta, self.hard_state, self.state_name)

    @rule(whole=st.booleans())
    def restart(self, whole: bool) -> None:
        if whole:
            self.log._engine.compact()  # so that some of it is in tables
        self.log.close()
        self.log = open_log(self.data_dir)

    @rule()
    def kill(self) -> None:
        self.images += 1
        data_dir = image(self.data_dir, self.root / str(self.images))
        self.log.close()
        shutil.rmtree(self.data_dir)
        self.data_dir = data_dir
        self.log = open_log(data_dir)

    @rule(committed=st.integers(1, 5), lost=st.integers(1, 400))
    def commit_lazily_and_lose_power(self, committed: int, lost: int) -> None:
        """The end that was not synced may go; nothing else may."""
        file = newest_log_file(self.log._engine.path)
        synced = file.stat().st_size
        before = self.hard_state
        after = replace(before, commit=min(self.last, before.commit + committed))
        self.log.append(after, (), sync=False)
        self.images += 1
        data_dir = image(self.data_dir, self.root / str(self.images))
        self.log.close()
        shutil.rmtree(self.data_dir)
        self.data_dir = data_dir
        file = newest_log_file(data_dir / "log")
        cut(file, min(lost, file.stat().st_size - synced))
        self.log = open_log(data_dir)
        assert self.log.hard_state in (before, after)
        self.hard_state = self.log.hard_state

    @invariant()
    def holds_what_was_written(self) -> None:
        log = self.log
        assert log.initial_state() == (self.hard_state, self.meta.conf)
        assert (log.snapshot(), log.state_name) == (self.meta, self.state_name)
        assert (log.first_index(), log.last_index()) == (self.meta.index + 1, self.last)
        assert log.entries(log.first_index(), log.last_index() + 1, 1 << 40) == self.entries
        for index in range(self.meta.index, self.last + 1):
            assert log.term(index) == self.term(index)
        with pytest.raises(LookupError):
            log.term(self.last + 1)
        if self.meta.index:
            with pytest.raises(Compacted):
                log.term(self.meta.index - 1)

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
        shutil.rmtree(self.root)


TestLog = LogMachine.TestCase
TestLog.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
