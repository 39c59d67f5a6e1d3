"""The stock that comes out even: many processes sell from it, while nodes are killed and sellers die.

    python examples/stock.py                     a cluster of five of its own, eight sellers, kills all along

Each seller takes the lock `stock`, reads how much is left, and writes one less and a receipt, in one transaction that
carries the lock's guard. Meanwhile the leader is killed again and again; one seller is killed while it holds the lock,
and one is stopped for longer than its lock lives and then goes on, believing that it still sells. At the end every
piece that is missing has exactly one receipt: nothing was sold twice, nothing was lost.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from raftkv import Client, LockLost, Put
from raftkv.local import LocalCluster

STOCK = "shop/stock"
RECEIPTS = "shop/receipts/"
TTL_S = 3.0
TIMEOUT_S = 30.0
PACKING_S = 0.01  # between reading and writing: where a pause does harm


def sell(name: str, endpoints: str) -> None:
    """One seller, a process of its own: sells until nothing is left; prints what it sold."""
    sold = refused = 0
    with Client(endpoints, timeout=TIMEOUT_S) as client:
        client.connect()
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            try:
                with client.lock("shop/lock", ttl=TTL_S, owner=name) as lock:
                    item = client.get(STOCK)
                    left = int(item.text) if item else 0
                    if left == 0:
                        break
                    print(f"holds {lock.fence}", flush=True)
                    time.sleep(PACKING_S)
                    receipt = Put(f"{RECEIPTS}{left:06d}", f"{name} {lock.fence}")
                    # Read above, written here: without the guard, whoever is paused in between sells what is sold.
                    client.txn(guards=[lock.guard()]).then(Put(STOCK, str(left - 1)), receipt).commit()
                    sold += 1
            except LockLost:
                refused += 1  # nothing was written; it begins again
    print(f"sold {sold} refused {refused}", flush=True)


class Seller:
    """A process that sells."""

    def __init__(self, number: int, endpoints: str) -> None:
        self.name = f"seller-{number}"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--sell", self.name, "--endpoints", endpoints],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        """Wait until it could sell."""
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def begin(self) -> None:
        """Let it sell."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal_inside(self, number: int) -> bool:
        """Send a signal in a moment when it holds the lock; False where it has nothing more to sell."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("holds"):
                os.kill(self.process.pid, number)
                return True
            if line.startswith("sold"):
                break
        return False

    def refused(self) -> int:
        """How many of its writes were refused, once it has ended; a killed one does not tell."""
        out, _ = self.process.communicate(timeout=120)
        last = (out.splitlines() or [""])[-1].split()
        return int(last[3]) if last[:1] == ["sold"] else 0


def run(sellers: int, stock: int, kills: int, nodes: int) -> None:
    """The whole story, on a cluster of its own."""
    with LocalCluster(nodes) as cluster:
        endpoints = ",".join(cluster.endpoints)
        with Client(endpoints, timeout=TIMEOUT_S) as client:
            client.put(STOCK, str(stock))
            people = [Seller(number, endpoints) for number in range(sellers)]
            try:
                for each in people:  # or those who come last on a busy machine find nothing to sell
                    each.wait_ready()
                for each in people:
                    each.begin()
                _disturb(cluster, people, kills)
                refused = sum(seller.refused() for seller in people)
            finally:
                for seller in people:
                    seller.process.kill()
                    seller.process.communicate()
            print(f"{refused} writes of sellers whose lock was lost were refused")
            _check(client, stock, people)


def _disturb(cluster: LocalCluster, people: list[Seller], kills: int) -> None:
    killed, paused = people[0], people[1]
    print(f"{paused.name} stopped while it holds the lock: {paused.signal_inside(signal.SIGSTOP)}", flush=True)
    stopped = time.monotonic()
    for _ in range(kills):
        (node,) = cluster.kill("leader")
        time.sleep(0.5)
        cluster.restart(node)
        print(f"{node} led, was killed, is back", flush=True)
    print(f"{killed.name} killed while it holds the lock: {killed.signal_inside(signal.SIGKILL)}", flush=True)
    time.sleep(max(0.0, stopped + 2 * TTL_S - time.monotonic()))
    os.kill(paused.process.pid, signal.SIGCONT)
    print(f"{paused.name} goes on, {time.monotonic() - stopped:.0f} s later", flush=True)


def _check(client: Client, stock: int, people: list[Seller]) -> None:
    item = client.get(STOCK)
    left = int(item.text) if item else 0
    receipts = list(client.scan(RECEIPTS))
    fences = [int(receipt.text.split()[1]) for receipt in reversed(receipts)]  # in the order of the sales
    by = {seller.name: sum(receipt.text.startswith(f"{seller.name} ") for receipt in receipts) for seller in people}
    for name, count in by.items():
        print(f"  {name}: {count}")
    assert left == 0, f"{left} are left"
    assert len(receipts) == stock, f"{len(receipts)} receipts for {stock} pieces"
    assert all(receipt.version == 1 for receipt in receipts), "a piece was sold twice"
    assert fences == sorted(set(fences)), "sold out of turn"
    print(f"stock {stock}, left {left}, receipts {len(receipts)}, each once: exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sellers", type=int, default=8)
    parser.add_argument("--stock", type=int, default=300)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--sell", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--endpoints", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.sell:
        sell(chosen.sell, chosen.endpoints)
    else:
        run(max(3, chosen.sellers), chosen.stock, chosen.kills, chosen.nodes)


if __name__ == "__main__":
    main()
