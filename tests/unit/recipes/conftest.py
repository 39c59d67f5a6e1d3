"""Clients of one store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.unit.recipes.store import BACKGROUND, FakeClient, Store


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
def make(store: Store) -> Callable[[], FakeClient]:
    return lambda: FakeClient(store)


async def quiet(turns: int = 60) -> None:
    """Let everything happen that can happen by itself."""
    for _ in range(turns):
        await asyncio.sleep(0)
    if BACKGROUND:
        await asyncio.wait(set(BACKGROUND))
