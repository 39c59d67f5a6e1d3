"""Logs: lines for people on a terminal, one JSON object a line otherwise, and never a wait.

    loop or thread --append--> bounded queue --> one writer thread --> stderr

Whoever logs only appends to a queue. A terminal that is stopped, or a pipe that nobody reads, stops the writer thread
and nothing else; lines beyond the queue's bound are dropped and counted, and the count is logged when writing goes on
(an etcd whose log was blocked let reads hang while it looked healthy, its issue 22214).

Fixed names: ts level event node term index peer. An event is a word or two with underscores, the rest are fields.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import structlog

from raftkv.server.config import NodeConfig

QUEUE_LINES_MAX = 10_000
FLUSH_S = 1.0
_FIRST = ("ts", "level", "event", "node", "term", "index", "peer")

EventDict = MutableMapping[str, Any]
Renderer = Callable[[EventDict], str]


class LogWriter:
    """The queue and the thread that empties it into a file descriptor."""

    def __init__(self, descriptor: int, render: Renderer, lines_max: int = QUEUE_LINES_MAX) -> None:
        self._descriptor = descriptor
        self._render = render
        self._queue: deque[EventDict] = deque()
        self._lines_max = lines_max
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self.dropped = 0  # in all; only ever grows
        self._told = 0  # of those, how many a line has told of
        threading.Thread(target=self._run, name="raftkv-log", daemon=True).start()

    def put(self, event: EventDict) -> None:
        """Have a line written, or dropped when too many wait. From any thread; never waits."""
        if len(self._queue) >= self._lines_max:
            self.dropped += 1
            return
        self._idle.clear()
        self._queue.append(event)
        self._wake.set()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until everything is written, but no longer than `timeout_s`. Whether it is."""
        return self._idle.wait(timeout_s)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._queue:
                self._write(self._queue.popleft())
                dropped = self.dropped
                if dropped > self._told and len(self._queue) < self._lines_max // 2:
                    self._write({"level": "warning", "event": "log_lines_dropped", "count": dropped - self._told})
                    self._told = dropped
            self._idle.set()
            if self._queue:  # put between the last look and the line above
                self._idle.clear()

    def _write(self, event: EventDict) -> None:
        try:
            line = self._render(event).encode("utf-8", "backslashreplace") + b"\n"
        except Exception as fault:  # noqa: BLE001 - a value that cannot be shown must not end the logs
            line = f"log line lost: {type(fault).__name__} in event {event.get('event')!r}\n".encode()
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            return  # closed, or its reader is gone: there is nobody to tell


class _QueueLogger:
    """What structlog calls in the end."""

    def __init__(self, writer: LogWriter) -> None:
        self._put = writer.put

    def msg(self, event: EventDict) -> None:
        self._put(event)

    debug = info = warning = error = critical = exception = fatal = msg


class _StdlibHandler(logging.Handler):
    """Lines of libraries (grpc, asyncio) go the same way."""

    def __init__(self, writer: LogWriter, finish: Callable[[EventDict], EventDict]) -> None:
        super().__init__()
        self._writer = writer
        self._finish = finish

    def emit(self, record: logging.LogRecord) -> None:
        event: EventDict = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.exc_info:
            event["exc_info"] = record.exc_info
        self._writer.put(self._finish(event))


def setup(config: NodeConfig) -> LogWriter:
    """Send this process's logs to stderr, as configured. Called once, first thing."""
    global _writer
    console = config.log_format == "console" or (config.log_format == "auto" and sys.stderr.isatty())
    writer = LogWriter(sys.stderr.fileno(), console_renderer(sys.stderr.isatty()) if console else render_json)
    _writer = writer
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        # A traceback is made where it happened: later, its frames would be gone.
        structlog.processors.format_exc_info if console else structlog.processors.dict_tracebacks,
    ]

    def to_queue(logger: object, method: str, event: EventDict) -> tuple[tuple[EventDict], dict[str, Any]]:
        event.setdefault("node", config.name)
        return (event,), {}

    level = getattr(logging, config.log_level.upper())
    structlog.configure(
        processors=[*before, to_queue],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _QueueLogger(writer),
        cache_logger_on_first_use=False,  # module-level loggers were made before this call
    )

    def finish(event: EventDict) -> EventDict:
        for processor in before[2:]:
            event = processor(None, str(event["level"]), event)  # type: ignore[assignment]
        event.setdefault("node", config.name)
        return event

    root = logging.getLogger()
    root.handlers[:] = [_StdlibHandler(writer, finish)]
    root.setLevel(max(level, logging.WARNING) if level > logging.DEBUG else logging.INFO)
    logging.captureWarnings(True)
    return writer


def flush() -> None:
    """Before the process ends: wait a little for the lines that are queued."""
    if _writer is not None:
        _writer.flush()


def render_json(event: EventDict) -> str:
    """One JSON object, the fixed names first."""
    ordered = _ordered(event)
    try:
        import orjson
    except ImportError:
        return json.dumps(ordered, default=_shown)
    return orjson.dumps(ordered, default=_shown, option=orjson.OPT_NON_STR_KEYS).decode()


def console_renderer(colors: bool) -> Renderer:
    """A line for people."""
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, timestamp_key="ts", sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )

    def render(event: EventDict) -> str:
        return str(renderer(None, "", dict(_ordered(event))))

    return render


def _ordered(event: Mapping[str, Any]) -> dict[str, Any]:
    first = {name: event[name] for name in _FIRST if name in event}
    first.update((name, value) for name, value in event.items() if name not in first)
    return first


def _shown(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else repr(value)


_writer: LogWriter | None = None
