"""The packet path inside of one process: what does an established packet cost, pure and compiled?

Everything is on: checksums, the window of TCP, counters, timeouts. No packet comes twice, for a repeated one is a
retransmission to the tracker: every pass starts anew with the same connections. They are few enough to stay in the
processor's cache, where a packet is that has just been received. Time is processor time: others do not count.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from statistics import median

from benchmarks.contestants import conntrackd_env
from benchmarks.programs import ROOT
from conntrackd import config
from conntrackd.const import (
    MARK_ESTABLISHED,
    MARK_REPLY,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
)
from conntrackd.core.net import Conntrack
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from tests.differential import packets
from tests.differential.packets import ACK, SYN
from tests.lab.daemon import POLICY
from tests.lab.network import LabError

VALUE = "tcp_small_ns"  # the figure that is shown while it runs

LAN, WAN = 1, 2
CLIENT = IPv4Address("10.1.0.2").packed
SERVER = IPv4Address("10.2.0.2").packed
CONNECTIONS = 16
PAIRS = 16  # there and back, per connection
FULL_SIZE = 1448
SMALL = 22
CONTENT = bytes(range(256)) * 6
NOW_MS = 1_000_000
TIMESTAMPS = bytes.fromhex("0101080a0000000100000001")

Stream = tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]]  # opening and measured packets, each with its device


def _tcp(port: int, flags: int, seq: int, ack: int, data: bytes = b"") -> tuple[bytes, int]:
    segment = packets.tcp(CLIENT, SERVER, port, 80, flags, seq, ack, 65000, TIMESTAMPS, data)
    return packets.ip(CLIENT, SERVER, 6, segment), LAN


def _tcp_back(port: int, flags: int, seq: int, ack: int) -> tuple[bytes, int]:
    segment = packets.tcp(SERVER, CLIENT, 80, port, flags, seq, ack, 65000, TIMESTAMPS, b"")
    return packets.ip(SERVER, CLIENT, 6, segment), WAN


def tcp_stream(size: int) -> Stream:
    """Segments of `size` bytes from the client, each answered by an ACK."""
    ports = range(20000, 20000 + CONNECTIONS)
    opening = []
    for port in ports:
        opening += [_tcp(port, SYN, 0, 0), _tcp_back(port, SYN | ACK, 0, 1), _tcp(port, ACK, 1, 1)]
    measured = []
    for number in range(PAIRS):
        for port in ports:
            seq = 1 + number * size
            measured += [_tcp(port, ACK, seq, 1, CONTENT[:size]), _tcp_back(port, ACK, 1, seq + size)]
    return opening, measured


def udp_stream() -> Stream:
    """Small packets to and fro."""
    ports = range(20000, 20000 + CONNECTIONS)

    def one(port: int) -> tuple[bytes, int]:
        return packets.ip(CLIENT, SERVER, 17, packets.udp(CLIENT, SERVER, port, 53, CONTENT[:SMALL])), LAN

    def back(port: int) -> tuple[bytes, int]:
        return packets.ip(SERVER, CLIENT, 17, packets.udp(SERVER, CLIENT, 53, port, CONTENT[:SMALL])), WAN

    opening = [packet for port in ports for packet in (one(port), back(port))]
    return opening, [packet for _ in range(PAIRS) for packet in opening]


def _opened(opening: list[tuple[bytes, int]]) -> Firewall:
    """A firewall with the connections established."""
    conf = config.parse(POLICY.encode(), "policy")
    ruleset = compile_ruleset(conf, generation=1)
    ruleset.set_links({LAN: "lan", WAN: "wan"})
    fw = Firewall(Conntrack(conf.sysctl()), ruleset)
    for data, iif in opening:
        bits = pre_routing(fw, data, NF_INET_PRE_ROUTING, iif, NOW_MS)
        assert bits >= 0
        post_routing(fw, data, bits, NF_INET_POST_ROUTING, iif, LAN + WAN - iif, NOW_MS)
    return fw


def ns_per_packet(stream: Stream, passes: int) -> float:
    """Median over the passes."""
    opening, measured = stream
    fw = _opened(opening)
    for data, iif in measured:
        bits = pre_routing(fw, data, NF_INET_PRE_ROUTING, iif, NOW_MS)
        assert bits == (MARK_ESTABLISHED if iif == LAN else MARK_ESTABLISHED | MARK_REPLY), bits
    found = []
    for _ in range(passes):
        fw = _opened(opening)
        begin = time.process_time_ns()
        for data, iif in measured:
            pre_routing(fw, data, NF_INET_PRE_ROUTING, iif, NOW_MS)
        found.append((time.process_time_ns() - begin) / len(measured))
    return median(found)


def main() -> None:
    """Measure the conntrackd that Python finds, print a JSON object."""
    passes = int(sys.argv[1])
    streams = {"tcp_ns": tcp_stream(FULL_SIZE), "tcp_small_ns": tcp_stream(SMALL), "udp_ns": udp_stream()}
    print(json.dumps({name: ns_per_packet(stream, passes) for name, stream in streams.items()}))


def measure(quick: bool) -> Iterator[tuple[str, dict[str, float], str]]:
    """Measure pure (f) and compiled (g), each in a process of its own: name, values, what went wrong."""
    for name, compiled in ("f", False), ("g", True):
        try:
            env = conntrackd_env(compiled)
        except LabError as error:
            yield name, {}, str(error)
            continue
        env["PYTHONPATH"] += f":{ROOT}"
        # Outside of the source tree, which Python would prefer.
        done = subprocess.run(
            [sys.executable, "-c", "from benchmarks.inprocess import main; main()", "50" if quick else "200"],
            env={**os.environ, **env},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            yield name, {}, done.stderr.strip().splitlines()[-1]
        else:
            yield name, json.loads(done.stdout), ""
