"""The circuit breaker, with a clock of its own."""

from __future__ import annotations

import pytest

from raftkv.client import BreakerConfig, BreakerState, ConfigError
from raftkv.client.breaker import Breaker


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def changes():
    return []


@pytest.fixture
def breaker(clock, changes):
    return Breaker(BreakerConfig(), clock, changes.append)


def test_five_failures_in_a_row_open_it(breaker, changes):
    for _ in range(4):
        breaker.failed(0)
    breaker.succeeded(0)
    for _ in range(4):
        breaker.failed(0)
    assert breaker.state is BreakerState.CLOSED
    breaker.failed(0)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admit()
    assert changes == [BreakerState.OPEN]


def test_after_the_reset_time_three_trials_close_it(breaker, clock, changes):
    for _ in range(5):
        breaker.failed(0)
    clock.now_s += 29.9
    assert not breaker.admit()
    clock.now_s += 0.1
    assert [breaker.admit() for _ in range(5)] == [True, True, True, False, False]
    for _ in range(3):
        breaker.succeeded(0)
    assert breaker.state is BreakerState.CLOSED
    assert changes == [BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED]


def test_a_failed_trial_opens_it_again_for_the_whole_reset_time(breaker, clock):
    for _ in range(5):
        breaker.failed(0)
    clock.now_s += 30
    assert breaker.admit()
    breaker.failed(0)
    assert breaker.state is BreakerState.OPEN
    clock.now_s += 29.9
    assert not breaker.admit()


def test_a_new_connection_half_opens_it_at_once(breaker):
    for _ in range(5):
        breaker.failed(0)
    breaker.connection_ready()
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.admit()


def test_calls_of_the_old_connection_say_nothing_about_the_new_one(breaker):
    for _ in range(5):
        breaker.failed(0)
    breaker.connection_ready()
    for _ in range(100):
        breaker.failed(0)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.failed(breaker.epoch)
    assert breaker.state is BreakerState.OPEN


def test_a_trial_whose_caller_went_away_makes_room_for_another(breaker, clock):
    for _ in range(5):
        breaker.failed(0)
    clock.now_s += 30
    assert [breaker.admit() for _ in range(4)] == [True, True, True, False]
    breaker.released(0)
    assert breaker.admit()


@pytest.mark.parametrize(
    ("field", "value"), [("failures_max", 0), ("reset_s", -1.0), ("trials_max", 0), ("failures_max", -5)]
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        BreakerConfig(**{field: value})
    assert caught.value.field == f"breaker.{field}"
