"""Full rate for long, and more than full rate.

    python -m tests.soak.overload churn --seconds 600    memory stays, nothing is left behind, counters add up
    python -m tests.soak.overload flood --seconds 30     more than can be judged: it answers, counts and recovers

`churn`: small packets of one flow, half as many as the daemon was measured to judge; 2,000 datagrams a second that
begin a flow each; 1,000 TCP connections a second that open, ask and close; 500 datagrams a second that the policy
drops; and a client that asks for status and counters every second. So at any time there are as many connections, and
memory that grows after the warm-up is held by nobody.

`flood`: as fast as the sender can, packets of one established flow, then packets that begin a flow each, then both at
once; and beside them 200 datagrams a second of a flow that is established, and 200 of new ones.
"""

import argparse
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.contestants import conntrackd_env
from benchmarks.programs import program
from conntrackd import api
from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Host, Network, Process, network, wait_until
from tests.lab.traffic import udp_socket

SHORT: Final = "\n[conntrack]\n" + "".join(
    f'{name} = "5s"\n'
    for name in (
        "udp_timeout", "udp_timeout_stream", "icmpv6_timeout", "tcp_timeout_time_wait", "tcp_timeout_close",
        "tcp_timeout_fin_wait", "tcp_timeout_last_ack", "tcp_timeout_close_wait", "tcp_timeout_established",
        "tcp_timeout_syn_sent", "tcp_timeout_syn_recv",
    )
)  # fmt: skip
# Of the time. Until then all that has a limit has reached it: the recent drops, and the dictionaries of the table,
# which grow for a while as entries come and go in them; and several snapshots have been written.
WARM_UP: Final = 0.25
GROWTH_PERCENT: Final = 2.0
PART: Final = 0.5  # of what it can judge; the rest is for connections, which cost more
NEW: Final = 2000  # per second
REQUEST_US: Final = 1000
DENIED: Final = 500  # per second
# As many connections as NEW and REQUEST_US can have at once, opened first: Python keeps the memory of as many as there
# ever were, and on a busy machine they would become more and more only with time.
FILL: Final = 18_000
FILL_S: Final = 2.0
MEASURE_S: Final = 5.0
# Behind the last of our queues.
LEAVING: Final = "table inet soak { chain left { type filter hook postrouting priority 300; counter; }; }"
# By the options of blast: each is a sender, as fast as it can.
FLOODS: Final = {"established": ["udp"], "new": ["new"], "both": ["udp", "new"]}
FULL: Final = 5.0  # times its capacity: a flood
UNFAIR: Final = 0.03  # of the probes: what chance makes of it
PAUSE_S: Final = 0.005
PATIENCE_S: Final = 0.1
ESTABLISHED_PORT: Final = 5300
NEW_PORT: Final = 5301


@dataclass
class Churned:
    """What a time of full rate left behind."""

    core: str
    packets: int
    packets_per_second: int
    connections: int
    memory: int  # bytes, after the warm-up
    growth_percent: float  # of it, from then on
    growth_per_connection: float  # bytes
    lost: int  # packets that the kernel dropped because the queue was full
    flows: int
    unconfirmed: int
    expectations: int
    waiting: int
    unaccounted: int  # packets that the kernel handed out and we did not count
    disputed: int  # by which the packets that we accepted differ from those that the kernel saw leave the router
    unexplained: int  # drops without a reason

    def left(self) -> int:
        """What should be nothing at all."""
        left = self.flows + self.unconfirmed + self.expectations + self.waiting
        return left + self.unaccounted + self.disputed + self.unexplained


@dataclass
class Flooded:
    """How the daemon stood a flood."""

    core: str
    flood: str
    capacity: int  # packets a second of the same mixture, as measured kind by kind with one sender
    offered: int
    judged: int
    lost_established: float  # parts
    lost_new: float
    slowest_status_s: float
    recovered_s: float  # until the queues are empty and a new flow passes
    miscounted: int  # packets by which our drop counters differ from the kernel's

    def times(self) -> float:
        """The flood in multiples of the capacity."""
        return self.offered / self.capacity

    def stood(self) -> bool:
        """Whether it counted to the packet, answered, recovered, and preferred nobody who is new."""
        fair = self.lost_established <= self.lost_new + UNFAIR
        return not self.miscounted and self.slowest_status_s < 1 and self.recovered_s < 5 and fair

    def text(self) -> str:
        """Say it in a line."""
        short = "" if self.times() >= FULL else f" (two processors do not send {FULL:g} times)"
        return (
            f"{self.core}, flood of {self.flood}: {self.offered} packets/s, {self.times():.1f} times the capacity of "
            f"{self.capacity}{short}; {self.judged} judged; lost {self.lost_established:.1%} of the established flow, "
            f"{self.lost_new:.1%} of new ones; slowest status {self.slowest_status_s:.2f} s; "
            f"recovered in {self.recovered_s:.2f} s; miscounted {self.miscounted}"
        )


def blast(near: Host, far: Host, seconds: float, *what: str) -> Process:
    """Start traffic from one host to another (benchmarks/blast.c)."""
    ends = ("--client", near.netns, "--server", far.netns, "--address", far.ipv4)
    return near.start(program("blast"), *ends, "--seconds", str(seconds), *what)


def finish(traffic: Process, seconds: float = 60.0) -> dict[str, Any]:
    """Wait for the end of traffic: its own account of it."""
    assert traffic.wait(seconds) == 0, traffic.output()
    account: dict[str, Any] = json.loads(traffic.output())
    return account


def quiet(net: Network) -> None:
    """IPv4 alone: no packets of the hosts themselves, such as neighbour discovery."""
    for host in net.hosts:
        host.sysctl("net/ipv6/conf/all/disable_ipv6", 1)


def capacity(net: Network, fw: Daemon, seconds: float, *what: str) -> int:
    """Measure how many packets a second the daemon judges when more come than it can."""
    before = judged(fw)
    traffic = blast(net.client, net.server, seconds, *what)
    finish(traffic)
    fw.wait_for_empty_queues()
    return int((judged(fw) - before) / seconds)


def judged(fw: Daemon) -> int:
    """Packets that had their first verdict."""
    packets: int = ask(fw, "status")["queues"][0]["packets"]
    return packets


def lost(fw: Daemon) -> int:
    """Packets that the kernel dropped because the queues were full."""
    return sum(queue.dropped_full + queue.dropped_socket for queue in fw.queues().values())


def anonymous(pid: int) -> int:
    """Bytes of memory that a process has for itself, without the pages of files."""
    with open(f"/proc/{pid}/statm") as file:
        _size, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * 4096


def ask(fw: Daemon, command: str) -> dict[str, Any]:
    """Ask the daemon without starting a program."""
    (row,) = api.request(str(fw.socket_path), command)
    answer: dict[str, Any] = json.loads(row)
    return answer


def left_router(net: Network) -> int:
    """The packets that have left the router since LEAVING: the kernel's own count."""
    (counter,) = re.findall(r"counter packets (\d+)", net.router.run("nft", "list", "table", "inet", "soak").stdout)
    return int(counter)


def churn(seconds: float, env: Mapping[str, str] | None = None) -> Churned:
    """Full rate for so long."""
    with network() as net:
        quiet(net)
        net.router.run("nft", "-f", "-", stdin=LEAVING)
        with daemon(net.router, POLICY + SHORT, env=env) as fw:
            rate = capacity(net, fw, min(MEASURE_S, seconds), "--udp", "0") * PART
            finish(blast(net.client, net.server, FILL_S, "--new", f"{FILL / FILL_S:.0f}"))
            begun, lost_before = judged(fw), lost(fw)
            traffic = blast(
                net.client, net.server, seconds, "--udp", f"{rate:.0f}", "--new", f"{NEW}", "--request", f"{REQUEST_US}"
            )
            denied = blast(net.server, net.client, seconds, "--new", f"{DENIED}")
            memory, made = watch(fw, traffic, seconds)
            finish(traffic)
            finish(denied)
            rate = (judged(fw) - begun) / seconds
            fw.wait_for_empty_queues()
            wait_until(lambda: not ask(fw, "status")["flows"], "all connections have ended", 60.0)
            wait_until(lambda: not ask(fw, "status")["unconfirmed"], "all that were not confirmed are forgotten", 60.0)
            status, stats, kernel = ask(fw, "status"), ask(fw, "stats"), fw.queues()
            queues = status["queues"]
            dropped = sum(queue["dropped"] for queue in queues)
            second = kernel[queues[1]["number"]]
            accepted = queues[0]["packets"] - dropped - second.dropped_full - second.dropped_socket
            quarter = max(1, len(memory) // 4)
            grown = max(memory[-quarter:]) - max(memory[:quarter])
            return Churned(
                core=status["core"],
                packets=sum(queue["packets"] for queue in queues),
                packets_per_second=int(rate),
                connections=stats["insert"],
                memory=max(memory[:quarter]),
                growth_percent=grown / max(memory[:quarter]) * 100,
                growth_per_connection=grown / max(1, made[-quarter] - made[0]),
                lost=lost(fw) - lost_before,
                flows=status["flows"],
                unconfirmed=status["unconfirmed"],
                expectations=sum(limit["used"] for limit in status["limits"] if limit["name"] == "expectations"),
                waiting=sum(queue.waiting for queue in kernel.values()),
                unaccounted=sum(
                    abs(kernel[q["number"]].seen - kernel[q["number"]].dropped_socket - q["packets"]) for q in queues
                ),
                disputed=abs(accepted - left_router(net)),
                unexplained=abs(sum(stats["drops"].values()) - dropped),
            )


def watch(fw: Daemon, traffic: Process, seconds: float) -> tuple[list[int], list[int]]:
    """Look while there is traffic, and ask as a monitor does: memory, and connections made, since the warm-up."""
    assert fw.process is not None
    memory: list[int] = []
    made: list[int] = []
    while traffic.running:
        ask(fw, "status")
        made.append(ask(fw, "stats")["insert"])
        memory.append(anonymous(fw.process.pid))
        time.sleep(min(1.0, seconds / 20))
    warm = int(len(memory) * WARM_UP)
    return memory[warm:], made[warm:]


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


def flood(kind: str, seconds: float, env: Mapping[str, str] | None = None) -> Flooded:
    """More than can be judged, for so long: of FLOODS."""
    with network() as net, daemon(net.router, POLICY, env=env) as fw:
        quiet(net)
        able = {what: capacity(net, fw, min(MEASURE_S, seconds), f"--{what}", "0") for what in FLOODS[kind]}
        probes = Probes(net)
        before = judged(fw)
        begun = time.monotonic()
        traffic = blast(
            net.client, net.server, seconds, *(word for what in FLOODS[kind] for word in (f"--{what}", "0"))
        )
        slowest = 0.0
        while time.monotonic() - begun < seconds - 1:
            asked = time.monotonic()
            ask(fw, "status")
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
        lost_established, lost_new = probes.end()
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4)
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
        fw.wait_for_empty_queues()
        far.settimeout(PATIENCE_S)

        def passes() -> bool:
            near.sendto(b"again", far.getsockname())
            try:
                return far.recv(10) == b"again"
            except TimeoutError:
                return False

        wait_until(passes, "a new flow passes again")
        recovered = time.monotonic() - begun - seconds
        sent = {what: account["sent"] for what, account in finish(traffic).items()}
        fw.wait_for_empty_queues()
        kernel, status = fw.queues(), ask(fw, "status")
        names = ("dropped_full", "dropped_socket")
        return Flooded(
            core=status["core"],
            flood=kind,
            capacity=int(sum(sent.values()) / sum(sent[what] / able[what] for what in sent)),
            offered=int(sum(sent.values()) / seconds),
            judged=int((judged(fw) - before) / seconds),
            lost_established=lost_established,
            lost_new=lost_new,
            slowest_status_s=slowest,
            recovered_s=recovered,
            miscounted=sum(
                abs(getattr(kernel[q["number"]], name) - q[name]) for q in status["queues"] for name in names
            ),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.overload")
    parser.add_argument("what", choices=["churn", "flood"])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--core", choices=["compiled", "pure"], action="append", help="one after the other")
    options = parser.parse_args()
    good = True
    for core in options.core or ["compiled"]:
        env = conntrackd_env(core == "compiled")
        if options.what == "churn":
            churned = churn(options.seconds, env)
            print(churned, flush=True)
            good &= not churned.left() and churned.growth_percent < GROWTH_PERCENT
            continue
        for kind in FLOODS:
            flooded = flood(kind, options.seconds, env)
            print(flooded.text(), flush=True)
            good &= flooded.stood()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
