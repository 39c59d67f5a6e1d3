"""Evidence that a peer's process is gone: its port refuses connections, at last."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from raftkv.raft.messages import Append, Heartbeat
from raftkv.raft.types import Entry, EntryKind
from raftkv.server import convert, peers
from raftkv.server.peers import Link, Peers


def peers_at(address: str | None, monkeypatch: pytest.MonkeyPatch) -> Peers:
    found = Peers(1, 7, 3, cast("Any", None))
    monkeypatch.setattr(found, "address", lambda _: address)
    return found


async def test_who_listens_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not await peers_at(f"127.0.0.1:{server.getsockname()[1]}", monkeypatch).is_gone(2)


async def test_who_listens_no_more_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert await peers_at(address, monkeypatch).is_gone(2)


async def test_nobody_we_know_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await peers_at(None, monkeypatch).is_gone(2)


async def test_a_socket_that_is_closed_last_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is being killed closes one socket after the other: it accepts, then resets, then refuses."""
    answers: list[type[OSError] | None] = [None, ConnectionResetError, None, ConnectionAbortedError]
    opened = peers.asyncio.open_connection
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        async def dying(host: str, port: int) -> Any:
            if not answers:
                server.close()
            elif (fault := answers.pop(0)) is not None:
                raise fault
            return await opened(host, port)

        monkeypatch.setattr(peers.asyncio, "open_connection", dying)
        assert await peers_at(f"127.0.0.1:{port}", monkeypatch).is_gone(2)
    assert answers == []


async def test_who_does_not_answer_may_be_frozen_and_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(host: str, port: int) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(peers.asyncio, "open_connection", silent)
    assert not await peers_at("127.0.0.1:1", monkeypatch).is_gone(2)


class FakeCall:
    """A stream that takes everything, or nothing."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.held_up = False
        self.cancelled = False

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def cancel(self) -> None:
        self.cancelled = True


def linked(peer: int) -> tuple[Link, FakeCall]:
    link, call = Link(peer, "127.0.0.1:1", (), cast("Any", None)), FakeCall()
    link._call = cast("Any", call)
    return link, call


async def test_what_followers_in_step_get_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    to_batch = convert.to_batch

    def noting(messages: Any) -> Any:
        encoded.append(list(messages))
        return to_batch(messages)

    monkeypatch.setattr(convert, "to_batch", noting)
    append = Append(3, 6, 3, (Entry(7, 3, EntryKind.NORMAL, b"x"),), 6)
    (first, second, behind) = (linked(peer) for peer in (2, 3, 4))
    for link, _ in (first, second):
        link.send(append)
    behind[0].send(Heartbeat(3, 5, 1))
    behind[0].send(append)
    shared: dict[tuple[int, ...], bytes] = {}
    for link, _ in (first, second, behind):
        link.flush(shared)
    assert len(encoded) == 2
    assert first[1].sent == second[1].sent
    assert len(first[1].sent) == 1
    messages = convert.from_batch(peers.raft_pb2.PeerBatch.FromString(behind[1].sent[0]))
    assert messages == [Heartbeat(3, 5, 1), append]


async def test_what_gathers_while_a_peer_does_not_read_leaves_as_one_message() -> None:
    link, call = linked(2)
    call.held_up = True
    for token in (1, 2, 3):
        link.send(Heartbeat(3, 5, token))
        link.flush({})
    assert call.sent == []
    call.held_up = False
    link.flush({})
    assert len(call.sent) == 1


async def test_a_peer_that_never_reads_has_its_stream_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "OUTBOX_BYTES_MAX", 100)
    link, call = linked(2)
    call.held_up = True
    for token in range(10):
        link.send(Heartbeat(3, 5, token))
        link.flush({})
    assert call.cancelled
    link.send(Heartbeat(3, 5, 11))
    call.held_up = False
    link.flush({})
    assert call.sent == []
