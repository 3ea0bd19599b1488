"""Connections through the router: they pass, are listed with their state, and are counted to the byte."""

import socket
import sys
from pathlib import Path

from tests.lab.daemon import Daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import talk, tcp_pair, udp_socket

HEADER = {4: 20, 6: 40}
ICMP = {4: "icmp", 6: "icmpv6"}
ECHO_REQUEST = {4: 8, 6: 128}
ECHO_REPLY = {4: 0, 6: 129}


def forwarded(net: Network, family: int) -> dict[str, tuple[int, int]]:
    """Packets and bytes that the router's own rules saw between the hooks, by the chain they were sorted to."""
    tool = "iptables-legacy" if family == 4 else "ip6tables-legacy"
    rows = net.router.run(tool, "-t", "filter", "-nvxL", "FORWARD").stdout.splitlines()[2:]
    counts = {}
    for row in rows:
        words = row.split()
        counts["orig" if "dpt:8000" in words else "reply"] = int(words[0]), int(words[1])
    return counts


def count_forwarded(net: Network, family: int) -> None:
    tool = "iptables-legacy" if family == 4 else "ip6tables-legacy"
    for side in "--dport", "--sport":
        net.router.run(tool, "-A", "FORWARD", "-p", "tcp", side, "8000")


def test_curl_of_10_mb(net: Network, fw: Daemon, family: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40960
    (tmp_path / "file").write_bytes(content)
    server = net.server.start(sys.executable, "-um", "http.server", "--bind", "::", "--directory", tmp_path, "8000")
    server.wait_for_output("Serving")
    count_forwarded(net, family)
    host = f"[{net.server.ipv6}]" if family == 6 else net.server.ipv4

    net.client.run("curl", "--silent", "--fail", "--output", tmp_path / "got", f"http://{host}:8000/file")

    assert (tmp_path / "got").read_bytes() == content
    flow = wait_until(
        lambda: (f := fw.flow("tcp", dport=8000))["state"] == "TIME_WAIT" and f, "the connection is closed"
    )
    assert flow["family"] == f"ipv{family}"
    assert set(flow["status"]) == {"SEEN_REPLY", "ASSURED", "CONFIRMED"}
    assert (flow["orig"]["src"], flow["orig"]["dst"]) == (net.client.address(family), net.server.address(family))
    assert (flow["reply"]["src"], flow["reply"]["dst"]) == (net.server.address(family), net.client.address(family))
    assert (flow["reply"]["sport"], flow["reply"]["dport"]) == (8000, flow["orig"]["sport"])
    assert (flow["in"], flow["out"], flow["rule"]) == ("lan", "wan", "lan-to-wan")
    # The router's own rules between the hooks counted the same packets, late ones of the end included.
    assert forwarded(net, family)["reply"][1] > len(content)

    def counted_alike() -> bool:
        flow, counted = fw.flow("tcp", dport=8000), forwarded(net, family)
        return all((flow[side]["packets"], flow[side]["bytes"]) == counted[side] for side in ("orig", "reply"))

    wait_until(counted_alike, "both counts are the same")


def test_tcp_states(net: Network, fw: Daemon, family: int) -> None:
    near, far = tcp_pair(net.client, net.server, family, 7)
    flow = fw.flow("tcp", dport=7)
    assert flow["state"] == "ESTABLISHED"
    assert set(flow["status"]) == {"SEEN_REPLY", "ASSURED", "CONFIRMED"}

    talk(near, far, b"question" * 1000)
    talk(far, near, b"answer" * 1000)
    assert fw.flow("tcp", dport=7)["state"] == "ESTABLISHED"

    near.close()
    assert far.recv(1) == b""
    wait_until(lambda: fw.flow("tcp", dport=7)["state"] == "CLOSE_WAIT", "the server acknowledged the FIN")
    far.close()
    wait_until(lambda: fw.flow("tcp", dport=7)["state"] == "TIME_WAIT", "the client acknowledged the FIN")


def test_tcp_refused(net: Network, fw: Daemon, family: int) -> None:
    """The RST of a closed port reaches the client."""
    near = net.client.open_socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_STREAM)
    assert near.connect_ex((net.server.address(family), 9)) != 0
    # A connection that was refused before any answer leaves nothing behind.
    assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]


def test_udp(net: Network, fw: Daemon, family: int) -> None:
    near = udp_socket(net.client, family)
    far = udp_socket(net.server, family, 5300)
    size = HEADER[family] + 8

    for number in range(3):
        near.sendto(bytes([number]) * 100, far.getsockname())
        assert far.recv(200) == bytes([number]) * 100
    flow = fw.flow("udp", dport=5300)
    assert flow["state"] is None
    assert flow["status"] == ["CONFIRMED"]
    assert (flow["orig"]["packets"], flow["orig"]["bytes"]) == (3, 3 * (100 + size))
    assert (flow["reply"]["packets"], flow["reply"]["bytes"]) == (0, 0)
    assert 0 < flow["timeout_seconds"] <= 30

    for number in range(2):
        far.sendto(bytes([number]) * 50, near.getsockname())
        assert near.recv(200) == bytes([number]) * 50
    flow = fw.flow("udp", dport=5300)
    assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
    assert (flow["orig"]["packets"], flow["orig"]["bytes"]) == (3, 3 * (100 + size))
    assert (flow["reply"]["packets"], flow["reply"]["bytes"]) == (2, 2 * (50 + size))
    assert (flow["in"], flow["out"], flow["rule"]) == ("lan", "wan", "lan-to-wan")


def test_udp_stream_is_assured(net: Network, fw: Daemon) -> None:
    """An exchange that goes on for more than two seconds is a stream: ASSURED, with the longer timeout."""
    near = udp_socket(net.client, 4)
    far = udp_socket(net.server, 4, 5300)

    def assured() -> bool:
        near.sendto(b"question", far.getsockname())
        far.recv(100)
        far.sendto(b"answer", near.getsockname())
        near.recv(100)
        return "ASSURED" in fw.flow("udp", dport=5300)["status"]

    wait_until(assured, "the stream is assured", 30.0)
    assert 30 < fw.flow("udp", dport=5300)["timeout_seconds"] <= 120


def test_ping(net: Network, fw: Daemon, family: int) -> None:
    net.client.run("ping", "-n", "-c", "3", "-i", "0.1", "-s", "100", net.server.address(family))
    flow = fw.flow(ICMP[family], type=ECHO_REQUEST[family])
    assert flow["state"] is None
    assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
    assert flow["reply"]["type"] == ECHO_REPLY[family]
    assert flow["reply"]["id"] == flow["orig"]["id"]
    for direction in "orig", "reply":
        assert flow[direction]["code"] == 0
        assert (flow[direction]["packets"], flow[direction]["bytes"]) == (3, 3 * (HEADER[family] + 8 + 100))
