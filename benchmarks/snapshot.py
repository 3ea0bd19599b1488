"""A snapshot beside the packets: the longest time that one turn of the loop is held up by it, and how long all takes.

`make bench-snapshot` runs it compiled (PURE=1: pure too). The connections are those of `make bench-table`; the
turns are those of the daemon's loop, one in a millisecond, without packets between them. The pauses are on the wall
clock, so whatever else the machine does counts, too.
"""

import argparse
import gc as garbage
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.contestants import conntrackd_env
from benchmarks.programs import ROOT
from benchmarks.table import START_MS, open_connection, tracker
from conntrackd import config
from conntrackd.core import compiled
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.handover import in_memory
from conntrackd.daemon.hugepages import resident
from conntrackd.daemon.links import Links
from conntrackd.daemon.notify import Notify
from conntrackd.daemon.restore import nothing
from conntrackd.daemon.state import State
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset
from tests.lab.daemon import POLICY


def firewall(conf: config.Config, limit: int) -> Firewall:
    return Firewall(tracker(limit), compile_ruleset(conf, 1))


def state_of(conf: config.Config, fw: Firewall, now_ms: int) -> State:
    links = Links()
    state = State(conf, fw, links, Generations(conf, "policy", fw, links, Notify({})), now_ms)
    state.open()
    return state


def percentile(sorted_ms: list[float], share: float) -> float:
    return sorted_ms[min(len(sorted_ms) - 1, int(len(sorted_ms) * share))]


def measure(connections: int, directory: str) -> None:
    """Measure in this process, and print."""
    conf = config.parse(f'{POLICY}\n[state]\ndirectory = "{directory}"\nsnapshot = "1s"\n'.encode(), "policy")
    fw = firewall(conf, connections * 2)
    for number in range(connections):
        open_connection(fw.net, number, START_MS)
    garbage.freeze()
    garbage.disable()
    before = resident()
    state = state_of(conf, fw, START_MS)
    state.now_ms = START_MS + 1000
    begun = time.perf_counter()
    state.tick()
    pauses = []
    while state.busy():
        turn = time.perf_counter()
        state.now_ms += 1
        state.turn()
        took = time.perf_counter() - turn
        pauses.append(took * 1000)
        time.sleep(max(0.0, 0.001 - took))
    took_s = time.perf_counter() - begun
    pauses.sort()
    status = state.status()
    assert status is not None
    assert (status.taken, status.flows) == (1, connections)
    grown = resident() - before
    begun = time.perf_counter()
    with in_memory(state.freezing(exact=True).pieces(unconfirmed=True), nothing):
        memory_s = time.perf_counter() - begun
    state.close()
    after = firewall(conf, connections * 2)
    begun = time.perf_counter()
    again = state_of(conf, after, START_MS)
    again.now_ms = START_MS + 1000
    again.restore()
    restore_s = time.perf_counter() - begun
    assert after.net.table.count == connections
    print(
        f"{connections:,} connections, {'compiled' if compiled() else 'pure'}: longest turn {pauses[-1]:.2f} ms, "
        f"99.9 % under {percentile(pauses, 0.999):.2f} ms, median {percentile(pauses, 0.5):.3f} ms; "
        f"{took_s:.1f} s from begin to disk, {status.bytes >> 20} MB, memory {grown >> 20:+} MB; "
        f"at once into memory {memory_s:.2f} s; restored in {restore_s:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshot")
    parser.add_argument("--connections", type=int, nargs="*", default=[200_000, 1_000_000])
    parser.add_argument("--core", action="append", choices=["compiled", "pure"])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        with tempfile.TemporaryDirectory(prefix="conntrackd-") as directory:
            measure(options.connections[0], directory)
        return
    for core in options.core or ["compiled"]:
        for count in options.connections:
            command = [sys.executable, "-m", "benchmarks.snapshot", "--here", "--connections", str(count)]
            env = {**os.environ, **conntrackd_env(core == "compiled")}
            env["PYTHONPATH"] += f":{ROOT}"
            subprocess.run(command, env=env, check=True, cwd="/")


if __name__ == "__main__":
    main()
