"""ICMP and ICMPv6 conversations: queries and their answers, errors about them, neighbour discovery, nonsense."""

import struct
from typing import Final

from conntrackd.const import IPPROTO_ICMP, IPPROTO_ICMPV6
from tests.differential import packets
from tests.differential.generate.path import CLIENT, SERVER, Conversation, Path

_V4_QUERIES: Final = ((8, 0), (8, 0), (8, 0), (13, 14), (15, 16), (17, 18))
_V6_QUERIES: Final = ((128, 129), (128, 129), (128, 129), (139, 140))
_V6_DISCOVERY: Final = (130, 131, 132, 133, 134, 135, 136, 143, 151, 152, 153)
_ALL_NODES: Final = bytes.fromhex("ff02" + "0" * 27 + "1")
_LINK_LOCAL: Final = bytes.fromhex("fe80" + "0" * 27 + "7")


def _put(path: Path, side: int, kind: int, code: int, rest: bytes, bad: bool = False) -> None:
    saddr, daddr = path.ends[side], path.ends[1 - side]
    if path.family == 4:
        path.send(side, IPPROTO_ICMP, packets.icmp(kind, code, rest, bad=bad))
    else:
        path.send(side, IPPROTO_ICMPV6, packets.icmpv6(saddr, daddr, kind, code, rest, bad=bad))


def converse(path: Path) -> Conversation:
    rng = path.rng
    queries = _V4_QUERIES if path.family == 4 else _V6_QUERIES
    proto = IPPROTO_ICMP if path.family == 4 else IPPROTO_ICMPV6
    flows = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kinds, code, ident = rng.choice(queries), rng.choice((0, 0, 0, 0, 1, 255)), rng.randbytes(2)
        flows.append((kinds, code, ident))
        path.watch(proto, CLIENT, ident + bytes([kinds[0], code]))
        path.watch(proto, SERVER, ident + bytes([kinds[0], code]))
    for number in range(rng.choice((1, 2, 4, 10))):
        kinds, code, ident = rng.choice(flows)
        side = rng.choice((CLIENT, CLIENT, CLIENT, SERVER))
        rest = ident + struct.pack(">H", number) + rng.randbytes(rng.choice((0, 4, 12, 56, 1400, 5000)))
        act = rng.random()
        if act < 0.65:
            _put(path, side, kinds[0], code, rest, bad=len(rest) < 3000 and path.chance(0.03))
            if path.chance(0.7):
                _put(path, 1 - side, kinds[1], code, rest)
        elif act < 0.75:  # an answer that fits nothing
            _put(path, side, kinds[1], rng.choice((code, 1)), rng.choice((rest, rng.randbytes(8))))
        elif act < 0.80:
            _put(path, side, rng.randrange(256), rng.choice((0, 0, 1, rng.randrange(256))), rest)
        elif act < 0.83:
            _put(path, side, rng.randrange(20), 0, rest[: rng.randrange(8)])
        elif act < 0.90 or path.family == 4:
            path.error()
        elif path.chance(0.3):
            _discovery(path)
        else:
            _redirect(path)
        if path.chance(0.1):
            path.again()
    return path.finish()


def _discovery(path: Path) -> None:
    rng = path.rng
    kind = rng.choice(_V6_DISCOVERY)
    saddr = rng.choice((_LINK_LOCAL, path.ends[0]))
    daddr = rng.choice((_ALL_NODES, path.ends[1]))
    message = packets.icmpv6(saddr, daddr, kind, 0, rng.randbytes(rng.choice((4, 20, 28))), bad=path.chance(0.2))
    path.put(CLIENT, packets.ipv6(saddr, daddr, IPPROTO_ICMPV6, message, hop_limit=rng.choice((255, 255, 1, 64))))


def _redirect(path: Path) -> None:
    """A redirect as a router on the link sends it, about a packet so far; each field may be wrong."""
    if not path.sent:
        return
    rng = path.rng
    side, inner = rng.choice(path.sent[-5:])
    saddr = _LINK_LOCAL
    if path.chance(0.15):  # fe80::/10 is link-local, its neighbours are not
        first = rng.choice((b"\xfe\xbf", b"\xfe\xc0", b"\xfd\x80"))
        saddr = rng.choice((path.middle, first + bytes(13) + b"\x07"))
    daddr = path.ends[side] if path.chance(0.9) else path.ends[1 - side]
    inner = inner[:1200] + bytes(-len(inner[:1200]) % 8)
    kind = rng.choice((4, 4, 4, 4, 2, 1, 0))
    size = rng.choice(((8 + len(inner)) // 8,) * 5 + (0, 1, 255))
    option = struct.pack(">BB6x", kind, size & 255) + inner
    if path.chance(0.1):
        option = option[: rng.randrange(len(option))]
    if path.chance(0.1):
        option = b"\x02\x01" + bytes(6) + option
    rest = bytes(4) + path.middle + path.ends[1 - side] + option
    message = packets.icmpv6(saddr, daddr, 137, rng.choice((0, 0, 0, 0, 1)), rest, bad=path.chance(0.05))
    if path.chance(0.15):
        message = packets.icmpv6(saddr, daddr, 137, 0, rest[: rng.choice((4, 35, 36, 37, 38, 43, 44, 45, 83, 84))])
    path.put(1 - side, packets.ipv6(saddr, daddr, IPPROTO_ICMPV6, message, hop_limit=rng.choice((255, 255, 255, 64))))
