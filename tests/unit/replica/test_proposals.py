"""Commands that callers wait for, from the queue to their fate."""

from __future__ import annotations

import pytest

from raftkv.replica.proposals import Forwarded, Proposals
from raftkv.state.commands import Command, Group

ME, LIFE = 7, 70


@pytest.fixture
def proposals() -> Proposals:
    return Proposals(ME, LIFE)


def add(proposals: Proposals, *payloads: bytes) -> list[object]:
    return [proposals.add(1, payload, payload.decode()) for payload in payloads]


def seen(proposals: Proposals, commands: tuple[Command, ...], origin: int = ME, life: int = LIFE) -> list[object]:
    """The tickets that are answered when an entry with these commands is applied."""
    out: list[tuple[object, object]] = []
    proposals.applied(Group(origin, life, commands), [f"result {command.seq}" for command in commands], out)
    return [ticket for ticket, _ in out]


def test_a_command_is_taken_once_and_answered_when_it_is_seen(proposals: Proposals) -> None:
    add(proposals, b"a", b"b")
    commands = proposals.take(3)
    assert [(c.seq, c.kind, c.payload) for c in commands] == [(1, 1, b"a"), (2, 1, b"b")]
    assert proposals.take(3) == ()
    assert seen(proposals, commands) == ["a", "b"]
    assert seen(proposals, commands) == []
    assert len(proposals) == 0


def test_commands_of_another_node_or_life_answer_nobody(proposals: Proposals) -> None:
    add(proposals, b"a")
    commands = proposals.take(1)
    assert seen(proposals, commands, origin=8) == []
    assert seen(proposals, commands, life=71) == []
    assert seen(proposals, commands) == ["a"]


def test_what_is_abandoned_before_it_is_sent_is_dropped(proposals: Proposals) -> None:
    first, _ = proposals.add(1, b"a", "a"), proposals.add(1, b"b", "b")
    first.abandoned = True
    assert [c.payload for c in proposals.take(1)] == [b"b"]
    assert len(proposals) == 1


def test_what_is_abandoned_later_is_answered_to_nobody(proposals: Proposals) -> None:
    pending = proposals.add(1, b"a", "a")
    commands = proposals.take(1)
    pending.abandoned = True
    assert seen(proposals, commands) == []
    assert len(proposals) == 0
    assert not proposals.sent(1)


def test_a_later_term_proves_that_a_command_is_lost_and_queues_it_anew(proposals: Proposals) -> None:
    add(proposals, b"a", b"b")
    old = proposals.take(3)
    add(proposals, b"c")
    proposals.term_applied(3)  # its own term proves nothing
    assert proposals.queued == 1
    proposals.term_applied(4)
    fresh = proposals.take(4)
    assert [(c.seq, c.payload) for c in fresh] == [(3, b"c"), (4, b"a"), (5, b"b")]  # numbers rise, none is used twice
    assert seen(proposals, old) == []
    assert seen(proposals, fresh) == ["c", "a", "b"]


def test_what_was_sent_in_the_later_term_is_not_touched(proposals: Proposals) -> None:
    add(proposals, b"a")
    proposals.take(3)
    add(proposals, b"b")
    proposals.take(5)
    proposals.term_applied(4)
    assert [c.payload for c in proposals.take(5)] == [b"a"]


def test_sending_again_keeps_numbers_and_order_and_forgets_the_abandoned(proposals: Proposals) -> None:
    add(proposals, b"a")
    gone = proposals.add(1, b"b", "b")
    add(proposals, b"c")
    sent = proposals.take(2)
    add(proposals, b"d")
    gone.abandoned = True
    assert proposals.send_again(1) == ()
    assert proposals.send_again(2) == (sent[0], sent[2])
    assert proposals.send_again(2) == (sent[0], sent[2])
    assert seen(proposals, sent) == ["a", "c"]
    assert not proposals.sent(2)


def test_sent_counts_what_is_under_way(proposals: Proposals) -> None:
    add(proposals, b"a", b"b")
    assert not proposals.sent(1)
    first = proposals.take(1)
    assert proposals.sent(1)
    assert not proposals.sent(2)
    seen(proposals, first[:1])
    assert proposals.sent(1)
    proposals.term_applied(2)
    again = proposals.take(2)
    assert proposals.sent(2)
    assert seen(proposals, again) == ["b"]
    assert not proposals.sent(2)


def test_everything_abandoned_and_lost_holds_up_nobody(proposals: Proposals) -> None:
    gone = proposals.add(1, b"a", "a")
    proposals.take(1)
    gone.abandoned = True
    assert proposals.send_again(1) == ()
    assert not proposals.sent(1)


def test_a_snapshot_hides_what_may_be_in_it(proposals: Proposals) -> None:
    add(proposals, b"a")
    proposals.take(2)
    gone = proposals.add(1, b"gone", "gone")
    add(proposals, b"b")
    proposals.take(3)
    gone.abandoned = True
    add(proposals, b"c")
    proposals.take(4)
    add(proposals, b"d")
    assert proposals.lose(3) == ["a", "b"]
    assert [c.payload for c in proposals.send_again(4)] == [b"c"]
    assert [c.payload for c in proposals.take(4)] == [b"d"]


def test_the_queue_is_freed_of_callers_that_have_gone(proposals: Proposals) -> None:
    """Without a leader nobody takes from the queue, however long callers come and go."""
    for number in range(100):
        proposals.add(1, b"x" * 1000, number).abandoned = True
    add(proposals, b"a")
    proposals.forget_abandoned()
    assert len(proposals) == proposals.queued == 1
    assert [c.payload for c in proposals.take(1)] == [b"a"]


# What the leader remembers.


def numbered(*numbers: int) -> tuple[Command, ...]:
    return tuple(Command(number, 1, b"%d" % number) for number in numbers)


def test_what_arrives_twice_is_taken_once() -> None:
    forwarded = Forwarded()
    assert forwarded.fresh(1, 2, 20, numbered(1, 2)) == numbered(1, 2)
    assert list(forwarded.fresh(1, 2, 20, numbered(1, 2, 3))) == list(numbered(3))
    assert list(forwarded.fresh(1, 2, 20, numbered(2))) == []
    assert forwarded.fresh(1, 2, 20, numbered(7)) == numbered(7)  # numbers may be left out
    assert forwarded.fresh(1, 3, 20, numbered(1)) == numbered(1)  # another node
    assert forwarded.fresh(1, 2, 20, ()) == ()


def test_a_new_term_of_leadership_begins_anew() -> None:
    forwarded = Forwarded()
    forwarded.fresh(1, 2, 20, numbered(1, 2))
    assert forwarded.fresh(4, 2, 20, numbered(1, 2)) == numbered(1, 2)


def test_a_late_message_of_an_earlier_life_repeats_nothing() -> None:
    """Both lives' commands would be taken twice, if only the latest life heard were remembered."""
    forwarded = Forwarded()
    assert forwarded.fresh(1, 2, 20, numbered(1, 2)) == numbered(1, 2)
    assert forwarded.fresh(1, 2, 21, numbered(1)) == numbered(1)
    assert list(forwarded.fresh(1, 2, 20, numbered(1, 2))) == []  # late
    assert list(forwarded.fresh(1, 2, 21, numbered(1))) == []  # sent again


def test_the_memory_of_lives_is_bounded() -> None:
    forwarded = Forwarded()
    for life in range(1, 3 * Forwarded.LIVES_MAX):
        assert forwarded.fresh(1, 2, life, numbered(1)) == numbered(1)
    assert len(forwarded._seen) == Forwarded.LIVES_MAX
    assert list(forwarded.fresh(1, 2, 3 * Forwarded.LIVES_MAX - 1, numbered(1))) == []
