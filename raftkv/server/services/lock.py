"""Lock: mutual exclusion on a name, held through a lease.

Same as etcd v3 Lock, and more: the answer carries the fencing token, and an unlock that names it never releases a later
holder.
"""

from __future__ import annotations

from raftkv._pb.lock_pb2 import LockRequest, LockResponse, UnlockRequest, UnlockResponse
from raftkv.server.errors import InvalidField, WaiterExpired
from raftkv.server.services.candidates import Candidates, Gone
from raftkv.server.services.contract import Node, fill_header
from raftkv.server.services.registry import Context, Method, Service, deadline_of


class Lock:
    """The methods of raftkv.v1.Lock, which are those of v3lockpb.Lock."""

    def __init__(self, node: Node, candidates: Candidates) -> None:
        self._node = node
        self._candidates = candidates

    def service(self) -> Service:
        """All of it, to be registered."""
        return Service(
            ("raftkv.v1.Lock", "v3lockpb.Lock"),
            (
                Method("Lock", self.lock, mutates=True, counted=False),
                Method("Unlock", self.unlock, mutates=True),
            ),
        )

    async def lock(self, raw: bytes, context: Context) -> bytes:
        """Answer when the lock is held."""
        request = LockRequest.FromString(raw)
        _check_fence(request.fence)
        if request.fence and request.lease <= 0:
            raise InvalidField("lease", f"{request.lease} is no lease, and a key with a fence belongs to one")
        name, lease, deadline = request.name, request.lease, deadline_of(context)
        try:
            with self._candidates.waiters.during(len(raw)):
                if request.fence:
                    held = await self._candidates.await_turn(name, lease, request.fence, deadline)
                else:
                    held = await self._candidates.hold(name, lease, None, deadline)
        except Gone:
            raise WaiterExpired from None
        response = LockResponse(key=held.key, fence=held.create_revision)
        response.header.revision = held.revision
        fill_header(self._node, response.header)
        return response.SerializeToString()

    async def unlock(self, raw: bytes, context: Context) -> bytes:
        """Release; what is not held (any more) is no error, but `released` says so."""
        request = UnlockRequest.FromString(raw)
        _check_fence(request.fence)
        released, revision = await self._candidates.release(request.key, request.fence, deadline_of(context))
        response = UnlockResponse(released=released)
        response.header.revision = revision
        fill_header(self._node, response.header)
        return response.SerializeToString()


def _check_fence(fence: int) -> None:
    if fence < 0:
        raise InvalidField("fence", f"{fence} is no token, which are above 0")
