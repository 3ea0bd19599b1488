"""Traffic for the lab: real sockets in pairs, crafted packets, and what arrives at a host."""

import socket
from collections.abc import Iterable

from tests.lab.network import Host, wait_until

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
ETH_P_ALL = 3
PACKET_OUTGOING = 4


def udp_socket(host: Host, family: int, port: int = 0, address: str = "") -> socket.socket:
    """A UDP socket bound to the address of the host, or to another one that it has."""
    bound = host.open_socket(AF[family], socket.SOCK_DGRAM)
    bound.bind((address or host.address(family), port))
    return bound


def tcp_listener(host: Host, family: int, port: int) -> socket.socket:
    """A TCP socket that listens on every address of the host."""
    listener = host.open_socket(AF[family], socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::" if family == 6 else "0.0.0.0", port))
    listener.listen()
    return listener


def tcp_pair(
    client: Host, server: Host, family: int, port: int, address: str = ""
) -> tuple[socket.socket, socket.socket]:
    """Connect from client to server (at `address` if not its usual one): both ends, the client's first."""
    listener = tcp_listener(server, family, port)
    near = client.open_socket(AF[family], socket.SOCK_STREAM)
    near.connect((address or server.address(family), port))
    far, _ = listener.accept()
    far.settimeout(10.0)
    listener.close()
    server.adopt(far)
    return near, far


def talk(sender: socket.socket, receiver: socket.socket, data: bytes) -> None:
    """Send over TCP and wait until all of it has arrived unchanged."""
    sender.sendall(data)
    received = b""
    while len(received) < len(data):
        part = receiver.recv(len(data) - len(received))
        assert part, f"the connection ended after {len(received)} of {len(data)} bytes"
        received += part
    assert received == data


def inject(host: Host, packets: Iterable[bytes]) -> int:
    """Send whole IP packets as they are, routed by the host; the number sent."""
    sockets = {4: host.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)}
    sockets[6] = host.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    sent = 0
    for packet in packets:
        if packet[0] >> 4 == 4:
            sockets[4].sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
        else:
            sockets[6].sendto(packet, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0))
        sent += 1
    for raw in sockets.values():
        raw.close()
    return sent


class Arrivals:
    """The IP packets that arrive at the `eth0` of a host from now on."""

    def __init__(self, host: Host) -> None:
        # Without a protocol: with one it would hear all interfaces, lo too, until it is bound.
        self._socket = host.open_socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self._socket.bind(("eth0", ETH_P_ALL))
        self._socket.settimeout(0.0)
        self._packets: list[bytes] = []

    def packets(self) -> list[bytes]:
        """Every packet so far, from the IP header on."""
        while True:
            try:
                data, address = self._socket.recvfrom(1 << 17)
            except BlockingIOError:
                return self._packets
            if address[2] != PACKET_OUTGOING:
                self._packets.append(data)

    def having(self, content: bytes) -> list[bytes]:
        """The packets so far that hold `content` anywhere."""
        return [packet for packet in self.packets() if content in packet]

    def to_port(self, port: int) -> list[bytes]:
        """The TCP and UDP packets so far that go to a port."""
        wanted = port.to_bytes(2, "big")
        found = []
        for packet in self.packets():
            header, protonum = (20, packet[9]) if packet[0] >> 4 == 4 else (40, packet[6])
            if packet[0] >> 4 in AF and protonum in (6, 17) and packet[header + 2 : header + 4] == wanted:
                found.append(packet)
        return found

    def wait_for(self, content: bytes, count: int = 1) -> list[bytes]:
        """Wait until `count` packets that hold `content` have arrived."""
        wait_until(lambda: len(self.having(content)) >= count, f"{count} packets with {content!r} arrive")
        return self.having(content)
