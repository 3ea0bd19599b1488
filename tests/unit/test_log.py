"""The log: JSON for machines, readable on a terminal."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from conntrackd.daemon.log import LINES_MAX, Sink

# stderr is a full disk for two lines, and then is not.
LOST = """
import os, sys, time
import structlog
from conntrackd.daemon import log
stderr, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
os.dup2(full, 2)
sink = log.configure()
logger = structlog.get_logger()
logger.info("before")
logger.info("before")
while sink.lost < 2:
    time.sleep(0.01)
os.dup2(stderr, 2)
logger.info("after")
while not sink.told:
    time.sleep(0.01)
sink.flush()
"""
PROGRAM = """
import structlog
from conntrackd.daemon import log
sink = log.configure()
logger = structlog.get_logger()
logger.debug("left_out")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed", queue=1)
sink.flush()
"""


def test_json_when_stderr_is_no_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["queue"]) == ("failed", "error", 1)
    assert entry["timestamp"].endswith("Z")
    assert "ZeroDivisionError" in entry["exception"]


def test_the_journal_is_told_how_important_a_line_is(tmp_path: Path) -> None:
    """Where stderr is the journal, of which systemd tells device and inode; a program that is not has none of it."""
    with (tmp_path / "journal").open("w+b") as journal:
        status = os.fstat(journal.fileno())
        for inode, begins in ((status.st_ino, b"<3>{"), (status.st_ino + 1, b"{")):
            env = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{inode}"}
            subprocess.run([sys.executable, "-c", PROGRAM], stderr=journal, check=True, env=env)
            journal.seek(0)
            assert journal.read().startswith(begins)
            journal.seek(0)
            journal.truncate()


def test_readable_on_a_terminal() -> None:
    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-c", PROGRAM], stderr=slave, check=True)
    os.close(slave)
    text = b""
    try:
        while part := os.read(master, 1 << 16):
            text += part
    except OSError:  # how a terminal says that its other side is closed
        pass
    os.close(master)
    assert b"failed" in text
    assert b"ZeroDivisionError" in text
    assert b'"event"' not in text
    assert b"left_out" not in text


def test_a_reader_that_reads_nothing_holds_nobody_up() -> None:
    """More lines than a pipe and the daemon hold: nothing waits, and whoever reads again is told what is missing."""
    read_end, write_end = os.pipe()
    sink = Sink(write_end)
    lines = 3 * LINES_MAX
    for number in range(lines):
        sink.msg(f"line {number} {'x' * 100}")
    assert 0 < sink.lost < lines
    text = b""
    while text.count(b"\n") < lines - sink.lost:
        text += os.read(read_end, 1 << 16)
    assert text.startswith(b"line 0 ")
    sink.flush()
    os.close(write_end)
    os.close(read_end)


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(full)
    for number in range(10):
        sink.msg(f"line {number}")
    sink.flush()
    assert sink.lost == 10
    os.close(full)


def test_lines_go_on_when_there_is_room_again_and_say_what_was_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stderr.splitlines())
    assert first["event"] == "after"
    assert (second["event"], second["lines"]) == ("log_lost", 2)


def test_a_descriptor_that_was_made_nonblocking_loses_nothing() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    sink = Sink(write_end)
    line = "x" * (1 << 16)
    for _ in range(4):
        sink.msg(line)
    text = b""
    while len(text) < 4 * (len(line) + 1):
        text += os.read(read_end, 1 << 16)
    sink.flush()
    assert sink.lost == 0
    os.close(write_end)
    os.close(read_end)
