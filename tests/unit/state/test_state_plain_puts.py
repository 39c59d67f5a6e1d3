"""The loop for plain puts does what the general path does, to the byte; and it does take what is plain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_driver import Driver, SessionCall, command, op
from state_ops import KEYS, VALUES, Chooser, Ops

from raftkv._pb.kv_pb2 import DeleteRangeRequest, Guard, PutRequest, RangeRequest, TxnRequest
from raftkv._pb.lease_pb2 import LeaseGrantRequest
from raftkv._pb.maintenance_pb2 import NOSPACE, AlarmRequest
from raftkv._pb.state_pb2 import SessionOpen
from raftkv.state import machine as machines
from raftkv.state import plain_puts, sessions
from raftkv.state.commands import Command, CommandFields, CommandKind, Group, encode_session_call
from raftkv.state.machine import StateMachine
from raftkv.state.overlay import Overlay
from raftkv.state.results import Refusal
from raftkv.state.sessions import Sessions
from raftkv.state.store import MemoryStore

SEED = st.integers(0, 2**32 - 1)
FRESH = tuple(b"%d" % number for number in range(100))
LEASE = 5
EDGES = (b"k" * 126, b"k" * 127, b"k" * 128, b"")
VALUE_SIZES = (1, 126, 127, 128, 129, 255, 256, 300, 16_383, 16_384)


class Commands:
    """Random commands, most of them plain puts or nearly."""

    def __init__(self, seed: int, machine: StateMachine) -> None:
        self.choose = Chooser(seed)
        self.machine = machine
        self.ops = Ops(self.choose)
        self.session = next(iter(machine.sessions), 0)

    def next(self, term: int) -> CommandFields:
        choose = self.choose
        self.ops.revision, self.ops.compact_revision = self.machine.revision, self.machine.compact_revision
        kind = choose.pick(
            ("put",) * 8 + ("call",) * 16 + ("other",) * 4 + ("leased", "leased", "open", "alarm", "cut")
        )
        if kind == "put":
            return 1, CommandKind.PUT, self.put()
        if kind == "call":
            return 1, CommandKind.SESSION_CALL, self.call()
        if kind == "leased":
            return command(PutRequest(key=choose.pick(FRESH[:20]), value=b"v", lease=LEASE))
        if kind == "open":
            return command(SessionOpen())
        if kind == "alarm":
            action = AlarmRequest.ACTIVATE if choose.chance(40) else AlarmRequest.DEACTIVATE
            return command(AlarmRequest(action=action, memberID=1, alarm=NOSPACE))
        if kind == "cut":
            data = self.call()
            return 1, CommandKind.SESSION_CALL, data[: choose.number(0, len(data))]
        request = self.ops.any_request(term, list(self.machine.sessions))
        return command(self.ops.delete() if isinstance(request, RangeRequest) else request)

    def entry(self, term: int) -> tuple[CommandFields, ...]:
        """Some commands, and perhaps plain calls of a session in a row, as of a client with many under way."""
        choose = self.choose
        commands = [self.next(term) for _ in range(choose.number(1, 8))]
        if choose.chance(40):
            seq, done = choose.number(1, 20), choose.chance(50)
            for each in range(seq, seq + choose.number(2, 7)):
                put = PutRequest(key=choose.pick(FRESH), value=b"v").SerializeToString()
                call = encode_session_call(self.session, each, seq if done else 0, CommandKind.PUT, put)
                commands.append((each, CommandKind.SESSION_CALL, call))
        return tuple(commands)

    def call(self) -> bytes:
        choose = self.choose
        if choose.chance(30):
            ids = list(self.machine.sessions)[:3]
            self.session = choose.pick(ids) if ids and choose.chance(95) else choose.pick((0, 404))
        seq = choose.number(0, choose.pick((12, 40)))
        return encode_session_call(
            self.session,
            seq,
            choose.number(0, seq + 1) if choose.chance(20) else 0,
            CommandKind.PUT if choose.chance(97) else choose.pick((0, 2, 4, 16, 19)),
            self.put(),
        )

    def put(self) -> bytes:
        """The payload of one."""
        choose = self.choose
        if choose.chance(10):
            return self.ops.put().SerializeToString()
        key = choose.pick(choose.pick((FRESH, FRESH, FRESH, KEYS, EDGES)))
        value = choose.pick(VALUES) if choose.chance(90) else b"v" * choose.pick(VALUE_SIZES)
        data: bytes = PutRequest(key=key, value=value).SerializeToString()
        if not data or choose.chance(85):
            return data
        shape = choose.pick(("cut", "longer", "bit", "twice", "turned", "wide"))
        if shape == "cut":
            return data[: choose.number(0, len(data))]
        if shape == "longer":
            return data + choose.pick((b"\0", b"\x18\1", b"\x20\1", b"\x12", b"\x12\1x", b"\x0a\1k"))
        if shape == "bit":
            place = choose.number(0, len(data) - 1) if choose.chance(50) else choose.pick((0, 1, 2 + len(key)))
            place = min(place, len(data) - 1)
            return data[:place] + bytes((data[place] ^ 1 << choose.number(0, 7),)) + data[place + 1 :]
        if shape == "twice":
            return data + data
        key_field, value_field = b"\x0a" + bytes((len(key) & 127,)) + key, b"\x12" + bytes((len(value) & 127,)) + value
        if shape == "turned":
            return value_field + key_field
        # A length in more bytes than it needs, as no protobuf writes it and every one reads it.
        return key_field + b"\x12" + bytes((len(value) & 127 | 128,)) + choose.pick((b"\0", b"\x80\0")) + value


def in_general(commands: Iterator[CommandFields], *_: Any) -> CommandFields | None:
    """In the place of the loop: nothing is plain."""
    return next(commands, None)


def apply(machine: StateMachine, entries: list[Any], *, plain: bool) -> list[Any]:
    if plain:
        return machine.apply_many(entries)
    with patch.object(machines, "apply_plain_puts", in_general):
        return machine.apply_many(entries)


def listing(machine: StateMachine) -> Any:
    """Of a directory, which is then remembered."""
    return machine.range(RangeRequest(key=b"d/", range_end=b"d0"))


def small_sessions(choose: Chooser) -> ExitStack:
    """Sessions that are full with a few answers, or a few bytes of them."""
    stack = ExitStack()
    limit, small = choose.pick((("ANSWERS_MAX", 5), ("ANSWERS_BYTES_MAX", 60)))
    for module in (sessions, plain_puts):
        stack.enter_context(patch.object(module, limit, small))
    return stack


def check_same(seeds: list[list[int]], choose: Chooser) -> None:
    both = [StateMachine(MemoryStore()), StateMachine(MemoryStore())]
    index = 0
    asked = False
    opening = (*(command(SessionOpen()) for _ in range(3)), command(LeaseGrantRequest(ID=LEASE, TTL=9)))
    for write in [[], *seeds]:
        entries = [] if write else [(1, 7, [Group(1, 1, opening)])]
        for seed in write:
            commands = Commands(seed, both[0])
            group = Group(1, 1, commands.entry(7))
            entries.append((index + 1 + len(entries), 7, [group, group] if commands.choose.chance(20) else [group]))
        index += len(entries)
        plain, general = (apply(machine, entries, plain=machine is both[0]) for machine in both)
        assert plain == general
        assert [type(result) for result in results_of(plain)] == [type(result) for result in results_of(general)]
        assert both[0].rolling_hash == both[1].rolling_hash
        assert both[0].revision == both[1].revision
        stored = [list(machine.store.iterate(b"", None)) for machine in both]
        assert stored[0] == stored[1]
        if asked := asked or choose.chance(30):  # from then on events are gathered
            assert both[0].take_session_events() == both[1].take_session_events()
        if choose.chance(50):
            assert listing(both[0]) == listing(both[1])
        if choose.chance(20):
            both = [StateMachine(machine.store) for machine in both]
            asked = False
    assert list(both[0].dump()) == list(both[1].dump())
    assert listing(both[0]) == listing(both[1]) == listing(StateMachine(both[0].store))


def results_of(entries: list[Any]) -> list[Any]:
    return [result for groups in entries for results in groups for result in results]


@given(seeds=st.lists(st.lists(SEED, min_size=1, max_size=4), min_size=3, max_size=10), seed=SEED)
@settings(max_examples=300, deadline=None)
def test_the_same_as_the_general_path(seeds: list[list[int]], seed: int) -> None:
    choose = Chooser(seed)
    if choose.chance(50):
        check_same(seeds, choose)
    else:
        with small_sessions(choose):
            check_same(seeds, choose)


@pytest.mark.parametrize("in_session", [False, True])
@pytest.mark.parametrize(
    "payload",
    [
        PutRequest(
            key=b"k" * 127 + b"\x12", value=b"v" * 17
        ).SerializeToString(),  # the key's length taken for one byte
        PutRequest(key=b"k", value=b"v" * 16_384).SerializeToString()[:-1],  # the value's for two
        b"\x0a\1k\x12\x81\0v",  # in more bytes than it needs
        b"\x0a\1k\x12\x80\0",
        b"\x0a\1k\x12\1vw",
        b"\x0a\1k\x12\2v",
        b"\x0a\1k\x12\x81",
        b"\x0a\1k\x12",
        b"\x0a\1k",
        b"\x0a\1",
        b"\x0a",
        b"",
    ],
    ids=lambda payload: f"{payload[:9].hex()}-{len(payload)}",
)
def test_bytes_that_look_plain_mean_what_the_parser_says(payload: bytes, in_session: bool) -> None:
    """These would have to come at random for the test above."""
    both = [Driver(), Driver()]
    results = []
    for kv in both:
        call = SessionCall(kv.call(SessionOpen()).session, 1, CommandKind.PUT, payload)
        made = command(call) if in_session else Command(1, CommandKind.PUT, payload)
        results.append(apply(kv.machine, [(2, 1, [Group(1, 1, (made,))])], plain=kv is both[0]))
    assert results[0] == results[1]
    assert list(both[0].machine.dump()) == list(both[1].machine.dump())


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[CommandFields]:
    """The commands that the loop left to the general path."""
    commands_left: list[CommandFields] = []
    original = plain_puts.apply_plain_puts

    def spy(commands: Iterator[CommandFields], overlay: Overlay, of: Sessions, results: list[Any]) -> Any:
        found = original(commands, overlay, of, results)
        if found is not None:
            commands_left.append(found)
        return found

    monkeypatch.setattr(machines, "apply_plain_puts", spy)
    return commands_left


def call_of(session: int, seq: int, done: int = 0, request: Any = None) -> SessionCall:
    request = PutRequest(key=b"k%d" % seq, value=b"v") if request is None else request
    kind = CommandKind.PUT if isinstance(request, PutRequest) else CommandKind.TXN
    return SessionCall(session, seq, kind, request.SerializeToString(), done)


def test_plain_puts_are_taken(left: list[CommandFields]) -> None:
    kv = Driver()
    one, two = (kv.call(SessionOpen()).session for _ in range(2))
    kv.put(b"there", b"v")
    left.clear()
    kv.apply(
        PutRequest(key=b"fresh", value=b"v"),
        PutRequest(key=b"there", value=b"v" * 128),
        PutRequest(key=b"k" * 127, value=b"v" * 16_383),
        call_of(one, 1),
        call_of(two, 1),
        call_of(one, 3, 2),
        call_of(one, 2, 2),
    )
    kv.apply(call_of(one, 4, 4), call_of(two, 2))
    assert left == []


PUT = PutRequest(key=b"k", value=b"v")
BESIDE = PutRequest(key=b"beside", value=b"v")
PUT_GUARDED = PutRequest(key=b"k", value=b"v", guards=[Guard(key=b"there", token=1)])


@pytest.mark.parametrize(
    "request_",
    [
        PutRequest(key=b"k"),
        PutRequest(key=b"k", value=b"v", prev_kv=True),
        PutRequest(key=b"k", value=b"v", lease=LEASE),
        PutRequest(key=b"leased", value=b"v"),
        PUT_GUARDED,
        PutRequest(key=b"k" * 128, value=b"v"),
        PutRequest(key=b"k", value=b"v" * 16_384),
        DeleteRangeRequest(key=b"k"),
        TxnRequest(success=[op(PUT)]),
        call_of(404, 1),
        call_of(1 << 20, 0),
        call_of(1 << 20, 7),
        call_of(1 << 20, 5, 6),
        call_of(1 << 20, 4, 0),
        call_of(1 << 20, 8, 0, TxnRequest(success=[op(PUT)])),
        call_of(1 << 20, 8, 0, PUT_GUARDED),
        call_of(2 << 20, 99),
    ],
    ids=lambda request: str(request)[:60],
)
def test_others_are_left_and_what_follows_is_taken(left: list[CommandFields], request_: Any) -> None:
    kv = Driver()
    kv.call(SessionOpen())  # 1 << 20: everything below 5 is acknowledged, 7 is answered
    kv.call(SessionOpen())  # 2 << 20: full
    kv.call(LeaseGrantRequest(ID=LEASE, TTL=9))
    kv.put(b"leased", b"v", lease=LEASE)
    kv.apply(call_of(1 << 20, 7, 5), *(call_of(2 << 20, seq) for seq in range(1, sessions.ANSWERS_MAX + 1)))
    left.clear()
    revision = kv.machine.revision
    before, _, after = kv.apply(BESIDE, request_, BESIDE)
    assert left == [command(request_, 1)]
    assert before.header.revision == revision + 1
    assert after.header.revision == kv.machine.revision


def test_a_session_that_is_not_in_memory_is_left_once(left: list[CommandFields]) -> None:
    kv = Driver()
    session = kv.call(SessionOpen()).session
    kv.machine = StateMachine(kv.store)
    left.clear()
    kv.apply(*(call_of(session, seq) for seq in (1, 2, 3)))
    assert left == [command(call_of(session, 1), 0)]


def test_nothing_is_plain_while_an_alarm_is_on(left: list[CommandFields]) -> None:
    kv = Driver()
    alarm = AlarmRequest(action=AlarmRequest.ACTIVATE, memberID=1, alarm=NOSPACE)
    first, *refused = kv.apply(PUT, alarm, PUT, PUT)[::2]
    assert not isinstance(first, Refusal)
    assert all(isinstance(result, Refusal) for result in refused)
    assert left == [command(alarm, 1)]
