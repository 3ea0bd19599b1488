"""`make demo`: what it claims, its exit code, and that it leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.network import PREFIX, wait_until

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "tests.demo"]
MAKE_DEMO = ["make", "-s", "-o", "setup", "demo", f"VENV={sys.prefix}"]  # all but the installing


def namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines()}


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def mine(process: subprocess.Popen[str]) -> list[str]:
    """Read until the demo has said its namespaces; their names."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(rf"({PREFIX}\w+)-server", line):
            return [f"{found[1]}-{role}" for role in ("client", "router", "server")]
    raise AssertionError(f"the demo ended with {process.wait()} before it named its namespaces")


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the demo ended with {process.wait()} before it said {text!r}")


def children_in(names: list[str]) -> list[int]:
    """Processes that run in one of the namespaces."""
    inodes = {os.stat(f"/run/netns/{name}").st_ino for name in names if Path(f"/run/netns/{name}").exists()}
    found = []
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            if entry.stat().st_ino in inodes:
                found.append(int(entry.parts[2]))
        except OSError:
            continue
    return found


def test_demo_holds_what_it_claims() -> None:
    done = subprocess.run(MAKE_DEMO, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout  # no colour where there is no terminal
    assert "FAILED" not in done.stdout
    claims = re.findall(r"^  ok      (.*)$", done.stdout, re.MULTILINE)
    assert f"All {len(claims)} claims were checked and held." in done.stdout
    said = "\n".join(claims)
    for family in "IPv4", "IPv6":
        assert f"{family}: 3 of 3 were answered" in said
        assert f"{family}: while it lasts the connection is ESTABLISHED and ASSURED" in said
        assert f"{family}: the file arrived whole" in said
        assert f"{family}: the answer passed the router" in said
        assert f"{family}: the TCP connection was not made" in said
        assert f"{family}: the UDP packet was dropped" in said
    # The reader has seen the table with its states, the counters, and the reason.
    for word in "ESTABLISHED", "TIME_WAIT", "icmpv6", "udp", "policy", "default-forward", "insert":
        assert word in done.stdout, word
    names = set(re.findall(rf"\b{PREFIX}\w+-(?:client|router|server)\b", done.stdout))
    assert len(names) == 3
    assert not names & namespaces()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["int", "term", "hup"]
)
def test_demo_cleans_up_after_a_signal(number: int, code: int) -> None:
    with start() as process:
        names = mine(process)
        read_until(process, "The client fetches")  # the daemon and the servers run by now
        assert len(children_in(names)) >= 1
        pids = children_in(names)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == code
    assert not set(names) & namespaces()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_demo_stays_until_enter() -> None:
    with start("--stay") as process:
        names = mine(process)
        read_until(process, "The network stays up")
        assert set(names) <= namespaces()
        wait_until(lambda: children_in(names), "the daemon runs")
        pids = children_in(names)
        # Not communicate(): it would not see what the reader above has already taken from the pipe.
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.close()
        output = process.stdout.read()
        assert process.wait() == 0, output
        assert re.search(r"\$ .*conntrackd .*flows", output)
        assert f"$ ip netns exec {names[0]} ping" in output
        assert "held" in output
    assert not set(names) & namespaces()
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "every process has ended")
