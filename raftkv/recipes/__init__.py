"""What is made of locks, leases, watches and transactions: semaphores, queues and the like. Works with etcd too.

Here for asyncio, made with a `raftkv.AsyncClient`; in `raftkv.recipes.blocking` for threads, made with a
`raftkv.Client`. Built on nothing but the client's public calls, one file a recipe, so that each can be read.
"""

from __future__ import annotations

from raftkv.recipes.barrier import Barrier
from raftkv.recipes.counter import Counter
from raftkv.recipes.double_barrier import DoubleBarrier
from raftkv.recipes.leader_task import LeaderTask
from raftkv.recipes.priority_queue import PriorityQueue
from raftkv.recipes.queue import Claim, Item, Queue
from raftkv.recipes.read_write_lock import ReadLock, ReadWriteLock, WriteLock
from raftkv.recipes.registry import Instance, Registration, Registry
from raftkv.recipes.semaphore import Permit, Semaphore

__all__ = [
    "Barrier",
    "Claim",
    "Counter",
    "DoubleBarrier",
    "Instance",
    "Item",
    "LeaderTask",
    "Permit",
    "PriorityQueue",
    "Queue",
    "ReadLock",
    "ReadWriteLock",
    "Registration",
    "Registry",
    "Semaphore",
    "WriteLock",
]
