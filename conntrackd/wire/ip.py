"""IPv4 and IPv6 headers (RFC 791, RFC 8200): where the transport header begins and how long the packet says it is.

`data` begins with the IP header and may hold less than the packet (NFQUEUE copies a bounded range), never more: the
caller cuts padding off with `packet_length`.
"""

from typing import Final

from conntrackd.const import INVALID_FRAGMENT, INVALID_IP_HEADER, INVALID_IPV6_EXTENSION
from conntrackd.wire.fields import u16

# IPv6 extension headers that are skipped to find the transport header (RFC 8200 4.1) [ipv6_ext_hdr].
HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51
NO_NEXT_HEADER: Final = 59
DESTINATION: Final = 60

# A packet quoted in another may be a first fragment: its transport header is in it, and only a later one is refused. A
# packet that is to be tracked has been reassembled in front of us; any fragment means that it was not.
IPV4_FRAGMENT: Final = 0x3FFF  # more fragments, offset (RFC 791 3.1)
IPV4_FRAGMENT_OFFSET: Final = 0x1FFF
IPV6_FRAGMENT: Final = 0xFFF9  # offset, more fragments (RFC 8200 4.5); neither in an atomic fragment (RFC 6946)
IPV6_FRAGMENT_OFFSET: Final = 0xFFF8

# Extension headers are 8 bytes or more and a capture is bounded, so the walk is too; this bound is for packets
# handed in whole (64 KiB of empty headers would be 8192 turns).
EXTENSIONS_MAX: Final = 512


def packet_length(data: bytes) -> int:
    """Return the packet's length in bytes by its own header, IP header included; 0 if the header is unusable.

    Segments that the kernel has put together may be longer than 16 bits can say ("BIG TCP"); their header says 0, and
    it is as much as there is. So it is for an IPv6 jumbogram, whose length stands in an option (RFC 2675).
    """
    size = len(data)
    if size >= 20 and data[0] >> 4 == 4:
        return u16(data, 2) or size
    if size >= 40 and data[0] >> 4 == 6:
        payload = u16(data, 4)
        return size if payload == 0 and data[6] == HOP_BY_HOP else 40 + payload
    return 0


def ipv4_transport(data: bytes, at: int) -> int:
    """Find the transport header of the IPv4 packet at `at` [ipv4_get_l4proto].

    Returns its offset, or the negated INVALID reason.
    """
    if len(data) < at + 20:
        return -INVALID_IP_HEADER
    if u16(data, at + 6) & (IPV4_FRAGMENT if at == 0 else IPV4_FRAGMENT_OFFSET):
        return -INVALID_FRAGMENT
    offset = at + ((data[at] & 0x0F) << 2)
    if offset > len(data) or (at == 0 and offset < 20):  # nobody checked a quoted header, and the kernel does not
        return -INVALID_IP_HEADER
    return offset


def ipv6_transport(data: bytes, at: int) -> tuple[int, int]:
    """Find the transport header of the IPv6 packet at `at` [ipv6_skip_exthdr].

    Returns its offset and protocol number, or the negated INVALID reason and 0.
    """
    size = len(data)
    if size < at + 40:
        return -INVALID_IP_HEADER, 0
    protonum = data[at + 6]
    offset = at + 40
    for _ in range(EXTENSIONS_MAX):
        if protonum in (HOP_BY_HOP, ROUTING, DESTINATION):
            if size < offset + 2:
                return -INVALID_IPV6_EXTENSION, 0
            protonum, offset = data[offset], offset + ((data[offset + 1] + 1) << 3)
        elif protonum == FRAGMENT:
            if size < offset + 4:
                return -INVALID_IPV6_EXTENSION, 0
            if u16(data, offset + 2) & (IPV6_FRAGMENT if at == 0 else IPV6_FRAGMENT_OFFSET):
                return -INVALID_FRAGMENT, 0
            protonum, offset = data[offset], offset + 8
        elif protonum == AUTHENTICATION:  # its length counts words, less two (RFC 4302 2.2)
            if size < offset + 2:
                return -INVALID_IPV6_EXTENSION, 0
            protonum, offset = data[offset], offset + ((data[offset + 1] + 2) << 2)
        elif protonum == NO_NEXT_HEADER:
            return -INVALID_IPV6_EXTENSION, 0
        else:
            return offset, protonum
    return -INVALID_IPV6_EXTENSION, 0


def transport(data: bytes, at: int) -> tuple[int, int]:
    """Find the transport header of the packet at `at`: its offset and protocol, or the negated reason and 0.

    A packet quoted in another has the family of the packet around it, so the first byte of `data` tells.
    """
    if data[0] >> 4 == 4:
        offset = ipv4_transport(data, at)
        return offset, data[at + 9] if offset > 0 else 0
    return ipv6_transport(data, at)


def addresses(data: bytes, at: int) -> bytes:
    """Cut source and destination address out of the IP header at `at`."""
    if data[0] >> 4 == 4:
        return data[at + 12 : at + 20]
    return data[at + 8 : at + 40]
