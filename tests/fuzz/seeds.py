"""Valid conversations of every protocol, for fuzzing to begin with. Each is (from the server?, packet) in order."""

from tests.differential import packets
from tests.differential.packets import ACK, DEST_OPTS, FIN, FRAGMENT, HOP_BY_HOP, PSH, RST, SYN, chunk
from tests.unit import craft
from tests.unit.craft import CLIENT, SERVER, error, gre, icmp, icmpv6, ip, sctp, sctp_init, tcp, udp, udplite

Conversation = list[tuple[bool, bytes]]

TCP_OPTIONS = bytes.fromhex("020405b4 0402 080a 00000001 00000000 01 030307")
SACK_BLOCK = bytes.fromhex("0101050a 000003f0 000003f8")


def tcp_life(family: int) -> Conversation:
    segments: list[tuple[bool, int, int, int, bytes, bytes]] = [
        (False, SYN, 1000, 0, TCP_OPTIONS, b""),
        (True, SYN | ACK, 5000, 1001, TCP_OPTIONS, b""),
        (False, ACK, 1001, 5001, b"", b""),
        (False, PSH | ACK, 1001, 5001, b"", b"GET / HTTP/1.0\r\n\r\n"),
        (True, ACK, 5001, 1001, SACK_BLOCK, b""),
        (True, PSH | ACK, 5001, 1019, b"", b"HTTP/1.0 200 OK\r\n\r\n"),
        (False, FIN | ACK, 1019, 5020, b"", b""),
        (True, ACK, 5020, 1020, b"", b""),
        (True, FIN | ACK, 5020, 1020, b"", b""),
        (False, ACK, 1020, 5021, b"", b""),
        (False, SYN, 900_000, 0, TCP_OPTIONS, b""),
        (True, RST | ACK, 0, 900_001, b"", b""),
    ]
    return [
        (back, tcp(flags, seq, ack, options=options, data=data, back=back, family=family))
        for back, flags, seq, ack, options, data in segments
    ]


def tcp_games() -> Conversation:
    """Simultaneous open, an ignored SYN, a challenge ACK, inexact resets."""
    segments = [
        (False, SYN, 1000, 0),
        (True, SYN, 5000, 0),
        (False, SYN | ACK, 1000, 5001),
        (True, ACK, 5001, 1001),
        (False, SYN, 700_000, 0),
        (True, ACK, 5001, 1001),
        (True, SYN | ACK, 800_000, 700_001),
        (False, RST, 1200, 0),
        (False, ACK, 700_001, 800_001),
        (True, RST, 800_100, 0),
    ]
    return [(back, tcp(flags, seq, ack, back=back)) for back, flags, seq, ack in segments]


def sctp_life() -> Conversation:
    client, server = 0x11111111, 0x22222222
    steps = [
        (False, 0, [chunk(1, 0, sctp_init(client))]),
        (True, client, [chunk(2, 0, sctp_init(server))]),
        (False, server, [chunk(10, 0, b"cookie"), chunk(0, 3, bytes(12) + b"data")]),
        (True, client, [chunk(11), chunk(3, 0, bytes(12))]),
        (False, server, [chunk(4, 0, bytes(8))]),
        (True, client, [chunk(5, 0, bytes(8))]),
        (False, server, [chunk(7, 0, bytes(4))]),
        (True, client, [chunk(8)]),
        (False, server, [chunk(14)]),
        (True, server, [chunk(6, 1)]),
    ]
    return [(back, sctp(vtag, *chunks, back=back)) for back, vtag, chunks in steps]


def conversations() -> list[Conversation]:
    v6_udp = udp(b"x", family=6)
    redirect = bytes(4) + SERVER[6] + SERVER[6] + bytes((4, 8)) + bytes(6) + v6_udp
    link_local = bytes((0xFE, 0x80)) + bytes(14)
    chain = [(HOP_BY_HOP, bytes.fromhex("00050200000100")), (DEST_OPTS, bytes.fromhex("00010400000000"))]
    atomic = [(FRAGMENT, bytes(7))]
    return [
        tcp_life(4),
        tcp_life(6),
        tcp_games(),
        [(False, udp(b"x")), (True, udp(b"y", back=True)), (False, udp(b"z")), (True, error(udp(b"x")))],
        [(False, v6_udp), (True, udp(b"y", family=6, back=True)), (True, error(v6_udp, 1))],
        [(False, udplite(b"four", coverage=8)), (True, udplite(b"four", coverage=12, back=True))],
        [(False, icmp(8)), (True, icmp(0, back=True)), (True, error(icmp(8), 11, 0))],
        [(False, icmpv6(128)), (True, icmpv6(129, back=True)), (False, icmpv6(135, rest=bytes(20)))],
        [
            (False, v6_udp),
            (True, packets.ip(link_local, CLIENT[6], 58, packets.icmpv6(link_local, CLIENT[6], 137, 0, redirect), 255)),
        ],
        sctp_life(),
        [(False, gre()), (True, gre(back=True)), (False, gre(1, 0x880B, bytes(4)))],
        [(False, ip(50, bytes(16))), (True, ip(50, bytes(16), back=True))],
        [(False, packets.ipv6(CLIENT[6], SERVER[6], *packets.extended(chain, 17, v6_udp[40:])))],
        [(False, packets.ipv6(CLIENT[6], SERVER[6], *packets.extended(atomic, 17, v6_udp[40:])))],
        [(False, piece) for piece in packets.fragments(craft.udp(bytes(64)), [24, 48], 9)],
    ]
