"""UDP and UDPLite conversations: queries, streams, one-way traffic, broken lengths and checksums."""

import struct

from conntrackd.const import IPPROTO_UDP, IPPROTO_UDPLITE
from tests.differential import packets
from tests.differential.generate.path import CLIENT, SERVER, Conversation, Path


def converse(path: Path) -> Conversation:
    return _converse(path, IPPROTO_UDP)


def converse_lite(path: Path) -> Conversation:
    return _converse(path, IPPROTO_UDPLITE)


def _converse(path: Path, proto: int) -> Conversation:
    rng = path.rng
    flows = [
        rng.choice(((rng.randrange(65536), 53), (rng.randrange(65536), rng.randrange(65536)), (0, 0), (5, 5)))
        for _ in range(rng.choice((1, 1, 1, 2, 3)))
    ]
    for flow in flows:
        path.watch(proto, CLIENT, struct.pack(">HH", *flow))
    replies = rng.choice((0.0, 0.1, 0.5, 0.5, 0.8, 1.0))  # share of packets that the server sends
    broken = rng.choice((0.0, 0.0, 0.1, 0.4))
    for _ in range(rng.choice((1, 2, 3, 6, 15))):
        flow = rng.choice(flows)
        side = SERVER if path.chance(replies) else CLIENT
        ports = flow if side == CLIENT else flow[::-1]
        saddr, daddr = path.ends[side], path.ends[1 - side]
        payload = rng.randbytes(rng.choice((0, 1, 2, 33, 512, 1400, 5000)))
        spoiled = len(payload) < 3000 and path.chance(broken)
        build = _udp if proto == IPPROTO_UDP else _udplite
        path.send(side, proto, build(path, saddr, daddr, ports, payload, spoiled))
        if path.chance(0.1):
            path.error()
        if path.chance(0.05):
            path.again()
    return path.finish()


def _udp(path: Path, saddr: bytes, daddr: bytes, ports: tuple[int, int], payload: bytes, broken: bool) -> bytes:
    rng = path.rng
    if not broken:
        return packets.udp(saddr, daddr, *ports, payload, zero=path.chance(0.1))
    size = 8 + len(payload)
    match rng.randrange(5):
        case 0:
            return packets.udp(saddr, daddr, *ports, payload, bad=True)
        case 1:
            length = rng.choice((0, 1, 7, 8, 9, size - 1, size + 1, 65535))
            return packets.udp(saddr, daddr, *ports, payload, length=length)
        case 2:
            length = rng.choice((7, 8, size - 1, size + 1))
            return packets.udp(saddr, daddr, *ports, payload, length=length, zero=True)
        case 3:
            return packets.udp(saddr, daddr, *ports, payload)[: rng.randrange(9)]
        case _:
            return packets.udp(saddr, daddr, *ports, payload, zero=True)


def _udplite(path: Path, saddr: bytes, daddr: bytes, ports: tuple[int, int], payload: bytes, broken: bool) -> bytes:
    rng = path.rng
    size = 8 + len(payload)
    coverage = rng.choice((0, 0, 8, size, rng.randrange(8, size + 1)))
    if not broken:
        return packets.udplite(saddr, daddr, *ports, payload, coverage=coverage)
    match rng.randrange(5):
        case 0:
            return packets.udplite(saddr, daddr, *ports, payload, coverage=coverage, rfc=True)
        case 1:
            return packets.udplite(saddr, daddr, *ports, payload, coverage=coverage, bad=True)
        case 2:
            coverage = rng.choice((1, 7, size + 1, 65535))
            return packets.udplite(saddr, daddr, *ports, payload, coverage=coverage)
        case 3:
            return packets.udplite(saddr, daddr, *ports, payload, coverage=coverage, zero=True)
        case _:
            return packets.udplite(saddr, daddr, *ports, payload)[: rng.randrange(9)]
