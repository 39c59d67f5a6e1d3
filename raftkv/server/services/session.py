"""Session: many requests and many answers in one message, for our own client library.

What costs is the message and the task, not the request: a batch of puts becomes so many futures and no task, and
whatever finished in one turn of the loop leaves as one message. See `conversation` for the stream itself.

A mutation with a session and a number goes into the log as SESSION_CALL: done once, however often it comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raftkv._pb import session_pb2 as pb
from raftkv._pb.lease_pb2 import LeaseKeepAliveRequest
from raftkv._pb.state_pb2 import SessionExpire, SessionOpen, SessionOpened
from raftkv.server.errors import NoSpace, NotSupported
from raftkv.server.limits import Inflight
from raftkv.server.services.contract import Node
from raftkv.server.services.conversation import Conversation
from raftkv.server.services.kv import KV
from raftkv.server.services.lease import Lease
from raftkv.server.services.quota import Quota
from raftkv.server.services.reads import Reads
from raftkv.server.services.registry import Method, Service, Stream
from raftkv.server.services.streams import ANSWER_EARLY_S
from raftkv.state.commands import CommandKind, encode_session_call
from raftkv.state.results import Done, Refusal, Refused, Result
from raftkv.state.txn import is_read_only, needs_space
from raftkv.state.validate import check_session_call, check_session_open

_Handler = Callable[[Conversation, pb.SessionRequest, float | None], None]


class Session:
    """The methods of raftkv.v1.Session; etcd has nothing like it."""

    def __init__(self, node: Node, kv: KV, lease: Lease, reads: Reads, quota: Quota, inflight: Inflight) -> None:
        self._node = node
        self._kv = kv
        self._lease = lease
        self._reads = reads
        self._quota = quota
        self._inflight = inflight
        self._loop = asyncio.get_running_loop()
        self._handlers: dict[int, _Handler] = {
            pb.SESSION_METHOD_PUT: self._put,
            pb.SESSION_METHOD_DELETE_RANGE: self._delete_range,
            pb.SESSION_METHOD_TXN: self._txn,
            pb.SESSION_METHOD_COMPACT: self._compact,
            pb.SESSION_METHOD_RANGE: self._range,
            pb.SESSION_METHOD_LEASE_GRANT: self._lease_grant,
            pb.SESSION_METHOD_LEASE_REVOKE: self._lease_revoke,
            pb.SESSION_METHOD_LEASE_KEEP_ALIVE: self._lease_keep_alive,
            pb.SESSION_METHOD_LEASE_TIME_TO_LIVE: self._lease_time_to_live,
            pb.SESSION_METHOD_OPEN: self._open,
            pb.SESSION_METHOD_CLOSE: self._close,
        }

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(("raftkv.v1.Session",), (Method("Stream", bidi=self.stream, mutates=True),))

    async def stream(self, stream: Stream) -> None:
        """One client's stream, for as long as it lasts."""
        await Conversation(self._node, self._reads, self._inflight, stream, self._accept).run_to_end()

    def _accept(self, talk: Conversation, request: pb.SessionRequest) -> None:
        handler = self._handlers.get(request.method)
        if handler is None:
            raise NotSupported(f"the session stream has no method {request.method}")
        deadline = None
        if request.timeout_ms:
            wait_s = request.timeout_ms / 1000
            deadline = self._loop.time() + wait_s - min(ANSWER_EARLY_S, wait_s / 10)
        handler(talk, request, deadline)

    def _put(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        payload = request.payload
        self._kv.admit_put(payload)
        if self._has_room(talk, request):
            self._mutate(talk, request, CommandKind.PUT, payload, self._kv.reply, deadline)

    def _delete_range(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        payload = request.payload
        self._kv.admit_delete(payload)
        self._mutate(talk, request, CommandKind.DELETE_RANGE, payload, self._kv.reply, deadline)

    def _txn(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        payload = request.payload
        txn = self._kv.admit_txn(payload)
        if is_read_only(txn):
            talk.run(request.id, self._kv.read_txn(txn, deadline))
        elif not needs_space(txn) or self._has_room(talk, request):
            self._mutate(talk, request, CommandKind.TXN, payload, self._kv.reply, deadline)

    def _compact(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        payload = request.payload
        self._kv.admit_compact(payload)
        kind, command = self._within_session(request, CommandKind.COMPACT, payload)

        async def compact() -> bytes:
            return await self._kv.compacted(payload, await self._node.propose(kind, command, deadline), deadline)

        talk.run(request.id, compact())

    def _range(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        talk.read(request.id, self._kv.admit_range(request.payload), deadline)

    def _lease_grant(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        # An id that we choose and that is taken is refused here: of 2**63 ids that is no case to plan for.
        payload = self._lease.admit_grant(request.payload)
        if self._has_room(talk, request):
            self._mutate(talk, request, CommandKind.LEASE_GRANT, payload, self._lease.reply, deadline)

    def _lease_revoke(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        payload = self._lease.admit_revoke(request.payload)
        self._mutate(talk, request, CommandKind.LEASE_REVOKE, payload, self._lease.reply, deadline)

    def _lease_keep_alive(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        self._quota.check_intact()
        lease = LeaseKeepAliveRequest.FromString(request.payload).ID
        talk.wait(request.id, self._node.ask_lease(lease, renew=True, deadline=deadline), self._lease.renewed)

    def _lease_time_to_live(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        talk.run(request.id, self._lease.look(request.payload, deadline))

    def _open(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        payload = request.payload
        check_session_open(SessionOpen.FromString(payload))
        talk.submit(request.id, CommandKind.SESSION_OPEN, payload, deadline, _opened)

    def _close(self, talk: Conversation, request: pb.SessionRequest, deadline: float | None) -> None:
        asked = SessionExpire.FromString(request.payload)
        ended = SessionExpire(sessions=asked.sessions)  # of no term: it is not the leader who says so
        payload = ended.SerializeToString(deterministic=True)
        talk.submit(request.id, CommandKind.SESSION_EXPIRE, payload, deadline, _closed)

    def _mutate(
        self,
        talk: Conversation,
        request: pb.SessionRequest,
        kind: CommandKind,
        payload: bytes,
        reply: Callable[[Result], bytes],
        deadline: float | None,
    ) -> None:
        kind, payload = self._within_session(request, kind, payload)
        talk.submit(request.id, kind, payload, deadline, reply)

    def _within_session(
        self, request: pb.SessionRequest, kind: CommandKind, payload: bytes
    ) -> tuple[CommandKind, bytes]:
        session, seq, first_incomplete = request.session, request.seq, request.first_incomplete
        if not (session or seq):
            return kind, payload
        check_session_call(session, seq, first_incomplete, kind)
        return CommandKind.SESSION_CALL, encode_session_call(session, seq, first_incomplete, kind, payload)

    def _has_room(self, talk: Conversation, request: pb.SessionRequest) -> bool:
        """Whether the quota lets it through; if not, it is answered, after everybody was told by the alarm.

        What was perhaps done before space ran out goes on to the state, which has its answer then, and else refuses it
        by the alarm: repetitions of failed attempts are few, so that they may cost an entry each.
        """
        if (request.perhaps_done and request.session) or not self._quota.is_reached():
            return True

        async def refuse() -> bytes:
            await self._quota.check_space()
            raise NoSpace  # it was reached a moment ago

        talk.run(request.id, refuse())
        return False


def _opened(result: Result) -> bytes:
    if isinstance(result, Refusal):
        raise Refused(result)
    assert isinstance(result, SessionOpened), "a result of another command"
    return result.SerializeToString()


def _closed(result: Result) -> bytes:
    if isinstance(result, Refusal):
        raise Refused(result)
    assert isinstance(result, Done), "a result of another command"
    return b""
