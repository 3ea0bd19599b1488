"""The log: JSON for machines, readable on a terminal."""

import json
import os
import pty
import subprocess
import sys

PROGRAM = """
import structlog
from conntrackd.daemon import log
log.configure()
logger = structlog.get_logger()
logger.debug("left_out")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed", queue=1)
"""


def test_json_when_stderr_is_no_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["queue"]) == ("failed", "error", 1)
    assert entry["timestamp"].endswith("Z")
    assert "ZeroDivisionError" in entry["exception"]


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
