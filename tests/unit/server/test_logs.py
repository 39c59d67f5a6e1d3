"""Logs never hold up whoever logs, and are the same fields everywhere."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
import time

import pytest

from raftkv.server import logs
from raftkv.server.logs import LogWriter, console_renderer, render_json

PROGRAM = """
import logging, sys
from pathlib import Path
import structlog
from raftkv.server import logs
from raftkv.server.config import NodeConfig
early = structlog.get_logger()  # as modules do when they are imported
logs.setup(NodeConfig(name="n1", data_dir=Path("."), **eval(sys.argv[1])))
log = structlog.get_logger().bind(node="n1")
log.debug("not_shown")
log.info("became_leader", term=3, index=7, peer="ab", extra=b"\\xff")
early.warning("from_a_module")
try:
    1 / 0
except ZeroDivisionError as fault:
    log.error("internal_error", exc_info=fault)
logging.getLogger("grpc").warning("from %s", "grpc")
logging.getLogger("asyncio").debug("not_shown")
import warnings
warnings.warn("a warning")
logs.flush()
"""


def run(settings: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, settings], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_lines_have_the_fixed_names_first() -> None:
    lines = [json.loads(line) for line in run("{}")]
    assert [line["event"].split(":")[0] for line in lines[:4]] == [
        "became_leader",
        "from_a_module",
        "internal_error",
        "from grpc",
    ]
    assert list(lines[0]) == ["ts", "level", "event", "node", "term", "index", "peer", "extra"]
    assert {line["node"] for line in lines} == {"n1"}
    assert lines[2]["exception"][0]["exc_type"] == "ZeroDivisionError"
    assert (lines[3]["level"], lines[3]["logger"]) == ("warning", "grpc")
    assert "a warning" in lines[4]["event"]
    assert len(lines) == 5


def test_console_lines_are_for_people() -> None:
    text = "\n".join(run("{'log_format': 'console', 'log_level': 'warning'}"))
    assert "became_leader" not in text
    assert "from_a_module" in text
    assert "ZeroDivisionError" in text
    with pytest.raises(ValueError):
        json.loads(text.splitlines()[0])


def test_a_pipe_that_nobody_reads_stops_nobody() -> None:
    """Row 80 of the bug catalogue: an etcd whose log was blocked let reads hang."""
    reader, writer_end = os.pipe()
    fcntl.fcntl(writer_end, fcntl.F_SETPIPE_SZ, 4096)
    writer = LogWriter(writer_end, render_json, lines_max=100)
    for number in range(1000):
        writer.put({"event": "x" * 200, "level": "info", "number": number})
    assert writer.dropped > 800
    assert not writer.flush(0.05)
    # It is read again: what waited comes, and how many were lost.
    os.set_blocking(reader, False)
    got = b""
    deadline = time.monotonic() + 30
    while b"log_lines_dropped" not in got and time.monotonic() < deadline:
        try:
            got += os.read(reader, 65536)
        except BlockingIOError:
            time.sleep(0.005)
    lines = [json.loads(line) for line in got.splitlines()]
    told = sum(line["count"] for line in lines if line["event"] == "log_lines_dropped")
    assert told == writer.dropped
    assert lines[0]["number"] == 0


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer_end = os.pipe()
    os.close(reader)
    writer = LogWriter(writer_end, render_json)
    writer.put({"event": "lost"})
    writer.put({"event": "lost too"})
    assert writer.flush(30)


def test_a_value_that_cannot_be_shown_costs_one_line_only() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    reader, writer_end = os.pipe()
    writer = LogWriter(writer_end, render_json)
    writer.put({"event": "bad", "value": Bad()})
    writer.put({"event": "good"})
    assert writer.flush(30)
    lines = os.read(reader, 65536).splitlines()
    assert lines[0].startswith(b"log line lost: ")
    assert json.loads(lines[1]) == {"event": "good"}


def test_lone_surrogates_do_not_end_the_writer() -> None:
    reader, writer_end = os.pipe()
    writer = LogWriter(writer_end, console_renderer(False))
    writer.put({"event": "odd \ud800"})
    writer.put({"event": "next"})
    assert writer.flush(30)
    assert b"next" in os.read(reader, 65536)


def test_flush_without_setup_is_nothing() -> None:
    logs.flush()
    assert logging.getLogger().handlers is not None
