"""What is urgent overtakes what is not; in one priority, first in is first out.

Needs a cluster: RAFTKV_ENDPOINTS says where, else 127.0.0.1:2379 (`raftkv cluster up`). Uses the blocking twin.
"""

from __future__ import annotations

from raftkv import Client
from raftkv.recipes.blocking import PriorityQueue

with Client() as client:
    client.delete("examples/mail/", prefix=True)
    queue = PriorityQueue(client, "examples/mail")
    queue.put("newsletter", priority=900)
    queue.put("first invoice", priority=500)
    queue.put("second invoice", priority=500)
    queue.put("password reset", priority=1)
    order = [queue.get(timeout=5).text for _ in range(4)]
    print(", ".join(order))
    assert order == ["password reset", "first invoice", "second invoice", "newsletter"]
