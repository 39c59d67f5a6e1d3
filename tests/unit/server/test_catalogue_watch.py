"""Bugs of others' watches, rows 57 to 63 of the catalogue: ours must not have them, and the checks must see them.

A mutant is our own code with the bug put in; it must fail the check that is named for the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raftkv._pb.common_pb2 import Event
from raftkv._pb.kv_pb2 import CompactionRequest, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest
from raftkv._pb.watch_pb2 import (
    WatchCancelRequest,
    WatchCreateRequest,
    WatchProgressRequest,
    WatchRequest,
    WatchResponse,
)
from raftkv.server.services.watch import _Watches
from raftkv.server.watch import Matcher, Watch, WatchHub
from raftkv.server.watch_stream import StreamBuffer
from raftkv.state.machine import StateMachine
from raftkv.state.mvcc import Reader
from tests.unit.server.test_watch_hub import Client, Node

Check = Callable[[], None]
Patch = Callable[[pytest.MonkeyPatch], None]


def values(client: Client, watch_id: int = 0) -> list[tuple[int, bytes]]:
    return [(event.kv.mod_revision, event.kv.value) for event in client.events[watch_id]]


def drain(node: Node, *clients: Client) -> None:
    """Until everybody has all that there is."""
    for _ in range(200):
        node.settle()
        for client in clients:
            client.read()


def numbered(node: Node, key: bytes, first: int, last: int) -> list[tuple[int, bytes]]:
    written = []
    for number in range(first, last + 1):
        node.put(key, b"%d" % number + bytes(40))
        written.append((node.machine.revision, b"%d" % number + bytes(40)))
    return written


def other_node(node: Node) -> StateMachine:
    """A replica with the same state, which goes on by itself."""
    assert not node.machine.sweeping
    return StateMachine(node.machine.store.copy())  # type: ignore[attr-defined]


# Row 57, W3.


def a_slow_watch_gets_everything_or_is_told_that_history_has_gone() -> None:
    """For each place where a compaction can fall between what a slow client has read and what it has not."""
    for ahead in range(14):
        node = Node()
        slow = Client(node, bytes_max=120)
        slow.watch(b"k")
        written = numbered(node, b"k", 1, 12)
        slow.read(1)
        node.settle()
        node.apply(CompactionRequest(revision=min(2 + ahead, node.machine.revision)))
        while node.machine.sweep(5):
            pass
        numbered(node, b"other", 1, 2)
        drain(node, slow)
        seen = values(slow)
        assert seen == written[: len(seen)], "a gap"
        assert len(seen) == len(written) or 0 in slow.compacted, "silence"
        if 0 in slow.compacted:
            assert slow.compacted[0] == node.machine.compact_revision
            assert written[len(seen)][0] < node.machine.compact_revision


def goes_on_where_history_begins(patch: pytest.MonkeyPatch) -> None:
    """M-57: a watch that is behind a compaction continues with what is left, as if nothing was missing."""
    original = WatchHub._catch_up

    def catch_up(self: WatchHub) -> None:
        for watch in self._behind:
            watch.next_revision = max(watch.next_revision, self._machine.compact_revision)
        original(self)

    patch.setattr(WatchHub, "_catch_up", catch_up)


def drops_it_silently(patch: pytest.MonkeyPatch) -> None:
    """M-57, the other half: the watch ends, and its client is not told."""
    patch.setattr(StreamBuffer, "cancelled", lambda self, watch, compact_revision: self.forget(watch))


# Row 58, W3.


def deletes_are_seen_whatever_revision_is_compacted() -> None:
    for compacted, sweep, slow in itertools.product(range(2, 9), (0, 1, 100), (False, True)):
        node = Node()
        watching = Client(node, bytes_max=1 if slow else 1 << 20)
        for key in (b"a", b"b"):
            node.put(key)
        watching.watch(b"\0", b"\0", start_revision=4 if slow else 0)
        node.apply(DeleteRangeRequest(key=b"a"))  # 4
        node.apply(PutRequest(key=b"a"), DeleteRangeRequest(key=b"a", range_end=b"c"))  # 5, 6
        node.put(b"c")  # 7
        node.apply(DeleteRangeRequest(key=b"c"))  # 8
        node.apply(CompactionRequest(revision=compacted))
        if sweep:
            while node.machine.sweep(sweep):
                pass
        drain(node, watching)
        late = Client(node)
        late.watch(b"\0", b"\0", start_revision=max(4, compacted))
        drain(node, late)
        everything = [
            (4, Event.DELETE, b"a"), (5, Event.PUT, b"a"), (6, Event.DELETE, b"a"), (6, Event.DELETE, b"b"),
            (7, Event.PUT, b"c"), (8, Event.DELETE, b"c"),
        ]  # fmt: skip
        for client in (watching, late):
            seen = [(event.kv.mod_revision, event.type, event.kv.key) for event in client.events[0]]
            first = 4 if client is watching else max(4, compacted)
            wanted = [each for each in everything if each[0] >= first]
            assert seen == wanted[: len(seen)], (compacted, sweep, slow)
            assert len(seen) == len(wanted) or 0 in client.compacted, (compacted, sweep, slow)


def has_no_tombstone_at_the_compact_revision(patch: pytest.MonkeyPatch) -> None:
    """M-58: the compaction keeps what can be read at its revision, and a deletion cannot be read."""
    original = Reader.changes

    def changes(self: Reader, *arguments: Any, **options: Any) -> Iterator[tuple[int, list[Event]]]:
        for revision, events in original(self, *arguments, **options):
            if revision == self.compact_revision:
                events = [event for event in events if event.type != Event.DELETE]
            yield revision, events

    patch.setattr(Reader, "changes", changes)


# Row 59, W1 and W2.


def an_installed_snapshot_neither_repeats_nor_skips() -> None:
    """A follower that has fallen behind gets the state of others in one piece, in all states of its watches."""
    for compacted in (0, 6, 9, 13):
        node = Node()
        before = numbered(node, b"k", 1, 6)
        ready, slow, late = Client(node), Client(node, bytes_max=120), Client(node)
        ready.watch(b"k")
        slow.watch(b"k")
        late.watch(b"k", start_revision=3)
        future = late.watch(b"k", start_revision=14)
        before += numbered(node, b"k", 7, 8)
        drain(node, ready)
        ahead = Node()
        ahead.machine = other_node(node)
        between = numbered(ahead, b"k", 9, 14)
        if compacted:
            ahead.apply(CompactionRequest(revision=compacted))
            while ahead.machine.sweep(100):
                pass
        node.machine = ahead.machine
        node.hub.advance()
        after = numbered(node, b"k", 15, 17)
        drain(node, ready, slow, late)
        everything = before + between + after
        assert future.start_revision == 14
        for client, watch_id, first in ((ready, 0, 8), (slow, 0, 8), (late, 0, 3), (late, 1, 14)):
            seen = values(client, watch_id)
            wanted = [each for each in everything if each[0] >= first]
            assert seen == wanted[: len(seen)], (compacted, watch_id)
            assert len(seen) == len(wanted) or watch_id in client.compacted, (compacted, watch_id)
        assert 0 not in ready.compacted or compacted > 10


def begins_anew_after_a_snapshot(patch: pytest.MonkeyPatch) -> None:
    """M-59: what has been sent is forgotten with the state that it came from."""
    original = WatchHub._reattach

    def reattach(self: WatchHub, machine: StateMachine) -> None:
        synced = [watch for watch in self._watches if watch not in self._behind]
        original(self, machine)
        for watch in synced:
            watch.next_revision = max(watch.start_revision, 1)

    patch.setattr(WatchHub, "_reattach", reattach)


def skips_what_a_snapshot_brought(patch: pytest.MonkeyPatch) -> None:
    """M-59, the other half: watches count as synced with a state whose history they have not seen."""

    def reattach(self: WatchHub, machine: StateMachine) -> None:
        self._machine = machine
        self.revision = machine.revision

    patch.setattr(WatchHub, "_reattach", reattach)


# Row 60, W5.


def progress_is_never_ahead_of_changes() -> None:
    """Whatever is asked when: a report of revision r comes behind all changes up to r, of all watches of the stream."""
    for bytes_max, asked_at in itertools.product((1, 200, 1 << 20), range(9)):
        node = Node()
        numbered(node, b"k", 1, 9)
        client = Client(node, bytes_max)
        watches = _Watches(node.hub, client.buffer)
        for start in (1, 0, 12):
            watches.handle(create(b"k", start))
        for step in range(9):
            if step >= asked_at:
                watches.handle(progress())
                watches._notified = {0, 1, 2}
                watches._report()
                watches.close()
            numbered(node, b"k", step, step)
            node.steps.step()
            node.run_job()
        got = list(responses(client))
        watches.handle(progress())
        got += responses(client)
        told = {0: 0, 1: 10, 2: 11}  # up to here each watch has been told all that it wants
        reported = 0
        for response in got:
            if response.events:
                told[response.watch_id] = max(event.kv.mod_revision for event in response.events)
                assert all(event.kv.mod_revision > reported for event in response.events), "overtaken"
            elif not response.created:
                wanted = told.values() if response.watch_id < 0 else (told[response.watch_id],)
                assert min(wanted) >= response.header.revision, "ahead"
                reported = max(reported, response.header.revision) if response.watch_id < 0 else reported
        assert reported == node.machine.revision, "no report at all"


def create(key: bytes, start_revision: int) -> WatchRequest:
    return WatchRequest(create_request=WatchCreateRequest(key=key, start_revision=start_revision))


def cancel(watch_id: int) -> WatchRequest:
    return WatchRequest(cancel_request=WatchCancelRequest(watch_id=watch_id))


def progress() -> WatchRequest:
    return WatchRequest(progress_request=WatchProgressRequest())


def responses(client: Client) -> Iterator[WatchResponse]:
    """All that the stream sends until there is no more."""
    client.node.settle()
    while parts := list(client.buffer.pop()):
        yield from map(WatchResponse.FromString, parts)
        client.node.settle()


def reports_before_all_are_synced(patch: pytest.MonkeyPatch) -> None:
    """M-60."""
    patch.setattr(WatchHub, "has_all", lambda self, watch: True)


def reports_past_what_is_queued(patch: pytest.MonkeyPatch) -> None:
    """M-60, in the stream: a report is put before the changes that wait to be sent."""
    original = StreamBuffer.tell

    def tell(self: StreamBuffer, revision: int, **fields: Any) -> None:
        original(self, revision, **fields)
        if not fields.get("created"):
            self._queue.rotate(1)

    patch.setattr(StreamBuffer, "tell", tell)


# Row 61, W6.


def nothing_comes_from_before_a_future_start() -> None:
    for offset, snapshot in itertools.product(range(1, 8), (False, True)):
        node = Node()
        numbered(node, b"k", 1, 3)
        client = Client(node)
        start = node.machine.revision + offset
        client.watch(b"k", start_revision=start)
        assert not node.hub.has_all(client.watches[0]) or offset == 1, "told as complete what has not begun"
        numbered(node, b"k", 4, 6)
        if snapshot:
            node.install()
        written = numbered(node, b"k", 7, 12)
        drain(node, client)
        seen = values(client)
        assert [revision for revision, _ in seen] == list(range(start, node.machine.revision + 1))
        assert seen[-6:] == written[-len(seen) :][-6:]


def begins_at_once(patch: pytest.MonkeyPatch) -> None:
    """M-61."""
    original = WatchHub.add

    def add(self: WatchHub, *arguments: Any, **options: Any) -> Watch:
        watch = original(self, *arguments, **options)
        watch.next_revision = min(watch.next_revision, self.revision + 1)
        return watch

    patch.setattr(WatchHub, "add", add)


# Rows 62 and 63, W2.


def an_event_comes_once_whatever_ways_lead_to_it() -> None:
    """A transaction of many keys, and watches of the key, of its prefix and of ranges around it."""
    node = Node()
    client = Client(node)
    ranges = [(b"a/1", b""), (b"a/", b"a0"), (b"a", b"b"), (b"\0", b"\0"), (b"a/1", b"a/2"), (b"a/1", b"a/1\0")]
    for pair in ranges:
        client.watch(*pair)
        client.watch(*pair, start_revision=1)
    for number in range(3):
        puts = [RequestOp(request_put=PutRequest(key=b"a/%d" % each, value=b"%d" % number)) for each in range(4)]
        node.apply(TxnRequest(success=puts), TxnRequest(success=puts[:1]))
    drain(node, client)
    for seen in client.events.values():
        pairs = [(event.kv.mod_revision, event.kv.key) for event in seen]
        assert len(set(pairs)) == len(pairs)
        assert (2, b"a/1") in pairs
        assert [revision for revision, _ in pairs] == sorted(revision for revision, _ in pairs)


def finds_a_watch_by_each_way(patch: pytest.MonkeyPatch) -> None:
    original = Matcher.match
    patch.setattr(Matcher, "match", lambda self, key: [*original(self, key), *original(self, key)[:1]])


def watch_0_and_negative_revisions_are_as_others() -> None:
    """Row 63: id 0 is an id, and is not taken for "none"; a negative revision harms nobody else."""
    node = Node()
    client = Client(node)
    watches = _Watches(node.hub, client.buffer)
    for key, start in ((b"a", 0), (b"b", 0), (b"c", -5)):
        watches.handle(create(key, start))
    watches.handle(cancel(-1))
    node.put(b"a")
    node.put(b"b")
    watches.handle(cancel(0))
    node.put(b"a")
    node.put(b"b")
    got = list(responses(client))
    refused = [(each.watch_id, each.created) for each in got if each.canceled]
    assert refused == [(-1, True), (0, False)]
    events = [(each.watch_id, event.kv.mod_revision) for each in got for event in each.events]
    assert sorted(events) == [(0, 2), (1, 3), (1, 5)]
    assert node.hub.behind == 0


def takes_0_for_none(patch: pytest.MonkeyPatch) -> None:
    original = _Watches._cancel
    patch.setattr(_Watches, "_cancel", lambda self, watch_id: original(self, watch_id) if watch_id else None)


CHECKS: list[Check] = [
    a_slow_watch_gets_everything_or_is_told_that_history_has_gone,
    deletes_are_seen_whatever_revision_is_compacted,
    an_installed_snapshot_neither_repeats_nor_skips,
    progress_is_never_ahead_of_changes,
    nothing_comes_from_before_a_future_start,
    an_event_comes_once_whatever_ways_lead_to_it,
    watch_0_and_negative_revisions_are_as_others,
]
MUTANTS: list[tuple[Patch, Check]] = [
    (goes_on_where_history_begins, a_slow_watch_gets_everything_or_is_told_that_history_has_gone),
    (drops_it_silently, a_slow_watch_gets_everything_or_is_told_that_history_has_gone),
    (has_no_tombstone_at_the_compact_revision, deletes_are_seen_whatever_revision_is_compacted),
    (begins_anew_after_a_snapshot, an_installed_snapshot_neither_repeats_nor_skips),
    (skips_what_a_snapshot_brought, an_installed_snapshot_neither_repeats_nor_skips),
    (reports_before_all_are_synced, progress_is_never_ahead_of_changes),
    (reports_past_what_is_queued, progress_is_never_ahead_of_changes),
    (begins_at_once, nothing_comes_from_before_a_future_start),
    (finds_a_watch_by_each_way, an_event_comes_once_whatever_ways_lead_to_it),
    (takes_0_for_none, watch_0_and_negative_revisions_are_as_others),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_sound(check: Check) -> None:
    check()


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda each: each.__name__)
async def test_mutant_is_found(mutant: Patch, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
