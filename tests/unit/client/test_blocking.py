"""The blocking twin: threads, forks, callbacks, the end of the process."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from raftkv.client import (
    AsyncClient,
    BlockingCluster,
    BlockingElection,
    BlockingLeadership,
    BlockingLease,
    BlockingLock,
    BlockingMaintenance,
    BlockingWatch,
    Client,
    Closed,
    Election,
    Get,
    Key,
    Leadership,
    Lease,
    Lock,
    OutcomeUnknown,
    Put,
    RaftkvError,
    Watch,
)
from raftkv.client.blocking import _Handover, loop_thread
from raftkv.client.cluster import Cluster
from raftkv.client.maintenance import Maintenance
from tests.unit.client.twins import check_twins


@pytest.fixture
def client(cluster_in_thread):
    with Client(cluster_in_thread) as client:
        yield client


def test_it_does_what_its_twin_does(client):
    assert client.put("k", "1").revision == 2
    assert client.get("k").text == "1"
    assert client.get("none") is None
    assert client.range("k", prefix=True).count == 1
    result = client.txn().when(Key("k").version == 1).then(Put("k", "2"), Get("k")).otherwise(Get("k")).commit()
    assert result.succeeded
    assert client.update("k", lambda item: item.text + "3").text == "23"
    assert [item.key for item in client.scan("", page_size=1)] == [b"k"]
    assert client.delete("k").deleted == 1
    assert [member.name for member in client.cluster.members()] == ["n1", "n2", "n3"]
    assert client.with_options(namespace="ns/").put("k", "v").revision > 0
    assert client.get("ns/k").text == "v"
    assert client.stats().failures == 0


def test_many_threads_use_one_client(client):
    def work(number: int) -> None:
        for _ in range(10):
            client.update("n", lambda item: str(int(item.text) + 1 if item else 1), max_retries=10_000)
            client.put(f"k{number}", "v")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert client.get("n").text == "80"
    assert client.range("k", prefix=True).count == 8


def test_a_scan_that_is_left_early_ends(client):
    for number in range(10):
        client.put(f"k{number}", "v")
    scan = client.scan("k", page_size=2)
    assert next(scan).key == b"k0"
    scan.close()


def test_all_clients_share_one_thread(cluster_in_thread):
    with Client(cluster_in_thread) as one, Client(cluster_in_thread) as two:
        one.put("k", "v")
        assert two.get("k").text == "v"
        assert len([thread for thread in threading.enumerate() if thread.name == "raftkv-client"]) == 1


def test_a_closed_client_says_so(cluster_in_thread):
    client = Client(cluster_in_thread)
    client.put("k", "v")
    client.close()
    client.close()
    with pytest.raises(Closed):
        client.get("k")


def test_a_callback_that_would_wait_for_itself_is_told(cluster_in_thread):
    raised = []
    client = Client(cluster_in_thread)

    def listener(state):
        try:
            client.get("k")
        except RaftkvError as error:
            raised.append(error)

    client.state.on_change(listener)
    client.put("k", "v")
    client.close()
    assert "callback" in str(raised[0])


@pytest.mark.parametrize(
    ("blocking", "twin", "left_out"),
    [
        (Client, AsyncClient, {"pages"}),  # used by the twin itself
        (BlockingCluster, Cluster, ()),
        (BlockingMaintenance, Maintenance, ()),
        (BlockingElection, Election, ()),
        (BlockingLeadership, Leadership, ()),
        (BlockingLease, Lease, {"chosen", "confirmed", "end", "renewed", "undecided"}),  # between it and its keeper
        (BlockingLock, Lock, ()),
        (BlockingWatch, Watch, {"aclose", "stop"}),  # `close`
    ],
)
def test_whatever_is_public_has_a_twin_with_the_same_parameters(blocking, twin, left_out):
    check_twins(blocking, twin, left_out)
    if blocking is Client:
        ours, theirs = inspect.signature(Client.__init__), inspect.signature(AsyncClient.__init__)
        assert list(ours.parameters.values()) == list(theirs.parameters.values())


def run(program: str, *arguments: str) -> str:
    """Run a program of its own and return what it printed; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_a_forked_child_is_told_clearly(cluster_in_thread):
    printed = run(
        """
        import os, sys
        from raftkv import AsyncClient, Client, Closed
        client = Client(sys.argv[1])
        client.put("k", "v")
        child = os.fork()
        if child == 0:
            for attempt in (lambda: client.get("k"), lambda: Client(sys.argv[1]).get("k")):
                try:
                    attempt()
                except Closed as error:
                    print("child:", error, flush=True)
            client.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("parent:", client.get("k").text)
        """,
        cluster_in_thread,
    )
    lines = printed.splitlines()
    assert lines[0].startswith("child: this client belongs to process")
    assert "was forked from process" in lines[1]
    assert lines[2] == "parent: v"


def test_a_child_forked_before_the_first_call_works(cluster_in_thread):
    printed = run(
        """
        import os, sys
        from raftkv import Client
        child = os.fork()
        with Client(sys.argv[1]) as client:
            client.put("child" if child == 0 else "parent", "v")
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
        """,
        cluster_in_thread,
    )
    assert printed == "done\n"


def test_a_process_ends_quietly_with_a_client_left_open(cluster_in_thread):
    program = """
        import sys
        from raftkv import Client
        client = Client(sys.argv[1])
        client.put("k", "v")
        print("done")
        """
    assert run(program, cluster_in_thread) == "done\n"


def test_ctrl_c_interrupts_a_waiting_call(cluster_in_thread):
    printed = run(
        """
        import os, signal, sys, threading
        from raftkv import Client
        client = Client(sys.argv[1])
        client.connect()
        try:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            client.get("hold", timeout=20)
        except KeyboardInterrupt:
            print("interrupted")
        """,
        cluster_in_thread,
    )
    assert printed == "interrupted\n"


@pytest.mark.parametrize("order", ["import aetcd, raftkv.client", "import raftkv.client, aetcd"])
def test_another_etcd_client_lives_in_the_same_process(cluster_in_thread, order):
    printed = run(
        f"""
        import sys
        {order}
        from raftkv import Client
        with Client(sys.argv[1]) as client:
            client.put("k", "v")
            print(client.get("k").text, aetcd.Client.__name__)
        """,
        cluster_in_thread,
    )
    assert printed == "v Client\n"


def test_an_unknown_outcome_reaches_the_thread_that_asked(client):
    with pytest.raises(OutcomeUnknown):
        client.put("hold", "v", timeout=2)


def test_an_unfinished_iteration_may_be_collected_in_the_loops_own_thread() -> None:
    ended = threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            ended.set()

    iteration = _Handover(loop_thread()).iterate(numbers())
    assert next(iteration) == 1
    closed = threading.Event()

    def collect() -> None:
        iteration.close()  # type: ignore[attr-defined]
        closed.set()

    loop_thread().loop.call_soon_threadsafe(collect)
    assert closed.wait(10)
    assert ended.wait(10)
