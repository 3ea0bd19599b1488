"""The work: what is asked of a contestant, and the figures that come out of it.

Traffic runs on one processor and the daemon on the other, except for bulk TCP: there the scheduler places everything,
for plain routing and the kernel's tracker would otherwise be left with one processor of two.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contestants import Contestant
from benchmarks.processors import DAEMON_CPU, TRAFFIC_CPU, Meter, pin
from benchmarks.programs import program
from tests.lab.daemon import queues
from tests.lab.network import Network, network

Values = dict[str, float]

FIXED_PPS = 30_000
FIXED_PPS_SCAPY = 2_000  # the rate above is beyond what it can do
LOSSLESS = 0.002  # part of the packets that may be lost at a rate that is called lossless
BACKLOG = 0.05  # part of them that may still wait in queues when the last one has been sent
LOWEST_PPS = 500
HIGHEST_PPS = 400_000  # no sender on one processor gets there
CONNS_PARALLEL = 32
PING_PAUSE_US = 1_000
REQUEST_PAUSE_US = 5_000


@dataclass
class Settings:
    """How long things take: `seconds` for one measurement, `steps` of the search for the lossless rate."""

    seconds: float = 3.0
    step_seconds: float = 1.0
    steps: int = 7
    soak_seconds: float = 60.0


@dataclass
class Round:
    """One round over all works and contestants, and what later works need of earlier ones."""

    settings: Settings
    lossless_pps: dict[str, float] = field(default_factory=dict)


class Bout:
    """One contestant standing in the router of a network of its own."""

    def __init__(self, net: Network, contestant: Contestant, pid: int | None, pinned: bool) -> None:
        self.net = net
        self.contestant = contestant
        self.pid = pid
        if pid is not None and pinned:
            pin(pid, DAEMON_CPU)

    def blast(self, seconds: float, *what: str) -> dict[str, Any]:
        """Run traffic (see blast.c); its figures."""
        client, server = self.net.client, self.net.server
        done = client.run(
            *(program("blast"), "--client", client.netns, "--server", server.netns, "--address", server.ipv4),
            *("--cpu", str(TRAFFIC_CPU), "--seconds", str(seconds), *what),
            timeout_s=seconds + 30,
        )
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures

    def queue_drops(self) -> int:
        """Packets that the kernel could not queue for the daemon."""
        return sum(queue.dropped_full + queue.dropped_socket for queue in queues(self.net.router).values())


class Spending:
    """Processor time since this was made."""

    def __init__(self, here: Bout) -> None:
        self._daemon = here.pid is not None
        self._meter = Meter(here.pid)
        self._before = self._meter.read()

    def per(self, count: float, unit: str) -> Values:
        """Divide it by what was done, us: of the daemon if there is one, and of the machine with its traffic."""
        if not count:
            return {}
        spent = self._meter.read() - self._before
        daemon = {f"cpu_us_per_{unit}": spent.daemon / count / 1e3} if self._daemon else {}
        return daemon | {f"machine_us_per_{unit}": spent.machine / count / 1e3}


@contextmanager
def bout(contestant: Contestant, pinned: bool = True) -> Iterator[Bout]:
    """Build a network with the contestant in its router. LabError when it can't, or when its daemon ends early."""
    with network() as net, contestant.stand(net) as pid:
        yield Bout(net, contestant, pid, pinned)


def tcp(flows: int) -> Callable[[Round, Contestant], Values]:
    """Bulk TCP from client to server."""

    def work(this: Round, contestant: Contestant) -> Values:
        seconds = math.ceil(this.settings.seconds)
        with bout(contestant, pinned=False) as here:
            server = here.net.server.start("iperf3", "--server", "--one-off", "--forceflush")
            server.wait_for_output("Server listening")
            client = ["iperf3", "--json", "--client", here.net.server.ipv4, "--parallel", str(flows)]
            done = here.net.client.run(*client, "--time", str(seconds), timeout_s=seconds + 60.0)
            end = json.loads(done.stdout)["end"]
        return {
            "gbit_per_s": end["sum_received"]["bits_per_second"] / 1e9,
            "retransmits": end["sum_sent"]["retransmits"],
        }

    return work


def udp_fixed(this: Round, contestant: Contestant) -> Values:
    """Small packets of one flow at a rate that everyone can do: what does one cost?"""
    rate = FIXED_PPS_SCAPY if contestant.name.startswith("e-") else FIXED_PPS
    with bout(contestant) as here:
        spending = Spending(here)
        udp = here.blast(this.settings.seconds, "--udp", str(rate))["udp"]
        return {"rate": rate, "loss": udp["loss"], **spending.per(udp["received"], "packet")}


def udp_full(this: Round, contestant: Contestant) -> Values:
    """Small packets of one flow, as many as the sender can send: what gets through?"""
    with bout(contestant) as here:
        udp = here.blast(this.settings.seconds, "--udp", "0")["udp"]
        return {
            "delivered_pps": udp["delivered_pps"],
            "sent_pps": udp["sent_pps"],
            "loss": udp["loss"],
            "queue_drops": here.queue_drops(),
        }


def udp_lossless(this: Round, contestant: Contestant) -> Values:
    """The highest rate of small packets at which next to none is lost."""
    with bout(contestant) as here:
        pps, sender_bound = search(this.settings, here)
    this.lossless_pps[contestant.name] = pps
    return {"pps": pps, "sender_bound": sender_bound}


def search(settings: Settings, here: Bout) -> tuple[float, bool]:
    """Halve the range, on a logarithmic scale, again and again: the lossless rate, and whether the sender set it."""
    best, sender_bound = 0.0, False
    low, high = LOWEST_PPS, HIGHEST_PPS
    for _ in range(settings.steps):
        rate = math.sqrt(low * high)
        udp = here.blast(settings.step_seconds, "--udp", str(round(rate)))["udp"]
        in_time = udp["delivered_pps"] / udp["sent_pps"]
        if udp["loss"] >= LOSSLESS or in_time < 1 - BACKLOG:
            high = round(rate)
        elif udp["sent_pps"] < 0.97 * rate:  # more is not to be had from the sender
            high = round(rate)
            if udp["sent_pps"] > best:
                best, sender_bound = udp["sent_pps"], True
        else:
            low = round(rate)
            if udp["sent_pps"] > best:
                best, sender_bound = udp["sent_pps"], False
    return best, sender_bound


def conns(this: Round, contestant: Contestant) -> Values:
    """New TCP connections: open, one request, one answer, close."""
    with bout(contestant) as here:
        spending = Spending(here)
        figures = here.blast(this.settings.seconds, "--conns", str(CONNS_PARALLEL))["tcp"]
        return {
            "per_second": figures["per_second"],
            "failed": figures["failed"],
            **spending.per(figures["done"], "connection"),
            **latency("", figures),
        }


def latency_idle(this: Round, contestant: Contestant) -> Values:
    """A packet to and fro, one after the other, nothing else going on."""
    with bout(contestant) as here:
        ping = here.blast(this.settings.seconds, "--ping", "0")["ping"]
        return {"lost": ping["lost"], **latency("ping_", ping)}


def latency_loaded(this: Round, contestant: Contestant) -> Values:
    """A packet to and fro, and a connection with a request, while small packets come at half the lossless rate."""
    with bout(contestant) as here:
        return _loaded(half_load(this, here), this.settings.seconds, here)


def soak(this: Round, contestant: Contestant) -> Values:
    """Half the lossless rate for long: is anything lost?"""
    with bout(contestant) as here:
        return _loaded(half_load(this, here), this.settings.soak_seconds, here)


def half_load(this: Round, here: Bout) -> int:
    """Half of the rate that the contestant can do. Where there is no daemon, half of what the best daemon can do."""
    name = here.contestant.name
    known = this.lossless_pps
    if here.pid is None:
        with_daemon = [pps for other, pps in known.items() if other not in ("a", "b")]
        if with_daemon:
            return round(max(with_daemon) / 2)
    if name not in known:
        known[name], _ = search(this.settings, here)
    return round(known[name] / 2)


def _loaded(rate: int, seconds: float, here: Bout) -> Values:
    traffic = ("--udp", str(rate), "--ping", str(PING_PAUSE_US), "--request", str(REQUEST_PAUSE_US))
    figures = here.blast(seconds, *traffic)
    udp, ping, request = figures["udp"], figures["ping"], figures["tcp"]
    return {
        "rate": rate,
        "lost": udp["sent"] - udp["received"] + ping["lost"] + request["failed"],
        "loss": udp["loss"],
        **latency("ping_", ping),
        **latency("request_", request),
    }


def latency(prefix: str, figures: dict[str, Any]) -> Values:
    """The latencies among the figures of blast."""
    return {f"{prefix}{name}": figures[name] for name in ("p50_us", "p99_us", "p999_us", "max_us")}


@dataclass(frozen=True)
class Work:
    """One kind of work: how it is done, and the value that charts and ratios are about."""

    name: str
    title: str
    do: Callable[[Round, Contestant], Values]
    value: str
    unit: str
    every_round: bool = True
    contestants: tuple[str, ...] = ()  # who does it; empty = all


WORKS = {
    work.name: work
    for work in (
        Work("tcp-1", "One TCP flow", tcp(1), "gbit_per_s", "Gbit/s"),
        Work("tcp-8", "Eight TCP flows", tcp(8), "gbit_per_s", "Gbit/s"),
        Work("udp-fixed", "Processor time per small packet", udp_fixed, "cpu_us_per_packet", "us"),
        Work("udp-full", "Small packets through at full blast", udp_full, "delivered_pps", "packets/s"),
        Work("udp-lossless", "Small packets without loss", udp_lossless, "pps", "packets/s"),
        Work("conns", "TCP connections: open, one request, close", conns, "per_second", "1/s"),
        Work("latency-idle", "To and fro, idle", latency_idle, "ping_p50_us", "us"),
        Work("latency-loaded", "To and fro at half load", latency_loaded, "ping_p99_us", "us"),
        Work("soak", "Packets lost at half load, for long", soak, "lost", "packets", False, ("c-both", "g")),
    )
}
