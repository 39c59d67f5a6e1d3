"""What coordinating clients are promised: a plain model of leases and sessions, and the checks of rules X and L.

The model is the witness (see `history`): it replays what the log has, in its order, and knows nothing of the state
machine. `Promises` rests on less: on what the state machine really answered, in the order of the log, on what clients
were told, and on true time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raftkv._pb.state_pb2 import LeaseCheckpoints, LeaseExpire, SessionExpire
from raftkv.sim.history import Answer, Kind, Model, Operation, Violation
from raftkv.sim.requests import Body, Call, Close, Create, Grant, Open, Put, Request, Revoke
from raftkv.state.commands import CommandKind
from raftkv.state.results import RefusalCode

NOT_KEPT = (RefusalCode.SESSION_EXPIRED, RefusalCode.STALE_SEQUENCE, RefusalCode.SESSION_FULL)
"""Refusals with which nothing was executed, nor will a repetition get the same."""
_SESSION_BITS = 20
_ANSWERS_MAX = 64


@dataclass(slots=True)
class _Session:
    acknowledged: int = 0
    answers: dict[int, Answer] = field(default_factory=dict)


class CoordinationModel(Model):
    """The key space, and leases and sessions, as plain as they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.leases: dict[int, dict[bytes, None]] = {}
        """The keys of each."""
        self.sessions: dict[int, _Session] = {}
        self.ended: list[tuple[int, bool]] = []
        """Leases that have ended, and whether by time; for who checks it to take."""
        self._opened = (0, 0)  # the last entry with sessions opened in it, and how many

    def apply(self, operation: Operation, index: int) -> Answer:
        """What a write in the entry `index` answers."""
        if operation.kind is not Kind.COMMAND:
            return super().apply(operation, index)
        request = operation.request
        if isinstance(request, Call):
            return self._call(request)
        if isinstance(request, Open):
            number = self._opened[1] if self._opened[0] == index else 0
            self._opened = (index, number + 1)
            session = index << _SESSION_BITS | number
            self.sessions[session] = _Session()
            return 0, (session, request.ttl_ms)
        assert isinstance(request, Close), f"{request} is no command"
        self.sessions.pop(request.session, None)
        return self.revision, None

    def lead(self, kind: int, payload: bytes, term: int) -> Answer:
        """What a command that a leader has proposed by itself answers in an entry of `term`."""
        expire: LeaseExpire | SessionExpire | LeaseCheckpoints
        if kind == CommandKind.LEASE_EXPIRE:
            expire = LeaseExpire.FromString(payload)
            if expire.proposer_term == term:
                for lease in [lease for lease in expire.ids if lease in self.leases]:
                    self._end(lease, expired=True)
        elif kind == CommandKind.SESSION_EXPIRE:
            expire = SessionExpire.FromString(payload)
            if expire.proposer_term == term:
                for session in expire.sessions:
                    self.sessions.pop(session, None)
        else:
            assert kind == CommandKind.LEASE_CHECKPOINT, f"nobody here proposes a command of kind {kind}"
            expire = LeaseCheckpoints.FromString(payload)
        return self.revision, None if expire.proposer_term == term else RefusalCode.STALE_TERM

    def guard_holds(self, key: bytes, token: int) -> bool:
        """Whether the key of a lock is there and was created at its token."""
        lock = self.item(key)
        return lock is not None and lock[2] == token

    def _call(self, call: Call) -> Answer:
        revision, seq, session = self.revision, call.seq, self.sessions.get(call.session)
        if session is None:
            return revision, RefusalCode.SESSION_EXPIRED
        if seq in session.answers:
            return session.answers[seq]
        if seq < max(session.acknowledged, call.first_incomplete):
            return revision, RefusalCode.STALE_SEQUENCE
        session.acknowledged = max(session.acknowledged, call.first_incomplete)
        for old in [old for old in session.answers if old < session.acknowledged]:
            del session.answers[old]
        assert len(session.answers) < _ANSWERS_MAX, "clients have fewer calls under way"
        answer = session.answers[seq] = self._do(call.body)
        return answer

    def _do(self, body: Body) -> Answer:
        if isinstance(body, Grant):
            if body.lease in self.leases:
                return self.revision, RefusalCode.LEASE_EXISTS
            self.leases[body.lease] = {}
            return self.revision, (body.lease, body.ttl_ms)
        if isinstance(body, Revoke):
            if body.lease not in self.leases:
                return self.revision, RefusalCode.LEASE_NOT_FOUND
            self._end(body.lease, expired=False)
            return self.revision, None
        before = self.item(body.key)
        created = before[2] if before else 0
        if isinstance(body, Put):
            if body.guard is not None and not self.guard_holds(*body.guard):
                return self.revision, RefusalCode.GUARD_FAILED
            return self.put(body.key, body.value), None
        if isinstance(body, Create):
            if created:
                return self.revision, before
            if body.lease not in self.leases:
                return self.revision, RefusalCode.LEASE_NOT_FOUND
            self.leases[body.lease][body.key] = None
            return self.put(body.key, body.value), True
        if created != body.token:
            return self.revision, before
        for keys in self.leases.values():
            keys.pop(body.key, None)
        self.delete([body.key])
        return self.revision, True

    def _end(self, lease: int, *, expired: bool) -> None:
        keys = self.leases.pop(lease)
        if keys:
            self.delete(keys)
        self.ended.append((lease, expired))


@dataclass(slots=True, eq=False)
class Held:
    """A client's belief that it holds a lock, until its deadline; 0: not yet."""

    name: bytes
    owner: int
    token: int
    deadline_s: float = 0.0


class Promises:
    """What is promised, and the checks of it; moments are true time in seconds."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, int], Answer] = {}
        self._made: dict[int, tuple[int, int]] = {}  # revision -> the call that made it
        self._tokens: dict[bytes, int] = {}  # by register: the last that was written with
        self._safe_s: dict[int, float] = {}  # until when a lease must live: by what was last acknowledged
        self._ended: dict[int, tuple[float, bool]] = {}  # when, and whether by time
        self._held: dict[bytes, list[Held]] = {}
        self._fences: dict[bytes, int] = {}  # of the last holder
        self.counts: dict[str, int] = {}
        """What has happened, so that a run in which nothing happened is noticed."""

    def count(self, what: str) -> None:
        """Something worth being seen has happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    # Sessions.

    def executed(self, request: Request, answer: Answer, alive: bool) -> None:
        """The first replica to apply a call has answered so; calls come in the order of the log.

        Args:
            alive: whether the session was there.
        """
        if not isinstance(request, Call):
            return
        refusal = answer[1] if isinstance(answer[1], RefusalCode) else None
        if not alive and refusal is not RefusalCode.SESSION_EXPIRED:
            raise Violation("X3", f"{request} is of an ended session, and was answered {answer}")
        if refusal is not None:
            self.count(f"calls {refusal.name.lower()}")
            if refusal in NOT_KEPT:
                return
        number = (request.session, request.seq)
        first = self._answers.get(number)
        if first is not None:
            self.count("calls repeated")
            if first[0] != answer[0]:
                raise Violation("X1", f"{request} was done at revision {first[0]}, and again: {answer}")
            if first != answer:
                raise Violation("X2", f"{request} was answered {first}, and now {answer}")
            return
        self._answers[number] = answer
        body = request.body
        if (isinstance(body, Put) and refusal is None) or answer[1] is True:
            if self._made.setdefault(answer[0], number) != number:
                raise Violation("X1", f"{request} claims revision {answer[0]}, as {self._made[answer[0]]} did")
            if isinstance(body, Put) and body.guard is not None:
                self._guarded(body, body.guard[1])

    def _guarded(self, body: Put, token: int) -> None:
        self.count("guarded writes")
        before = self._tokens.get(body.key, 0)
        if token < before:
            raise Violation("L7", f"{body} comes after a write of the later holder {before}")
        self._tokens[body.key] = token

    def acknowledged(self, session: int, seq: int, answer: Answer) -> None:
        """A client takes a call for done."""
        if self._answers.get((session, seq)) != answer:
            done = self._answers.get((session, seq))
            raise Violation("X2", f"call {seq} of session {session:x} was answered {answer}; it gave {done}")

    # Leases.

    def granted(self, lease: int, sent_s: float, ttl_s: float) -> None:
        """A client was told so of a grant that it sent first at `sent_s`."""
        self.count("leases granted")
        self._must_live(lease, sent_s + ttl_s)

    def renewed(self, lease: int, sent_s: float, remaining_s: float, now_s: float) -> None:
        """A client was told of a renewal it had sent at `sent_s`; `remaining_s` 0: that the lease is gone."""
        ended, safe_s = self._ended.get(lease), self._safe_s[lease]
        if not remaining_s:
            if ended is None and now_s < safe_s:
                raise Violation("L5", f"lease {lease:x} is told gone at {now_s:.3f}; it lives until {safe_s:.3f}")
            self.count("renewals refused")
            return
        if ended is not None and ended[0] < sent_s:
            raise Violation("L3", f"lease {lease:x} ended at {ended[0]:.3f}; a renewal sent at {sent_s:.3f} went well")
        self.count("renewals")
        self._must_live(lease, sent_s + remaining_s)

    def _must_live(self, lease: int, until_s: float) -> None:
        self._safe_s[lease] = max(self._safe_s.get(lease, 0.0), until_s)
        self._check_not_early(lease)

    def lease_ended(self, lease: int, expired: bool, now_s: float) -> None:
        """The first replica applies the end of a lease."""
        self.count("leases expired" if expired else "leases revoked")
        self._ended[lease] = now_s, expired
        self._check_not_early(lease)

    def _check_not_early(self, lease: int) -> None:
        ended, safe_s = self._ended.get(lease), self._safe_s.get(lease, 0.0)
        if ended is not None and ended[1] and ended[0] < safe_s:
            raise Violation("L2", f"lease {lease:x} expired at {ended[0]:.3f}, granted or renewed until {safe_s:.3f}")

    # Locks.

    def holds(self, held: Held, deadline_s: float, now_s: float) -> None:
        """A client begins to believe that it holds a lock, or learns that it does for longer."""
        name = held.name
        others = [other for other in self._held.get(name, ()) if other is not held and other.deadline_s > now_s]
        self._held[name] = [*others, held]
        if not held.deadline_s:
            self.count("locks taken")
            if held.token <= self._fences.get(name, 0):
                raise Violation("L1", f"{held} was taken after one of token {self._fences[name]}")
            self._fences[name] = held.token
        held.deadline_s = max(held.deadline_s, deadline_s)
        if others and held.deadline_s > now_s:
            raise Violation("L6", f"{held} and {others} are believed at {now_s:.3f}")

    # The end.

    @staticmethod
    def check_ledger(key: bytes, version: int, acknowledged: int, unknown: int) -> None:
        """Of the writes of a key, each acknowledged one was done once, and each other one once at most."""
        if not acknowledged <= version <= acknowledged + unknown:
            raise Violation("X1", f"{key!r} has version {version}: {acknowledged} puts, and perhaps {unknown} more")
