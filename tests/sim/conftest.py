"""Options of the transcripts."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="record the output of the transcripts in tests/sim/scenarios anew; review it as a diff",
    )
