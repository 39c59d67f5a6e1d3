"""What your tests use: a real cluster of node processes as a pytest fixture, gone when the test is over.

Installed with raftkv, found by pytest by itself (entry point `raftkv` in group `pytest11`):

    def test_my_service(raftkv_client):
        raftkv_client.put("greeting", "hello")

See `raftkv.testing.plugin` for the fixtures. `LocalCluster` is the same without pytest.
"""

from __future__ import annotations

from raftkv.local import AsyncLocalCluster, LocalCluster

__all__ = ["AsyncLocalCluster", "LocalCluster"]
