"""What may pass: the outside can only answer, and what belongs to no connection is INVALID."""

import socket

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import AF, Arrivals, inject, talk, tcp_listener, tcp_pair, udp_socket

ACCEPT_INVALID = POLICY.replace('invalid = "drop"', 'invalid = "accept"')


def segment(net: Network, family: int, flags: str, load: bytes) -> bytes:
    """A TCP segment from the server to the client that belongs to no connection."""
    ip = IPv6 if family == 6 else IP
    packet = ip(src=net.server.address(family), dst=net.client.address(family))
    return bytes(packet / TCP(sport=80, dport=40000, flags=flags, seq=1000, ack=2000) / load)


def test_unsolicited_tcp_from_outside_is_dropped(net: Network, fw: Daemon, family: int) -> None:
    tcp_listener(net.client, family, 8080)
    arrivals = Arrivals(net.client)
    outside = net.server.open_socket(AF[family], socket.SOCK_STREAM)
    outside.setblocking(False)
    outside.connect_ex((net.client.address(family), 8080))

    drop = fw.wait_for_drop(protocol="tcp", dport=8080)
    assert (drop["reason"], drop["rule"]) == ("policy", "default-forward")
    assert (drop["src"], drop["dst"]) == (net.server.address(family), net.client.address(family))
    assert (drop["in"], drop["out"], drop["family"]) == ("wan", "lan", f"ipv{family}")
    assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]
    assert not arrivals.to_port(8080)


def test_unsolicited_udp_from_outside_is_dropped(net: Network, fw: Daemon, family: int) -> None:
    inside = udp_socket(net.client, family, 5300)
    outside = udp_socket(net.server, family, 4000)
    arrivals = Arrivals(net.client)
    outside.sendto(b"nobody asked", inside.getsockname())

    drop = fw.wait_for_drop(protocol="udp", dport=5300)
    assert (drop["reason"], drop["rule"], drop["sport"]) == ("policy", "default-forward", 4000)
    assert not [flow for flow in fw.flows() if flow["protocol"] == "udp"]
    assert not arrivals.having(b"nobody asked")

    # The same packet is an answer as soon as the inside has asked, and only to the port that asked.
    inside.sendto(b"now it asks", outside.getsockname())
    assert outside.recv(100) == b"now it asks"
    outside.sendto(b"an answer", inside.getsockname())
    assert inside.recv(100) == b"an answer"
    outside.sendto(b"another port", (net.client.address(family), 5301))
    fw.wait_for_drop(protocol="udp", dport=5301, reason="policy")
    assert not arrivals.having(b"another port")


def test_outside_cannot_reach_the_router(net: Network, fw: Daemon, family: int) -> None:
    router = "fd00:2::1" if family == 6 else "10.2.0.1"
    listener = udp_socket(net.router, family, 53, router)
    udp_socket(net.server, family, 4000).sendto(b"query", listener.getsockname())
    drop = fw.wait_for_drop(protocol="udp", dport=53)
    assert (drop["reason"], drop["rule"]) == ("policy", "default-input")
    assert (drop["in"], drop["out"]) == ("wan", None)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(100)


@pytest.mark.parametrize("flags", ["R", "RA", "SA"])
def test_segment_without_a_connection_is_invalid(net: Network, fw: Daemon, family: int, flags: str) -> None:
    arrivals = Arrivals(net.client)
    inject(net.server, [segment(net, family, flags, b"stray")])
    drop = fw.wait_for_drop(protocol="tcp", sport=80, dport=40000)
    assert (drop["reason"], drop["rule"]) == ("tcp_new", None)
    assert not arrivals.having(b"stray")
    assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]
    assert fw.stats()["invalid"] == 1


def test_invalid_can_be_accepted(net: Network, family: int) -> None:
    with daemon(net.router, ACCEPT_INVALID) as fw:
        arrivals = Arrivals(net.client)
        inject(net.server, [segment(net, family, "SA", b"stray")])
        arrivals.wait_for(b"stray")
        # The client's own RST about it is INVALID just as well.
        wait_until(lambda: fw.stats()["ctinfo"]["tcp_new"] == 2, "both segments are counted as INVALID")
        assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]


def test_reset_of_a_living_connection_needs_its_sequence_number(net: Network, fw: Daemon, family: int) -> None:
    """A blind RST from the right addresses and ports does not end the connection."""
    near, far = tcp_pair(net.client, net.server, family, 80)
    talk(near, far, b"alive")
    port = near.getsockname()[1]
    ip = IPv6 if family == 6 else IP
    blind = ip(src=net.server.address(family), dst=net.client.address(family))
    arrivals = Arrivals(net.client)
    inject(net.server, [bytes(blind / TCP(sport=80, dport=port, flags="R", seq=0) / b"blind")])
    talk(far, near, b"still alive")  # in the queue behind it
    assert fw.flow("tcp", dport=80)["state"] == "ESTABLISHED"
    assert not arrivals.having(b"blind")
