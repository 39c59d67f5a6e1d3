"""The replicated state machine: applies committed entries, answers reads.

    entries --apply_many--> Overlay --one atomic write--> store
                               |                            ^
                               +-- results                  +-- Reader <- range, read_txn, hash_kv, changes

Pure apart from the store handed in: results and state are a function of the entries alone. A refused command is a
result; nothing raises but the store, whose failure to write is fatal to the node.

Invariants: the applied index and the rolling hash are in the same write as the effects, so that replay from the applied
index gives the same state; 1 <= revision, compact_revision <= revision, neither ever decreases; revision grows by one
for each command that changed a key and by nothing else.    See: reliability rules Z4, S1 to S5, D5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.message import DecodeError

from raftkv._pb.common_pb2 import Event
from raftkv._pb.kv_pb2 import (
    CompactionRequest,
    CompactionResponse,
    DeleteRangeRequest,
    PutRequest,
    RangeRequest,
    RangeResponse,
    TxnRequest,
    TxnResponse,
)
from raftkv._pb.lease_pb2 import LeaseGrantRequest, LeaseRevokeRequest
from raftkv._pb.maintenance_pb2 import CORRUPT, NONE, NOSPACE, AlarmRequest
from raftkv._pb.state_pb2 import (
    LeaseCheckpoints,
    LeaseExpire,
    MemberAttributes,
    SessionExpire,
    SessionOpen,
)
from raftkv.state import hashing, txn
from raftkv.state.attachments import Attachments
from raftkv.state.commands import CommandKind, Group, MalformedCall, decode_session_call
from raftkv.state.compaction import sweep_start, sweep_step
from raftkv.state.directories import Directories
from raftkv.state.keys import (
    ALARM,
    ALARM_END,
    ALARM_ID,
    CONF_KEY,
    LEASES,
    LEASES_END,
    MEMBER,
    MEMBER_END,
    MEMBER_ID,
    SESSIONS,
    SESSIONS_END,
    STATE_KEY,
    SWEEP_KEY,
    Head,
)
from raftkv.state.leases import LeaseEvent, LeaseRecord, Leases
from raftkv.state.mvcc import Reader
from raftkv.state.overlay import Overlay
from raftkv.state.plain_puts import apply_plain_puts
from raftkv.state.ranges import read_range
from raftkv.state.results import Done, HashKVResult, PutDone, Refusal, RefusalCode, Result
from raftkv.state.sessions import SessionEvent, Sessions
from raftkv.state.store import KeyValueStore, KeyValueView

_PUT = int(CommandKind.PUT)
_SESSION_CALL = int(CommandKind.SESSION_CALL)
_parse_put = PutRequest.FromString
_PLAIN_OVERHEAD_MAX = 5
"""A put of a key and a value has four bytes besides them, or five; of any other field, six at least.

Only for values that are not empty; those of 16 KiB and more have more bytes and are looked at field by field.
"""


class StateMachine:
    """The state of one replica. Everything but the sweep is driven by the log."""

    def __init__(self, store: KeyValueStore) -> None:
        """Take over the state in `store`; an empty store is the state before the first entry.

        Raises:
            StoreDamaged: the state's own record is not one this code can read.
        """
        self.store = store
        self.applied_index = 0
        self.applied_term = 0
        self.revision = 1  # of an empty store, as etcd
        self.compact_revision = -1  # never compacted, as etcd
        self.rolling_hash = 0
        self.conf: bytes = store.get(CONF_KEY) or b""
        """The membership as of the applied index, in the driver's encoding; empty while the log's first one holds."""
        self.alarms: frozenset[tuple[int, int]] = frozenset(
            ALARM_ID.unpack_from(key, len(ALARM)) for key, _ in store.iterate(ALARM, ALARM_END)
        )
        """The alarms that are on: (member id, alarm type)."""
        self._members: dict[int, bytes] = {}
        self._directories = Directories()
        self._attachments = Attachments()
        self._leases = Leases(store, self._attachments)
        self._sessions = Sessions(store)
        self._entry_index = self._entry_term = 0  # of the entry that is being applied
        self._sweep_place: bytes | None = store.get(SWEEP_KEY)
        stored = store.get(STATE_KEY)
        if stored is not None:
            (
                self.applied_index,
                self.applied_term,
                self.revision,
                self.compact_revision,
                self.rolling_hash,
            ) = Head.decode(stored)
        for key, value in store.iterate(MEMBER, MEMBER_END):
            self._members[MEMBER_ID.unpack_from(key, len(MEMBER))[0]] = value

    # Writing

    def apply(self, entry_index: int, entry_term: int, groups: Sequence[Group]) -> list[list[Result]]:
        """Apply one committed entry: see `apply_many`."""
        return self.apply_many(((entry_index, entry_term, groups),))[0]

    def apply_many(
        self, entries: Sequence[tuple[int, int, Sequence[Group]]], conf: bytes | None = None
    ) -> list[list[list[Result]]]:
        """Apply committed entries (index, term, groups) in the order of the log, in one write.

        A membership takes effect when its entry is applied, so it must be as durable as the applied index is: `conf` is
        the membership after these entries where they change it.

        An entry without commands (a new leader's first, a membership change) is given too, with no groups, so that the
        applied index passes it.

        Returns:
            For each entry, for each group, the results of its commands in their order.
        """
        overlay = Overlay(self.store, self.revision, self._directories, self._attachments)
        effects = overlay.effects
        results: list[list[list[Result]]] = []
        for index, term, groups in entries:
            assert index > self.applied_index, f"entry {index} is already applied"
            self._entry_index, self._entry_term = index, term
            results.append([self._apply_group(overlay, group) for group in groups])
            self.revision = overlay.revision
            self.rolling_hash = hashing.chain(self.rolling_hash, index, term, effects)
            effects.clear()
            self.applied_index = index
            self.applied_term = term
        self._sessions.flush(overlay)
        pending = overlay.pending
        pending[STATE_KEY] = self._head()
        if conf is not None:
            self.conf = conf
            pending[CONF_KEY] = conf
        puts = [(key, value) for key, value in pending.items() if value is not None]
        deletes = [] if len(puts) == len(pending) else [key for key, value in pending.items() if value is None]
        self.store.write(puts, deletes)
        return results

    def _apply_group(self, overlay: Overlay, group: Group) -> list[Result]:
        results: list[Result] = []
        commands = iter(group.commands)
        while True:
            if self.alarms:
                command = next(commands, None)
            else:  # nearly all commands are done in here
                command = apply_plain_puts(commands, overlay, self._sessions, results)
            if command is None:
                return results
            _, kind, payload = command
            try:
                if kind == _SESSION_CALL:
                    result = self._call(overlay, payload)
                else:
                    result = self._apply_command(overlay, kind, payload)
            except (DecodeError, MalformedCall):
                result = Refusal(RefusalCode.MALFORMED, overlay.revision, self.compact_revision)
            overlay.commit()
            if isinstance(result, Refusal):
                # Answers are part of what replicas must agree on, and those that change nothing are not in the changes.
                overlay.effects.append(b"refused" + bytes((result.code,)))
            results.append(result)

    def _apply_command(self, overlay: Overlay, kind: int, payload: bytes) -> Result:
        """One command, in a session or not, but no call of a session; the caller commits its revision.

        Raises:
            DecodeError: the payload is not what the kind asks for. Nothing has changed.
        """
        if self.alarms and (code := self._stopped_by_alarm(kind, payload)):
            return Refusal(code, overlay.revision, self.compact_revision)
        if kind == _PUT:
            return self._put(overlay, payload)
        return self._apply_other(overlay, kind, payload)

    def _put(self, overlay: Overlay, payload: bytes) -> Result:
        request = _parse_put(payload)
        key, value = request.key, request.value
        if value and len(payload) - len(key) - len(value) <= _PLAIN_OVERHEAD_MAX:
            overlay.put(key, value, 0)
            return PutDone(overlay.revision + 1)
        return txn.apply_put(overlay, request, self.compact_revision, self._lease_exists)

    def _apply_other(self, overlay: Overlay, kind: int, payload: bytes) -> Result:
        if kind == CommandKind.TXN:
            request = TxnRequest.FromString(payload)
            return txn.apply_txn(overlay, request, self.compact_revision, self._lease_exists)
        if kind == CommandKind.DELETE_RANGE:
            return txn.apply_delete(overlay, DeleteRangeRequest.FromString(payload), self.compact_revision)
        if kind == CommandKind.COMPACT:
            return self._compact(overlay, CompactionRequest.FromString(payload))
        if kind == CommandKind.MEMBER_ATTR:
            return self._set_member(overlay, payload)
        if kind == CommandKind.ALARM:
            return self._set_alarm(overlay, AlarmRequest.FromString(payload))
        if CommandKind.LEASE_GRANT <= kind <= CommandKind.LEASE_CHECKPOINT:
            return self._apply_lease(overlay, kind, payload)
        if kind == CommandKind.SESSION_OPEN:
            opened = self._sessions.open(overlay, SessionOpen.FromString(payload), self._entry_index)
            return self._answer(overlay, opened)
        if kind == CommandKind.SESSION_EXPIRE:
            ended = self._sessions.expire(overlay, SessionExpire.FromString(payload), self._entry_term)
            return self._answer(overlay, ended)
        return Refusal(RefusalCode.UNKNOWN_COMMAND, overlay.revision, self.compact_revision)

    def _apply_lease(self, overlay: Overlay, kind: int, payload: bytes) -> Result:
        leases = self._leases
        result: Result | RefusalCode | None
        if kind == CommandKind.LEASE_GRANT:
            result = leases.grant(overlay, LeaseGrantRequest.FromString(payload))
        elif kind == CommandKind.LEASE_REVOKE:
            result = leases.revoke(overlay, LeaseRevokeRequest.FromString(payload))
        elif kind == CommandKind.LEASE_EXPIRE:
            result = leases.expire(overlay, LeaseExpire.FromString(payload), self._entry_term)
        else:
            result = leases.checkpoint(overlay, LeaseCheckpoints.FromString(payload), self._entry_term)
        return self._answer(overlay, result)

    def _call(self, overlay: Overlay, call: bytes) -> Result:
        session, seq, first_incomplete, kind, payload = decode_session_call(call)
        answer = self._sessions.admit(overlay, session, seq, first_incomplete, kind)
        if answer is not None:
            return self._answer(overlay, answer)
        try:
            if kind == _PUT and not self.alarms:
                result = self._put(overlay, payload)
            else:
                result = self._apply_command(overlay, kind, payload)
        except DecodeError:
            result = Refusal(RefusalCode.MALFORMED, overlay.revision, self.compact_revision)
        self._sessions.keep(overlay, session, seq, result, self.compact_revision)
        return result

    def _answer(self, overlay: Overlay, result: Result | RefusalCode | None) -> Result:
        if result is None:
            return Done(overlay.revision)
        if isinstance(result, RefusalCode):
            return Refusal(result, overlay.revision, self.compact_revision)
        return result

    def _compact(self, overlay: Overlay, request: CompactionRequest) -> CompactionResponse | Refusal:
        revision = request.revision
        if revision <= self.compact_revision:
            return Refusal(RefusalCode.COMPACTED, overlay.revision, self.compact_revision)
        if revision > overlay.revision:
            return Refusal(RefusalCode.FUTURE_REVISION, overlay.revision, self.compact_revision)
        self._sweep_place = sweep_start(self._sweep_place, self.compact_revision)
        self.compact_revision = revision
        overlay.pending[SWEEP_KEY] = self._sweep_place
        overlay.effects.append(b"compact" + revision.to_bytes(8, "big"))
        response = CompactionResponse()
        response.header.revision = overlay.revision
        return response

    def _set_member(self, overlay: Overlay, payload: bytes) -> Done | Refusal:
        member_id = MemberAttributes.FromString(payload).id
        if not member_id:
            return Refusal(RefusalCode.MALFORMED, overlay.revision, self.compact_revision)
        # Kept as received: what another implementation of protobuf would make of unknown fields must not matter.
        self._members[member_id] = payload
        overlay.pending[MEMBER + MEMBER_ID.pack(member_id)] = payload
        overlay.effects.append(b"member" + len(payload).to_bytes(4, "big") + payload)
        return Done(overlay.revision)

    def _set_alarm(self, overlay: Overlay, request: AlarmRequest) -> Done | Refusal:
        """Switch alarms on or off; off means all that match, where member 0 and type NONE match any."""
        member, kind = request.memberID, request.alarm
        if request.action == AlarmRequest.ACTIVATE and kind in (NOSPACE, CORRUPT):
            alarms = self.alarms | {(member, int(kind))}
        elif request.action == AlarmRequest.DEACTIVATE:
            alarms = frozenset(
                alarm for alarm in self.alarms if member not in (0, alarm[0]) or kind not in (NONE, alarm[1])
            )
        else:
            return Refusal(RefusalCode.MALFORMED, overlay.revision, self.compact_revision)
        for alarm in sorted(alarms ^ self.alarms):
            overlay.pending[ALARM + ALARM_ID.pack(*alarm)] = b"" if alarm in alarms else None
            overlay.effects.append(b"alarm" + ALARM_ID.pack(*alarm) + bytes((alarm in alarms,)))
        self.alarms = alarms
        return Done(overlay.revision)

    def _stopped_by_alarm(self, kind: int, payload: bytes) -> RefusalCode | None:
        # Judged again here, after the node that was asked: the alarm may have been armed in between.
        # Of a call of a session only what is in it, when it is to be done: done before, it has its answer.
        if kind in (CommandKind.ALARM, CommandKind.MEMBER_ATTR):
            return None
        if any(alarm == CORRUPT for _, alarm in self.alarms):
            return RefusalCode.CORRUPT
        if kind in (_PUT, CommandKind.LEASE_GRANT) or (
            kind == CommandKind.TXN and txn.needs_space(TxnRequest.FromString(payload))
        ):
            return RefusalCode.NO_SPACE
        return None

    def _lease_exists(self, lease: int) -> bool:
        return lease in self._leases.records

    def _head(self) -> bytes:
        return Head(
            self.applied_index, self.applied_term, self.revision, self.compact_revision, self.rolling_hash
        ).encode()

    # Reading

    @property
    def members(self) -> dict[int, MemberAttributes]:
        """What each member last published about itself, by id, in the order of ids."""
        return {member_id: MemberAttributes.FromString(self._members[member_id]) for member_id in sorted(self._members)}

    def reader(self, view: KeyValueView | None = None) -> Reader:
        """The key space of now.

        Args:
            view: `store.view()`, taken since the last apply: the reader then stays as it is, in any thread, while
                entries are applied. Without it the reader is good until the next apply or sweep only.
        """
        swept = self._sweep_place is None
        if view is not None:
            return Reader(view, self.revision, self.compact_revision, swept=swept)
        return Reader(self.store, self.revision, self.compact_revision, swept=swept, directories=self._directories)

    def range(self, request: RangeRequest, walk_max: int | None = None) -> RangeResponse:
        """Serve a range read: see `ranges.read_range`."""
        return read_range(self.reader(), request, walk_max=walk_max)

    def read_txn(self, request: TxnRequest) -> TxnResponse:
        """Run a read-only transaction: see `txn.read_txn`."""
        return txn.read_txn(self.reader(), request)

    def changes(self, from_revision: int, limit: int, *, prev_kv: bool = False) -> Iterator[tuple[int, list[Event]]]:
        """The history from a revision on: see `Reader.changes`."""
        return self.reader().changes(from_revision, limit, prev_kv=prev_kv)

    # Leases and sessions

    @property
    def leases(self) -> Mapping[int, LeaseRecord]:
        """All leases by id, as of the applied index. A live view: it changes with the next apply."""
        return self._leases.records

    def lease_keys(self, lease: int) -> list[bytes]:
        """The keys attached to a lease, in order; none where there is no such lease."""
        return self._leases.keys_of(self.store, lease)

    def take_lease_events(self) -> list[LeaseEvent]:
        """What happened to leases since the last call, in order.

        Gathered from the first call on, so that nothing gathers where nobody asks: ask once, read `leases`, and then
        ask after each apply.
        """
        return self._leases.take_events()

    @property
    def sessions(self) -> Mapping[int, int]:
        """The time to live in milliseconds of all sessions, by id. A live view: it changes with the next apply."""
        return self._sessions.ttls

    def take_session_events(self) -> list[SessionEvent]:
        """What happened to sessions since the last call, in order; as `take_lease_events`."""
        return self._sessions.take_events()

    # Physical compaction

    @property
    def sweeping(self) -> bool:
        """Whether compacted changes are still to be taken out. A compaction with `physical` is done when not."""
        return self._sweep_place is not None

    def sweep(self, budget: int) -> bool:
        """Take out what was compacted among the next `budget` changes, in one small write.

        Returns:
            Whether more is left.
        """
        if self._sweep_place is not None:
            self._sweep_place = sweep_step(self.store, self._sweep_place, self.compact_revision, budget)
        return self._sweep_place is not None

    # Comparing replicas

    def hash(self) -> int:
        """32 bits that are equal on replicas with equal applied index: the lower half of the rolling hash."""
        return self.rolling_hash & 0xFFFFFFFF

    def hash_kv(self, revision: int) -> HashKVResult:
        """Hash of the key space at a revision, in one go: see `hashing.hash_kv_steps` for large stores."""
        return hashing.hash_kv(self.reader(), revision)

    def dump(self) -> Iterator[bytes]:
        """All that is replicated, as canonical bytes: equal states give identical sequences."""
        members = [(member_id, self._members[member_id]) for member_id in sorted(self._members)]
        yield b"conf " + self.conf
        yield from (b"alarm " + ALARM_ID.pack(*alarm) for alarm in sorted(self.alarms))
        yield from (b"lease " + key + value for key, value in self.store.iterate(LEASES, LEASES_END))
        yield from (b"session " + key + value for key, value in self.store.iterate(SESSIONS, SESSIONS_END))
        yield from hashing.dump(self.reader(), self._head(), members)
