"""REJECT: the answer to a packet that may not pass [nf_reject_ipv4.c, nf_reject_ipv6.c].

A TCP segment is answered by a RST that its sender will believe, anything else by an ICMP error that quotes it. Nothing
is answered that must not be: errors, resets, and what was sent to many (RFC 1122 3.2.2, RFC 4443 2.4).
"""

from typing import Final

from conntrackd.const import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP
from conntrackd.wire.checksum import checksum
from conntrackd.wire.fields import u32
from conntrackd.wire.ip import packet_length, transport

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10

TTL: Final = 64
DONT_FRAGMENT: Final = 0x4000
ICMP_UNREACHABLE: Final = 3
ICMPV6_UNREACHABLE: Final = 1
# Codes of "unreachable" (RFC 792, RFC 1812 5.2.7.1; RFC 4443 3.1).
CODES4: Final = {"auto": 3, "port-unreachable": 3, "host-unreachable": 1, "admin-prohibited": 13}
CODES6: Final = {"auto": 4, "port-unreachable": 4, "host-unreachable": 3, "admin-prohibited": 1}
QUOTED4: Final = 548  # an error is no longer than 576 bytes (RFC 1812 4.3.2.3)
QUOTED6: Final = 1232  # an error is no longer than 1280 bytes (RFC 4443 3.1)


class Answer:
    """What is to be sent: a whole packet, or an ICMP message for which the kernel chooses the source."""

    def __init__(self, whole: bool, ipv6: bool, destination: bytes, iif: int, data: bytes) -> None:
        self.whole = whole
        self.ipv6 = ipv6
        self.destination = destination
        self.iif = iif  # where the refused packet came in: the scope of a link-local destination
        self.data = data


def answer(data: bytes, how: str, iif: int) -> Answer | None:
    """Make the answer to a refused packet; None for one that gets none. `how` is `reject_with` of the rule."""
    length = packet_length(data)
    dataoff, protonum = transport(data[:length], 0) if length else (-1, 0)
    if dataoff < 0 or len(data) < dataoff + 8:
        return None
    ipv6 = data[0] >> 4 == 6
    source = data[8:24] if ipv6 else data[12:16]
    destination = data[24:40] if ipv6 else data[16:20]
    if to_many(source) or to_many(destination) or not any_bit(source):
        return None
    if protonum == IPPROTO_TCP and (how == "auto" or how == "tcp-reset"):
        reset = tcp_reset(data, dataoff, length)
        return Answer(True, ipv6, source, iif, reset) if reset else None
    kind = data[dataoff]
    # An error is not answered by an error: types 3, 4, 5, 11, 12, and of ICMPv6 all below 128.
    if protonum == IPPROTO_ICMP and (kind == 3 or kind == 4 or kind == 5 or kind == 11 or kind == 12):
        return None
    if protonum == IPPROTO_ICMPV6 and kind < 128:
        return None
    if ipv6:
        # The kernel fills in the checksum, for it is the one who chooses the source.
        message = bytes((ICMPV6_UNREACHABLE, CODES6[how], 0, 0, 0, 0, 0, 0)) + data[: min(length, QUOTED6)]
        return Answer(False, True, source, iif, message)
    head = bytes((ICMP_UNREACHABLE, CODES4[how]))
    body = b"\0\0\0\0" + data[: min(length, QUOTED4)]
    return Answer(False, False, source, iif, head + checksum(head + b"\0\0" + body) + body)


def to_many(address: bytes) -> bool:
    """Whether an address is multicast or the limited broadcast."""
    if len(address) == 16:
        return address[0] == 0xFF
    return address[0] >= 224


def any_bit(address: bytes) -> bool:
    """Whether an address is not the unspecified one."""
    return int.from_bytes(address, "big") != 0


def tcp_reset(data: bytes, dataoff: int, length: int) -> bytes:
    """Write the RST that answers a segment (RFC 9293 3.10.7.1), IP header and all; b"" if none may."""
    if len(data) < dataoff + 20:
        return b""
    flags = data[dataoff + 13]
    if flags & RST:
        return b""
    if flags & ACK:
        numbers = data[dataoff + 8 : dataoff + 12] + b"\0\0\0\0"
        answer_flags = RST
    else:
        # It acknowledges all that the segment takes of the sequence space.
        taken = length - dataoff - (data[dataoff + 12] >> 4 << 2)
        taken += (flags & SYN != 0) + (flags & FIN != 0)
        numbers = b"\0\0\0\0" + (u32(data, dataoff + 4) + taken & 0xFFFFFFFF).to_bytes(4, "big")
        answer_flags = RST | ACK
    ports = data[dataoff + 2 : dataoff + 4] + data[dataoff : dataoff + 2]
    head = ports + numbers + bytes((0x50, answer_flags, 0, 0))
    if data[0] >> 4 == 4:
        addresses = data[16:20] + data[12:16]
        segment = head + checksum(addresses + bytes((0, IPPROTO_TCP, 0, 20)) + head + b"\0\0\0\0") + b"\0\0"
        ip = b"\x45\0\0\x28\0\0" + DONT_FRAGMENT.to_bytes(2, "big") + bytes((TTL, IPPROTO_TCP))
        return ip + checksum(ip + b"\0\0" + addresses) + addresses + segment
    addresses = data[24:40] + data[8:24]
    pseudo = addresses + bytes((0, 0, 0, 20, 0, 0, 0, IPPROTO_TCP))
    segment = head + checksum(pseudo + head + b"\0\0\0\0") + b"\0\0"
    return b"\x60\0\0\0" + bytes((0, 20, IPPROTO_TCP, TTL)) + addresses + segment
