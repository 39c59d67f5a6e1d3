"""The lessor: nothing ends early, nothing lives much too long, and what it costs."""

from __future__ import annotations

import random
import time

import pytest

from raftkv.server import lessor as module
from raftkv.server.lessor import LeaseLeft, Lessor, Work
from raftkv.state.leases import LeaseChange, LeaseRecord
from raftkv.state.sessions import SessionChange

GONE = LeaseLeft(1, 0, 0)


class Bench:
    """A lessor, its clock, and the state it looks at."""

    def __init__(self) -> None:
        self.now = 5_000.0
        self.leases: dict[int, LeaseRecord] = {}
        self.sessions: dict[int, int] = {}
        self.keys: dict[int, int] = {}
        self.lessor = Lessor(lambda: self.now)
        self.now += 2_000.0  # nobody has led for so short a time

    def lead(self, term: int = 1) -> None:
        self.lessor.heard(term, [], self.leases)
        self.lessor.lead(term, self.leases, self.sessions)

    def follow(self, term: int) -> None:
        self.lessor.heard(term, [], self.leases)
        self.lessor.follow()

    def grant(self, lease: int, ttl_s: float) -> None:
        self.leases[lease] = LeaseRecord(int(ttl_s * 1000), 0)
        self.lessor.applied([(LeaseChange.GRANTED, lease)], [])

    def remove(self, lease: int) -> None:
        del self.leases[lease]
        self.lessor.applied([(LeaseChange.EXPIRED, lease)], [])

    def work(self) -> Work:
        return self.lessor.work(lambda lease: self.keys.get(lease, 0))

    def pass_time(self, seconds: float, step_s: float = 0.1) -> Work:
        """Let time pass as a node does, and gather what comes of it; what expires is applied at once."""
        total = Work()
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + step_s)
            work = self.work()
            total.expired += work.expired
            total.checkpoints += work.checkpoints
            total.ended_sessions += work.ended_sessions
            for lease in work.expired:
                self.remove(lease)
            for lease, left_ms in work.checkpoints:
                self.leases[lease] = LeaseRecord(self.leases[lease].ttl_ms, left_ms)
                self.lessor.heard(self.lessor.term, [(LeaseChange.CHECKPOINTED, lease)], self.leases)
            for session in work.ended_sessions:
                del self.sessions[session]
                self.lessor.applied([], [(SessionChange.EXPIRED, session)])
        return total


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_lease_lives_its_time_and_the_grace_and_not_much_longer(bench: Bench) -> None:
    bench.lead()
    bench.work()
    bench.grant(1, 5)
    assert bench.pass_time(5.4).expired == []
    assert bench.lessor.look(1) == LeaseLeft(1, 0, 5000), "in its grace: no time left, but there"
    assert bench.pass_time(0.4).expired == [1]


def test_renewing_gives_the_whole_time_again(bench: Bench) -> None:
    bench.lead()
    bench.grant(1, 5)
    for _ in range(10):
        assert bench.pass_time(4).expired == []
        assert bench.lessor.renew(1) == LeaseLeft(1, 5000, 5000)
    assert bench.pass_time(5.4).expired == []
    assert bench.pass_time(0.3).expired == [1]
    assert bench.lessor.renew(1) == GONE


def test_looking_does_not_renew_and_shows_no_grace(bench: Bench) -> None:
    bench.lead()
    bench.grant(1, 5)
    assert bench.lessor.look(1) == LeaseLeft(1, 5000, 5000)
    bench.pass_time(2)
    assert bench.lessor.look(1).remaining_ms == pytest.approx(3000, abs=2)
    assert bench.lessor.look(2) == LeaseLeft(2, 0, 0)
    assert bench.pass_time(3.6).expired == [1]


def test_once_proposed_it_counts_as_gone(bench: Bench) -> None:
    bench.lead()
    bench.work()
    bench.grant(1, 5)
    bench.now += 6
    bench.work()  # the first look after a pause only listens
    bench.now += 0.6
    assert bench.work().expired == [1]
    assert bench.lessor.renew(1) == GONE
    assert bench.lessor.look(1) == GONE
    assert bench.work().expired == [], "proposed once"
    bench.lessor.not_expired([1], [])
    assert bench.lessor.renew(1) == GONE, "the proposal may come through yet"
    assert bench.pass_time(0.9).expired == []
    assert bench.pass_time(0.2).expired == [1], "again, when it came to nothing"


def test_one_past_its_deadline_is_renewed_while_it_is_not_proposed(bench: Bench) -> None:
    bench.lead()
    bench.work()
    bench.grant(1, 5)
    bench.now += 60  # the process was paused
    assert bench.work().expired == []
    assert bench.lessor.renew(1) == LeaseLeft(1, 5000, 5000), "its keepalive waited in a socket"
    assert bench.pass_time(5.4).expired == []
    assert bench.pass_time(0.2).expired == [1]


def test_the_same_id_granted_anew_begins_anew(bench: Bench) -> None:
    bench.lead()
    bench.grant(1, 5)
    bench.pass_time(4)
    del bench.leases[1]
    bench.lessor.applied([(LeaseChange.REVOKED, 1)], [])
    assert bench.lessor.look(1) == GONE
    bench.grant(1, 8)
    assert bench.pass_time(8.4).expired == []
    assert bench.pass_time(0.2).expired == [1]
    # Both in one turn: the events come when the state has gone through both.
    bench.leases[2] = LeaseRecord(3000, 0)
    bench.lessor.applied([(LeaseChange.GRANTED, 2), (LeaseChange.REVOKED, 2), (LeaseChange.GRANTED, 2)], [])
    assert bench.lessor.look(2) == LeaseLeft(2, 3000, 3000)
    bench.lessor.applied([(LeaseChange.GRANTED, 3), (LeaseChange.REVOKED, 3)], [])
    assert bench.lessor.look(3) == LeaseLeft(3, 0, 0)


def test_a_new_leader_gives_everybody_the_whole_time_from_when_it_has_won(bench: Bench) -> None:
    bench.leases[1] = LeaseRecord(5000, 0)
    bench.leases[2] = LeaseRecord(20_000, 7_000)  # as the last leader noted
    bench.lead(term=7)
    assert bench.lessor.term == 7
    assert bench.lessor.look(2).remaining_ms == 7000
    assert bench.pass_time(5.4).expired == []
    assert bench.pass_time(0.2).expired == [1]
    assert bench.pass_time(1.8).expired == []
    assert bench.pass_time(0.2).expired == [2]


def test_who_does_not_lead_knows_nothing(bench: Bench) -> None:
    bench.leases[1] = LeaseRecord(5000, 0)
    assert bench.lessor.renew(1) == GONE
    bench.lead()
    bench.lessor.follow()
    assert bench.lessor.term == 0
    assert bench.lessor.renew(1) == GONE
    bench.now += 1000
    assert bench.work() == Work()
    bench.grant(2, 5)
    assert bench.lessor.look(2) == LeaseLeft(2, 0, 0)


def test_leases_that_nobody_renews_are_checkpointed_and_a_row_of_leaders_ends_them(bench: Bench) -> None:
    bench.grant(1, 60)
    born = bench.now
    for term in range(1, 100):
        bench.lead(term)
        if bench.pass_time(31).expired:
            break
    assert 1 not in bench.leases
    assert 60 <= bench.now - born <= 3 * 60


def test_what_is_checkpointed(bench: Bench) -> None:
    bench.lead()
    bench.grant(1, 60)
    bench.grant(2, 9)
    bench.grant(3, 60)
    for _ in range(12):
        bench.pass_time(2.5)
        bench.lessor.renew(3)
    assert bench.leases[1].remaining_ms == pytest.approx(30_000, abs=200)
    assert bench.leases[3].remaining_ms == 0
    assert bench.lessor.must_clear(1)
    assert not bench.lessor.must_clear(3)
    assert 2 not in bench.leases
    checkpoints = bench.pass_time(29).checkpoints
    assert [left_ms // 1000 for lease, left_ms in checkpoints if lease == 1] == [14, 7, 2]


def test_a_renewal_must_undo_the_checkpoint_first(bench: Bench) -> None:
    bench.lead()
    bench.grant(1, 60)
    bench.pass_time(31)
    assert bench.lessor.renew(1) == LeaseLeft(1, 60_000, 60_000)
    first = bench.lessor.must_clear(1)
    assert first
    bench.pass_time(31)  # while the undoing is under way, another one is proposed behind it
    bench.lessor.cleared({1: first})
    second = bench.lessor.must_clear(1)
    assert second
    assert second != first
    bench.lessor.cleared({1: second, 99: 4})
    assert not bench.lessor.must_clear(1)
    # And a new leader finds the checkpoint in the state.
    bench.leases[1] = LeaseRecord(60_000, 20_000)
    bench.lead(term=2)
    bench.lessor.renew(1)
    assert bench.lessor.must_clear(1)


def test_many_that_end_at_once_end_at_a_bounded_rate(bench: Bench) -> None:
    bench.lead()
    bench.work()
    for lease in range(1, 3_001):
        bench.grant(lease, 2)
    assert bench.pass_time(2.4).expired == []
    counts = [len(bench.pass_time(0.1).expired) for _ in range(40)]
    assert sum(counts) == 3_000
    assert max(counts) <= module.EXPIRIES_A_SECOND * module.ALLOWANCE_S
    assert sum(counts[:20]) <= 2_300


def test_leases_with_many_keys_end_one_by_one(bench: Bench) -> None:
    bench.lead()
    bench.work()
    for lease in range(1, 11):
        bench.keys[lease] = 1_000
        bench.grant(lease, 2)
    bench.pass_time(2.4)
    counts = [len(bench.pass_time(0.1).expired) for _ in range(20)]
    assert max(counts) == 1
    assert sum(counts) == 10


def test_checkpoints_keep_to_their_rate(bench: Bench) -> None:
    bench.lead()
    for lease in range(1, 5_001):
        bench.grant(lease, 100)
    assert bench.pass_time(49).checkpoints == []
    assert len(bench.pass_time(3).checkpoints) <= 2.2 * module.CHECKPOINTS_A_SECOND
    assert len(bench.pass_time(5).checkpoints) >= 2_700


def test_a_checkpoint_runs_on_every_node_whoever_leads(bench: Bench) -> None:
    bench.leases[1] = LeaseRecord(60_000, 0)
    bench.lead()
    ((lease, left_ms),) = bench.pass_time(31).checkpoints
    assert (lease, left_ms) == (1, pytest.approx(29_950, abs=100))
    for term in range(2, 20):  # none stays for long enough to say it once more
        bench.follow(term)
        assert bench.pass_time(1).expired == []
        bench.lead(term)
        assert bench.pass_time(0.4).expired == []
    bench.lead(20)
    assert bench.pass_time(7).expired == [1]


def test_a_new_leader_checkpoints_at_once_what_the_one_before_had_no_time_for(bench: Bench) -> None:
    bench.leases[1] = LeaseRecord(60_000, 0)
    bench.lead(1)
    bench.pass_time(29)
    bench.lead(2)
    assert [lease for lease, _ in bench.pass_time(0.5).checkpoints] == [1]
    bench.leases[2] = LeaseRecord(60_000, 0)
    bench.pass_time(40)
    bench.lead(3)
    bench.leases[3] = LeaseRecord(60_000, 0)
    bench.lessor.applied([(LeaseChange.GRANTED, 3)], [])
    assert [lease for lease, _ in bench.pass_time(25).checkpoints if lease != 1] == [], "there had been time"


def test_nothing_expires_before_keepalives_that_found_no_leader_are_heard(bench: Bench) -> None:
    bench.leases[1] = LeaseRecord(5_000, 1_000)
    bench.follow(1)
    bench.lessor.heard(1, [(LeaseChange.CHECKPOINTED, 1)], bench.leases)
    bench.now += 60  # without a leader
    bench.lead(2)
    assert bench.pass_time(0.4).expired == []
    assert bench.lessor.renew(1).granted_ms == 5_000
    assert bench.pass_time(5).expired == []


def test_a_hundred_thousand_leases_that_are_kept_alive_cost_no_checkpoints(bench: Bench) -> None:
    """But for those of a time in which leaders follow one another fast; and these end with it."""
    count = 100_000
    for lease in range(1, count + 1):
        bench.leases[lease] = LeaseRecord(60_000, 0)

    def keep_alive(seconds: int) -> int:
        """Each is renewed every twenty seconds."""
        checkpoints = 0
        for tenth in range(seconds * 10):
            bench.now += 0.1
            work = bench.work()
            assert not work.expired
            checkpoints += len(work.checkpoints)
            for lease in range(1 + tenth % 200, count + 1, 200):
                bench.lessor.renew(lease)
        return checkpoints

    bench.lead(1)
    assert keep_alive(45) == 0
    bench.lead(2)
    assert keep_alive(5) == 0
    bench.lead(3)
    assert 0 < keep_alive(20) <= 20.2 * module.CHECKPOINTS_A_SECOND
    assert keep_alive(25) == 0
    bench.lead(4)
    assert keep_alive(20) == 0


def test_sessions_end_when_they_are_not_used(bench: Bench) -> None:
    bench.sessions[1] = 60_000
    bench.lead()
    bench.sessions[2] = 60_000
    bench.lessor.applied([], [(SessionChange.OPENED, 2)])
    for _ in range(5):
        assert bench.pass_time(50, 1.0).ended_sessions == []
        bench.lessor.applied([], [(SessionChange.USED, 1), (SessionChange.USED, 2), (SessionChange.USED, 2)])
    assert bench.pass_time(60 + module.SESSION_GRACE_S - 2, 1.0).ended_sessions == []
    assert sorted(bench.pass_time(4, 1.0).ended_sessions) == [1, 2]
    bench.lessor.applied([], [(SessionChange.USED, 1)])  # too late, and refused by the state
    assert bench.pass_time(200, 1.0).ended_sessions == []


def test_a_session_that_was_not_ended_is_ended_later(bench: Bench) -> None:
    bench.sessions[1] = 10_000
    bench.lead()
    while not (ended := bench.work().ended_sessions):
        bench.now += 0.5
    assert ended == [1]
    bench.lessor.not_expired([], ended)
    bench.now += 0.5
    assert bench.work().ended_sessions == []
    bench.now += 0.6
    assert bench.work().ended_sessions == [1]


@pytest.mark.parametrize("seed", range(5))
def test_no_lease_ends_before_the_time_last_granted(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    bench.lead()
    safe_until: dict[int, float] = {}
    term = 1
    for _ in range(3_000):
        choice = rng.random()
        lease = rng.randrange(1, 40)
        if choice < 0.1 and lease not in bench.leases:
            bench.grant(lease, rng.choice((2, 5, 10, 30, 100)))
            safe_until[lease] = bench.now + bench.leases[lease].ttl_ms / 1000
        elif choice < 0.35:
            if bench.lessor.renew(lease).granted_ms:
                mark = bench.lessor.must_clear(lease)
                if mark:  # the node undoes the checkpoint before it tells
                    bench.leases[lease] = LeaseRecord(bench.leases[lease].ttl_ms, 0)
                    bench.lessor.heard(term, [(LeaseChange.CHECKPOINTED, lease)], bench.leases)
                    bench.lessor.cleared({lease: mark})
                safe_until[lease] = bench.now + bench.leases[lease].ttl_ms / 1000
        elif choice < 0.36:
            term += 1
            bench.lead(term)
        else:
            bench.now += rng.choice((0.05, 0.1, 0.1, 0.1, 0.5, 3.0))
            work = bench.work()
            for expired in work.expired:
                assert bench.now >= safe_until.pop(expired)
                bench.remove(expired)
            for checkpointed, left_ms in work.checkpoints:
                bench.leases[checkpointed] = LeaseRecord(bench.leases[checkpointed].ttl_ms, left_ms)
                bench.lessor.heard(term, [(LeaseChange.CHECKPOINTED, checkpointed)], bench.leases)


def test_a_hundred_thousand_leases_cost_little(bench: Bench) -> None:
    for lease in range(1, 100_001):
        bench.leases[lease] = LeaseRecord(60_000, 0)
    before = time.process_time()
    bench.lead()
    assert time.process_time() - before < 0.2, "taking over must not hold up heartbeats"
    rng = random.Random(1)
    worked = renewed = 0.0
    for _ in range(600):  # a minute
        bench.now += 0.1
        before = time.process_time()
        bench.work()
        worked += time.process_time() - before
        before = time.process_time()
        for _ in range(500):  # each three times a minute
            bench.lessor.renew(rng.randrange(1, 100_001))
        renewed += time.process_time() - before
    # Of 60 seconds; measured 0.5 and 0.6.
    assert worked < 3.0
    assert renewed < 6.0
