"""What REJECT answers, byte by byte as scapy reads it, and what gets no answer."""

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, IPv6

from conntrackd.policy.reject import answer

HOSTS = {4: ("10.0.0.5", "198.51.100.9"), 6: ("2001:db8::5", "2001:db8:f::9")}
families = pytest.mark.parametrize("family", [4, 6])


def packet(family: int, layer: Any, destination: str = "", source: str = "") -> bytes:
    ip = IPv6 if family == 6 else IP
    client, server = HOSTS[family]
    return bytes(ip(src=source or client, dst=destination or server) / layer)


@families
@pytest.mark.parametrize(
    ("flags", "load", "seq", "ack", "answered"),
    [
        ("S", b"", 0, 1001, "RA"),
        ("S", b"fast open", 0, 1010, "RA"),
        ("F", b"xy", 0, 1003, "RA"),
        ("A", b"", 7777, 0, "R"),
        ("PA", b"data", 7777, 0, "R"),
        ("SA", b"", 7777, 0, "R"),
    ],
)
def test_reset(family: int, flags: str, load: bytes, seq: int, ack: int, answered: str) -> None:
    segment = TCP(sport=1234, dport=80, flags=flags, seq=1000, ack=7777, options=[("MSS", 1460)])
    made = answer(packet(family, segment / load), "auto", 3)
    assert made is not None
    assert (made.whole, made.ipv6, made.iif) == (True, family == 6, 3)
    ip = (IPv6 if family == 6 else IP)(made.data)
    client, server = HOSTS[family]
    assert (ip.src, ip.dst) == (server, client)
    reset = ip[TCP]
    assert (reset.sport, reset.dport, reset.seq, reset.ack, str(reset.flags)) == (80, 1234, seq, ack, answered)
    # Scapy writes the same checksums when it is asked to.
    again = ip.copy()
    del again[TCP].chksum
    if family == 4:
        del again.chksum
    assert bytes(again) == made.data


def test_numbers_go_round() -> None:
    made = answer(packet(4, TCP(flags="S", seq=0xFFFFFFFF)), "tcp-reset", 0)
    assert made is not None
    assert IP(made.data)[TCP].ack == 0


@families
@pytest.mark.parametrize(
    ("how", "code4", "code6"),
    [("auto", 3, 4), ("port-unreachable", 3, 4), ("host-unreachable", 1, 3), ("admin-prohibited", 13, 1)],
)
def test_unreachable(family: int, how: str, code4: int, code6: int) -> None:
    refused = packet(family, UDP(sport=5, dport=53) / (b"x" * 2000))
    made = answer(refused, how, 2)
    assert made is not None
    assert not made.whole
    if family == 4:
        error = ICMP(made.data)
        assert (error.type, error.code) == (3, code4)
        assert made.data[8:] == refused[:548]
        del error.chksum
        assert bytes(error) == made.data
    else:
        error = ICMPv6DestUnreach(made.data)
        assert (error.type, error.code) == (1, code6)
        assert made.data[8:] == refused[:1232]


def test_tcp_may_be_told_by_icmp_too() -> None:
    made = answer(packet(4, TCP(flags="S")), "admin-prohibited", 0)
    assert made is not None
    assert not made.whole


@pytest.mark.parametrize(
    "refused",
    [
        packet(4, TCP(flags="R")),
        packet(6, TCP(flags="RA")),
        packet(4, ICMP(type=3) / IP(dst="10.0.0.1")),
        packet(4, ICMP(type=11) / IP(dst="10.0.0.1")),
        packet(6, ICMPv6DestUnreach() / IPv6(dst="2001:db8::1")),
        packet(4, UDP(), destination="224.0.0.251"),
        packet(4, UDP(), destination="255.255.255.255"),
        packet(6, UDP(), destination="ff02::fb"),
        packet(4, UDP(), source="0.0.0.0"),
        packet(6, UDP(), source="::"),
        packet(4, UDP(), source="224.0.0.1"),
        b"",
        b"\x45",
        packet(4, TCP(flags="S"))[:24],
        packet(4, TCP(flags="S"))[:30],
    ],
)
def test_what_gets_no_answer(refused: bytes) -> None:
    assert answer(refused, "auto", 1) is None


def test_a_ping_is_answered() -> None:
    made = answer(packet(6, ICMPv6EchoRequest(data=b"ping")), "auto", 1)
    assert made is not None
    assert ICMPv6DestUnreach(made.data).code == 4
