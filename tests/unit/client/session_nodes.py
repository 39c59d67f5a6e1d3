"""Scripted nodes with the session stream, which share one replicated table of sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from raftkv._pb import kv_pb2, session_pb2, state_pb2
from raftkv.client.session import WINDOW
from tests.unit.client.conftest import FakeCluster, FakeNode

Rule = Callable[[session_pb2.SessionRequest], session_pb2.SessionError | str | None]


class Table:
    """The sessions of a cluster: what was answered, by (session, number)."""

    def __init__(self) -> None:
        self.next = 1
        self.answers: dict[int, dict[int, bytes]] = {}
        self.executed: list[bytes] = []  # the keys put, in order
        self.kept_most = 0

    def open(self) -> bytes:
        session, self.next = self.next, self.next + 1
        self.answers[session] = {}
        return state_pb2.SessionOpened(session=session, ttl_ms=60_000).SerializeToString()


class SessionNode(FakeNode):
    """A node with the session stream. `rule` decides about each request: an error, "mute", "break", or None."""

    def __init__(self, cluster: FakeCluster, member_id: int, table: Table) -> None:
        super().__init__(cluster, member_id)
        self.table = table
        self.rule: Rule | None = None
        self.batches: list[int] = []
        self.requests: list[session_pb2.SessionRequest] = []
        self.cancelled: list[int] = []

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        stream = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=session_pb2.SessionRequests.FromString,
            response_serializer=session_pb2.SessionResponses.SerializeToString,
        )
        return [
            *super()._handlers(),
            grpc.method_handlers_generic_handler("raftkv.v1.Session", {"Stream": stream}),
        ]

    async def _stream(self, requests: Any, context: Any) -> AsyncIterator[session_pb2.SessionResponses]:
        self.calls.append("Stream")
        async for message in requests:
            self.batches.append(len(message.requests))
            self.cancelled.extend(message.cancelled)
            answer = session_pb2.SessionResponses()
            for request in message.requests:
                self.requests.append(request)
                verdict = self.rule(request) if self.rule is not None else None
                if verdict == "break-before":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                if isinstance(verdict, session_pb2.SessionError):
                    answer.responses.add(id=request.id, error=verdict)
                    continue
                response = self._carry_out(request)
                if verdict == "break":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                if verdict != "mute":
                    answer.responses.add().CopyFrom(response)
            if answer.responses:
                yield answer

    def _carry_out(self, request: session_pb2.SessionRequest) -> session_pb2.SessionResponse:
        table = self.table
        if request.method == session_pb2.SESSION_METHOD_OPEN:
            return session_pb2.SessionResponse(id=request.id, payload=table.open())
        if request.method == session_pb2.SESSION_METHOD_CLOSE:
            for session in state_pb2.SessionExpire.FromString(request.payload).sessions:
                table.answers.pop(session, None)
            return session_pb2.SessionResponse(id=request.id)
        kept = table.answers.get(request.session)
        if kept is None:
            return session_pb2.SessionResponse(id=request.id, error=refusal("SESSION_EXPIRED", 9))
        for seq in [seq for seq in kept if seq < request.first_incomplete]:
            del kept[seq]
        if request.seq not in kept:
            assert len(kept) < WINDOW
            put = kv_pb2.PutRequest.FromString(request.payload)
            table.executed.append(put.key)
            response = self.cluster.put(put)
            self.fill(response.header)
            kept[request.seq] = response.SerializeToString()
            table.kept_most = max(table.kept_most, len(kept))
        return session_pb2.SessionResponse(id=request.id, payload=kept[request.seq])


def refusal(reason: str, code: int, executed: str = "no", retry_after_ms: int = 0) -> session_pb2.SessionError:
    return session_pb2.SessionError(
        code=code, message=reason, reason=reason, executed=executed, retry_after_ms=retry_after_ms
    )


async def with_sessions(cluster: FakeCluster) -> Table:
    """Give the cluster nodes that have the session stream."""
    table = Table()
    for node in cluster.nodes:
        await node.stop()
    cluster.nodes = [SessionNode(cluster, member_id, table) for member_id in (1, 2, 3)]
    for node in cluster.nodes:
        await node.start()
    return table


def nodes_of(cluster: FakeCluster) -> list[SessionNode]:
    return [node for node in cluster.nodes if isinstance(node, SessionNode)]


def puts_only(verdict: session_pb2.SessionError | str, times: int) -> Rule:
    left = times

    def rule(request: session_pb2.SessionRequest) -> session_pb2.SessionError | str | None:
        nonlocal left
        if request.method != session_pb2.SESSION_METHOD_PUT or left <= 0:
            return None
        left -= 1
        return verdict

    return rule
