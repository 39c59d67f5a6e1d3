"""The log, its quorums and its progress, piece by piece."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from raftkv.raft.config import RaftConfig
from raftkv.raft.errors import ConfigError
from raftkv.raft.log import Log
from raftkv.raft.progress import Inflights, Progress, ProgressState
from raftkv.raft.quorum import VoteResult, agreed_value, has_quorum, vote_result
from raftkv.raft.types import ConfState, Entry, EntryKind, HardState
from tests.unit.raft.harness import FakeDisk


def entry(index: int, term: int, size: int = 0) -> Entry:
    return Entry(index, term, EntryKind.NORMAL, b"x" * size)


def log_of(*terms: int, cache: int = 1 << 20) -> tuple[Log, FakeDisk]:
    """A log whose entries are all on disk, none in memory."""
    disk = FakeDisk(ConfState((1,)))
    disk.log = [entry(index, term) for index, term in enumerate(terms, 1)]
    return Log(disk, HardState(0, 0, 0), 0, cache), disk


class TestLog:
    def test_terms_come_from_memory_or_disk(self) -> None:
        log, _ = log_of(1, 1, 2)
        log.append([entry(4, 3)])
        assert [log.term(index) for index in range(-1, 6)] == [None, 0, 1, 1, 2, 3, None]

    @pytest.mark.parametrize(
        ("index", "term", "meet"),
        [
            (5, 3, (5, 3)),
            (5, 2, (3, 2)),
            (9, 9, (6, 5)),
            (6, 4, (5, 3)),
            (3, 1, (1, 1)),
            (2, 0, (0, 0)),
            (-3, 1, (0, 0)),
        ],
    )
    def test_where_two_logs_may_meet(self, index: int, term: int, meet: tuple[int, int]) -> None:
        log, _ = log_of(1, 2, 2, 3, 3, 5)
        assert log.last_not_after(index, term) == meet

    def test_where_they_may_meet_when_that_is_compacted(self) -> None:
        log, disk = log_of(3, 3, 5)
        log.commit_to(3)
        log.applying = 3
        log.applied_to(2)
        disk.compact(replace(disk.meta, index=2, term=3))
        log.compacted(2)
        assert log.last_not_after(3, 1) == (1, 0)
        assert log.last_not_after(1, 3) == (1, 0)
        assert log.last_not_after(3, 3) == (2, 3)

    def test_slices_are_cut_at_their_limit_but_never_empty(self) -> None:
        log, _ = log_of()
        log.append([entry(index, 1, 68) for index in range(1, 6)])
        for limit, count in ((0, 1), (100, 1), (199, 1), (200, 2), (1000, 5)):
            assert len(log.slice(1, 6, limit) or ()) == count
        assert log.slice(3, 3, 1000) == ()

    def test_a_slice_across_memory_and_disk_ends_where_the_disk_does(self) -> None:
        log, _ = log_of(1, 1)
        log.append([entry(3, 1)])
        assert [found.index for found in log.slice(1, 4, 1000) or ()] == [1, 2]
        assert [found.index for found in log.slice(3, 4, 1000) or ()] == [3]

    def test_what_is_not_durable_is_never_forgotten(self) -> None:
        log, disk = log_of(cache=0)
        log.append([entry(1, 1), entry(2, 1)])
        assert log.in_memory(1)
        disk.log = list(log.take_unstable())
        log.write_begins(1)
        assert log.in_memory(1)
        log.persisted(1)
        assert not log.in_memory(2)
        assert [found.index for found in log.slice(1, 3, 1000) or ()] == [1, 2]

    def test_truncation_beyond_memory(self) -> None:
        log, _ = log_of(1, 1, 2, 2)
        log.append([entry(5, 2)])
        log.truncate(3)
        log.append([entry(3, 4)])
        assert (log.last, log.last_term, log.stable, log.term(2)) == (3, 4, 2, 1)
        assert log.take_unstable() == (entry(3, 4),)

    def test_what_is_committed_is_never_truncated(self) -> None:
        log, _ = log_of(1, 1)
        log.commit_to(1)
        with pytest.raises(AssertionError):
            log.truncate(1)

    def test_holes_and_falling_terms_are_not_appended(self) -> None:
        log, _ = log_of(2)
        for wrong in (entry(3, 2), entry(1, 2), entry(2, 1)):
            with pytest.raises(AssertionError):
                log.append([wrong])

    def test_the_commit_index_never_falls_nor_leaves_the_log(self) -> None:
        log, _ = log_of(1, 1)
        assert log.commit_to(2)
        assert not log.commit_to(1)
        with pytest.raises(AssertionError):
            log.commit_to(3)

    def test_a_state_that_is_ahead_of_the_log_is_refused(self) -> None:
        disk = FakeDisk(ConfState((1,)))
        with pytest.raises(AssertionError, match="applied 5"):
            Log(disk, HardState(0, 0, 0), 5, 0)

    def test_committed_entries_are_handed_out_in_pieces(self) -> None:
        log, _ = log_of(*[1] * 10)
        log.commit_to(10)
        sizes = []
        while log.has_committed:
            sizes.append(len(log.take_committed(3 * 32)))
        assert sizes == [3, 3, 3, 1]


class TestQuorum:
    @pytest.mark.parametrize(
        ("voters", "values", "agreed"),
        [((), [], 0), ((1,), [7], 7), ((1, 2), [7, 5], 5), ((1, 2, 3), [7, 5, 3], 5), ((1, 2, 3, 4), [9, 7, 5, 3], 5)],
    )
    def test_agreed_value(self, voters: tuple[int, ...], values: list[int], agreed: int) -> None:
        conf = ConfState(voters)
        assert agreed_value(conf, dict(zip(voters, values, strict=True))) == agreed
        assert agreed_value(replace(conf, outgoing=(8,)), dict(zip(voters, values, strict=True))) == 0

    def test_joint_needs_both(self) -> None:
        conf = ConfState((1, 2, 3), (3, 4, 5))
        assert agreed_value(conf, {1: 9, 2: 8, 3: 7, 4: 6, 5: 5}) == 6
        assert vote_result(conf, {1: True, 2: True}) is VoteResult.PENDING
        assert vote_result(conf, {1: True, 2: True, 3: True, 4: True}) is VoteResult.WON
        assert vote_result(conf, {1: True, 2: True, 4: False, 5: False}) is VoteResult.LOST

    def test_learners_do_not_count(self) -> None:
        conf = ConfState((1, 2, 3), learners=(4, 5))
        assert not has_quorum(conf, {1: True, 4: True, 5: True})
        assert agreed_value(conf, {1: 9, 4: 9, 5: 9}) == 0


class TestProgress:
    def test_inflights_are_counted_and_freed(self) -> None:
        inflights = Inflights(3, 100)
        for last in (1, 2, 3):
            assert not inflights.full
            inflights.add(last, 10)
        assert inflights.full
        with pytest.raises(AssertionError):
            inflights.add(4, 10)
        inflights.free_to(2)
        assert (len(inflights), inflights.bytes) == (1, 10)
        inflights.add(9, 95)
        assert inflights.full

    def test_next_stays_behind_match_never(self) -> None:
        """R15, raft #149."""
        progress = Progress(10, 0, Inflights(5, 1000))
        assert progress.rejected(9, 3)
        assert progress.next == 4
        assert not progress.rejected(9, 1)  # old news
        assert progress.accepted(7)
        progress.become_replicate()
        progress.sent(9, 10)
        assert (progress.match, progress.next) == (7, 10)
        assert not progress.accepted(5)
        assert progress.rejected(9, 2)
        assert (progress.state, progress.next) == (ProgressState.PROBE, 8)

    def test_after_a_snapshot_it_probes_behind_it(self) -> None:
        progress = Progress(3, 0, Inflights(5, 1000))
        progress.become_snapshot(20)
        progress.become_probe()
        assert progress.next == 21


class TestConfig:
    def test_each_field_has_its_bound(self) -> None:
        for field in fields(RaftConfig):
            if field.type != "bool":
                with pytest.raises(ConfigError) as refused:
                    RaftConfig(**{field.name: -1})  # type: ignore[arg-type]
                assert refused.value.field == field.name

    def test_the_election_timeout_exceeds_the_heartbeat(self) -> None:
        with pytest.raises(ConfigError, match="election_ticks"):
            RaftConfig(heartbeat_ticks=10, election_ticks=10)
