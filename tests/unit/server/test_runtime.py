"""When a node applies: behind what others wait for, and never behind a disk that does not come back.

A cluster of one, with its real disk; `write_log` holds the disk's thread up.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from raftkv._pb.kv_pb2 import PutRequest
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.replica.replica import Replica
from raftkv.server.config import NodeConfig
from raftkv.server.runtime import Runtime
from raftkv.server.stores import Stores
from raftkv.state.commands import CommandKind
from raftkv.state.results import PutDone


class Held:
    """The disk's thread, held up between two writes."""

    def __init__(self, runtime: Runtime) -> None:
        self._go = threading.Event()
        self._runtime = runtime

    def hold(self) -> None:
        self._runtime.write_log(self._wait)

    def _wait(self) -> None:
        self._go.wait(20)

    def release(self) -> None:
        self._go.set()


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    config = NodeConfig(name="n1", data_dir=tmp_path)
    stores = Stores(config)
    raft = Raft(stores.identity.node_id, RaftConfig(), stores.log, 0, random.Random(1))
    runtime = Runtime(config, stores, Replica(raft, 1), 1)
    async with asyncio.TaskGroup() as tasks:
        runtime.start(tasks)
        async with asyncio.timeout(20):
            await put(runtime, b"first")
        yield runtime
        runtime.end_tasks()
    runtime.close()


@pytest.fixture
def disk(runtime: Runtime) -> Held:
    return Held(runtime)


def submit(runtime: Runtime, key: bytes) -> asyncio.Future[object]:
    payload = PutRequest(key=key, value=b"v").SerializeToString()
    return runtime.submit(CommandKind.PUT, payload, None)  # type: ignore[return-value]  # a Future is not covariant


def slip_in(runtime: Runtime, key: bytes) -> asyncio.Future[object]:
    """As `submit`, but the node does not know that anybody waits: as commands of other nodes come."""
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    runtime.replica.propose(CommandKind.PUT, PutRequest(key=key, value=b"v").SerializeToString(), future)
    runtime.on_messages(runtime.node_id, [])
    return future


async def put(runtime: Runtime, key: bytes) -> object:
    return await submit(runtime, key)


async def applied(runtime: Runtime, index: int) -> None:
    """Wait until so much is applied."""
    seen = asyncio.Event()
    runtime.on_applied = seen.set
    async with asyncio.timeout(10):
        while runtime.machine.applied_index < index:
            await seen.wait()
            seen.clear()


async def test_a_caller_has_its_answer_while_a_later_write_is_under_way(runtime: Runtime, disk: Held) -> None:
    before = runtime.machine.applied_index
    one = submit(runtime, b"a")
    await asyncio.sleep(0)  # it is in an entry of its own, on its way to the disk
    disk.hold()
    two = submit(runtime, b"b")
    async with asyncio.timeout(10):
        assert isinstance(await one, PutDone)
    assert not two.done()
    assert runtime.machine.applied_index == before + 1
    disk.release()
    async with asyncio.timeout(10):
        assert isinstance(await two, PutDone)


async def test_what_nobody_waits_for_is_applied_although_the_disk_does_not_come_back(
    runtime: Runtime, disk: Held
) -> None:
    before = runtime.machine.applied_index
    one = slip_in(runtime, b"a")
    await asyncio.sleep(0)
    disk.hold()
    two = slip_in(runtime, b"b")
    await applied(runtime, before + 1)
    assert one.done()
    assert not two.done()
    disk.release()
    async with asyncio.timeout(10):
        assert isinstance(await two, PutDone)
    assert runtime.machine.applied_index == before + 2


async def test_results_come_in_the_order_of_the_log(runtime: Runtime) -> None:
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(put(runtime, b"k%d" % number) for number in range(500)))
    revisions = [answer.revision for answer in answers if isinstance(answer, PutDone)]
    assert revisions == sorted(set(revisions))
    assert len(revisions) == 500


async def test_a_state_is_after_a_mark_when_something_was_appended_and_applied_since(
    runtime: Runtime, disk: Held
) -> None:
    mark = runtime.mark()
    assert not runtime.is_after(mark)
    disk.hold()
    one = submit(runtime, b"a")
    await asyncio.sleep(0)
    late = runtime.mark()  # the entry of `a` was appended before
    assert not runtime.is_after(mark)
    disk.release()
    async with asyncio.timeout(10):
        await one
    assert runtime.is_after(mark)
    assert not runtime.is_after(late)


async def test_a_mark_proves_nothing_without_leadership_or_in_another_term(runtime: Runtime) -> None:
    mark = runtime.mark()
    await put(runtime, b"a")
    assert not runtime.is_after(mark._replace(term=mark.term + 1))
    assert not runtime.is_after(mark._replace(term=0))
    runtime.replica.raft.become_follower(mark.term, 0, "the test says so")
    assert runtime.mark().term == 0
