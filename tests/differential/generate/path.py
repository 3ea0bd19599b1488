"""What all conversations share: two ends, a seeded dice, the packets so far, and trouble on the IP layer."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from conntrackd.const import IPPROTO_ICMP, IPPROTO_ICMPV6
from tests.differential import packets
from tests.differential.kernel import CLIENT, SERVER

V4_ERRORS: Final = (3, 4, 5, 11, 12)
V6_ERRORS: Final = (1, 2, 3, 4, 99, 127)


_GROUPS: Final = {
    4: (bytes((224, 0, 0, 1)), bytes((224, 0, 0, 5)), bytes((255, 255, 255, 255)), bytes((127, 0, 0, 1)), bytes(4)),
    6: (bytes.fromhex("ff02" + "0" * 27 + "1"), bytes.fromhex("ff0e" + "0" * 27 + "5"), bytes(15) + b"\x01", bytes(16)),
}


@dataclass
class Step:
    """One packet of a conversation: what it waits for, by which device it enters."""

    side: int
    delay_ms: int
    data: bytes


@dataclass
class Conversation:
    """A replayable conversation. `watch`: the tuples whose entries are compared after every packet."""

    seed: int
    index: int
    protocol: str
    profile: str
    steps: list[Step] = field(default_factory=list)
    watch: list[bytes] = field(default_factory=list)


def addresses(index: int, family: int) -> tuple[bytes, bytes, bytes]:
    """Client, server and a router in the middle that only this conversation has."""
    low = (index + 1) & 0x7FFFFF
    if family == 4:
        return (
            (0x0A000000 | low).to_bytes(4, "big"),
            (0x0A800000 | low).to_bytes(4, "big"),
            (0xAC100000 | low & 0xFFFFF).to_bytes(4, "big"),
        )
    tail = low.to_bytes(4, "big")
    prefixes = (b"\xfd\x0a", b"\xfd\x0b", b"\xfd\x0c")
    client, server, middle = (prefix + bytes(10) + tail for prefix in prefixes)
    return client, server, middle


class Path:
    """Writes a conversation. `side` is always the sender of what is sent."""

    def __init__(self, rng: random.Random, conversation: Conversation, slow: bool) -> None:
        self.rng = rng
        self.conversation = conversation
        self.family = rng.choice((4, 6))
        self.slow = slow  # waits matter to the settings of this conversation
        client, server, self.middle = addresses(conversation.index, self.family)
        special = rng.random()
        if special < 0.02:  # the router itself is the server
            server = b"\xc0\x00\x02\x01" if self.family == 4 else bytes.fromhex("20010db8" + "0" * 23 + "1")
        elif special < 0.03:  # a group, of which the router may be a member, or everybody
            server = rng.choice(_GROUPS[self.family])
        elif special < 0.04:  # from and to the same address
            server = client
        self.ends = (client, server)
        self.trouble = rng.choice((0.0, 0.0, 0.01, 0.1))  # share of packets that the IP layer spoils
        self.wrapped = rng.random() < 0.15  # often with IP options or extension headers
        self.sent: list[tuple[int, bytes]] = []  # whole datagrams with their sides, for duplicates and errors
        self._delay = 0
        self._patience = 6000  # ms that this conversation may wait in all

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def wait(self) -> None:
        """Between two packets: mostly nothing, at times long enough for something to expire or to become a stream."""
        if self.slow and self._patience > 0 and self.chance(0.15):
            delay = self.rng.choice((350, 700, 1300, 1300, 2350, 3300))
        elif self._patience > 0 and self.chance(0.004):
            delay = 2350
        else:
            delay = self.rng.choice((0, 0, 0, 0, 0, 1, 2, 3))
        self._patience -= delay
        self._delay += delay

    def watch(self, proto: int, side: int, ports: bytes) -> None:
        """Compares the entry of the flow that `side` would open with these ports (or ICMP id, type, code)."""
        saddr, daddr = self.ends[side], self.ends[1 - side]
        key = bytes([proto]) + saddr + daddr + ports
        if key not in self.conversation.watch:
            self.conversation.watch.append(key)

    # --- sending ------------------------------------------------------------------------------------------------

    def send(self, side: int, proto: int, payload: bytes) -> None:
        """One datagram of the conversation proper; the IP layer may spoil it."""
        saddr, daddr = self.ends[side], self.ends[1 - side]
        # Nobody could tell that the checksum of a packet is wrong that the capture cuts: those stay whole.
        if len(payload) < 3000 and self.chance(self.trouble):
            self.rng.choice(_TROUBLES)(self, side, saddr, daddr, proto, payload)
            return
        if len(payload) < 3000 and self.wrapped and self.chance(0.4):
            _extended(self, side, saddr, daddr, proto, payload)
            return
        self.put(side, packets.ip(saddr, daddr, proto, payload))

    def put(self, side: int, packet: bytes) -> None:
        """A finished datagram, whole or (if it is long enough) sometimes in fragments."""
        self.sent.append((side, packet))
        header = 20 if self.family == 4 else 40
        plain = packet[0] == 0x45 or (self.family == 6 and packet[6] not in (0, 43, 44, 51, 60))
        if plain and len(packet) > header + 16 and self.chance(self.trouble / 2):
            for piece in self._fragments(packet, header):
                self.raw(side, piece)
        else:
            self.raw(side, packet)

    def raw(self, side: int, packet: bytes) -> None:
        self.wait()
        self.conversation.steps.append(Step(side, self._delay, packet))
        self._delay = 0

    def _fragments(self, packet: bytes, header: int) -> list[bytes]:
        eighths = range(8, len(packet) - header, 8)
        cuts = sorted(self.rng.sample(eighths, min(len(eighths), self.rng.randrange(1, 4))))
        ident = self.rng.getrandbits(32)
        pieces = packets.fragments(packet, cuts, ident)
        match self.rng.randrange(8):
            case 0:
                self.rng.shuffle(pieces)
            case 1:
                pieces.reverse()
            case 2:
                pieces.pop(self.rng.randrange(len(pieces)))
            case 3:
                pieces.append(self.rng.choice(pieces))
            case 4:  # the same bytes cut elsewhere: overlaps
                other = sorted(self.rng.sample(eighths, 1))
                pieces.insert(1, packets.fragments(packet, other, ident)[self.rng.randrange(2)])
            case 5:  # one byte too many before the last fragment: not a multiple of 8
                pieces[0] = packets.ip(packet[12:16], packet[16:20], packet[9], b"x" * 9) if header == 20 else pieces[0]
        return pieces

    def again(self) -> None:
        """A datagram of before once more, by either device."""
        if self.sent:
            side, packet = self.rng.choice(self.sent[-6:])
            self.put(side, packet)

    # --- ICMP errors --------------------------------------------------------------------------------------------

    def error(self) -> None:
        """An ICMP error about a datagram so far: by its receiver or a router on the way, right or wrong."""
        if not self.sent:
            return
        rng = self.rng
        side, inner = rng.choice(self.sent[-5:])
        saddr, daddr = self.ends[side], self.ends[1 - side]
        source = rng.choice((daddr, self.middle, self.middle))
        target = saddr
        if self.chance(0.1):
            target = rng.choice((daddr, self.middle))
        header = 20 if self.family == 4 else 40
        inner = inner[:1200]
        if self.chance(0.4):
            inner = inner[: header + rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24))]
        elif self.chance(0.1):
            inner = inner[: rng.randrange(header)]
        if self.chance(0.05) and self.family == 4 and len(inner) > 8:  # the first fragment, or a later one
            inner = inner[:6] + rng.choice((b"\x20\x00", b"\x20\x10", b"\x00\x10")) + inner[8:]
        if self.chance(0.15) and len(inner) > 4:
            spoiled = bytearray(inner)
            for _ in range(rng.randrange(1, 3)):
                spoiled[rng.randrange(min(len(inner), header + 8))] = rng.getrandbits(8)
            inner = bytes(spoiled)
        if self.family == 4:
            kind = rng.choice(V4_ERRORS)
            message = packets.icmp(kind, rng.randrange(4), rng.randbytes(4) + inner, bad=self.chance(0.03))
            proto = IPPROTO_ICMP
        else:
            kind = rng.choice(V6_ERRORS)
            rest = rng.randbytes(4) + inner
            message = packets.icmpv6(source, target, kind, rng.randrange(4), rest, bad=self.chance(0.03))
            proto = IPPROTO_ICMPV6
        if self.chance(0.05):
            message = message[: rng.randrange(len(message))]
        packet = packets.ip(source, target, proto, message)
        self.put(rng.choice((1 - side, 1 - side, 1 - side, side)), packet)

    def finish(self) -> Conversation:
        return self.conversation


# --- trouble on the IP layer ------------------------------------------------------------------------------------


def _dying(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """The router sees it and must not send it on."""
    path.put(side, packets.ip(saddr, daddr, proto, payload, ttl=path.rng.choice((0, 1))))


def _padded(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """More bytes on the wire than the IP header says (Ethernet padding)."""
    path.put(side, packets.ip(saddr, daddr, proto, payload) + bytes(path.rng.randrange(1, 30)))


def _lengths(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """A wrong length field in the IP header."""
    wrong = path.rng.choice((0, len(payload) - 1, len(payload) // 2, len(payload) + 1, 8, 19, 20, 28))
    if path.family == 4:
        path.put(side, packets.ipv4(saddr, daddr, proto, payload, length=wrong + path.rng.choice((0, 20))))
    else:
        path.put(side, packets.ipv6(saddr, daddr, proto, payload, length=wrong))


def _short(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """The payload cut off, the IP length right."""
    path.put(side, packets.ip(saddr, daddr, proto, payload[: path.rng.randrange(len(payload) + 1)]))


def _other_proto(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """The other family's ICMP, whose handler must not take it."""
    del proto
    foreign = IPPROTO_ICMPV6 if path.family == 4 else IPPROTO_ICMP
    path.put(side, packets.ip(saddr, daddr, foreign, payload))


def _bits(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """One flipped bit in the payload; the checksum no longer matches."""
    if payload:
        spoiled = bytearray(payload)
        spoiled[path.rng.randrange(len(payload))] ^= 1 << path.rng.randrange(8)
        payload = bytes(spoiled)
    path.put(side, packets.ip(saddr, daddr, proto, payload))


_V4_OPTIONS: Final = (
    b"\x01\x01\x01\x00",
    b"\x94\x04\x00\x00",  # router alert
    b"\x07\x07\x04\x00\x00\x00\x00\x00",  # record route
    b"\x44\x0c\x05\x00" + bytes(8),  # timestamp
    b"\x83\x07\x04\x0a\x00\x00\x01\x00",  # loose source route
    b"\x07\x27\x04" + bytes(37),  # all 40 bytes
    b"\x99\x00\x00\x00",  # length zero
    b"\x07\x30\x04\x00",  # longer than the header
)


def _extended(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """IPv4 options or IPv6 extension headers, good and bad."""
    rng = path.rng
    if path.family == 4:
        if path.chance(0.2):
            path.put(side, packets.ipv4(saddr, daddr, proto, payload, words=rng.choice((0, 4, 6, 8, 15))))
        elif path.chance(0.1):
            path.put(side, packets.ipv4(saddr, daddr, proto, payload, bad=True))
        else:
            path.put(side, packets.ipv4(saddr, daddr, proto, payload, options=rng.choice(_V4_OPTIONS)))
        return
    headers: list[tuple[int, bytes]] = []
    for _ in range(rng.randrange(1, 5)):
        kind = rng.choice((packets.HOP_BY_HOP, packets.DEST_OPTS, packets.DEST_OPTS, packets.ROUTING, packets.AUTH))
        if kind == packets.HOP_BY_HOP and headers:
            continue
        if kind == packets.ROUTING:
            body = bytes([2, rng.choice((0, 2, 4)), rng.choice((0, 0, 1)), 0, 0, 0, 0]) + daddr
        elif kind == packets.AUTH:
            body = bytes([4, 0, 0]) + rng.randbytes(20)
        else:
            size = rng.choice((0, 0, 1, 3))
            body = bytes([size, 1, 4 + 8 * size, 0, 0, 0, 0]) + bytes(8 * size)  # one PadN
            if path.chance(0.1):
                body = bytes([rng.choice((size, 31, 255))]) + rng.randbytes(len(body) - 1)
        headers.append((kind, body))
    last = rng.randrange(10)
    if last == 0:
        headers.append((packets.NO_NEXT, b""))
    elif last == 1:  # an atomic fragment
        headers.append((packets.FRAGMENT, struct.pack(">BHI", 0, 0, rng.getrandbits(32))))
    elif last == 2:
        headers.append((packets.MOBILITY, bytes(7)))
    kind, extended = packets.extended(headers, proto, payload)
    if path.chance(0.1):
        extended = extended[: rng.randrange(rng.choice((12, len(extended))))]
    length = 0 if path.chance(0.1) else None  # as of a jumbogram, if hop-by-hop options come first
    path.put(side, packets.ipv6(saddr, daddr, kind, extended, length=length))


def _version(path: Path, side: int, saddr: bytes, daddr: bytes, proto: int, payload: bytes) -> None:
    """A version nibble that does not fit the header."""
    packet = packets.ip(saddr, daddr, proto, payload)
    path.raw(side, bytes([path.rng.choice((0x05, 0x45, 0x65, 0x75))]) + packet[1:])


_TROUBLES: Final[tuple[Callable[[Path, int, bytes, bytes, int, bytes], None], ...]] = (
    _dying,
    _padded,
    _lengths,
    _short,
    _other_proto,
    _bits,
    _extended,
    _extended,
    _extended,
    _version,
)

__all__ = ["CLIENT", "SERVER", "Conversation", "Path", "Step"]
