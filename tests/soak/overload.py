"""Full rate for long, and more than full rate.

    python -m tests.soak.overload churn --seconds 600    memory stays, nothing is left behind, counters add up
    python -m tests.soak.overload flood --seconds 30     more than can be judged: it answers, and recovers

`churn`: small packets of one flow as fast as they go, and TCP connections that open, ask and close, 16 at a time.
`flood`: the same packets, and beside them 200 datagrams a second of a flow that is established, and 200 of new ones.
"""

import argparse
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.programs import program
from conntrackd import api
from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, Process, network, wait_until
from tests.lab.traffic import udp_socket

SHORT: Final = "\n[conntrack]\n" + "".join(
    f'{name} = "5s"\n'
    for name in (
        "udp_timeout", "udp_timeout_stream", "icmpv6_timeout", "tcp_timeout_time_wait", "tcp_timeout_close",
        "tcp_timeout_fin_wait", "tcp_timeout_last_ack", "tcp_timeout_close_wait", "tcp_timeout_established",
        "tcp_timeout_syn_sent", "tcp_timeout_syn_recv",
    )
)  # fmt: skip
WARM_UP: Final = 0.25  # of the time, after which memory must stay as it is
PAUSE_S: Final = 0.005
ESTABLISHED_PORT: Final = 5300
NEW_PORT: Final = 5301


@dataclass
class Churned:
    """What a time of full rate left behind."""

    packets: int
    connections: int
    growth_percent: float  # of memory after the warm-up
    flows: int
    unconfirmed: int
    expectations: int
    waiting: int
    unaccounted: int  # packets that the kernel handed out and we did not count
    unexplained: int  # drops without a reason

    def left(self) -> int:
        """What should be nothing at all."""
        return self.flows + self.unconfirmed + self.expectations + self.waiting + self.unaccounted + self.unexplained


@dataclass
class Flooded:
    """How the daemon stood a flood."""

    offered: int
    judged: int
    lost_established: float  # parts
    lost_new: float
    slowest_status_s: float
    recovered_s: float
    miscounted: int  # packets by which our drop counters differ from the kernel's


def blast(net: Network, seconds: float, *what: str) -> Process:
    """Start traffic (benchmarks/blast.c)."""
    ends = ("--client", net.client.netns, "--server", net.server.netns, "--address", net.server.ipv4)
    return net.client.start(program("blast"), *ends, "--seconds", str(seconds), *what)


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def ask(fw: Daemon, command: str) -> dict[str, Any]:
    """Ask the daemon without starting a program."""
    (row,) = api.request(str(fw.socket_path), command)
    answer: dict[str, Any] = json.loads(row)
    return answer


def churn(seconds: float) -> Churned:
    """Full rate for so long."""
    with network() as net, daemon(net.router, POLICY + SHORT) as fw:
        assert fw.process is not None
        traffic = blast(net, seconds, "--udp", "0", "--conns", "16")
        memory: list[int] = []
        while traffic.running:
            memory.append(resident(fw.process.pid))
            time.sleep(0.2)
        assert traffic.popen.returncode == 0, traffic.output()
        settled = memory[int(len(memory) * WARM_UP) :]
        quarter = max(1, len(settled) // 4)
        growth = max(settled[-quarter:]) / max(settled[:quarter]) - 1
        for host in net.hosts:  # no more packets of its own
            host.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
        fw.wait_for_empty_queues()
        wait_until(lambda: not ask(fw, "status")["flows"], "all connections have ended", 60.0)
        wait_until(lambda: not ask(fw, "status")["unconfirmed"], "all that were not confirmed are forgotten", 60.0)
        status, stats, kernel = ask(fw, "status"), ask(fw, "stats"), fw.queues()
        queues = status["queues"]
        return Churned(
            packets=sum(queue["packets"] for queue in queues),
            connections=stats["insert"],
            growth_percent=growth * 100,
            flows=status["flows"],
            unconfirmed=status["unconfirmed"],
            expectations=sum(limit["used"] for limit in status["limits"] if limit["name"] == "expectations"),
            waiting=sum(queue.waiting for queue in kernel.values()),
            unaccounted=sum(
                abs(kernel[q["number"]].seen - kernel[q["number"]].dropped_socket - q["packets"]) for q in queues
            ),
            unexplained=abs(sum(stats["drops"].values()) - sum(queue["dropped"] for queue in queues)),
        )


class Probes:
    """Datagrams of a flow that is established, and of new ones, side by side: how many arrive."""

    def __init__(self, net: Network) -> None:
        self.sent = 0
        self._net = net
        self._stop = threading.Event()
        self._far = {port: udp_socket(net.server, 4, port) for port in (ESTABLISHED_PORT, NEW_PORT)}
        self._near = udp_socket(net.client, 4)
        self._near.sendto(b"", self._far[ESTABLISHED_PORT].getsockname())
        self._far[ESTABLISHED_PORT].sendto(b"", self._far[ESTABLISHED_PORT].recvfrom(1)[1])
        self._near.recv(1)
        self._arrived = dict.fromkeys(self._far, 0)
        self._threads = [threading.Thread(target=self._send)]
        self._threads += [threading.Thread(target=self._count, args=(port,)) for port in self._far]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        fresh = [self._net.client.open_socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(500)]
        while not self._stop.wait(PAUSE_S):
            new = fresh[self.sent % len(fresh)]
            # Back to back, and by turns: the first one may find room where the second finds none.
            both = [(new, NEW_PORT), (self._near, ESTABLISHED_PORT)]
            for near, port in both if self.sent % 2 else reversed(both):
                near.sendto(b"x", (self._net.server.ipv4, port))
            self.sent += 1
            new.close()
            fresh[(self.sent - 1) % len(fresh)] = self._net.client.call(
                lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            )
        for each in fresh:
            each.close()

    def _count(self, port: int) -> None:
        self._far[port].settimeout(1.0)
        while True:
            try:
                self._far[port].recv(10)
            except TimeoutError:
                if self._stop.is_set():
                    return
                continue
            self._arrived[port] += 1

    def end(self) -> tuple[float, float]:
        """Stop: the parts that were lost of the established flow, and of the new ones."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return 1 - self._arrived[ESTABLISHED_PORT] / self.sent, 1 - self._arrived[NEW_PORT] / self.sent


def flood(seconds: float) -> Flooded:
    """More than can be judged, for so long."""
    with network() as net, daemon(net.router, POLICY) as fw:
        probes = Probes(net)
        before = sum(queue["packets"] for queue in ask(fw, "status")["queues"])
        traffic = blast(net, seconds, "--udp", "0")
        slowest = 0.0
        begun = time.monotonic()
        while time.monotonic() - begun < seconds - 1:
            asked = time.monotonic()
            ask(fw, "status")
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
        lost_established, lost_new = probes.end()
        traffic.wait(60.0)
        ended = time.monotonic()
        fw.wait_for_empty_queues()
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4)
        near.sendto(b"again", far.getsockname())
        assert far.recv(10) == b"again"
        recovered = time.monotonic() - ended
        kernel, queues = fw.queues(), ask(fw, "status")["queues"]
        lost = ("dropped_full", "dropped_socket")
        return Flooded(
            offered=json.loads(traffic.output())["udp"]["sent"],
            judged=sum(queue["packets"] for queue in queues) - before,
            lost_established=lost_established,
            lost_new=lost_new,
            slowest_status_s=slowest,
            recovered_s=recovered,
            miscounted=sum(abs(getattr(kernel[q["number"]], name) - q[name]) for q in queues for name in lost),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.overload")
    parser.add_argument("what", choices=["churn", "flood"])
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    if options.what == "churn":
        churned = churn(options.seconds)
        print(churned)
        return int(churned.left() > 0 or churned.growth_percent >= 2)
    flooded = flood(options.seconds)
    print(flooded)
    return int(flooded.miscounted > 0 or flooded.slowest_status_s >= 1 or flooded.recovered_s >= 5)


if __name__ == "__main__":
    sys.exit(main())
