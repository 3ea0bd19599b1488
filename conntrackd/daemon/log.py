"""The log: readable lines when stderr is a terminal, else JSON lines. Nothing is logged per packet.

The journal is told how important a line is, as sd-daemon(3) says, so that `journalctl -p warning` finds it.

Who logs never waits: a thread does the writing. While stderr takes nothing, as a pipe that nobody reads, LINES_MAX
lines may wait. What comes on top is lost, and so is what a full disk refuses; both are counted.
"""

import logging
import os
import select
import sys
import threading
from queue import SimpleQueue
from typing import Final

import structlog

LINES_MAX: Final = 4096
# syslog's numbers
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}
FLUSH_S: Final = 1.0  # how long a daemon that ends waits for its last lines to be taken


class Sink:
    """Lines on their way to a descriptor. structlog calls the method of a line's level."""

    def __init__(self, fd: int) -> None:
        self.lost = 0
        self.told = 0  # lost lines that a line spoke of
        self._fd = fd
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._torn = False  # a line was written in part
        self.begin()

    def begin(self) -> None:
        """Begin to write; a forked process has to begin anew, for it has none of its parent's threads."""
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def msg(self, line: str) -> None:
        """Take one line, or lose it if too many wait."""
        if self._lines.qsize() < LINES_MAX:
            self._lines.put(line)
        else:
            self.lost += 1

    debug = info = warning = error = critical = exception = msg

    def flush(self) -> None:
        """Wait until what waits is written, if it is taken soon."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(FLUSH_S)

    def _work(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                self._write(("\n" if self._torn else "") + line + "\n")
            except OSError:
                self.lost += 1
                continue
            if self.lost != self.told and self._lines.empty():
                self.told = self.lost
                structlog.get_logger().warning("log_lost", lines=self.told)

    def _write(self, text: str) -> None:
        rest = text.encode(errors="replace")
        while rest:
            try:
                written = os.write(self._fd, rest)
            except BlockingIOError:  # somebody who shares the descriptor has made it so
                select.select([], [self._fd], [])
                continue
            rest = rest[written:]
            self._torn = bool(rest)


def _is_journal(fd: int) -> bool:
    status = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _with_priority(_logger: object, level: str, line: object) -> str:
    return f"<{PRIORITIES[level]}>{line}"


def configure() -> Sink:
    """Set structlog up for this process; returns what its lines go through."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty():
        shared.append(structlog.dev.ConsoleRenderer())
    else:
        shared += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if _is_journal(sys.stderr.fileno()):
            shared.append(_with_priority)
    sink = Sink(sys.stderr.fileno())
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    return sink
