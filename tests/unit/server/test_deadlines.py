"""Deadlines: the heap against a plain dictionary, and what it costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raftkv.server.deadlines import Deadlines

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 9), st.integers(0, 100)),
        st.tuples(st.just("discard"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("pass"), st.integers(1, 20), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_is_a_dictionary_that_knows_what_is_due(steps: list[tuple[str, int, int]]) -> None:
    deadlines = Deadlines()
    plain: dict[int, float] = {}
    now = 0.0
    for step, first, second in steps:
        if step == "set":
            deadlines.set(first, now + second)
            plain[first] = now + second
        elif step == "discard":
            deadlines.discard(first)
            plain.pop(first, None)
        else:
            now += first
            found = deadlines.due(now, 1_000)
            expected = {each for each, moment in plain.items() if moment <= now}
            assert set(found) == expected
            assert len(found) == len(expected)
            assert [plain[each] for each in found] == sorted(plain[each] for each in found)
            for each in found:
                del plain[each]
        assert len(deadlines) == len(plain)
        assert all(deadlines.get(each) == moment and each in deadlines for each, moment in plain.items())


def test_putting_off_costs_no_place_in_the_heap() -> None:
    deadlines = Deadlines()
    for each in range(100):
        deadlines.set(each, 10.0)
    for moment in range(11, 1_000):
        for each in range(100):
            deadlines.set(each, float(moment))
    assert len(deadlines._heap) == 100
    assert deadlines.due(10.0, 1_000) == []
    assert len(deadlines._heap) == 100


def test_what_was_forgotten_does_not_gather() -> None:
    deadlines = Deadlines()
    for each in range(100_000):
        deadlines.set(each, 1e9)
        deadlines.discard(each)
    assert len(deadlines._heap) <= 1_001
    deadlines.set(1, 5.0)
    assert deadlines.due(5.0, 10_000) == [1]


def test_a_call_takes_no_more_steps_than_it_may() -> None:
    deadlines = Deadlines()
    for each in range(10):
        deadlines.set(each, float(each))
    assert deadlines.due(100.0, 4) == [0, 1, 2, 3]
    assert deadlines.due(100.0, 100) == [4, 5, 6, 7, 8, 9]
    deadlines.set(3, 1.0)
    deadlines.clear()
    assert deadlines.due(100.0, 100) == []
    assert len(deadlines) == 0
