"""The hub against a model: random histories, compactions, snapshots, slow readers and chunks read apart.

Every watch must get exactly the events of its range from its start on, in order, a revision never split, or be told
the compact revision (rules W1 to W7, catalogue rows 57 to 63).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftkv._pb.common_pb2 import Event
from raftkv._pb.kv_pb2 import CompactionRequest, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest
from raftkv._pb.watch_pb2 import WatchResponse
from raftkv.server.watch import BUFFERED_BYTES_MAX, Watch, WatchHub
from raftkv.server.watch_changes import Change, varint
from raftkv.server.watch_history import BUSY_S, HALVES_EVERY_S, PAUSE_S, SLICE_BYTES, Found, Pace, Plan
from raftkv.server.watch_matching import Matcher, prefix_end, prefix_of
from raftkv.server.watch_stream import RESPONSE_BYTES_MAX, STREAM_BYTES_MAX, Listener, StreamBuffer, Wakes
from raftkv.state.commands import Command, CommandKind, Group
from raftkv.state.keys import span
from raftkv.state.machine import StateMachine
from raftkv.state.mvcc import Reader
from raftkv.state.store import MemoryStore

KEYS = [b"a", b"a/1", b"a/2", b"a\xff", b"a\xff\xff", b"b", b"b\0", b"c"]
RANGES = [
    *((key, b"") for key in KEYS),
    (b"a/", b"a0"),
    (b"a", b"b"),
    (b"a\xff", b"b"),
    (b"a/1", b"b\0"),
    (b"b", b"\0"),
    (b"\0", b"\0"),
]
KINDS: dict[type, CommandKind] = {
    PutRequest: CommandKind.PUT,
    DeleteRangeRequest: CommandKind.DELETE_RANGE,
    TxnRequest: CommandKind.TXN,
    CompactionRequest: CommandKind.COMPACT,
}


class Steps:
    """A loop that runs what is due when told to; its time moves when nothing is due before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.later: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any) -> object:
        self.later.append((self.now + delay, callback, args))
        return None

    def call_soon(self, callback: Callable[..., object], /, *args: Any) -> object:
        self.due.append((callback, args))
        return None

    call_soon_threadsafe = call_soon

    def run(self, seconds: float) -> None:
        """Let time pass, and do what is due meanwhile."""
        end = self.now + seconds
        while self.due or any(at <= end for at, _, _ in self.later):
            self.step()
        self.now = end

    def step(self) -> bool:
        if not self.due and not self.later:
            return False
        if not self.due:
            first = min(self.later, key=lambda each: each[0])
            self.later.remove(first)
            self.now, *what = first
            self.due.append((what[0], what[1]))
        callback, args = self.due.pop(0)
        callback(*args)
        return True


class Node:
    """A state machine, a hub, and threads whose work is done when told to."""

    def __init__(self, loop_revisions_max: int = 4) -> None:
        self.machine = StateMachine(MemoryStore())
        self.steps = Steps()
        self.jobs: list[tuple[concurrent.futures.Future[Found], Callable[[Reader], Found], Reader]] = []
        self.faults: list[BaseException] = []
        self.watched: list[bool] = []
        self.hub = WatchHub(
            lambda: self.machine, self.steps, self.apart, self.faults.append, loop_revisions_max, self.watched.append
        )

    def apart(self, read: Callable[[Reader], Found]) -> concurrent.futures.Future[Found]:
        job: concurrent.futures.Future[Found] = concurrent.futures.Future()
        self.jobs.append((job, read, self.machine.reader(self.machine.store.view())))
        return job

    def apply(self, *requests: Any) -> None:
        commands = tuple(Command(1, KINDS[type(each)], each.SerializeToString()) for each in requests)
        self.machine.apply(self.machine.applied_index + 1, 1, [Group(1, 1, commands)])
        self.hub.advance()

    def put(self, key: bytes, value: bytes = b"v") -> None:
        self.apply(PutRequest(key=key, value=value))

    def run_job(self) -> None:
        if self.jobs:
            job, read, reader = self.jobs.pop(0)
            job.set_result(read(reader))

    def install(self) -> None:
        """As a snapshot of itself would: the same state, in another machine."""
        assert isinstance(self.machine.store, MemoryStore)
        self.machine = StateMachine(self.machine.store.copy())
        self.hub.advance()

    def settle(self) -> None:
        while self.steps.step() or self.jobs:
            self.run_job()
        assert self.faults == []


class Client:
    """A stream of one or more watches that parses what it is sent."""

    def __init__(self, node: Node, bytes_max: int = 1 << 20) -> None:
        self.node = node
        self.buffer = StreamBuffer(
            node.hub,
            Wakes(node.steps.call_soon),
            lambda rev: WatchResponse(header={"revision": rev}).SerializeToString(),
        )
        self.buffer._bytes_max = bytes_max
        self.events: dict[int, list[Event]] = {}
        self.compacted: dict[int, int] = {}
        self.watches: dict[int, Watch] = {}
        self.responses: list[WatchResponse] = []

    def watch(self, key: bytes, range_end: bytes = b"", *, fragment: bool = False, **options: Any) -> Watch:
        watch_id = len(self.watches)
        watch = self.node.hub.add(self.buffer, *span(key, range_end), **options)
        self.buffer.ids[watch] = (watch_id, fragment)
        self.watches[watch_id] = watch
        self.events[watch_id] = []
        return watch

    def read(self, responses_max: int = 1 << 30) -> None:
        for _ in range(responses_max):
            parts = [WatchResponse.FromString(raw) for raw in self.buffer.pop()]
            if not parts:
                return
            for number, part in enumerate(parts):
                assert part.fragment == (number + 1 < len(parts))
            response = parts[0]
            for part in parts[1:]:
                response.events.extend(part.events)
            self.responses.append(response)
            if response.canceled:
                self.compacted[response.watch_id] = response.compact_revision
                continue
            seen = self.events[response.watch_id]
            assert response.watch_id not in self.compacted, "after the end"
            assert all(event.kv.mod_revision <= response.header.revision for event in response.events)
            # A revision is never split (W4): the next response begins with a later one.
            assert not seen or response.events[0].kv.mod_revision > seen[-1].kv.mod_revision
            seen.extend(response.events)


requests = st.one_of(
    st.builds(lambda key, value: PutRequest(key=key, value=value), st.sampled_from(KEYS), st.binary(max_size=30)),
    st.builds(lambda pair: DeleteRangeRequest(key=pair[0], range_end=pair[1]), st.sampled_from(RANGES)),
    st.builds(
        lambda keys: TxnRequest(
            success=[RequestOp(request_put=PutRequest(key=key, value=b"txn")) for key in sorted(keys)]
        ),
        st.sets(st.sampled_from(KEYS), min_size=1, max_size=4),
    ),
)
moves = st.one_of(
    st.tuples(st.just("apply"), st.lists(requests, min_size=1, max_size=3)),
    st.tuples(st.just("apply_compact"), requests),
    st.tuples(st.just("compact"), st.integers(0, 10)),
    st.tuples(st.just("sweep"), st.integers(1, 5)),
    st.tuples(st.just("watch"), st.tuples(st.integers(0, 2), st.sampled_from(RANGES), st.integers(-12, 5))),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("read"), st.tuples(st.integers(0, 2), st.integers(1, 3))),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("job"), st.none()),
    st.tuples(st.just("install"), st.none()),
)


class Expected:
    """What a watch must get."""

    def __init__(self, client: Client, watch_id: int, start: int, options: dict[str, bool]) -> None:
        self.client = client
        self.watch_id = watch_id
        self.start = start
        self.options = options
        self.alive = True


def play(node: Node, clients: list[Client], expected: list[Expected], move: str, what: Any) -> None:
    machine = node.machine
    if move == "apply":
        node.apply(*what)
    elif move == "apply_compact":  # in one turn: what is written is already compacted when the hub learns of it
        node.apply(what, PutRequest(key=b"c"), CompactionRequest(revision=machine.revision + 1))
    elif move == "compact":
        node.apply(CompactionRequest(revision=machine.revision - what))
    elif move == "sweep":
        machine.sweep(what)
    elif move == "watch":
        client, (key, range_end), offset = clients[what[0]], what[1], what[2]
        start = 0 if offset == 0 else max(1, machine.revision + offset)
        options = {"prev_kv": offset % 2 == 0, "no_put": offset % 5 == 1, "no_delete": offset % 5 == 2}
        watch = client.watch(key, range_end, start_revision=start, **options)
        watch_id = len(client.watches) - 1
        assert client.watches[watch_id] is watch
        expected.append(Expected(client, watch_id, start or machine.revision + 1, options))
    elif move == "cancel" and what < len(expected) and expected[what].alive:
        each = expected[what]
        watch = each.client.watches[each.watch_id]
        if watch in each.client.buffer.ids:
            node.hub.remove(watch)
            each.client.buffer.forget(watch)
            each.alive = False
    elif move == "read":
        clients[what[0]].read(what[1])
    elif move == "step":
        node.steps.step()
    elif move == "job":
        node.run_job()
    elif move == "install":
        node.install()


def matches(event: Event, watch: Watch, options: dict[str, bool]) -> bool:
    inside = watch.key <= event.kv.key and (watch.stop is None or event.kv.key < watch.stop)
    return inside and not options["no_delete" if event.type == Event.DELETE else "no_put"]


@given(st.lists(moves, max_size=60), st.sampled_from([1, 60, 300]))
@settings(max_examples=300, deadline=None)
def test_watches_get_what_they_must(script: list[tuple[str, Any]], bytes_max: int) -> None:
    node = Node()
    # The first is slow and has hardly any room; the last is never read before the end.
    clients = [Client(node, bytes_max), Client(node), Client(node, bytes_max)]
    expected: list[Expected] = []
    past: list[Event] = []
    for move, what in script:
        before = node.machine.revision
        play(node, clients, expected, move, what)
        reader = node.machine.reader()
        reader.compact_revision = min(reader.compact_revision, before)
        if node.machine.revision > before:
            past += [event for _, events in reader.changes(before + 1, 1 << 30, prev_kv=True) for event in events]
    for _ in range(500):
        node.settle()
        for client in clients:
            client.read(1)
        if not any(client.buffer.bytes for client in clients) and not node.steps.due and not node.hub.behind:
            break
    assert node.hub.behind == 0
    assert node.hub.buffered_bytes == 0
    for each in expected:
        client, watch = each.client, each.client.watches[each.watch_id]
        seen = client.events[each.watch_id]
        wanted = [e for e in past if e.kv.mod_revision >= each.start and matches(e, watch, each.options)]
        for event, want in zip(seen, wanted, strict=False):  # W1, W2, W3, W6: a beginning of what it must get
            assert (event.type, event.kv) == (want.type, want.kv)
            if each.options["prev_kv"] and event.HasField("prev_kv"):
                assert event.prev_kv == want.prev_kv
            elif each.options["prev_kv"] and want.HasField("prev_kv"):  # W7: absent only where it is compacted
                assert event.kv.mod_revision - 1 < node.machine.compact_revision
            assert each.options["prev_kv"] or not event.HasField("prev_kv")
        assert len(seen) <= len(wanted)
        if each.watch_id in client.compacted:
            compacted = client.compacted[each.watch_id]
            last = seen[-1].kv.mod_revision if seen else each.start - 1
            # It was told, and rightly: had it got all before the compaction, it would not have needed to be.
            assert last < compacted <= node.machine.compact_revision
            assert watch not in client.buffer.ids
        elif each.alive:
            assert len(seen) == len(wanted)
            assert node.hub.has_all(watch) or each.start > node.machine.revision + 1


@given(st.sampled_from(RANGES), st.sampled_from([*KEYS, b"a\xff0", b"zz", b"\xff", b"\0"]))
def test_the_matcher_knows_what_is_inside(pair: tuple[bytes, bytes], key: bytes) -> None:
    start, stop = span(*pair)
    watch = Watch(Client(Node()).buffer, start, stop, 0, False, (False, False))
    matcher = Matcher((watch,))
    inside = start <= key and (stop is None or key < stop)
    assert list(matcher.match(key)) == ([watch] if inside else [])
    assert matcher.touches()(key) == inside
    matcher.discard(watch)
    assert not matcher.match(key)
    assert not matcher.touches()(key)


@given(st.lists(st.sampled_from(RANGES), max_size=5), st.sampled_from([*KEYS, b"a\xff0", b"zz"]))
def test_many_ranges(pairs: list[tuple[bytes, bytes]], key: bytes) -> None:
    watches = [Watch(Client(Node()).buffer, *span(*pair), 0, False, (False, False)) for pair in pairs]
    matcher = Matcher(watches)
    expected = [watch for watch in watches if watch.key <= key and (watch.stop is None or key < watch.stop)]
    assert set(matcher.match(key)) == set(expected)
    assert len(matcher.match(key)) == len(expected)
    assert matcher.touches()(key) == bool(expected)
    for watch in watches:
        matcher.discard(watch)
    assert not matcher.touches()(key)


@pytest.mark.parametrize("prefix", [b"", b"a", b"a/", b"a\xff", b"\xff"])
def test_prefixes(prefix: bytes) -> None:
    start, stop = span(prefix or b"\0", prefix_end(prefix))
    assert prefix_of(start, stop) == (prefix if prefix != b"\xff" else None)


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**63 - 1, -1, -(2**63)])
def test_numbers_as_protobuf_writes_them(number: int) -> None:
    assert WatchResponse.FromString(b"\x10" + varint(number)).watch_id == number


def test_a_client_that_does_not_read_costs_its_buffer_and_misses_nothing() -> None:
    node = Node(loop_revisions_max=10)
    client = Client(node, bytes_max=10_000)
    client.watch(b"k")
    for number in range(1000):
        node.put(b"k", b"%04d" % number + bytes(1000))
        node.settle()
        assert client.buffer.bytes < 12_000
    for _ in range(1000):
        client.read(1)
        node.settle()
    assert [event.kv.value[:4] for event in client.events[0]] == [b"%04d" % number for number in range(1000)]


def test_a_slow_client_whose_history_goes_is_told() -> None:
    """Row 57: what a slow watcher needed next was compacted; it must not go on as if nothing had been."""
    node = Node()
    client = Client(node, bytes_max=1)
    client.watch(b"k")
    for _ in range(5):
        node.put(b"k")
    node.apply(CompactionRequest(revision=5))
    while client.buffer.bytes:
        client.read()
        node.settle()
    assert client.compacted == {0: 5}
    assert [event.kv.mod_revision for event in client.events[0]] == [2]


def test_all_streams_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftkv.server.watch_stream.BUFFERED_BYTES_MAX", 50_000)
    node = Node()
    clients = [Client(node) for _ in range(20)]
    for client in clients:
        client.watch(b"k")
    for _ in range(100):
        node.put(b"k", bytes(1000))
    assert node.hub.buffered_bytes <= 50_000 + 20 * 1100
    assert all(client.buffer.bytes for client in clients), "each gets something"
    for _ in range(300):
        for client in clients:
            client.read(1)
        node.settle()
    assert {len(client.events[0]) for client in clients} == {100}


def test_a_stream_whose_client_asks_no_more_ends_however_busy_it_is() -> None:
    """What is queued is still sent; what comes later is not, or it would never end."""
    node = Node()
    client = Client(node, bytes_max=10_000)
    watch = client.watch(b"k")
    for _ in range(100):
        node.put(b"k", bytes(1000))
    assert node.hub.behind == 1
    client.buffer.end()
    assert not client.buffer.ended
    for _ in range(100):
        client.read(1)
        node.put(b"k", b"late")
        node.settle()
        if client.buffer.ended:
            break
    assert client.buffer.ended
    assert client.events[0]
    assert b"late" not in {event.kv.value for event in client.events[0]}
    assert watch not in client.buffer.ids
    assert (len(node.hub), node.hub.buffered_bytes) == (0, 0)


def test_those_who_catch_up_and_never_read_are_bounded_together() -> None:
    """Each comes by itself and is behind from the beginning, so no two share what they hold."""
    node = Node(loop_revisions_max=64)
    for number in range(300):
        node.put(b"k", b"%03d" % number + bytes(1000))
    clients = [Client(node, STREAM_BYTES_MAX) for _ in range(300)]
    for client in clients:
        client.watch(b"k", start_revision=2)
        node.settle()
    assert node.hub.buffered_bytes > BUFFERED_BYTES_MAX // 2
    assert node.hub.buffered_bytes <= BUFFERED_BYTES_MAX + len(clients) * (RESPONSE_BYTES_MAX + 1100)
    last = clients[-1]  # it reads, and gets on though the others do not
    for _ in range(100):
        last.read()
        node.settle()
    assert len(last.events[0]) == 300


def test_beside_writes_history_is_pushed_slowly_and_else_at_once() -> None:
    """Or a thousand that catch up would take all of the loop's time, and puts would wait for it."""
    node = Node(loop_revisions_max=1_000)
    for number in range(50):
        node.put(b"k", b"%03d" % number + bytes(1000))
    clients = [Client(node) for _ in range(100)]
    for client in clients:
        client.watch(b"k", start_revision=2)
    begun = node.steps.now
    while node.steps.now < begun + 0.2:
        node.put(b"other")
        node.steps.run(0.001)
        slices = (node.steps.now - begun) / PAUSE_S + 2
        assert node.hub.buffered_bytes <= slices * (SLICE_BYTES + 52_000), (
            "no more than a slice, and what the last gets"
        )
    assert node.hub.buffered_bytes > 0.2 / PAUSE_S * SLICE_BYTES / 2, "and not much less"
    assert node.hub.behind
    node.steps.run(BUSY_S + PAUSE_S)  # nobody writes any more
    node.steps.run(0.0)
    assert node.hub.behind == 0
    for client in clients:
        client.read()
        assert len(client.events[0]) == 50


def test_the_longer_somebody_is_behind_the_shorter_are_the_pauses() -> None:
    """Or readers that can keep up with the writes, but not at this pace, would never be with them again."""
    now = 0.0
    pace = Pace(lambda: now)

    def pause_s() -> float:
        pace.written()
        pace.set_behind(True)
        pace.spend(SLICE_BYTES)
        pace.end()
        return pace.pause_s()

    assert pause_s() == pytest.approx(PAUSE_S)
    now += 2 * HALVES_EVERY_S
    assert pause_s() == pytest.approx(PAUSE_S / 4)
    pace.set_behind(False)
    assert pause_s() == pytest.approx(PAUSE_S)
    pace.spend(SLICE_BYTES - 1)
    now += 1
    pace.end()
    assert pace.pause_s() == 0.0, "no slice yet"


def test_whoever_is_nearly_there_does_not_wait_for_those_who_are_far_behind() -> None:
    node = Node(loop_revisions_max=64)
    for number in range(2_000):
        node.put(b"k", b"%04d" % number + bytes(1000))
    far = [Client(node) for _ in range(20)]
    for number, client in enumerate(far):
        client.watch(b"k", start_revision=2 + 70 * number)  # each needs its own chunk
    near = Client(node)
    near.watch(b"k", start_revision=node.machine.revision - 3)
    for _ in range(4):
        node.put(b"k")
        node.steps.step()
        node.run_job()
    near.read()
    assert len(near.events[0]) > 4
    turns = 0
    while node.hub.behind:
        for client in far:
            client.read()
        node.steps.step()
        node.run_job()
        turns += 1
        ahead = [client.watches[0].next_revision for client in far]
        if turns == 100:
            assert all(revision > 2 + 70 * number for number, revision in enumerate(ahead)), "each has had its turn"
    for number, client in enumerate(far):
        client.read()
        assert len(client.events[0]) == 2_000 + 4 - 70 * number
    assert node.faults == []


def test_fragments() -> None:
    node = Node()
    client = Client(node)
    client.watch(b"\0", b"\0", fragment=True)
    client.watch(b"\0", b"\0")
    puts = [RequestOp(request_put=PutRequest(key=b"%02d" % number, value=bytes(300_000))) for number in range(10)]
    node.apply(TxnRequest(success=puts))
    raws = list(client.buffer.pop())
    parts = [WatchResponse.FromString(raw) for raw in raws]
    assert [part.fragment for part in parts] == [True, False]
    assert [len(part.events) for part in parts] == [6, 4]
    assert all(len(raw) < 2 * 1024 * 1024 for raw in raws)
    assert {part.header.revision for part in parts} == {2}
    node.settle()  # the first left no room for the second
    (whole,) = (WatchResponse.FromString(raw) for raw in client.buffer.pop())
    assert (len(whole.events), whole.fragment, whole.watch_id) == (10, False, 1)


def test_what_is_caught_up_with_comes_in_responses_of_bounded_size() -> None:
    """Of each stream one is under way in gRPC, however far behind it is; and a revision is never torn."""
    node = Node()
    for _ in range(20):
        puts = [PutRequest(key=b"%d" % number, value=bytes(RESPONSE_BYTES_MAX // 5)) for number in range(3)]
        node.apply(TxnRequest(success=[RequestOp(request_put=put) for put in puts]))
    client = Client(node)
    client.watch(b"\0", b"\0", start_revision=2)
    node.settle()
    client.read()
    assert len(client.events[0]) == 60
    last = 1
    for response in client.responses:
        assert response.ByteSize() <= 2 * RESPONSE_BYTES_MAX
        assert len(response.events) % 3 == 0
        revisions = [event.kv.mod_revision for event in response.events]
        assert revisions[0] == last + 1
        last = revisions[-1]
        assert response.header.revision == last
    assert last == node.machine.revision


def test_a_response_is_joined_by_later_changes_while_it_waits() -> None:
    node = Node()
    client = Client(node)
    client.watch(b"k")
    for _ in range(5):
        node.put(b"k")
    client.read()
    assert [len(response.events) for response in client.responses] == [5]
    assert client.responses[0].header.revision == 6
    node.put(b"k", bytes(RESPONSE_BYTES_MAX))
    node.put(b"k")
    client.read()
    assert [len(response.events) for response in client.responses] == [5, 1, 1]


def test_expired_is_told() -> None:
    change = Change(5, Event(type=Event.DELETE, kv={"key": b"k"}, prev_kv={"key": b"k"}, expired=True))
    for prev_kv in (False, True):
        (event,) = WatchResponse.FromString(change.frame(prev_kv)).events
        assert event.expired
        assert event.HasField("prev_kv") == prev_kv


def test_an_error_in_the_hub_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, reader: Reader) -> Found:
        raise ValueError("broken")

    node = Node()
    node.put(b"k")
    monkeypatch.setattr(Plan, "read", fail)
    Client(node).watch(b"k", start_revision=1)
    node.steps.step()
    assert [str(fault) for fault in node.faults] == ["broken"]


async def test_a_client_that_only_asks_waits_for_room() -> None:
    """Answers without events count too: who does not read them is not listened to any more."""
    client = Client(Node(), bytes_max=100)
    while client.buffer.bytes <= 100:
        await asyncio.wait_for(client.buffer.wait_room(), 20)
        client.buffer.tell(1, watch_id=-1, created=True, canceled=True, cancel_reason="no")
    waiting = asyncio.ensure_future(client.buffer.wait_room())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    for _ in range(8):
        client.buffer.pop()
    await asyncio.wait_for(waiting, 20)
    for _ in range(20):
        client.buffer.tell(1, watch_id=-1, created=True, canceled=True, cancel_reason="no")
    waiting = asyncio.ensure_future(client.buffer.wait_room())
    await asyncio.sleep(0.01)
    client.buffer.closed()  # the node stops
    await asyncio.wait_for(waiting, 20)


def test_the_first_watch_and_the_end_of_the_last_are_told() -> None:
    node = Node()
    sink = Listener(node.hub)
    with sink:
        sink.add(b"a", None, 0)
        sink.add(b"b", None, 0)
        assert node.watched == [True]
    assert node.watched == [True, False]
