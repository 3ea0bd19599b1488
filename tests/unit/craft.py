"""Packets between one client and one server, and a tracker that they go through.

The packets are those of tests.differential.packets; here they get addresses. `back=True` is the answer's direction:
from the server to the client, ports swapped.
"""

import struct
from ipaddress import ip_address
from typing import Final

from conntrackd.const import IPS_CONFIRMED, IPS_DYING, NF_ACCEPT
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import Conntrack, confirm, conntrack_in
from conntrackd.core.proto.tcp_conn import TcpConn
from conntrackd.core.proto.tcp_states import STATE_NAMES
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple
from tests.differential import packets
from tests.differential.packets import ACK, FIN, RST, SYN

CLIENT: Final = {4: ip_address("10.0.0.5").packed, 6: ip_address("2001:db8:1::5").packed}
SERVER: Final = {4: ip_address("192.0.2.80").packed, 6: ip_address("2001:db8:2::80").packed}
STRANGER: Final = {4: ip_address("203.0.113.9").packed, 6: ip_address("2001:db8:3::9").packed}
SPORT: Final = 40000
DPORT: Final = 80

START_MS: Final = 10_000_000  # when the tests' clock begins


def ends(family: int, back: bool) -> tuple[bytes, bytes]:
    """Source and destination address."""
    if back:
        return SERVER[family], CLIENT[family]
    return CLIENT[family], SERVER[family]


def ip(proto: int, payload: bytes, *, back: bool = False, family: int = 4, ttl: int = 64) -> bytes:
    return packets.ip(*ends(family, back), proto, payload, ttl)


def tcp(
    flags: int,
    seq: int = 0,
    ack: int = 0,
    win: int = 8192,
    *,
    options: bytes = b"",
    data: bytes = b"",
    back: bool = False,
    family: int = 4,
    sport: int = SPORT,
    dport: int = DPORT,
    words: int | None = None,
    bad: bool = False,
) -> bytes:
    source, target = ends(family, back)
    ports = (dport, sport) if back else (sport, dport)
    segment = packets.tcp(source, target, *ports, flags, seq, ack, win, options, data, words=words, bad=bad)
    return packets.ip(source, target, 6, segment)


def udp(
    data: bytes = b"",
    *,
    back: bool = False,
    family: int = 4,
    sport: int = SPORT,
    dport: int = DPORT,
    length: int | None = None,
    zero: bool = False,
    bad: bool = False,
) -> bytes:
    source, target = ends(family, back)
    ports = (dport, sport) if back else (sport, dport)
    return packets.ip(source, target, 17, packets.udp(source, target, *ports, data, length=length, zero=zero, bad=bad))


def udplite(
    data: bytes = b"", *, back: bool = False, coverage: int = 0, zero: bool = False, bad: bool = False
) -> bytes:
    source, target = ends(4, back)
    ports = (DPORT, SPORT) if back else (SPORT, DPORT)
    datagram = packets.udplite(source, target, *ports, data, coverage=coverage, zero=zero, bad=bad)
    return packets.ip(source, target, 136, datagram)


def icmp(kind: int, code: int = 0, rest: bytes = b"\0\7\0\1", *, back: bool = False, bad: bool = False) -> bytes:
    """An ICMP message whose id is 7 unless `rest` says otherwise."""
    return ip(1, packets.icmp(kind, code, rest, bad=bad), back=back)


def icmpv6(
    kind: int, code: int = 0, rest: bytes = b"\0\7\0\1", *, back: bool = False, bad: bool = False, hop_limit: int = 255
) -> bytes:
    source, target = ends(6, back)
    return packets.ip(source, target, 58, packets.icmpv6(source, target, kind, code, rest, bad=bad), hop_limit)


def error(quoted: bytes, kind: int = 3, code: int = 1, *, source: bytes = b"", target: bytes = b"") -> bytes:
    """An ICMP or ICMPv6 error about a packet, by default from a router on the way to the packet's sender."""
    family = quoted[0] >> 4
    source = source or STRANGER[family]
    if family == 4:
        return packets.ip(source, target or quoted[12:16], 1, packets.icmp(kind, code, bytes(4) + quoted))
    target = target or quoted[8:24]
    return packets.ip(source, target, 58, packets.icmpv6(source, target, kind, code, bytes(4) + quoted))


def gre(version: int = 0, protocol: int = 0x0800, key: bytes = b"", *, back: bool = False) -> bytes:
    return ip(47, struct.pack(">HH", 0x2000 | version, protocol) + key, back=back)


def sctp(vtag: int, *chunks: bytes, back: bool = False, bad: bool = False, family: int = 4) -> bytes:
    ports = (DPORT, SPORT) if back else (SPORT, DPORT)
    return ip(132, packets.sctp(*ports, vtag, chunks, bad=bad), back=back, family=family)


def sctp_init(tag: int) -> bytes:
    """The value of an INIT or INIT ACK chunk that announces a tag."""
    return struct.pack(">IIHHI", tag, 65535, 1, 1, 1)


class Talk:
    """A tracker and a clock. Every packet that is sent leaves the router: what is new is confirmed."""

    def __init__(self, **settings: int) -> None:
        sysctl = Sysctl()
        for name, value in settings.items():
            assert hasattr(sysctl, name), name
            setattr(sysctl, name, value)
        self.net = Conntrack(sysctl)
        self.now_ms = START_MS
        self.last: Conn | None = None  # connection of the last packet

    def send(self, data: bytes, checksum: bool = True) -> int:
        """Track a packet and confirm its connection; returns its ctinfo."""
        ctinfo, ct = conntrack_in(self.net, data, checksum, self.now_ms)
        if ct is not None and not ct.status & (IPS_CONFIRMED | IPS_DYING):
            assert confirm(self.net, ct, self.now_ms) == NF_ACCEPT
        self.last = ct
        return ctinfo

    def wait(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)

    def find(self, data: bytes) -> Conn | None:
        """The confirmed connection of a packet."""
        return self.net.table.find(get_tuple(data, 0), self.now_ms)

    def the(self) -> Conn:
        """The one connection in the table."""
        (ct,) = self.net.table.connections()
        return ct

    def timeout(self) -> float:
        """Seconds that the one connection has left."""
        return (self.the().expires_ms - self.now_ms) / 1000

    def status(self, bit: int) -> bool:
        return self.the().status & bit != 0


class TcpTalk(Talk):
    """A TCP conversation in relative numbers: each side's SYN is number 0, so its first data byte is 1."""

    def __init__(self, client_isn: int = 1_000_000, server_isn: int = 5_000_000, **settings: int) -> None:
        super().__init__(**settings)
        self.client_isn = client_isn
        self.server_isn = server_isn

    def client(
        self, flags: int, seq: int, ack: int = 0, win: int = 8192, data: bytes = b"", options: bytes = b""
    ) -> int:
        """A segment of the client; without ACK the acknowledgement field is zero."""
        raw_ack = self.server_isn + ack if flags & ACK else 0
        return self.send(tcp(flags, self.client_isn + seq, raw_ack, win, data=data, options=options))

    def server(
        self, flags: int, seq: int, ack: int = 0, win: int = 8192, data: bytes = b"", options: bytes = b""
    ) -> int:
        raw_ack = self.client_isn + ack if flags & ACK else 0
        return self.send(tcp(flags, self.server_isn + seq, raw_ack, win, data=data, options=options, back=True))

    def handshake(self, win: int = 8192, client_options: bytes = b"", server_options: bytes = b"") -> None:
        self.client(SYN, 0, win=win, options=client_options)
        self.server(SYN | ACK, 0, 1, win=win, options=server_options)
        self.client(ACK, 1, 1, win=win)

    def close(self) -> None:
        """Close in order after a handshake without data: TIME_WAIT after it."""
        self.client(FIN | ACK, 1, 1)
        self.server(ACK, 1, 2)
        self.server(FIN | ACK, 1, 2)
        self.client(ACK, 2, 2)

    def reset(self) -> None:
        """Abort after a handshake without data: CLOSE after it, the client's doing."""
        self.client(RST, 1)

    def tcp(self) -> TcpConn:
        ct = self.the()
        assert isinstance(ct, TcpConn)
        return ct

    def state(self) -> str:
        return STATE_NAMES[self.tcp().state]
