"""A node without consensus or disk, served by a real gRPC server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_node import FakeNode, Served, serve


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A served fake node with the default configuration."""
    async with serve(FakeNode(tmp_path)) as running:
        yield running
