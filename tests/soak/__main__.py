"""What a restart and a crash cost, under load.

    python -m tests.soak restart --rounds 10     restarts in place: no connection broken, no packet lost
    python -m tests.soak stop --rounds 10        stops and starts: no connection broken
    python -m tests.soak kill --rounds 50        SIGKILL at random moments: it starts, with what the snapshot has

The load: a bulk transfer by iperf3, 50 new connections and 200 datagrams a second, and 50 connections on which only the
outside speaks.
"""

import argparse
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tests.differential import packets
from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, Process, network, wait_until
from tests.lab.traffic import inject

HELD: Final = 50
SETTLE_S: Final = 1.0  # between two rounds
CATCH_UP_S: Final = 4.0  # where packets were dropped: TCP sends again later and later
CROWD: Final = 20_000  # more flows, so that writing them takes its time
LONG_LIVED: Final = '\n[conntrack]\nudp_timeout = "1h"\n'
OFTEN: Final = '\n[state]\nsnapshot = "1s"\ndirectory = "{directory}"\n'


@dataclass
class Result:
    """What became of the load."""

    rounds: int
    talk: dict[str, Any] = field(default_factory=dict)
    bulk_bits_per_second: float = 0.0
    bulk_error: str = ""
    dropped_by_kernel: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def broken(self) -> int:
        """Connections that ended before their time."""
        return int(sum(self.talk["broken"].values())) + bool(self.bulk_error)

    def known_broken(self) -> int:
        """Of these, those that a snapshot knew: a crash may cost what is younger, and waits for the outside."""
        held = [count for kind, count in self.talk["broken"].items() if kind.startswith("held")]
        return int(sum(held)) + bool(self.bulk_error)

    def text(self) -> str:
        talk = self.talk
        bulk = f"{self.bulk_bits_per_second / 1e9:.2f} Gbit/s {self.bulk_error}"
        lines = [
            f"{self.rounds} rounds; kept {talk['held']}, new {talk['opened']}, bulk {bulk}: {self.broken()} broken",
            f"new connections that could not be opened: {talk['unopened']}",
            f"datagrams {talk['sent']}: {talk['lost']} unanswered; dropped by the kernel: {self.dropped_by_kernel}",
            f"slowest exchange {talk['slowest_s']} s; drops {self.drops}; broken {talk['broken']}",
        ]
        return "\n".join(lines + self.notes)


class Load:
    """The load, while `flowing`."""

    def __init__(self, net: Network) -> None:
        self.net = net
        address = net.server.ipv4
        talkers = (sys.executable, "-m", "tests.lab.talkers")
        self.server = net.server.start(*talkers, "server", address)
        self.bulk_server = net.server.start("iperf3", "--server", "--one-off", "--forceflush")
        self.server.wait_for_output("ready")
        self.bulk_server.wait_for_output("listening")
        self.client = net.client.start(*talkers, "client", address, "--held", str(HELD))
        self.client.wait_for_output("ready", 30.0)
        self.bulk = net.client.start("iperf3", "--client", address, "--time", "86400", "--json")
        wait_until(lambda: self.bulk.running, "iperf3 runs")

    def end(self, result: Result) -> None:
        """Stop it, and note what became of it."""
        self.client.signal(15)
        self.client.wait(120.0)
        result.talk = json.loads(self.client.output().splitlines()[-1])
        result.bulk_error, result.bulk_bits_per_second = _end_bulk(self.bulk)


def _end_bulk(bulk: Process) -> tuple[str, float]:
    if not bulk.running:
        return f"iperf3 ended: {bulk.output()[-300:]}", 0.0
    bulk.signal(2)
    bulk.wait(30.0)
    report = json.loads(bulk.output())
    error = str(report.get("error", ""))
    ours = "interrupt - the client has terminated" in error
    return "" if ours else error, float(report["end"]["sum_sent"]["bits_per_second"])


def _note_losses(fw: Daemon, result: Result) -> None:
    result.dropped_by_kernel += sum(queue.dropped_full + queue.dropped_socket for queue in fw.queues().values())
    result.drops = fw.stats()["drops"]


@contextmanager
def _prepared(config: str = POLICY) -> Iterator[tuple[Network, Daemon]]:
    with network() as net, daemon(net.router, config) as fw:
        yield net, fw


def restart(rounds: int) -> Result:
    """Restart in place."""
    result = Result(rounds)
    with _prepared() as (net, fw):
        load = Load(net)
        for _ in range(rounds):
            time.sleep(SETTLE_S)
            fw.restart()
        time.sleep(SETTLE_S)
        load.end(result)
        _note_losses(fw, result)
        fw.wait_for_empty_queues()
        fw.wait_for_log("queue_adopted", 2 * rounds)
        assert "Traceback" not in fw.log(), fw.log()
    return result


def stop(rounds: int) -> Result:
    """Stop, and start again: what comes meanwhile is dropped, and sent again."""
    result = Result(rounds)
    with _prepared() as (net, fw):
        load = Load(net)
        for number in range(rounds):
            time.sleep(CATCH_UP_S if number else SETTLE_S)
            assert fw.stop() == 0, fw.log()
            assert "Traceback" not in fw.log(), fw.log()
            fw.start()
        time.sleep(CATCH_UP_S)
        load.end(result)
        _note_losses(fw, result)
        fw.wait_for_empty_queues()
    return result


def kill(rounds: int, seed: int, crowd: int = CROWD) -> Result:
    """Kill at random moments."""
    rng = random.Random(seed)
    result = Result(rounds)
    aside = 0
    fewest = 1 << 30
    with network() as net, daemon(net.router, POLICY, start=False) as fw:
        fw.write_config(POLICY + LONG_LIVED + OFTEN.format(directory=fw.directory / "state"))
        fw.launch()
        fw.install_rules()
        fw.wait_until_ready()
        _crowd(net, fw, crowd)
        load = Load(net)
        before = fw.status()["state"]["taken"]
        wait_until(lambda: fw.status()["state"]["taken"] >= before + 2, "a snapshot of all", 60.0)
        for _ in range(rounds):
            time.sleep(rng.uniform(0.0, CATCH_UP_S))
            fw.kill()
            fw.start()
            aside += fw.log().count("snapshot_set_aside")
            restored = fw.status()["state"]["restored"]
            assert restored is not None, fw.log()
            fewest = min(fewest, restored)
            assert restored >= crowd + HELD, fw.log()
            assert "Traceback" not in fw.log(), fw.log()
        time.sleep(SETTLE_S)
        load.end(result)
        _note_losses(fw, result)
        fw.wait_for_empty_queues()
    result.notes = [f"seed {seed}; {aside} snapshots set aside; at least {fewest} flows restored each time"]
    return result


def _crowd(net: Network, fw: Daemon, count: int) -> None:
    """Make many flows that stay."""
    source, target = (socket.inet_aton(host.ipv4) for host in (net.client, net.server))
    net.server.run("iptables-legacy", "-A", "INPUT", "-p", "udp", "--dport", "9", "-j", "DROP")  # no errors come back
    for first in range(0, count, 500):
        inject(
            net.client,
            [
                packets.ip(source, target, 17, packets.udp(source, target, 10_000 + number, 9, b"x"))
                for number in range(first, first + 500)
            ],
        )
        wait_until(lambda count=first + 500: fw.status()["flows"] >= count, "they have come")  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("what", choices=["restart", "stop", "kill"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), help="of the moments of `kill`")
    options = parser.parse_args()
    if options.what == "kill":
        result = kill(options.rounds, options.seed)
    else:
        result = (restart if options.what == "restart" else stop)(options.rounds)
    print(result.text())
    if options.what == "kill":
        return 1 if result.known_broken() else 0
    lost = 0
    if options.what == "restart":
        lost = int(result.talk["lost"]) + int(result.talk["unopened"]) + result.dropped_by_kernel
    return 1 if result.broken() or lost else 0


if __name__ == "__main__":
    sys.exit(main())
