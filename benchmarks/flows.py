"""Listing 200,000 flows while 5,000 packets a second go through: is the list whole, and does anything wait for it?

    make bench-flows

A real daemon in the router of a private network. What waits is measured in its loop: a turn is the time from when it
wakes up until it looks at its queues again, on the wall and of its processor; in a turn no packet is taken. The same is
measured without a list, for comparison. The to and fro of pings says what a user sees of it; the pings share their
processor with the client that lists.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.contestants import conntrackd_env
from benchmarks.processors import DAEMON_CPU, TRAFFIC_CPU, pin
from benchmarks.programs import ROOT, program
from conntrackd.daemon import main as daemon_main
from tests.lab.daemon import CONNTRACKD, POLICY, Daemon, daemon
from tests.lab.network import LabError, Network, network

RESULTS: Final = ROOT / "benchmarks" / "results"

RATE: Final = 5000
Turn = tuple[int, int, int]  # its end, its length on the wall and of the processor, ns

PORTS: Final = 50_000  # per address
NETWORK: Final = "198.51.100.0/24"  # nobody is there: what is sent there ends at the server without an answer
BURST: Final = 100
BURST_PAUSE_S: Final = 0.004
ROUNDS: Final = 3  # of which the median counts: a virtual machine that stands still now and then counts as ours
QUIET_S: Final = 4  # the measurement for comparison
SETTLE_S: Final = 1
LIST_S: Final = 14  # traffic for longer than a list takes
NOTED_NS: Final = 500_000  # shorter turns are only counted

# What is measured, and the goal where there is one.
NEVER: Final = ("missing", "twice", "broken", "lost")  # of these, all rounds count
GOALS: Final = dict.fromkeys(NEVER, 0.0) | {"turn_ms": 10.0, "growth_mb": 20.0}
TITLES: Final = {
    "flows": "flows in the table",
    "listed": "of these listed",
    "missing": "there all the time and not listed",
    "twice": "listed twice",
    "broken": "lines that are no flow",
    "seconds": "time the list took, s",
    "packets_per_s": "packets per second meanwhile",
    "lost": "of these lost",
    "turn_ms": "longest turn of the loop while listing, ms",
    "turn_cpu_ms": "the same, processor time, ms",
    "quiet_turn_ms": "longest turn without a list, ms",
    "quiet_turn_cpu_ms": "the same, processor time, ms",
    "ping_p99_us": "to and fro while listing, 99th percentile, us",
    "ping_max_us": "longest of them, us",
    "quiet_ping_p99_us": "to and fro without a list, 99th percentile, us",
    "quiet_ping_max_us": "longest of them, us",
    "growth_mb": "memory of the daemon, growth at its peak, MB",
    "client_mb": "memory of the client at its peak, MB",
}


# --- The daemon ---------------------------------------------------------------------------------------------------


class TimedPoll:
    """The epoll of the loop, which notes how long each turn of the loop took."""

    def __init__(self, epoll: Any) -> None:
        self._epoll = epoll
        self._wall = self._cpu = 0
        self.turns: list[Turn] = []
        self.register = epoll.register
        self.close = epoll.close

    def poll(self, timeout: float, most: int) -> Any:
        now = time.monotonic_ns()
        if self._wall and now - self._wall > NOTED_NS:
            self.turns.append((now, now - self._wall, time.thread_time_ns() - self._cpu))
        ready = self._epoll.poll(timeout, most)
        self._wall, self._cpu = time.monotonic_ns(), time.thread_time_ns()
        return ready


def run_daemon(config: str, socket_path: str, notes: Path) -> int:
    """Run the daemon with a loop that is timed; at its end, write down the turns."""
    polls: list[TimedPoll] = []

    class Timed(daemon_main.Daemon):
        def loop(self) -> int:
            polls.append(TimedPoll(self._packets))
            self._packets = polls[0]  # type: ignore[assignment]
            return super().loop()

    daemon_main.Daemon = Timed  # type: ignore[misc]
    code = daemon_main.run(config, socket_path, None)
    notes.write_text(json.dumps(polls[0].turns))
    return code


@contextmanager
def timed_daemon(net: Network, config: str, notes: Path) -> Iterator[Daemon]:
    with daemon(net.router, config, start=False) as this:
        env = conntrackd_env(compiled=True)
        env["PYTHONPATH"] += f":{ROOT}"
        command = ["env", "-C", "/", sys.executable, "-m", "benchmarks.flows", "--daemon", str(this.config_path)]
        this.process = net.router.start(*command, str(this.socket_path), str(notes), env=env)
        this.wait_until_ready()
        pin(this.process.pid, DAEMON_CPU)
        yield this


# --- Traffic ------------------------------------------------------------------------------------------------------


def open_flows(net: Network, here: Daemon, count: int) -> None:
    """Open that many flows of UDP, a datagram each; what the queue had no room for once more."""
    sender = net.client.open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    while open_now(here) < count:
        for number in range(count):
            sender.sendto(b"x", target(number))
            if number % BURST == 0:
                time.sleep(BURST_PAUSE_S)
        here.wait_for_empty_queues()
    sender.close()


def target(number: int) -> tuple[str, int]:
    """Where flow `number` goes."""
    return f"198.51.100.{number // PORTS}", 1024 + number % PORTS


def open_now(here: Daemon) -> int:
    return int(here.cli("count", f"dst net {NETWORK}").stdout)


class Traffic:
    """Packets and pings in the background."""

    def __init__(self, net: Network, seconds: int) -> None:
        ends = ("--client", net.client.netns, "--server", net.server.netns, "--address", net.server.ipv4)
        what = ("--cpu", str(TRAFFIC_CPU), "--seconds", str(seconds), "--udp", str(RATE), "--ping", "1000")
        self._process = subprocess.Popen([program("blast"), *ends, *what], stdout=subprocess.PIPE)

    def figures(self) -> dict[str, Any]:
        out, _ = self._process.communicate()
        figures: dict[str, Any] = json.loads(out)
        return figures


def memory(pid: int, what: str) -> float:
    """Memory of a process in MB: VmRSS, or VmHWM, its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def list_flows(here: Daemon, to: Path) -> float:
    """List all flows into a file; the client's memory in MB."""
    measured = [sys.executable, "-c", CLIENT, "nice", str(CONNTRACKD), "--socket", str(here.socket_path)]
    with to.open("wb") as file:
        done = subprocess.run(
            ["taskset", "--cpu-list", str(TRAFFIC_CPU), *measured, "flows", "-o", "jsonl"],
            stdout=file, stderr=subprocess.PIPE, check=True,
        )  # fmt: skip
    return int(done.stderr) / 1024


CLIENT: Final = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
)


# --- Figures ------------------------------------------------------------------------------------------------------


def measure(count: int, directory: Path) -> dict[str, float]:
    """Take all figures."""
    config = POLICY + '[conntrack]\nudp_timeout = "1h"\nadaptive_end = 0\n'
    notes = directory / "turns.json"
    rounds = []
    with network() as net:
        net.router.run("ip", "route", "add", NETWORK, "via", net.server.ipv4)
        with timed_daemon(net, config, notes) as here:
            open_flows(net, here, count)
            for number in range(ROUNDS):
                rounds.append(Round(net, here, directory / f"flows-{number}.jsonl"))
    turns = json.loads(notes.read_text())
    figures = [each.figures(count, turns) for each in rounds]
    found = {name: median(each[name] for each in figures) for name in TITLES}
    # Memory that the first list took is there for the others.
    return found | {name: max(each[name] for each in figures) for name in (*NEVER, "growth_mb")}


class Round:
    """Traffic without a list, then with one."""

    def __init__(self, net: Network, here: Daemon, listed: Path) -> None:
        assert here.process is not None
        pid = here.process.pid
        begin = time.monotonic()
        self.quiet = Traffic(net, QUIET_S).figures()
        self.quiet_time = begin, time.monotonic()
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        resident = memory(pid, "VmRSS")
        traffic = Traffic(net, LIST_S)
        time.sleep(SETTLE_S)
        begin = time.monotonic()
        self.client_mb = list_flows(here, listed)
        self.time = begin, time.monotonic()
        if self.time[1] - begin > LIST_S - 2 * SETTLE_S:
            raise LabError(f"the list took {self.time[1] - begin:.0f} s: longer than the traffic")
        self.busy = traffic.figures()
        self.growth_mb = memory(pid, "VmHWM") - resident
        self.lines = listed.read_bytes().splitlines()

    def figures(self, count: int, turns: list[Turn]) -> dict[str, float]:
        seen: Counter[tuple[str, int]] = Counter()
        broken = 0
        for line in self.lines:
            try:
                orig = json.loads(line)["orig"]
                seen[orig["dst"], orig.get("dport", 0)] += 1
            except ValueError:
                broken += 1
        there = [seen[target(number)] for number in range(count)]
        udp = self.busy["udp"]
        figures = {
            "flows": count,
            "listed": sum(times > 0 for times in there),
            "missing": sum(times == 0 for times in there),
            "twice": sum(times > 1 for times in there),
            "broken": broken,
            "seconds": self.time[1] - self.time[0],
            "packets_per_s": udp["sent_pps"],
            "lost": udp["sent"] - udp["received"],
            "growth_mb": self.growth_mb,
            "client_mb": self.client_mb,
        }
        for prefix, during, traffic in ("", self.time, self.busy), ("quiet_", self.quiet_time, self.quiet):
            figures[f"{prefix}turn_ms"] = longest(turns, during, 1)
            figures[f"{prefix}turn_cpu_ms"] = longest(turns, during, 2)
            figures[f"{prefix}ping_p99_us"] = traffic["ping"]["p99_us"]
            figures[f"{prefix}ping_max_us"] = traffic["ping"]["max_us"]
        return figures


def longest(turns: list[Turn], during: tuple[float, float], which: int) -> float:
    """The longest turn that ended between two times of the monotonic clock, ms; on the wall 1, of the processor 2."""
    found = [turn[which] for turn in turns if during[0] * 1e9 <= turn[0] <= during[1] * 1e9]
    return max(found, default=NOTED_NS) / 1e6


def report(found: dict[str, float]) -> str:
    """Write the figures as a table."""
    lines = ["| | | goal |", "|---|---:|---:|"]
    for name, title in TITLES.items():
        value, goal = found[name], GOALS.get(name)
        figure = f"{value:,.2f}" if value != int(value) and value < 1000 else f"{value:,.0f}"
        met = "" if goal is None else f"at most {goal:,.0f}: {'met' if value <= goal else 'NOT MET'}"
        lines.append(f"| {title} | {figure} | {met} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure; print and write the figures. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flows")
    parser.add_argument("--flows", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--daemon", nargs=3, metavar=("CONFIG", "SOCKET", "NOTES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.daemon:
        return run_daemon(args.daemon[0], args.daemon[1], Path(args.daemon[2]))
    with tempfile.TemporaryDirectory() as directory:
        found = measure(args.flows, Path(directory))
    text = report(found)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "flows.md").write_text(f"# Listing {args.flows:,} flows while packets go through\n\n{text}")
    (args.out / "flows.json").write_text(json.dumps(found, indent=2) + "\n")
    return int(any(found[name] > goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
