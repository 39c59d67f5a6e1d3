"""What a supervisor knows of its nodes: the process from the kernel, the rest from the node's own Status call."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raftkv.local.process import NodeProcess

if TYPE_CHECKING:
    import grpc

    from raftkv._pb import maintenance_pb2

_CHANNEL_OPTIONS = (
    # A node that was restarted answers at once, not after gRPC's default backoff of seconds.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRow:
    """One line of the cluster's table. Fields that only a live node could tell are None when it did not answer."""

    name: str
    process: str
    """running, paused or exited."""
    role: str
    """leader, follower, learner, no leader (it knows none) or silent (it did not answer)."""
    client: str
    """host:port for clients."""
    peer: str
    pid: int | None = None
    exit_code: int | None = None
    """Of the last exit, when the process is not running; negative: the signal."""
    starts: int = 0
    member_id: int | None = None
    leader_id: int | None = None
    term: int | None = None
    commit: int | None = None
    applied: int | None = None
    lag: int | None = None
    """Entries that the leader has committed and this node has not applied; None without a leader."""
    rss_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NodeRow:
        """The inverse of `as_dict`."""
        return cls(**values)


class Probe:
    """Asks one node for its status. Blocking gRPC underneath, so that it can be used from any event loop."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.Channel | None = None
        self._ask: Any = None

    async def status(self, timeout_s: float) -> maintenance_pb2.StatusResponse | None:
        """The node's status, or None when it gave none in time."""
        import grpc

        if self._channel is None:
            from raftkv._pb import maintenance_pb2

            self._channel = grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
            self._ask = self._channel.unary_unary(
                "/etcdserverpb.Maintenance/Status",  # etcd's name: a supervisor can run etcd too (bench)
                request_serializer=maintenance_pb2.StatusRequest.SerializeToString,
                response_deserializer=maintenance_pb2.StatusResponse.FromString,
            )
            self._request = maintenance_pb2.StatusRequest()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[maintenance_pb2.StatusResponse | None] = loop.create_future()

        def deliver(call: Any) -> None:
            # On gRPC's thread. A loop that is closed by now has nobody left who waits.
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, call)

        def settle(call: Any) -> None:
            if not done.done():
                done.set_result(None if call.cancelled() or call.exception() is not None else call.result())

        call = self._ask.future(self._request, timeout=timeout_s)
        call.add_done_callback(deliver)
        try:
            return await done
        finally:
            call.cancel()

    def close(self) -> None:
        """Drop the connection; the next `status` makes a new one."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def role_of(reading: maintenance_pb2.StatusResponse) -> str:
    """A node's role as its own status tells it."""
    if reading.isLearner:
        return "learner"
    if reading.leader == 0:
        return "no leader"
    return "leader" if reading.leader == reading.header.member_id else "follower"


def leader_of(readings: Mapping[str, maintenance_pb2.StatusResponse | None]) -> str | None:
    """The name of the node that leads. Of two that believe it, the one of the higher term: the other is deposed."""
    leaders = [
        (reading.raftTerm, name)
        for name, reading in readings.items()
        if reading is not None and reading.leader == reading.header.member_id != 0
    ]
    return max(leaders)[1] if leaders else None


def agreed(readings: Mapping[str, maintenance_pb2.StatusResponse | None]) -> bool:
    """Whether every one of these nodes answers and all follow the same leader of the same term, who is one of them."""
    answers = [reading for reading in readings.values() if reading is not None]
    return (
        0 < len(answers) == len(readings)
        and len({(reading.leader, reading.raftTerm) for reading in answers}) == 1
        and answers[0].leader != 0
        and leader_of(readings) is not None
        and all(reading.raftAppliedIndex > 0 and not reading.errors for reading in answers)
    )


def table(
    nodes: Sequence[tuple[NodeProcess, str, str]],
    readings: Mapping[str, maintenance_pb2.StatusResponse | None],
) -> list[NodeRow]:
    """Join processes (with their client and peer address) and readings to rows."""
    leading = leader_of(readings)
    leader = readings[leading] if leading is not None else None
    rows = []
    for process, client, peer in nodes:
        reading = readings.get(process.name)
        alive = process.alive
        row = NodeRow(
            name=process.name,
            process=("paused" if process.is_stopped() else "running") if alive else "exited",
            role="silent" if reading is None else role_of(reading),
            client=client,
            peer=peer,
            pid=process.pid,
            exit_code=process.exit_code,
            starts=process.starts,
            rss_bytes=process.rss_bytes(),
        )
        if reading is not None:
            row = dataclasses.replace(
                row,
                # A deposed leader that has not heard of it still calls itself leader; the table shows one at most.
                role="deposed" if row.role == "leader" and process.name != leading else row.role,
                member_id=reading.header.member_id,
                leader_id=reading.leader or None,
                term=reading.raftTerm,
                commit=reading.raftIndex,
                applied=reading.raftAppliedIndex,
                lag=None if leader is None else max(0, leader.raftIndex - reading.raftAppliedIndex),
            )
        rows.append(row)
    return rows


def summary(rows: Sequence[NodeRow]) -> str:
    """The rows in one line, for error messages."""
    return ", ".join(f"{row.name} {row.role if row.process == 'running' else row.process}" for row in rows)
