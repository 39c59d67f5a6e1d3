"""A program that changes one key under a lock, for the tests that stop it in the middle.

    fencing_worker.py ENDPOINTS guarded|unguarded TTL_S [once]

It tells what it does in lines of JSON, with moments of the one clock that all processes of a machine share. With
`once` it holds the lock, has read and checked, and then waits for a line before it writes; else it takes turns until
its input ends.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time

import raftkv
from raftkv.client.blocking_coordination import BlockingLock

KEY = "stock"


def tell(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, "at": now(), **facts}), flush=True)


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def believes(lock: BlockingLock) -> bool:
    """Whether `check` says that it is held; told with a moment before the question."""
    began = now()
    try:
        lock.check()
    except raftkv.LockLost:
        return False
    tell("check", fence=lock.fence, began=began)
    return True


def turn(client: raftkv.Client, lock: BlockingLock, guarded: bool, once: bool) -> None:
    fence = lock.fence
    guards = [lock.guard()] if guarded else []
    tell("acquired", fence=fence)
    item = client.get(KEY)
    old = json.loads(item.value)["count"] if item is not None else 0
    if not believes(lock):
        return
    if once:
        tell("checked")
        sys.stdin.readline()  # stopped meanwhile, and continued
        tell("check says held" if believes(lock) else "check says lost")
    else:
        time.sleep(random.random() * 0.05)
    value = json.dumps({"count": old + 1, "fence": fence})
    try:
        put = client.put(KEY, value, guards=guards)
    except raftkv.LockLost:
        tell("refused", fence=fence)
    else:
        tell("written", fence=fence, revision=put.revision)
    if not once:
        believes(lock)


def main() -> None:
    endpoints, mode, ttl_s = sys.argv[1:4]
    once = sys.argv[4:] == ["once"]
    ended = threading.Event()
    if not once:

        def listen() -> None:
            sys.stdin.read()
            ended.set()

        threading.Thread(target=listen, daemon=True).start()
    with raftkv.Client(endpoints, timeout=60) as client:
        lock = client.lock("turns", ttl=float(ttl_s))
        while not ended.is_set():
            try:
                lock.acquire(timeout=60)
                turn(client, lock, mode == "guarded", once)
            except raftkv.LockLost:
                tell("lost")
            try:
                lock.release()
            except raftkv.LockLost:
                tell("lost")
            if once:
                break
    tell("ended")


if __name__ == "__main__":
    main()
