"""GRE of both versions, and the protocols that the tracker knows only by their addresses."""

import struct
from typing import Final

from conntrackd.const import IPPROTO_GRE
from tests.differential.generate.path import CLIENT, Conversation, Path

_PROTOCOLS: Final = (2, 4, 33, 41, 50, 88, 89, 103, 112, 115, 253, 254, 255)
_PPTP: Final = 0x880B


def converse_gre(path: Path) -> Conversation:
    rng = path.rng
    calls = [rng.randrange(65536) for _ in range(2)]
    path.watch(IPPROTO_GRE, CLIENT, bytes(4))
    for side in (0, 1):
        for call in calls:
            path.watch(IPPROTO_GRE, side, struct.pack(">HH", 0, call))
    pptp = path.chance(0.5)
    for _ in range(rng.choice((1, 2, 4, 8))):
        side = rng.choice((0, 0, 1))
        if path.chance(0.1):
            header = rng.randbytes(rng.randrange(20))  # any version, any flags, any length
        elif pptp:
            protocol = _PPTP if path.chance(0.95) else 0x0800
            header = struct.pack(">HHHH", rng.choice((0x2001, 0x3001, 0x3081)), protocol, 8, rng.choice(calls)) + bytes(
                16
            )
        else:
            header = struct.pack(">HH", rng.choice((0, 0x2000, 0xB000)), 0x0800) + rng.randbytes(24)
        if path.chance(0.1):
            header = header[: rng.randrange(len(header) + 1)]
        path.send(side, IPPROTO_GRE, header)
        if path.chance(0.1):
            path.error()
    return path.finish()


def converse_generic(path: Path) -> Conversation:
    rng = path.rng
    protocols = rng.sample(_PROTOCOLS, rng.choice((1, 1, 2)))
    for proto in protocols:
        path.watch(proto, CLIENT, bytes(4))
    for _ in range(rng.choice((1, 2, 5))):
        path.send(rng.randrange(2), rng.choice(protocols), rng.randbytes(rng.choice((0, 1, 4, 8, 40, 1000))))
        if path.chance(0.1):
            path.error()
    return path.finish()
