"""The table at a million connections: memory, cost per packet, pauses, new connections per second.

`make bench-table` runs it in a process of its own per core, compiled and (with PURE=1) pure, and compares with the
goals. Connections are real ones: three packets each through the tracker. Time is processor time: others do not count;
the longest pause is given as the clock on the wall saw it, too, where others do count.
"""

import argparse
import gc as garbage
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from threading import Thread

from benchmarks.contestants import conntrackd_env
from benchmarks.programs import ROOT
from conntrackd import config
from conntrackd.const import IP_CT_ESTABLISHED, IP_CT_NEW, NF_ACCEPT, NF_INET_PRE_ROUTING, STRESSED_TABLE_FULL
from conntrackd.core.conntrack import confirm, conntrack_in, gc
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.hugepages import collapse, resident
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.nfnetlink import NFQA_IFINDEX_INDEV, NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQNL_MSG_PACKET
from conntrackd.daemon.queue import MESSAGE_HEADER, Queue
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset
from tests.lab.daemon import POLICY

RESULTS = ROOT / "benchmarks" / "results"

IP_HEAD = bytes.fromhex("450000280000400040060000")
SERVER = bytes((192, 0, 2, 80))
PORTS = 50_000  # per client
LAN, WAN = 1, 2
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
START_MS = 1_000_000
PACKETS = 100_000
ROUNDS = 9
NEW = 20_000

# What is measured, in its unit, and the goal where there is one.
GOALS = {
    "bytes_per_connection": 600.0,
    "daemon_ratio": 2.0,
    "pause_growing_ms": 5.0,
    "pause_expiring_ms": 5.0,
    "pause_collapsing_ms": 5.0,
}
TITLES = {
    "connections": "live connections",
    "bytes_per_connection": "memory per connection, bytes",
    "daemon_few_ns": "established TCP packet at 1,000 connections, from message to verdict, ns",
    "daemon_many_ns": "the same at all connections, ns",
    "daemon_ratio": "ratio of the two",
    "tracker_few_ns": "of this, the tracker alone at 1,000 connections, ns",
    "tracker_many_ns": "the same at all connections, ns",
    "tracker_ratio": "ratio of the two",
    "pause_growing_ms": "longest pause while growing, ms",
    "pause_growing_wall_ms": "the same on the wall clock, ms",
    "pause_expiring_ms": "longest pause while all expire, ms",
    "pause_expiring_wall_ms": "the same on the wall clock, ms",
    "pause_collapsing_ms": "longest pause of a packet while memory is put into huge pages, ms",
    "pause_collapsing_wall_ms": "the same on the wall clock, ms",
    "expired_per_s": "connections expired per second",
    "new_per_s_empty": "new connections per second, table empty",
    "new_per_s_half": "new connections per second, table half full",
    "new_per_s_full": "new connections per second, table full, each evicts one",
    "refused_per_s": "new connections per second that a full table refuses",
}


def segment(number: int, flags: int, seq: int, ack: int, back: bool = False) -> bytes:
    """A TCP segment without data of connection `number`, from the client or `back`. Its checksum is not set."""
    client = struct.pack(">I", 0x0A000000 + number // PORTS)
    port = 1024 + number % PORTS
    ends = SERVER + client + struct.pack(">HH", 80, port) if back else client + SERVER + struct.pack(">HH", port, 80)
    return IP_HEAD + ends + struct.pack(">IIBBHHH", seq, ack, 0x50, flags, 65000, 0, 0)


def open_connection(net: Conntrack, number: int, now_ms: int) -> None:
    """Bring a connection from its SYN to ESTABLISHED, ASSURED."""
    _, ct = conntrack_in(net, segment(number, SYN, 0, 0), False, now_ms)
    assert ct is not None
    assert confirm(net, ct, now_ms) == NF_ACCEPT
    conntrack_in(net, segment(number, SYN_ACK, 0, 1, back=True), False, now_ms)
    conntrack_in(net, segment(number, ACK, 1, 1), False, now_ms)


def knock(net: Conntrack, number: int, now_ms: int) -> bool:
    """Begin a connection; say whether it was let in."""
    ctinfo, ct = conntrack_in(net, segment(number, SYN, 0, 0), False, now_ms)
    if ct is None:
        assert ctinfo == STRESSED_TABLE_FULL
        return False
    assert ctinfo == IP_CT_NEW
    return confirm(net, ct, now_ms) == NF_ACCEPT


def tracker(limit: int) -> Conntrack:
    sysctl = Sysctl()
    sysctl.max = limit
    sysctl.adaptive_end = 0  # never: what is measured is to be the same at every fill
    return Conntrack(sysctl)


class Pauses:
    """The longest time that one call took: of the processor, and on the wall."""

    def __init__(self) -> None:
        self.cpu_ns = 0
        self.wall_ns = 0

    def call(self, function: Callable[..., object], *args: object) -> object:
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = function(*args)
        self.cpu_ns = max(self.cpu_ns, time.thread_time_ns() - cpu)
        self.wall_ns = max(self.wall_ns, time.perf_counter_ns() - wall)
        return result


def some_packets(connections: int) -> list[bytes]:
    """Segments of established connections that are chosen at random."""
    return [segment(random.randrange(connections), ACK, 1, 1) for _ in range(PACKETS)]  # noqa: S311


def tracker_ns(net: Conntrack, connections: int, now_ms: int) -> float:
    """Time of the tracker alone per packet of an established connection."""
    packets = some_packets(connections)
    begin = time.process_time_ns()
    for data in packets:
        conntrack_in(net, data, False, now_ms)
    took = time.process_time_ns() - begin
    assert conntrack_in(net, packets[0], False, now_ms)[0] == IP_CT_ESTABLISHED
    return took / PACKETS


def daemon_ns(net: Conntrack, connections: int, now_ms: int) -> float:
    """Time of the daemon per packet of an established connection: from the kernel's message to the verdict's."""
    conf = config.parse(POLICY.encode(), "policy")
    ruleset = compile_ruleset(conf, generation=1)
    ruleset.set_links({LAN: "lan", WAN: "wan"})
    queue = Queue(0, Firewall(net, ruleset), Mark(conf.queue.mark_mask), accept_on_error=False)
    queue.now_ms = now_ms
    messages = [packet_message(number, data) for number, data in enumerate(some_packets(connections))]
    begin = time.process_time_ns()
    for message in messages:
        queue.on_message(message)
    took = time.process_time_ns() - begin
    assert (queue.packets, queue.dropped, queue.errors) == (PACKETS, 0, 0)
    return took / PACKETS


def packet_message(number: int, data: bytes) -> bytes:
    """The message in which the kernel hands a packet over: a packet whose checksum the hardware has verified."""
    attributes = struct.pack("<HH", 11, NFQA_PACKET_HDR) + struct.pack(">IHB", number, 0x0800, NF_INET_PRE_ROUTING)
    attributes += b"\0" + struct.pack("<HH", 8, NFQA_IFINDEX_INDEV) + struct.pack(">I", LAN)
    attributes += struct.pack("<HH", 4 + len(data), NFQA_PAYLOAD) + data
    size = MESSAGE_HEADER + len(attributes)
    return struct.pack("<IHHII", size, NFQNL_MSG_PACKET, 0, 0, 0) + b"\2\0\0\0" + attributes


def new_per_s(net: Conntrack, first: int, now_ms: int, lets_in: bool) -> float:
    """Time new connections; `first` is the number of the first."""
    begin = time.process_time_ns()
    for number in range(first, first + NEW):
        assert knock(net, number, now_ms) is lets_in
    return NEW * 1e9 / (time.process_time_ns() - begin)


def empty(net: Conntrack) -> None:
    """End all connections."""
    for ct in net.table.connections():
        net.table.kill(ct, START_MS)


def measure(count: int) -> dict[str, float]:
    """Take all figures, in one process without Python's own collector, as the daemon runs."""
    random.seed(1)
    found: dict[str, float] = {"connections": count}
    garbage.collect()
    garbage.freeze()
    garbage.disable()

    few = tracker(0)
    for number in range(1000):
        open_connection(few, number, START_MS)

    # The longest pause is the median of three passes: a virtual machine that stands still now and then counts as ours.
    grown: list[Pauses] = []
    before = resident()
    for _ in range(3):
        many, pauses = tracker(0), Pauses()
        for number in range(count):
            pauses.call(open_connection, many, number, START_MS + number // 100)
        assert many.table.count == count
        if not grown:
            found["bytes_per_connection"] = (resident() - before) / count
        grown.append(pauses)
        if len(grown) < 3:
            empty(many)
    grown_bytes = resident()
    found["pause_growing_ms"] = median(pauses.cpu_ns for pauses in grown) / 1e6
    found["pause_growing_wall_ms"] = median(pauses.wall_ns for pauses in grown) / 1e6

    # As the daemon has it done beside the packets, which go on meanwhile.
    now_ms = START_MS + count // 100
    pauses, packets = Pauses(), cycle(some_packets(count))
    collapsing = Thread(target=collapse)
    collapsing.start()
    while collapsing.is_alive():
        pauses.call(conntrack_in, many, next(packets), False, now_ms)
    found["pause_collapsing_ms"] = pauses.cpu_ns / 1e6
    found["pause_collapsing_wall_ms"] = pauses.wall_ns / 1e6
    found["bytes_per_connection"] += max(0, resident() - grown_bytes) / count

    for title, timed in ("tracker", tracker_ns), ("daemon", daemon_ns):
        # In turn, so that what disturbs one disturbs the other.
        rounds = [(timed(few, 1000, now_ms), timed(many, count, now_ms)) for _ in range(ROUNDS)]
        found[f"{title}_few_ns"] = median(few_ns for few_ns, _ in rounds)
        found[f"{title}_many_ns"] = median(many_ns for _, many_ns in rounds)
        found[f"{title}_ratio"] = median(many_ns / few_ns for few_ns, many_ns in rounds)

    # All expire while a packet comes between any two turns of gc.
    pauses = Pauses()
    now_ms += Sysctl().tcp_timeout_established
    begin = time.process_time_ns()
    while many.table.count:
        pauses.call(gc, many, now_ms)
        conntrack_in(few, segment(1, ACK, 1, 1), False, START_MS)
        now_ms += 1
    found["expired_per_s"] = count * 1e9 / (time.process_time_ns() - begin)
    found["pause_expiring_ms"] = pauses.cpu_ns / 1e6
    found["pause_expiring_wall_ms"] = pauses.wall_ns / 1e6
    del many

    filling = tracker(count)
    now_ms = START_MS
    found["new_per_s_empty"] = new_per_s(filling, 0, now_ms, True)
    filled = NEW
    for name, goal in ("new_per_s_half", count // 2), ("new_per_s_full", count):
        while filled < goal:
            assert knock(filling, filled, now_ms)
            filled += 1
        now_ms += filling.sysctl.early_drop_timeout  # what is there is no longer spared
        found[name] = new_per_s(filling, filled, now_ms, True)
        filled += NEW
    assert filling.stats.early_drop > 0
    full = tracker(1000)
    for number in range(1000):
        open_connection(full, number, START_MS)
    found["refused_per_s"] = new_per_s(full, 1000, START_MS, False)
    return found


def report(results: dict[str, dict[str, float]]) -> str:
    """Write the figures as a table, a column for each core."""
    cores = list(results)
    lines = [
        "| | " + " | ".join(cores) + " | goal |",
        "|---|" + "---:|" * (len(cores) + 1),
    ]
    for name, title in TITLES.items():
        goal = GOALS.get(name)
        values = [results[core][name] for core in cores]
        figures = " | ".join(f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in values)
        met = ""
        if goal is not None:
            value = results[cores[0]][name]
            met = f"at most {goal:,.0f}: {'met' if value <= goal else 'NOT MET'}"
        lines.append(f"| {title} | {figures} | {met} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure the cores that are asked for; print and write the figures. Returns 1 if the first misses a goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table")
    parser.add_argument("--connections", type=int, default=1_000_000)
    parser.add_argument("--core", action="append", choices=["compiled", "pure"], help="default: compiled")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.connections)))
        return 0
    results = {}
    for core in args.core or ["compiled"]:
        env = conntrackd_env(core == "compiled")
        env["PYTHONPATH"] += f":{ROOT}"
        command = [sys.executable, "-m", "benchmarks.table", "--here", "--connections", str(args.connections)]
        # Outside of the source tree, which Python would prefer.
        done = subprocess.run(command, env={**os.environ, **env}, cwd="/", capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        results[core] = json.loads(done.stdout)
    text = report(results)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(f"# The table at {args.connections:,} connections\n\n{text}")
    (args.out / "table.json").write_text(json.dumps(results, indent=2) + "\n")
    first = next(iter(results.values()))
    return int(any(first[name] > goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
