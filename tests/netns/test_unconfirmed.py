"""A packet that the router drops between the hooks leaves no trace."""

from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import inject

NOWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}  # the router has no route there
BLOCKED_PORT = 9


@pytest.fixture
def block(net: Network) -> None:
    """The router's own firewall drops one port between the hooks."""
    for tool in "iptables-legacy", "ip6tables-legacy":
        net.router.run(tool, "-A", "FORWARD", "-p", "udp", "--dport", str(BLOCKED_PORT), "-j", "DROP")


def datagrams(net: Network, family: int, cause: str, count: int) -> Iterator[bytes]:
    """Datagrams from the client that the policy admits and the router drops, each of a flow of its own."""
    ip = IPv6 if family == 6 else IP
    packet = ip(src=net.client.address(family), dst=net.server.address(family)) / UDP(dport=53) / b"lost"
    if cause == "forward-drop":
        packet[UDP].dport = BLOCKED_PORT
    elif cause == "ttl":
        packet.ttl = packet.hlim = 1
    else:
        packet.dst = NOWHERE[family]
    packet[UDP].chksum = 0  # none: built once, and only the source port changes
    built = bytearray(bytes(packet))
    header = 40 if family == 6 else 20
    for port in range(1024, 1024 + count):
        built[header : header + 2] = port.to_bytes(2, "big")
        yield bytes(built)


@pytest.fixture
def hasty(net: Network) -> Iterator[Daemon]:
    """A daemon that forgets unconfirmed connections soon, for tests that wait for it."""
    with daemon(net.router, POLICY + '\n[conntrack]\nunconfirmed_timeout = "200ms"\n') as running:
        yield running


def udp_flows(fw: Daemon) -> list[object]:
    return [flow for flow in fw.flows() if flow["protocol"] == "udp"]


@pytest.mark.parametrize("cause", ["forward-drop", "ttl", "no-route"])
@pytest.mark.usefixtures("block")
def test_one_packet_leaves_no_entry(net: Network, hasty: Daemon, family: int, cause: str) -> None:
    before = hasty.stats()["created"]
    inject(net.client, datagrams(net, family, cause, 1))
    wait_until(lambda: hasty.stats()["created"] > before, "the tracker saw the packet")
    assert not udp_flows(hasty)
    wait_until(lambda: hasty.status()["unconfirmed"] == 0, "the unconfirmed connection is forgotten")
    assert not udp_flows(hasty)


@pytest.mark.usefixtures("block")
def test_ten_thousand_packets_leave_no_entry(net: Network, fw: Daemon) -> None:
    before = fw.stats()
    sent = 0
    for family, cause, count in (
        (4, "forward-drop", 4000),
        (6, "forward-drop", 3000),
        (4, "ttl", 1000),
        (6, "ttl", 1000),
        (4, "no-route", 500),
        (6, "no-route", 500),
    ):
        packets = list(datagrams(net, family, cause, count))
        # In portions that the queue can hold, so that every packet is seen.
        for start in range(0, count, 500):
            sent += inject(net.client, packets[start : start + 500])
            fw.wait_for_empty_queues()
    assert sent == 10_000

    wait_until(lambda: fw.stats()["created"] - before["created"] >= sent, "the tracker saw every packet")
    wait_until(lambda: fw.status()["unconfirmed"] == 0, "the unconfirmed connections are forgotten")
    after = fw.stats()
    assert after["unconfirmed_expired"] - before["unconfirmed_expired"] >= sent
    assert after["insert"] == before["insert"]
    assert not udp_flows(fw)
    for queue in fw.queues().values():
        assert (queue.waiting, queue.dropped_full, queue.dropped_socket) == (0, 0, 0)


@pytest.mark.usefixtures("block")
def test_a_dropped_packet_does_not_block_its_flow(net: Network, family: int) -> None:
    """The same flow passes as soon as the router lets it."""
    with daemon(net.router, POLICY + '\n[conntrack]\nunconfirmed_timeout = "60s"\n') as fw:
        packet = next(datagrams(net, family, "forward-drop", 1))
        inject(net.client, [packet])
        wait_until(lambda: fw.status()["unconfirmed"] == 1, "the connection waits for its confirmation")
        net.router.run("iptables-legacy" if family == 4 else "ip6tables-legacy", "-F", "FORWARD")
        inject(net.client, [packet])
        wait_until(lambda: udp_flows(fw), "the connection is confirmed")
        assert fw.flow("udp", dport=BLOCKED_PORT)["orig"]["packets"] == 2
