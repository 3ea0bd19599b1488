"""Packets longer than what is copied of them, and fragments: they are judged, and none stays in a queue."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Host, Network, network
from tests.lab.traffic import Arrivals, tcp_pair, udp_socket

TOOL = {4: "iptables-legacy", 6: "ip6tables-legacy"}
ICMP = {4: "icmp", 6: "icmpv6"}
HEADER = {4: 20, 6: 40}
SIZES = (4000, 20_000, 60_000)
BULK = 20_000_000

RTM_SETLINK = 19
IFLA_GSO_IPV4 = 63
IFLA_GRO_IPV4 = 64


@contextmanager
def marked_network(mtu: int, family: int) -> Iterator[tuple[Network, Daemon]]:
    """A network whose router sets a mark of its own on every packet: it makes the kernel's messages longer."""
    with network(mtu) as net, daemon(net.router, POLICY) as fw:
        for chain in "PREROUTING", "OUTPUT":
            net.router.run(TOOL[family], "-t", "raw", "-I", chain, "-j", "MARK", "--set-mark", "0x1")
        yield net, fw


def ping(net: Network, family: int, size: int, count: int) -> int:
    """Exit code of a ping; it may be answered within five seconds."""
    return net.client.run(
        "ping", "-n", "-c", str(count), "-i", "0.05", "-W", "5", "-s", str(size), net.server.address(family),
        check=False,
    ).returncode  # fmt: skip


def assert_no_slot_is_lost(fw: Daemon) -> None:
    fw.wait_for_empty_queues()
    for queue in fw.queues().values():
        assert (queue.dropped_full, queue.dropped_socket) == (0, 0)


@pytest.mark.parametrize("mtu", [1500, 9000, 65_535])
def test_big_pings_pass(mtu: int, family: int) -> None:
    """Whole where the link carries them, in fragments elsewhere, which the rules make the kernel reassemble."""
    with marked_network(mtu, family) as (net, fw):
        for size in SIZES:
            assert ping(net, family, size, 3) == 0, size
        flows = [flow for flow in fw.flows() if flow["protocol"] == ICMP[family]]
        assert sorted(flow["orig"]["bytes"] // 3 for flow in flows) == [size + 8 + HEADER[family] for size in SIZES]
        assert_no_slot_is_lost(fw)


@pytest.mark.parametrize("size", SIZES)
def test_fragments_without_reassembly_are_judged(family: int, size: int) -> None:
    """Without the rule that makes the kernel reassemble, later fragments belong to no connection: INVALID."""
    with marked_network(1500, family) as (net, fw):
        rule = next(
            line.replace("-A", "-D", 1)
            for line in net.router.run(f"{TOOL[family]}-save", "-t", "raw").stdout.splitlines()
            if "-m socket" in line
        )
        net.router.run(f"{TOOL[family]}-restore", "--noflush", stdin=f"*raw\n{rule}\nCOMMIT\n")
        arrivals = Arrivals(net.server)
        payload = bytes(range(256)) * (size // 256)
        near = udp_socket(net.client, family)
        near.sendto(payload, (net.server.address(family), 5300))
        near.sendto(b"behind it", (net.server.address(family), 5300))
        arrivals.wait_for(b"behind it")
        # Without its later fragments the datagram is lost, and it is said why.
        assert fw.wait_for_drop(reason="fragment")["in"] == "lan"
        assert not [packet for packet in arrivals.packets() if packet[-16:] == payload[-16:]]
        assert_no_slot_is_lost(fw)


def test_the_lengths_that_fill_the_buffer(family: int) -> None:
    """Around 4 kB packet and metadata together exceed the buffer that the binding reads into."""
    lengths = range(3890, 4110)
    with marked_network(9000, family) as (net, fw):
        near = udp_socket(net.client, family)
        far = udp_socket(net.server, family, 5300)
        for length in lengths:
            payload = length.to_bytes(2, "big") * ((length - HEADER[family] - 8) // 2)
            near.sendto(payload, far.getsockname())
            assert far.recv(9000) == payload
            far.sendto(payload, near.getsockname())
            assert near.recv(9000) == payload
        flow = fw.flow("udp", dport=5300)
        assert flow["orig"]["packets"] == flow["reply"]["packets"] == len(lengths)
        assert_no_slot_is_lost(fw)


def test_more_jumbo_packets_than_the_queue_has_slots(family: int) -> None:
    """Whoever leaks a slot per jumbo packet stops after a queue's length of them."""
    config = POLICY + "\n[queue]\nmax_length = 100\n"
    with network(9000) as net, daemon(net.router, config) as fw:
        near = udp_socket(net.client, family)
        far = udp_socket(net.server, family, 5300)
        for number in range(250):
            payload = number.to_bytes(4, "big") * 2000
            near.sendto(payload, far.getsockname())
            assert far.recv(9000) == payload
        assert fw.flow("udp", dport=5300)["orig"]["packets"] == 250
        assert_no_slot_is_lost(fw)


def allow_big_segments(host: Host, ifname: str) -> None:
    """Let segments be put together to more than 64 KiB over IPv4; neither `ip` nor pyroute2 knows that yet."""

    def ask() -> None:
        index = socket.if_nametoindex(ifname)
        attributes = b"".join(struct.pack("=HHI", 8, kind, 180_000) for kind in (IFLA_GSO_IPV4, IFLA_GRO_IPV4))
        body = struct.pack("=BBHiII", 0, 0, 0, index, 0, 0) + attributes
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
            netlink.send(struct.pack("=IHHII", 16 + len(body), RTM_SETLINK, 5, 1, 0) + body)
            assert struct.unpack_from("=i", netlink.recv(4096), 16) == (0,)

    host.call(ask)


def test_segments_of_more_than_64_kib_in_one_pass() -> None:
    """BIG TCP: the header of such a packet says that it is 0 bytes long."""
    with marked_network(1500, 4) as (net, fw):
        for host, ifname in (net.client, "eth0"), (net.router, "lan"), (net.router, "wan"), (net.server, "eth0"):
            allow_big_segments(host, ifname)
        net.router.run("iptables-legacy", "-t", "raw", "-I", "PREROUTING", "-m", "length", "!", "--length", "0:65535")
        near, far = tcp_pair(net.client, net.server, 4, 5001)
        sending = threading.Thread(target=near.sendall, args=(bytes(BULK),))
        sending.start()
        left = BULK
        while left:
            left -= len(far.recv(1 << 20))
        sending.join()
        listed = net.router.run("iptables-legacy", "-t", "raw", "-nvxL", "PREROUTING").stdout
        (line,) = [line for line in listed.splitlines() if "length" in line]
        assert int(line.split()[0]) > 0
        assert fw.flow("tcp", dport=5001)["orig"]["bytes"] > BULK
        assert not fw.drops()
        assert_no_slot_is_lost(fw)
