"""How long leases and sessions have left: known to the leader alone, in its memory, on a clock that only runs forward.

    not leading --its own term's first entry is applied--> leading --role or term lost--> not leading

    deadline = moment of grant, renewal or taking over + time to live + grace
        or   = moment in which this node has applied the last checkpoint + what that has left + grace

What is replicated is that a lease exists and how long it may live; see `raftkv.state.leases`. A new leader gives each
lease its whole time again, but for those that were checkpointed: their time runs on every node, whoever leads.

Why no lease ends early, whatever is slow, paused or cut off: a client sends its keepalive at s. The leader of term T
acknowledges it only after a round that proved its leadership and began at r >= s, and sets the deadline >= r + ttl. A
leader of a later term needs a vote of somebody in that round, given after it, so it wins later than s and sets every
deadline >= s + ttl too. What the leader of T believed when it was deposed is of no effect: LEASE_EXPIRE counts only in
the term it was proposed in. No two clocks are compared, only the rates of clocks matter, and the grace covers those.

A lease whose deadline has passed is proposed for expiry (rule Z7) and from then on counts as gone: it is not renewed
any more. One that nobody has renewed for half its time is checkpointed. That must be undone in the log before a renewal
is acknowledged, so who finds it in the state knows: nothing was acknowledged since the leader of then said what is
left, and he said it before we applied it; what is left from that moment on is never too little.

So each lease ends within three times its time, whatever elections there are. A leader that stays for half its time
checkpoints it. Who follows one that did not, checkpoints at once what is not: leases that are kept alive cost their
checkpoints then, and the undoing of these, but only when leaders follow one another so fast. Once it is done, the time
runs. (A node that starts anew begins again with what the last checkpoint has left, so these are repeated.)

Nothing is scanned: a lease costs about two heap operations for each of its times to live. See `deadlines`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from raftkv.server.deadlines import Deadlines
from raftkv.state.leases import LeaseChange, LeaseEvent, LeaseRecord
from raftkv.state.sessions import SessionChange, SessionEvent

GRACE_S = 0.5
GRACE_SHARE = 0.02
"""Beyond its time a lease lives on for so long, or this share of its time: nothing is lost by being late."""

EXPIRIES_A_SECOND = 1_000
EXPIRED_KEYS_MAX = 1_000
"""Once so many keys are to be deleted, the rest waits for the next time: applying it must not hold up heartbeats."""
CHECKPOINTS_A_SECOND = 1_000
"""As many as may end; those of one time are one entry."""
CHECKPOINT_SHARE = 0.5
"""Of its time without a renewal, then it is checkpointed: clients renew after a third."""
CHECKPOINT_AGAIN_S = 5.0
CHECKPOINT_AGAIN_SHARE = 0.25
CHECKPOINT_LONG_S = 300.0
CHECKPOINT_LONG_SHARE = 1 / 16
"""Once it is checkpointed, the next is due after half of what is left; not before the lesser of the first two has
passed, and not after the greater of the last two."""
ALLOWANCE_S = 0.2
"""What was not used of an allowance is saved up for so long."""
SESSION_GRACE_S = 30.0
"""Nothing waits for the end of a session, and a client that comes late loses what it was sure of."""

STEPS_MAX = 5_000
"""What one call of `work` looks at, at most: some milliseconds."""
PAUSE_S = 1.0
"""A gap between two calls of `work` from which on the process was held up: what waits for it in its sockets is heard
before anything expires."""


class LeaseLeft(NamedTuple):
    """What the leader knows of a lease. `granted_ms` 0: there is none (any more)."""

    lease: int
    remaining_ms: int
    granted_ms: int


@dataclass(slots=True)
class Work:
    """What the leader is to propose now."""

    expired: list[int] = field(default_factory=list)
    checkpoints: list[tuple[int, int]] = field(default_factory=list)  # lease, milliseconds left
    ended_sessions: list[int] = field(default_factory=list)


class _Allowance:
    """So many a second, and not all of them at once after a quiet time."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = 0.0
        self._at: float | None = None

    def take(self, now: float) -> int:
        """What may be done now."""
        if self._at is not None:
            self._left = min(self._left + (now - self._at) * self._rate, self._rate * ALLOWANCE_S)
        self._at = now
        return int(self._left)

    def spend(self, count: int) -> None:
        self._left -= count


class _Live:
    """One lease of which we know when it ends."""

    __slots__ = ("checkpoint_at", "checkpointed", "deadline", "expiring", "grace_s", "queued", "ttl_s")

    def __init__(self, record: LeaseRecord, since: float, mark: int, *, soon: bool) -> None:
        """
        Args:
            since: when it began to have what the record says.
            soon: it is to be checkpointed at once if it is not.
        """
        self.ttl_s = record.ttl_ms / 1000
        self.grace_s = max(GRACE_S, GRACE_SHARE * self.ttl_s)
        self.checkpointed = mark if record.remaining_ms else 0  # in the state, or on the way there: by which mark
        self.expiring = False  # proposed for expiry
        self.queued = False  # its deadline had come, and it waits for its turn to be proposed
        left_s = record.remaining_ms / 1000 or self.ttl_s
        self.deadline = since + left_s + self.grace_s
        if record.remaining_ms:
            self.checkpoint_at = self._next_checkpoint(since)
        else:
            self.checkpoint_at = since if soon else since + CHECKPOINT_SHARE * self.ttl_s

    def renew(self, now: float) -> None:
        self.deadline = max(self.deadline, now + self.ttl_s + self.grace_s)
        self.checkpoint_at = now + CHECKPOINT_SHARE * self.ttl_s

    def mark(self, now: float, mark: int) -> None:
        """It is being checkpointed."""
        self.checkpointed = mark
        self.checkpoint_at = self._next_checkpoint(now)

    def left_s(self, now: float) -> float:
        """Of its time, without the grace."""
        return max(0.0, self.deadline - self.grace_s - now)

    def wake_at(self) -> float:
        return min(self.deadline, self.checkpoint_at)

    def _next_checkpoint(self, now: float) -> float:
        """After one at `now`."""
        left_s = self.left_s(now)
        least_s = min(CHECKPOINT_AGAIN_S, CHECKPOINT_AGAIN_SHARE * self.ttl_s)
        most_s = max(CHECKPOINT_LONG_S, CHECKPOINT_LONG_SHARE * self.ttl_s)
        step_s = max(least_s, min(left_s / 2, most_s))
        return now + step_s if step_s < left_s else float("inf")


class Lessor:
    """See the module. Everything but `clock` is given to it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.term = 0  # the one it leads in, 0: it does not
        self._clock = clock
        self._records: Mapping[int, LeaseRecord] = {}
        self._ttls: Mapping[int, int] = {}
        self._since = 0.0
        self._mark = 0
        self._untouched: list[int] = []  # leases there at the beginning; each gets its _Live in time, or when asked for
        self._untouched_sessions: list[int] = []
        self._live: dict[int, _Live] = {}
        self._wakes = Deadlines()
        self._sessions = Deadlines()
        self._due_leases: deque[int] = deque()  # those whose moment has come wait in these until it is their turn
        self._due_checkpoints: deque[int] = deque()
        self._due_sessions: deque[int] = deque()
        self._queued_sessions: set[int] = set()  # those in _due_sessions
        self._expiries = _Allowance(EXPIRIES_A_SECOND)
        self._checkpoints = _Allowance(CHECKPOINTS_A_SECOND)
        self._worked_at = 0.0
        self._hold_until = 0.0
        # In whatever role.
        self._noted: dict[int, float] = {}  # lease -> when we applied the checkpoint that its record has
        self._heard_term = 0
        self._heard_at = clock()  # when the first entry of that term was applied
        self._reign_s = float("inf")  # how long the term before that had lasted

    # In whatever role.

    def heard(self, term: int, events: Iterable[LeaseEvent], leases: Mapping[int, LeaseRecord]) -> None:
        """What applying entries has done, the last of them of `term`; before anything else is told of it.

        Args:
            events: in order.
            leases: as they are now.
        """
        now = self._clock()
        if term != self._heard_term:
            self._reign_s = now - self._heard_at
            self._heard_term, self._heard_at = term, now
        for _, lease in events:
            record = leases.get(lease)
            if record is not None and record.remaining_ms:
                self._noted[lease] = now
            else:
                self._noted.pop(lease, None)

    def restored(self) -> None:
        """Another state has taken the place of the one we heard of."""
        self._noted.clear()

    # Leading.

    def lead(self, term: int, leases: Mapping[int, LeaseRecord], session_ttls_ms: Mapping[int, int]) -> None:
        """We lead in `term`, and have applied its first entry: so `leases` has all that earlier leaders did.

        Args:
            leases, session_ttls_ms: views that follow the state.
        """
        self.follow()
        self.term = term
        self._records, self._ttls = leases, session_ttls_ms
        self._since = self._worked_at = self._clock()
        self._hold_until = self._since + GRACE_S  # keepalives that found nobody to lead are heard first
        self._expiries.take(self._since)
        # Not all at once: 100,000 of them would hold up the first heartbeats. None can be due so early.
        self._untouched = list(leases)
        self._untouched_sessions = list(session_ttls_ms)

    def follow(self) -> None:
        """We do not lead (any more): nothing is known here."""
        self.term = 0
        self._records, self._ttls = {}, {}
        self._untouched, self._untouched_sessions = [], []
        self._live = {}
        self._wakes.clear()
        self._sessions.clear()
        for waiting in (self._due_leases, self._due_checkpoints, self._due_sessions):
            waiting.clear()
        self._queued_sessions.clear()

    def applied(self, leases: Iterable[LeaseEvent], sessions: Iterable[SessionEvent]) -> None:
        """What applying has done, in order."""
        if not self.term:
            return
        now = self._clock()
        for change, lease in leases:
            if change is LeaseChange.GRANTED:
                self._forget(lease)  # the same id again, within one turn
                self._touch(lease, now)
            elif change is not LeaseChange.CHECKPOINTED:
                self._forget(lease)
        used = {session: change for change, session in sessions}
        for session, session_change in used.items():
            if session_change is SessionChange.EXPIRED:
                self._sessions.discard(session)
            else:
                self._touch_session(session, now)

    # Questions; `renew` only after a round that proved the leadership, begun when the question was there.

    def renew(self, lease: int) -> LeaseLeft:
        """Give a lease its whole time again. It may be told only when `must_clear` says so."""
        live = self._known(lease)
        if live is None or live.expiring:
            return LeaseLeft(lease, 0, 0)
        live.renew(self._clock())
        self._wakes.set(lease, live.wake_at())
        ttl_ms = round(live.ttl_s * 1000)
        return LeaseLeft(lease, ttl_ms, ttl_ms)

    def must_clear(self, lease: int) -> int:
        """Not 0: a checkpoint of the lease must be undone in the log before its renewal is told; then say `cleared`."""
        live = self._live.get(lease)
        return live.checkpointed if live is not None else 0

    def cleared(self, marks: Mapping[int, int]) -> None:
        """Leases whose checkpoint is undone -> what `must_clear` said of them when that was proposed."""
        for lease, mark in marks.items():
            live = self._live.get(lease)
            if live is not None and live.checkpointed == mark:  # else there is another one, on its way behind that
                live.checkpointed = 0

    def look(self, lease: int) -> LeaseLeft:
        """How long a lease has left."""
        live = self._known(lease)
        if live is None or live.expiring:
            return LeaseLeft(lease, 0, 0)
        return LeaseLeft(lease, int(live.left_s(self._clock()) * 1000), round(live.ttl_s * 1000))

    # Time.

    def work(self, keys_of: Callable[[int], int]) -> Work:
        """What is to be proposed now; to be called about ten times a second.

        Args:
            keys_of: how many keys a lease has.
        """
        work = Work()
        if not self.term:
            return work
        now = self._clock()
        if now - self._worked_at > PAUSE_S:
            self._hold_until = now + GRACE_S
        self._worked_at = now
        self._touch_some()
        for lease in self._wakes.due(now, STEPS_MAX):
            self._wake(lease, now)
        for session in self._sessions.due(now, STEPS_MAX):
            if session not in self._queued_sessions:
                self._queued_sessions.add(session)
                self._due_sessions.append(session)
        if now >= self._hold_until:
            self._expire(now, work, keys_of)
        self._checkpoint(now, work)
        return work

    def _wake(self, lease: int, now: float) -> None:
        live = self._live[lease]
        if live.deadline <= now:
            if not live.queued:
                live.queued = True
                self._due_leases.append(lease)
        elif live.checkpoint_at <= now:
            self._due_checkpoints.append(lease)
            self._wakes.set(lease, live.deadline)
        else:
            self._wakes.set(lease, live.wake_at())

    def _expire(self, now: float, work: Work, keys_of: Callable[[int], int]) -> None:
        allowed = self._expiries.take(now)
        keys = 0
        while self._due_leases and len(work.expired) < allowed and keys < EXPIRED_KEYS_MAX:
            lease = self._due_leases.popleft()
            live = self._live.get(lease)
            if live is None or not live.queued:
                continue  # gone
            live.queued = False
            if live.deadline <= now:  # else it was renewed while it waited
                live.expiring = True
                work.expired.append(lease)
                keys += keys_of(lease)
        while self._due_sessions and len(work.expired) + len(work.ended_sessions) < allowed:
            session = self._due_sessions.popleft()
            self._queued_sessions.discard(session)
            if session in self._ttls and session not in self._sessions:  # not used while it waited
                work.ended_sessions.append(session)
        self._expiries.spend(len(work.expired) + len(work.ended_sessions))

    def _checkpoint(self, now: float, work: Work) -> None:
        allowed = self._checkpoints.take(now)
        while self._due_checkpoints and len(work.checkpoints) < allowed:
            lease = self._due_checkpoints.popleft()
            live = self._live.get(lease)
            if live is None or live.expiring or live.checkpoint_at > now:
                continue  # gone, or renewed while it waited
            # A whole time would be none; less by a little is covered by the grace.
            left_ms = min(int(live.left_s(now) * 1000), round(live.ttl_s * 1000) - 1)
            if left_ms > 0:
                self._mark += 1
                live.mark(now, self._mark)
                self._wakes.set(lease, live.wake_at())
                work.checkpoints.append((lease, left_ms))
        self._checkpoints.spend(len(work.checkpoints))

    def not_expired(self, leases: Iterable[int], sessions: Iterable[int]) -> None:
        """What was proposed for these may have come to nothing: try again, a little later.

        The leases stay gone for those who ask: the proposal may come through yet.
        """
        later = self._clock() + 1.0
        for lease in leases:
            if lease in self._live:
                self._wakes.set(lease, later)
        for session in sessions:
            if session in self._ttls:
                self._sessions.set(session, later)

    def _known(self, lease: int) -> _Live | None:
        live = self._live.get(lease)
        if live is None and lease in self._records:
            return self._inherit(lease)
        return live

    def _inherit(self, lease: int) -> _Live:
        """One that was there when we began to lead."""
        record = self._records[lease]
        since = self._noted.get(lease, self._since) if record.remaining_ms else self._since
        # The leader before us may have come and gone before it was time for a checkpoint.
        soon = self._reign_s < CHECKPOINT_SHARE * record.ttl_ms / 1000
        return self._begin(lease, record, since, soon=soon)

    def _touch(self, lease: int, since: float) -> None:
        record = self._records.get(lease)
        if record is not None:  # else gone again within the turn in which it came
            self._begin(lease, record, since, soon=False)

    def _begin(self, lease: int, record: LeaseRecord, since: float, *, soon: bool) -> _Live:
        self._mark += 1
        live = self._live[lease] = _Live(record, since, self._mark, soon=soon)
        self._wakes.set(lease, live.wake_at())
        return live

    def _touch_session(self, session: int, since: float) -> None:
        ttl_ms = self._ttls.get(session)
        if ttl_ms is not None:
            self._sessions.set(session, since + ttl_ms / 1000 + SESSION_GRACE_S)

    def _touch_some(self) -> None:
        for _ in range(min(STEPS_MAX, len(self._untouched))):
            self._known(self._untouched.pop())
        for _ in range(min(STEPS_MAX, len(self._untouched_sessions))):
            session = self._untouched_sessions.pop()
            if session not in self._sessions:
                self._touch_session(session, self._since)

    def _forget(self, lease: int) -> None:
        self._live.pop(lease, None)
        self._wakes.discard(lease)
