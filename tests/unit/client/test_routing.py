"""Who is asked, decided over connections that are only looked at."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.client.breaker import Breaker, BreakerConfig
from raftkv.client.health import Health, decode_response, encode_request
from raftkv.client.routing import Purpose, Router


@dataclass(eq=False)
class Stub:
    """What the router sees of a connection."""

    member_id: int
    ready: bool = True
    suspect: bool = False
    foreign: bool = False
    is_learner: bool = False
    heard_in: int = -1
    health: Health = Health.SERVING
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerConfig(), lambda: 0.0, lambda state: None))

    def is_ready(self) -> bool:
        return self.ready


def make(routing="auto", size=3):
    stubs = [Stub(number + 1) for number in range(size)]
    router = Router(stubs, routing, random.Random(5))
    router.observe(2, 1)
    hear_all(router, stubs)
    return router, stubs


def hear_all(router, stubs):
    for stub in stubs:
        router.heard(stub)


@pytest.mark.parametrize(
    ("routing", "purpose", "is_leader"),
    [
        ("auto", Purpose.READ, True),
        ("auto", Purpose.WRITE, False),
        ("auto", Purpose.STALE_READ, False),
        ("auto", Purpose.LEADER, True),
        ("leader", Purpose.WRITE, True),
        ("leader", Purpose.STALE_READ, True),
        ("any", Purpose.LEADER, True),
    ],
)
def test_every_purpose_has_its_place(routing, purpose, is_leader):
    router, stubs = make(routing)
    assert (router.pick(purpose) is stubs[0]) is is_leader


def test_a_choice_is_sticky_until_its_reason_is_gone():
    router, stubs = make()
    first = router.pick(Purpose.WRITE)
    assert all(router.pick(Purpose.WRITE) is first for _ in range(20))
    router.observe(3, first.member_id)
    hear_all(router, stubs)
    second = router.pick(Purpose.WRITE)
    assert second is not first
    second.suspect = True
    third = router.pick(Purpose.WRITE)
    assert third not in (first, second)
    third.ready = False
    assert router.pick(Purpose.WRITE) is first  # the leader, before one that is silent
    assert {first, second, third} == set(stubs)


def test_after_an_election_the_new_leader_takes_writes_until_another_node_was_heard_of():
    """The leader of before was frozen with its connections open, and got the writes that left the new leader."""
    router, (frozen, writer, other) = make()
    router.observe(3, writer.member_id)
    router.heard(writer)
    assert router.pick(Purpose.WRITE) is writer
    router.heard(other)
    assert router.pick(Purpose.WRITE) is other
    router.doubt()  # a connection broke: what `other` said before that proves nothing now
    assert router.pick(Purpose.WRITE) is writer
    router.heard(frozen)
    assert router.pick(Purpose.WRITE) is frozen  # awake again
    assert router.pick(Purpose.READ) is writer  # reads go to the leader in any case


@pytest.mark.parametrize("purpose", list(Purpose))
def test_while_some_say_that_there_is_no_leader_what_a_frozen_one_said_before_counts_for_nothing(purpose):
    router, (frozen, follower, other) = make()
    follower.health = other.health = Health.NOT_SERVING
    router.doubt()
    router.heard(follower)
    assert router.pick(purpose) is follower
    assert not router.better_than(follower)
    router.heard(frozen)  # it was not frozen: these two are cut off
    assert router.pick(purpose) is frozen
    assert router.better_than(follower)
    assert not router.better_than(frozen)


def test_clients_spread_over_the_followers():
    chosen = set()
    for seed in range(30):
        stubs = [Stub(number) for number in (1, 2, 3)]
        router = Router(stubs, "auto", random.Random(seed))
        router.observe(2, 1)
        hear_all(router, stubs)
        chosen.add(router.pick(Purpose.WRITE).member_id)
    assert chosen == {2, 3}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda stub: setattr(stub, "suspect", True),
        lambda stub: setattr(stub, "health", Health.NOT_SERVING),
        lambda stub: setattr(stub, "is_learner", True),
        lambda stub: [stub.breaker.failed(0) for _ in range(5)],
    ],
)
def test_whoever_is_doubtful_comes_last_but_is_asked_before_nobody(spoil):
    router, stubs = make()
    for follower in stubs[1:]:
        spoil(follower)
    assert router.pick(Purpose.WRITE) is stubs[0]
    router, stubs = make()
    for stub in stubs:
        spoil(stub)
    assert router.pick(Purpose.WRITE) is not None


def test_nobody_connected_is_nobody():
    router, stubs = make()
    for stub in stubs:
        stub.ready = False
    assert router.pick(Purpose.READ) is None
    assert not router.elsewhere(())
    stubs[2].ready = True
    stubs[2].foreign = True
    assert router.pick(Purpose.READ) is None


def test_who_failed_this_request_is_tried_last():
    router, stubs = make()
    assert router.pick(Purpose.READ, {stubs[0]}) in stubs[1:]
    assert router.pick(Purpose.READ, set(stubs)) is stubs[0]
    assert router.elsewhere({stubs[0]})
    assert not router.elsewhere(set(stubs))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3))))
def test_knowledge_of_the_leader_never_goes_back(answers):
    router = Router([], "auto", random.Random(0))
    known = {}
    for term, leader in answers:
        before = (router.term, router.leader_id)
        router.observe(term, leader)
        assert router.term >= before[0]
        if router.term == before[0] and before[1]:
            # Within a term there is one leader; only a lying server could name a second one.
            assert router.leader_id != 0
        known[router.term] = router.leader_id


@given(st.binary())
def test_any_health_answer_is_understood(data):
    assert decode_response(data) in Health


def test_health_requests_have_the_bytes_of_the_real_messages():
    health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2")
    assert encode_request("raftkv.v1.KV") == health_pb2.HealthCheckRequest(service="raftkv.v1.KV").SerializeToString()
    assert encode_request("") == health_pb2.HealthCheckRequest().SerializeToString()
    for health in Health:
        assert decode_response(health_pb2.HealthCheckResponse(status=int(health)).SerializeToString()) is health


def test_etcd_takes_writes_at_its_leader_and_none_while_it_is_gone():
    router, (leader, follower, other) = make()
    router.is_etcd(True)
    assert router.pick(Purpose.WRITE) is leader
    leader.suspect = True
    router.doubt()
    assert router.leader_gone
    router.observe(2, leader.member_id)  # said by one that has not missed it yet
    router.heard(follower)
    assert router.leader_gone
    router.observe(3, 0)
    assert router.leader_gone
    router.observe(3, other.member_id)
    assert not router.leader_gone
    assert router.pick(Purpose.WRITE) is other


def test_nobody_waits_for_the_successor_of_a_leader_that_is_back_or_only_out_of_our_sight():
    router, (leader, *others) = make()
    router.is_etcd(True)
    leader.ready = False
    router.doubt()
    leader.ready = True
    router.heard(leader)
    assert not router.leader_gone
    leader.ready = False
    router.doubt()
    router.hold_no_more()
    router.doubt()
    assert not router.leader_gone
    hear_all(router, others)
    assert router.pick(Purpose.WRITE) in others
    router.observe(3, 0)  # who won is not known yet
    assert router.must_wait()
    router.observe(3, 9)  # none of ours
    assert not router.must_wait()
    others[0].member_id, others[0].ready = 0, False
    assert router.must_wait()  # it may be this one


@pytest.mark.parametrize("routing", ["auto", "leader", "any"])
def test_only_etcd_holds_writes_back_and_only_where_the_choice_is_left_to_us(routing):
    router, (leader, *_) = make(routing)
    if routing != "auto":
        router.is_etcd(True)
    else:
        router.is_etcd(True)
        router.is_etcd(False)  # known better now
    leader.ready = False
    router.doubt()
    assert not router.leader_gone
    assert router.pick(Purpose.WRITE) is not leader
