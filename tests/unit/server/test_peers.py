"""Evidence that a peer's process is gone: its port refuses connections, at last."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from raftkv.server import peers
from raftkv.server.peers import Peers


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
