"""Connections to and from the router itself: tracked at INPUT and OUTPUT, confirmed like all others."""

from tests.lab.daemon import Daemon
from tests.lab.network import Network
from tests.lab.traffic import talk, tcp_pair, udp_socket

ICMP = {4: "icmp", 6: "icmpv6"}


def router_address(net: Network, family: int, segment: int) -> str:
    return f"fd00:{segment}::1" if family == 6 else f"10.{segment}.0.1"


def test_ping_to_the_router(net: Network, fw: Daemon, family: int) -> None:
    address = router_address(net, family, 1)
    net.client.run("ping", "-n", "-c", "2", "-i", "0.1", address)
    flow = fw.flow(ICMP[family], dst=address)
    assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
    assert (flow["orig"]["packets"], flow["reply"]["packets"]) == (2, 2)
    assert (flow["in"], flow["out"], flow["rule"]) == ("lan", None, "lan-to-router")


def test_tcp_to_the_router(net: Network, fw: Daemon, family: int) -> None:
    near, far = tcp_pair(net.client, net.router, family, 22, router_address(net, family, 1))
    talk(near, far, b"hello")
    talk(far, near, b"welcome")
    flow = fw.flow("tcp", dport=22)
    assert flow["state"] == "ESTABLISHED"
    assert set(flow["status"]) == {"SEEN_REPLY", "ASSURED", "CONFIRMED"}
    assert (flow["in"], flow["out"], flow["rule"]) == ("lan", None, "lan-to-router")


def test_tcp_from_the_router(net: Network, fw: Daemon, family: int) -> None:
    near, far = tcp_pair(net.router, net.server, family, 80)
    talk(near, far, b"hello")
    talk(far, near, b"welcome")
    flow = fw.flow("tcp", dport=80)
    assert flow["state"] == "ESTABLISHED"
    assert set(flow["status"]) == {"SEEN_REPLY", "ASSURED", "CONFIRMED"}
    assert (flow["in"], flow["out"], flow["rule"]) == (None, "wan", "default-output")


def test_udp_from_the_router(net: Network, fw: Daemon, family: int) -> None:
    near = udp_socket(net.router, family, address=router_address(net, family, 2))
    far = udp_socket(net.server, family, 123)
    near.sendto(b"what time is it", far.getsockname())
    far.recv(100)
    far.sendto(b"late", near.getsockname())
    assert near.recv(100) == b"late"
    flow = fw.flow("udp", dport=123)
    assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
    assert (flow["in"], flow["out"]) == (None, "wan")


def test_ping_from_the_router(net: Network, fw: Daemon, family: int) -> None:
    net.router.run("ping", "-n", "-c", "1", net.server.address(family))
    flow = fw.flow(ICMP[family], dst=net.server.address(family))
    assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
    assert (flow["in"], flow["out"], flow["rule"]) == (None, "wan", "default-output")


def test_loopback_is_left_alone(net: Network, fw: Daemon, family: int) -> None:
    near, far = tcp_pair(net.router, net.router, family, 8080, "::1" if family == 6 else "127.0.0.1")
    talk(near, far, b"to myself")
    assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]
