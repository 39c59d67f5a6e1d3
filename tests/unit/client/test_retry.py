"""The decisions of retry.py, as properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raftkv.client.faults import Fault, FaultKind
from raftkv.client.retry import Action, Retry, attempt_timeout_s, backoff_s, decide

faults = st.builds(
    Fault,
    kind=st.sampled_from(FaultKind),
    code=st.just("CODE"),
    text=st.just("text"),
    not_executed=st.booleans(),
    retry_after_s=st.floats(0, 100),
)
policies = st.builds(
    Retry,
    backoff_initial_s=st.floats(0.001, 0.5),
    backoff_max_s=st.floats(0.5, 60),
    backoff_factor=st.floats(1, 100),
    attempts_max=st.none() | st.integers(1, 20),
)
chances = st.floats(0, 1, exclude_max=True)
situations = st.fixed_dictionaries(
    {
        "mutation": st.booleans(),
        "attempts": st.integers(1, 10**6),
        "waits": st.integers(0, 10**6),
        "elsewhere": st.booleans(),
        "remaining_s": st.none() | st.floats(-1, 100),
        "policy": st.none() | policies,
        "uniform": chances.map(lambda chance: lambda: chance),
    }
)


@given(faults, situations)
def test_a_write_that_may_have_been_done_is_never_repeated(fault, situation):
    decision = decide(fault, **situation)
    if situation["mutation"] and not fault.not_executed:
        assert decision.action is Action.UNKNOWN
    else:
        assert decision.action is not Action.UNKNOWN


@given(faults, situations)
def test_what_can_never_succeed_is_not_tried_again(fault, situation):
    if fault.kind.is_final:
        assert decide(fault, **situation).action in (Action.RAISE, Action.UNKNOWN)


@given(faults, situations)
def test_nothing_starts_that_cannot_end_in_time(fault, situation):
    decision = decide(fault, **situation)
    remaining_s = situation["remaining_s"]
    if decision.action is Action.AGAIN and remaining_s is not None:
        assert 0 <= decision.delay_s < remaining_s


@given(faults, situations)
def test_the_number_of_attempts_is_bounded_where_asked(fault, situation):
    policy = situation["policy"]
    if policy is None or (policy.attempts_max is not None and situation["attempts"] >= policy.attempts_max):
        assert decide(fault, **situation).action is not Action.AGAIN


@given(faults, situations)
def test_the_servers_wish_to_wait_is_honoured(fault, situation):
    decision = decide(fault, **situation)
    if decision.action is Action.AGAIN and not (situation["elsewhere"] and fault.kind.moves_on):
        assert decision.delay_s >= fault.retry_after_s


@given(policies, st.integers(0, 10**9), chances)
def test_backoff_is_bounded_and_never_overflows(policy, waits, chance):
    assert 0 <= backoff_s(policy, waits, chance) <= policy.backoff_max_s


@given(policies, st.integers(0, 1000), st.floats(0.01, 0.99))
def test_backoff_never_shrinks(policy, waits, chance):
    assert backoff_s(policy, waits, chance) <= backoff_s(policy, waits + 1, chance)


@given(st.integers(0, 10**6), st.none() | st.floats(0.001, 100), st.none() | st.floats(0.001, 1000), st.booleans())
def test_an_attempt_never_outlives_the_call(attempts, attempt_s, remaining_s, elsewhere):
    limit_s = attempt_timeout_s(attempts, attempt_s=attempt_s, remaining_s=remaining_s, elsewhere=elsewhere)
    if remaining_s is not None:
        assert limit_s is not None
        assert 0 < limit_s <= remaining_s
    if not elsewhere:
        assert limit_s == remaining_s


@given(policies, st.floats(0.01, 20), st.lists(st.tuples(faults, chances), max_size=60))
def test_all_attempts_and_waits_end_with_the_deadline(policy, total_s, failures):
    """A call whose every attempt fails at once still ends, and its waits stay within its time."""
    now_s = 0.0
    for made, (fault, chance) in enumerate(failures):
        decision = decide(
            fault,
            mutation=False,
            attempts=made + 1,
            waits=made,
            elsewhere=False,
            remaining_s=total_s - now_s,
            policy=policy,
            uniform=lambda chance=chance: chance,
        )
        if decision.action is not Action.AGAIN:
            break
        now_s += decision.delay_s
        assert now_s <= total_s


def test_a_fault_of_the_endpoint_moves_the_call_on_at_once():
    for kind in (FaultKind.UNREACHABLE, FaultKind.SILENT, FaultKind.STOPPING, FaultKind.LEARNER):
        decision = decide(
            Fault(kind, "", "", not_executed=True),
            mutation=True,
            attempts=1,
            waits=0,
            elsewhere=True,
            remaining_s=1.0,
            policy=Retry(),
            uniform=lambda: 0.5,
        )
        assert decision.action is Action.AGAIN
        assert decision.delay_s == 0
