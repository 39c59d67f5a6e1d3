"""The checkers are tested first: every bad history is reported, by the right rule, and every good one passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftkv.sim.history import Answer, History, Item, Kind, Operation, Outcome, Violation


class Story:
    """A history told step by step."""

    def __init__(self) -> None:
        self.history = History()
        self._index = 0

    def call(
        self, kind: Kind, key: bytes = b"a", value: bytes = b"", expected: int = 0, previous: bool = False
    ) -> Operation:
        operation = Operation(len(self.history.operations) + 1, kind, key, value, expected, previous)
        self.history.called(operation)
        return operation

    def put(self, value: bytes, key: bytes = b"a", previous: bool = False) -> Operation:
        return self.call(Kind.PUT, key, value, previous=previous)

    def log(self, *operations: Operation) -> None:
        self._index += 1
        self.history.applied(self._index, operations)

    def ok(self, operation: Operation, revision: int, seen: object = None) -> None:
        self.history.returned(operation, Outcome.OK, (revision, seen))

    def done(self, value: bytes, revision: int, key: bytes = b"a") -> None:
        """A put from its beginning to its end."""
        operation = self.put(value, key)
        self.log(operation)
        self.ok(operation, revision)

    def read(self, answer: Answer, key: bytes = b"a") -> None:
        operation = self.call(Kind.READ, key)
        self.ok(operation, *answer)


def item(value: bytes, create: int, mod: int, version: int, key: bytes = b"a") -> Item:
    return key, value, create, mod, version


# Good ones.


def test_reads_between_writes() -> None:
    story = Story()
    story.read((1, None))
    story.done(b"1", 2)
    story.done(b"2", 3)
    story.read((3, item(b"2", 2, 3, 2)))
    delete = story.call(Kind.DELETE)
    story.log(delete)
    story.ok(delete, 4, item(b"2", 2, 3, 2))
    story.read((4, None))
    story.done(b"3", 5)
    story.read((5, item(b"3", 5, 5, 1)))


def test_concurrent_operations_in_any_order() -> None:
    story = Story()
    first, second, reader = story.put(b"1"), story.put(b"2", previous=True), story.call(Kind.READ)
    story.log(second, first)
    story.ok(first, 3)
    story.ok(reader, 2, item(b"2", 2, 2, 1))  # it began before either had returned
    story.ok(second, 2, None)


def test_one_of_two_swaps_wins() -> None:
    story = Story()
    first = story.call(Kind.SWAP, value=b"1")
    second = story.call(Kind.SWAP, value=b"2")
    story.log(first, second)
    story.ok(second, 2, item(b"1", 2, 2, 1))
    story.ok(first, 2, True)


def test_deleting_nothing_makes_no_revision() -> None:
    story = Story()
    delete = story.call(Kind.DELETE)
    story.log(delete)
    story.ok(delete, 1, None)
    story.done(b"1", 2)


def test_a_scan_sees_one_moment() -> None:
    story = Story()
    story.done(b"1", 2, b"a")
    story.done(b"2", 3, b"b")
    scan = story.call(Kind.SCAN)
    story.ok(scan, 3, (item(b"1", 2, 2, 1), item(b"2", 3, 3, 1, b"b")))


@pytest.mark.parametrize("applied", [False, True])
def test_unknown_is_once_or_never(applied: bool) -> None:
    story = Story()
    lost = story.put(b"1")
    story.history.returned(lost, Outcome.UNKNOWN)
    if applied:
        story.log(lost)
    story.done(b"2", 3 if applied else 2)


def test_failed_is_never() -> None:
    story = Story()
    failed = story.put(b"1")
    story.history.returned(failed, Outcome.FAILED)
    story.done(b"2", 2)
    story.read((2, item(b"2", 2, 2, 1)))


# Bad ones.


def stale_read(story: Story) -> None:
    story.done(b"1", 2)
    story.done(b"2", 3)
    story.read((2, item(b"1", 2, 2, 1)))


def read_goes_back(story: Story) -> None:
    story.done(b"1", 2)
    slow = story.put(b"2")
    story.log(slow)
    story.read((3, item(b"2", 2, 3, 2)))
    story.read((2, item(b"1", 2, 2, 1)))


def read_of_a_value_never_written(story: Story) -> None:
    story.done(b"1", 2)
    story.read((2, item(b"7", 2, 2, 1)))


def read_from_the_future(story: Story) -> None:
    story.done(b"1", 2)
    story.put(b"2")
    story.read((3, item(b"2", 2, 3, 2)))


def read_at_another_revision_than_it_says(story: Story) -> None:
    story.done(b"1", 2)
    story.done(b"2", 3)
    story.read((3, item(b"1", 2, 2, 1)))


def wrong_version(story: Story) -> None:
    story.done(b"1", 2)
    story.read((2, item(b"1", 2, 2, 2)))


def lost_update(story: Story) -> None:
    story.done(b"1", 2)
    for value in (b"2", b"3"):
        swap = story.call(Kind.SWAP, value=value, expected=1)
        story.log(swap)
        story.ok(swap, story.history.model.revision, True)


def scan_torn(story: Story) -> None:
    story.done(b"1", 2, b"a")
    story.done(b"2", 3, b"b")
    story.done(b"3", 4, b"a")
    scan = story.call(Kind.SCAN)
    story.ok(scan, 4, (item(b"1", 2, 2, 1), item(b"2", 3, 3, 1, b"b")))


def scan_misses_a_key(story: Story) -> None:
    story.done(b"1", 2, b"a")
    story.done(b"2", 3, b"b")
    scan = story.call(Kind.SCAN)
    story.ok(scan, 3, (item(b"2", 3, 3, 1, b"b"),))


def revision_repeats(story: Story) -> None:
    story.done(b"1", 2)
    story.done(b"2", 2)


def revision_skips(story: Story) -> None:
    story.done(b"1", 3)


def wrong_previous_value(story: Story) -> None:
    story.done(b"1", 2)
    put = story.put(b"2", previous=True)
    story.log(put)
    story.ok(put, 3, None)


def delete_says_that_nothing_was_there(story: Story) -> None:
    story.done(b"1", 2)
    delete = story.call(Kind.DELETE)
    story.log(delete)
    story.ok(delete, 2, None)


def acknowledged_and_lost(story: Story) -> None:
    put = story.put(b"1")
    story.ok(put, 2)


def applied_twice(story: Story) -> None:
    put = story.put(b"1")
    story.log(put)
    story.ok(put, 2)
    story.log(put)


def applied_twice_in_one_entry(story: Story) -> None:
    put = story.put(b"1")
    story.log(put, put)


def unknown_applied_twice(story: Story) -> None:
    put = story.put(b"1")
    story.history.returned(put, Outcome.UNKNOWN)
    story.log(put)
    story.log(put)


def failed_but_applied_before(story: Story) -> None:
    put = story.put(b"1")
    story.log(put)
    story.history.returned(put, Outcome.FAILED)


def failed_but_applied_later(story: Story) -> None:
    put = story.put(b"1")
    story.history.returned(put, Outcome.FAILED)
    story.log(put)


def answered_twice(story: Story) -> None:
    put = story.put(b"1")
    story.log(put)
    story.ok(put, 2)
    story.ok(put, 2)


BAD: list[tuple[str, Callable[[Story], None]]] = [
    ("K1", stale_read),
    ("K1", read_goes_back),
    ("K1", read_of_a_value_never_written),
    ("K1", read_from_the_future),
    ("K1", read_at_another_revision_than_it_says),
    ("K1", wrong_version),
    ("K1", lost_update),
    ("K1", scan_torn),
    ("K1", scan_misses_a_key),
    ("K1", revision_repeats),
    ("K1", revision_skips),
    ("K1", wrong_previous_value),
    ("K1", delete_says_that_nothing_was_there),
    ("D1", acknowledged_and_lost),
    ("X1", applied_twice),
    ("X1", applied_twice_in_one_entry),
    ("X1", unknown_applied_twice),
    ("K3", failed_but_applied_before),
    ("K3", failed_but_applied_later),
    ("K3", answered_twice),
]


@pytest.mark.parametrize(("rule", "tell"), BAD, ids=[tell.__name__ for _, tell in BAD])
def test_a_bad_history_is_reported(rule: str, tell: Callable[[Story], None]) -> None:
    with pytest.raises(Violation) as caught:
        tell(Story())
    assert caught.value.rule == rule
