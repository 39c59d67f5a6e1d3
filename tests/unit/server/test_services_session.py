"""The session stream: what a batch of requests gets, and what bounds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_node import FakeNode, Served, failure, serve, until

from raftkv._pb import kv_pb2, lease_pb2
from raftkv._pb import session_pb2 as pb
from raftkv._pb.state_pb2 import SessionExpire, SessionOpen, SessionOpened
from raftkv.client import AsyncClient, Get, Put
from raftkv.server import transport
from raftkv.server.errors import NoLeader, RequestTimeout
from raftkv.server.services import conversation, quota
from raftkv.server.services.reads import Reads
from raftkv.state.commands import CommandKind, decode_session_call
from raftkv.state.results import Refusal, RefusalCode, Result

Code = grpc.StatusCode
PUT = pb.SESSION_METHOD_PUT
RANGE = pb.SESSION_METHOD_RANGE


class Talk:
    """The client's side of one stream."""

    def __init__(self, served: Served) -> None:
        self.call: grpc.aio.StreamStreamCall[bytes, bytes] = served.channel.stream_stream("/raftkv.v1.Session/Stream")()
        self.answers: dict[int, pb.SessionResponse] = {}
        self.messages = 0

    async def send(self, *requests: pb.SessionRequest, cancelled: Sequence[int] = ()) -> None:
        await self.call.write(pb.SessionRequests(requests=requests, cancelled=cancelled).SerializeToString())

    async def receive(self, count: int) -> dict[int, pb.SessionResponse]:
        """Wait until there are so many answers in all."""
        async with asyncio.timeout(10):
            while len(self.answers) < count:
                message = await self.call.read()
                assert isinstance(message, bytes), "the stream has ended"
                self.messages += 1
                for response in pb.SessionResponses.FromString(message).responses:
                    assert response.id not in self.answers, "answered twice"
                    self.answers[response.id] = response
        return self.answers

    async def ask(self, request: pb.SessionRequest) -> pb.SessionResponse:
        await self.send(request)
        return (await self.receive(len(self.answers) + 1))[request.id]


@pytest.fixture
async def talk(served: Served) -> AsyncIterator[Talk]:
    talk = Talk(served)
    yield talk
    talk.call.cancel()


def put(each: int, key: bytes = b"", value: bytes | None = None, **more: Any) -> pb.SessionRequest:
    value = b"v%d" % each if value is None else value
    payload = kv_pb2.PutRequest(key=key or b"key/%d" % each, value=value).SerializeToString()
    return pb.SessionRequest(id=each, method=PUT, payload=payload, **more)


def get(each: int, key: bytes, **more: Any) -> pb.SessionRequest:
    payload = kv_pb2.RangeRequest(key=key, **more).SerializeToString()
    return pb.SessionRequest(id=each, method=RANGE, payload=payload)


async def open_session(talk: Talk, each: int = 1_000_000) -> int:
    request = pb.SessionRequest(id=each, method=pb.SESSION_METHOD_OPEN, payload=SessionOpen().SerializeToString())
    return SessionOpened.FromString((await talk.ask(request)).payload).session


async def test_a_batch_is_answered_and_its_bytes_are_proposed_as_they_came(served: Served, talk: Talk) -> None:
    requests = [put(each) for each in range(1, 301)]
    await talk.send(*requests)
    answers = await talk.receive(300)
    assert served.node.proposed == [(CommandKind.PUT, request.payload) for request in requests]
    revisions = [kv_pb2.PutResponse.FromString(answers[each].payload).header.revision for each in range(1, 301)]
    assert revisions == list(range(2, 302))
    header = kv_pb2.PutResponse.FromString(answers[1].payload).header
    assert (header.cluster_id, header.member_id) == (served.node.cluster_id, served.node.node_id)
    assert (header.raft_term, header.leader) == (3, served.node.leader)
    assert talk.messages < 20, "what finishes in one turn leaves as one message"


async def test_every_method(served: Served, talk: Talk) -> None:
    await talk.send(put(1, b"k"))
    await talk.receive(1)
    await served.node.propose(CommandKind.PUT, put(0, b"other").payload, None)
    method = pb.SessionMethod.Value

    def request(each: int, name: str, message: Any) -> pb.SessionRequest:
        return pb.SessionRequest(id=each, method=method(f"SESSION_METHOD_{name}"), payload=message.SerializeToString())

    op = kv_pb2.RequestOp(request_put=kv_pb2.PutRequest(key=b"t", value=b"1"))
    look = kv_pb2.RequestOp(request_range=kv_pb2.RangeRequest(key=b"k"))
    for each, name, message, kind in (
        (2, "RANGE", kv_pb2.RangeRequest(key=b"k"), kv_pb2.RangeResponse),
        (3, "RANGE", kv_pb2.RangeRequest(key=b"\0", range_end=b"\0", serializable=True), kv_pb2.RangeResponse),
        (4, "TXN", kv_pb2.TxnRequest(success=[op]), kv_pb2.TxnResponse),
        (5, "TXN", kv_pb2.TxnRequest(success=[look]), kv_pb2.TxnResponse),
        (6, "DELETE_RANGE", kv_pb2.DeleteRangeRequest(key=b"t"), kv_pb2.DeleteRangeResponse),
        (7, "LEASE_GRANT", lease_pb2.LeaseGrantRequest(ID=9, TTL=60), lease_pb2.LeaseGrantResponse),
        (8, "LEASE_KEEP_ALIVE", lease_pb2.LeaseKeepAliveRequest(ID=9), lease_pb2.LeaseKeepAliveResponse),
        (9, "LEASE_TIME_TO_LIVE", lease_pb2.LeaseTimeToLiveRequest(ID=9), lease_pb2.LeaseTimeToLiveResponse),
        (10, "LEASE_REVOKE", lease_pb2.LeaseRevokeRequest(ID=9), lease_pb2.LeaseRevokeResponse),
        (11, "COMPACT", kv_pb2.CompactionRequest(revision=3), kv_pb2.CompactionResponse),
    ):
        answer = await talk.ask(request(each, name, message))
        assert answer.WhichOneof("result") == "payload", answer
        response: Any = kind.FromString(answer.payload)
        assert response.header.member_id == served.node.node_id
        if each == 2:
            assert response.kvs[0].value == b"v1"
        elif each == 3:
            assert response.count == 2
        elif each == 5:
            assert response.responses[0].response_range.kvs[0].key == b"k"
        elif each == 6:
            assert response.deleted == 1
        elif each in (7, 8, 9):
            assert response.TTL == 60
    session = await open_session(talk)
    closed = await talk.ask(request(12, "CLOSE", SessionExpire(sessions=[session], proposer_term=99)))
    assert closed.WhichOneof("result") == "payload"
    assert served.node.machine.sessions == {}


async def test_a_mutation_within_a_session_is_done_once(served: Served, talk: Talk) -> None:
    session = await open_session(talk)
    first = await talk.ask(put(1, b"k", session=session, seq=1, first_incomplete=1))
    kind, payload = served.node.proposed[-1]
    assert kind is CommandKind.SESSION_CALL
    assert decode_session_call(payload)[:4] == (session, 1, 1, CommandKind.PUT)
    await talk.ask(put(2, b"k", session=session, seq=2, first_incomplete=1))
    again = await talk.ask(put(3, b"k", session=session, seq=1, first_incomplete=1))
    assert again.payload == first.payload, "the same answer, with the same revision"
    kv = kv_pb2.RangeResponse.FromString((await talk.ask(get(4, b"k"))).payload).kvs[0]
    assert (kv.value, kv.version) == (b"v2", 2)


async def test_the_sdk_gets_through_a_session_that_is_full_of_large_answers(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest call has to wait until the others have filled the session, and then must not be refused for that."""
    propose, refused = served.node.propose, asyncio.Event()

    async def held_up(kind: CommandKind, payload: bytes, deadline: float | None) -> Result:
        if b"oldest" in payload and not refused.is_set():
            raise NoLeader
        result = await propose(kind, payload, deadline)
        if isinstance(result, Refusal):
            assert result.code is RefusalCode.SESSION_FULL
            refused.set()
        return result

    monkeypatch.setattr(served.node, "propose", held_up)
    async with AsyncClient([served.address], timeout=30) as client:
        await client.put("big", b"x" * 500_000)
        async with asyncio.TaskGroup() as calls:
            calls.create_task(client.put("oldest", ""))
            await asyncio.sleep(0)
            for _ in range(6):
                calls.create_task(client.txn().then(Get("big"), Put("n", "")).commit())
        assert refused.is_set()
        assert client.stats().failures == 0
        item = await client.get("oldest")
        assert item is not None
        assert item.version == 1


async def test_an_unknown_session_executes_nothing(served: Served, talk: Talk) -> None:
    error = (await talk.ask(put(1, session=77, seq=1, first_incomplete=1))).error
    assert error.reason == "SESSION_EXPIRED"
    assert error.executed == "no"
    assert served.node.machine.revision == 1


@pytest.mark.parametrize("numbers", [{"session": 1}, {"seq": 1}, {"session": 1, "seq": 1, "first_incomplete": 2}])
async def test_numbers_that_mean_nothing(served: Served, talk: Talk, numbers: dict[str, Any]) -> None:
    error = (await talk.ask(put(1, **numbers))).error
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT.value[0], "SESSION_CALL")
    assert served.node.proposed == []


async def test_one_bad_request_is_refused_alone(served: Served, talk: Talk) -> None:
    await talk.send(
        put(1),
        pb.SessionRequest(id=2, method=PUT),
        pb.SessionRequest(id=3, method=PUT, payload=b"\xff"),
        pb.SessionRequest.FromString(b"\x08\x04\x10\x63"),  # id 4, method 99
        pb.SessionRequest(id=5, method=RANGE, payload=kv_pb2.RangeRequest(key=b"k", revision=50).SerializeToString()),
        put(6),
    )
    answers = await talk.receive(6)
    assert [each for each in range(1, 7) if answers[each].WhichOneof("result") == "payload"] == [1, 6]
    assert answers[2].error.message == "etcdserver: key is not provided"
    assert answers[2].error.reason == "EMPTY_KEY"
    assert answers[2].error.more["raftkv-field"] == "key"
    assert (answers[3].error.code, answers[3].error.reason) == (3, "MALFORMED")
    assert answers[4].error.code == Code.UNIMPLEMENTED.value[0]
    assert answers[5].error.reason == "FUTURE_REVISION"
    assert {answers[each].error.executed for each in (2, 3, 4, 5)} == {"no"}


async def test_a_request_that_is_too_large_is_refused_alone(served: Served, talk: Talk) -> None:
    """What gRPC itself lets pass, as large as messages of the stream may be."""
    limit = served.node.config.max_request_bytes
    session = await open_session(talk)
    envelope = len(put(1, value=b"").payload) + 4  # a tag and three bytes of length, which an empty value has not

    def of_size(each: int, size: int) -> pb.SessionRequest:
        return put(each, value=bytes(size - envelope), session=session, seq=each, first_incomplete=1)

    await talk.send(of_size(1, limit))
    await talk.send(of_size(2, limit + 1))
    await talk.send(of_size(3, limit + transport.RECEIVE_MARGIN_BYTES - 64), cancelled=[77])
    await talk.send(put(4, session=session, seq=4, first_incomplete=1))
    answers = await talk.receive(5)
    assert {each: answers[each].error.reason for each in range(1, 5)} == {
        1: "",
        2: "REQUEST_TOO_LARGE",
        3: "REQUEST_TOO_LARGE",
        4: "",
    }
    assert answers[2].error.executed == answers[3].error.executed == "no"


async def test_failures_say_whether_it_was_done(served: Served, talk: Talk) -> None:
    served.node.fault = RequestTimeout(executed="unknown")
    await talk.send(put(1), get(2, b"k"))
    answers = await talk.receive(2)
    assert (answers[1].error.reason, answers[1].error.executed) == ("TIMEOUT", "unknown")
    assert (answers[2].error.reason, answers[2].error.executed) == ("TIMEOUT", "no")
    served.node.fault = NoLeader()
    assert (await talk.ask(put(3))).error.reason == "NO_LEADER"


async def test_an_error_nobody_expected_is_told_by_its_id_only(served: Served, talk: Talk) -> None:
    served.node.fault = ValueError("secret")
    error = (await talk.ask(put(1))).error
    assert (error.code, error.reason, error.executed) == (Code.INTERNAL.value[0], "INTERNAL", "unknown")
    assert "secret" not in error.message


async def test_the_time_of_each_request_is_its_own(served: Served, talk: Talk) -> None:
    served.node.hold()
    await talk.send(put(1, timeout_ms=50), put(2))
    answers = await talk.receive(1)
    assert list(answers) == [1]
    served.node.release()
    await talk.receive(2)
    loop = asyncio.get_running_loop()
    assert served.node.deadlines[0] is not None
    assert served.node.deadlines[0] < loop.time()
    assert served.node.deadlines[1] is None


async def test_cancelled_requests_are_dropped_and_not_answered(served: Served, talk: Talk) -> None:
    served.node.hold()
    await talk.send(put(1), get(2, b"k"), get(3, b"k", range_end=b"l"), put(4), put(5), cancelled=[5])
    await until(lambda: served.services.inflight.requests == 4)
    await asyncio.sleep(0.02)
    await talk.send(cancelled=[1, 2, 3, 77])
    await until(lambda: served.node.abandoned == 3)
    served.node.release()
    await talk.receive(1)
    assert list(talk.answers) == [4]
    assert [kind for kind, _ in served.node.proposed] == [CommandKind.PUT]
    await talk.ask(put(1))
    assert served.services.inflight.requests == 0
    assert served.services.inflight.bytes == 0


async def test_a_number_that_is_under_way_ends_the_stream(served: Served, talk: Talk) -> None:
    served.node.hold()
    await talk.send(put(1), put(1))
    error = await failure(talk.receive(1))
    assert error.code() is Code.INVALID_ARGUMENT
    assert "under way" in (error.details() or "")
    await until(lambda: served.services.inflight.requests == 0)


async def test_bytes_that_are_no_batch_end_the_stream(served: Served, talk: Talk) -> None:
    await talk.call.write(b"\xff\xff\xff")
    assert (await failure(talk.receive(1))).code() is Code.INVALID_ARGUMENT


async def test_a_client_that_leaves_leaves_nothing(served: Served, talk: Talk) -> None:
    served.node.hold()
    await talk.send(*(put(each) for each in range(1, 101)))
    await until(lambda: served.services.inflight.requests == 100)
    talk.call.cancel()
    await until(lambda: served.node.abandoned == 100)
    assert served.services.inflight.requests == 0
    assert served.services.inflight.bytes == 0


async def test_no_read_begins_for_a_client_that_leaves_while_others_are_under_way(
    served: Served, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that ends makes room for one that waits, also when all end because nobody is there any more."""
    begun = 0

    async def forever(reads: Reads, request: kv_pb2.RangeRequest) -> bytes:
        nonlocal begun
        begun += 1
        await asyncio.Event().wait()
        return b""

    monkeypatch.setattr(Reads, "range", forever)
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    request = kv_pb2.RangeRequest(key=b"a", range_end=b"b", serializable=True).SerializeToString()
    count = 2 * conversation.LONG_READS_MAX
    await talk.send(*(pb.SessionRequest(id=each, method=RANGE, payload=request) for each in range(1, count + 1)))
    await until(lambda: begun == conversation.LONG_READS_MAX)
    talk.call.cancel()
    await until(lambda: not served.services.inflight.requests)
    await asyncio.sleep(0.05)
    assert begun == conversation.LONG_READS_MAX
    assert not faults


async def test_what_is_under_way_is_answered_when_the_client_sends_no_more(served: Served, talk: Talk) -> None:
    served.node.hold()
    await talk.send(put(1))
    await talk.call.done_writing()
    await asyncio.sleep(0.05)
    served.node.release()
    await talk.receive(1)
    assert await talk.call.read() is grpc.aio.EOF
    assert await talk.call.code() is Code.OK


async def test_what_is_under_way_is_answered_when_the_node_stops(served: Served, talk: Talk) -> None:
    served.node.hold()
    await talk.send(put(1))
    await until(lambda: served.services.inflight.requests == 1)
    served.services.end_streams()
    await asyncio.sleep(0.05)
    served.node.release()
    await talk.receive(1)
    error = await failure(talk.receive(2))
    assert (error.code(), error.details()) == (Code.UNAVAILABLE, "etcdserver: server stopped")


async def test_a_stream_takes_on_a_bounded_number(served: Served, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "REQUESTS_MAX", 10)
    served.node.hold()
    await talk.send(*(put(each) for each in range(1, 26)))
    await until(lambda: served.services.inflight.requests == 10)
    await asyncio.sleep(0.05)
    assert served.services.inflight.requests == 10
    served.node.release()
    await talk.receive(25)


async def test_answers_that_are_not_read_hold_up_reads(
    served: Served, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "ANSWERS_BYTES_MAX", 2 << 20)
    value = b"x" * 500_000
    big = kv_pb2.PutRequest(key=b"big", value=value).SerializeToString()
    await served.node.propose(CommandKind.PUT, big, None)
    read = 0
    one = served.services._reads.one

    def counted(request: kv_pb2.RangeRequest) -> bytes:
        nonlocal read
        read += 1
        return one(request)

    monkeypatch.setattr(served.services._reads, "one", counted)
    await talk.send(*(get(each, b"big") for each in range(1, 101)))
    await until(lambda: read)
    await asyncio.sleep(0.3)
    assert read < 60, "most wait until the client reads"
    answers = await talk.receive(100)
    assert all(len(answer.payload) > 500_000 for answer in answers.values())


async def test_a_node_at_its_limit_refuses(tmp_path: Path) -> None:
    async with serve(FakeNode(tmp_path, inflight_requests_max=5)) as served:
        with contextlib.closing(_Closing(Talk(served))) as closing:
            talk = closing.talk
            served.node.hold()
            await talk.send(*(put(each) for each in range(1, 9)))
            answers = await talk.receive(3)
            assert {answer.error.reason for answer in answers.values()} == {"TOO_MANY_REQUESTS"}
            assert {answer.error.retry_after_ms for answer in answers.values()} == {100}
            assert next(iter(answers.values())).error.more["raftkv-limit"] == "inflight_requests_max"
            served.node.release()
            await talk.receive(8)


async def test_the_quota_refuses_writes_and_says_so(tmp_path: Path) -> None:
    async with serve(FakeNode(tmp_path, quota_backend_bytes=1 << 20)) as served:
        with contextlib.closing(_Closing(Talk(served))) as closing:
            served.node.bytes_on_disk = 2 << 20
            await closing.talk.send(put(1), get(2, b"k"))
            answers = await closing.talk.receive(2)
            assert answers[1].error.reason == "NO_SPACE"
            assert answers[2].payload
            assert served.node.machine.alarms


async def test_what_was_done_before_space_ran_out_has_its_answer_and_nothing_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "LOOK_EVERY_S", 0.0)
    async with serve(FakeNode(tmp_path, quota_backend_bytes=1 << 20)) as served:
        with contextlib.closing(_Closing(Talk(served))) as closing:
            talk = closing.talk
            session = await open_session(talk)
            numbers: dict[str, Any] = {"session": session, "first_incomplete": 1}
            first = await talk.ask(put(1, seq=1, **numbers))
            served.node.bytes_on_disk = 2 << 20
            assert (await talk.ask(put(2, seq=1, perhaps_done=True, **numbers))).payload == first.payload
            assert (await talk.ask(put(3, seq=2, **numbers))).error.reason == "NO_SPACE"
            assert served.node.machine.alarms
            assert (await talk.ask(put(4, seq=1, perhaps_done=True, **numbers))).payload == first.payload
            refused = (await talk.ask(put(5, seq=3, perhaps_done=True, **numbers))).error
            assert (refused.reason, refused.executed) == ("NO_SPACE", "no")
            assert (await talk.ask(put(6, perhaps_done=True))).error.reason == "NO_SPACE", "of no session"
            assert served.node.machine.revision == 2


class _Closing:
    def __init__(self, talk: Talk) -> None:
        self.talk = talk

    def close(self) -> None:
        self.talk.call.cancel()
