"""The tuple: what names one direction of a connection [struct nf_conntrack_tuple].

A tuple is bytes cut from the wire, 13 for IPv4 and 37 for IPv6 (the length tells the family):

    protocol (1)  source address  destination address  source port (2)  destination port (2)

ICMP has id (2), type (1) and code (1) in place of the ports, GRE its two keys, any other protocol zeros. Bytes are
compact, need no parsing, and are hashed with a key of the process, so nobody outside can aim at one bucket.
"""

from ipaddress import ip_address
from typing import Final

from conntrackd.const import (
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPPROTO_UDPLITE,
)
from conntrackd.wire.fields import u16
from conntrackd.wire.ip import addresses, packet_length, transport

NO_PORTS: Final = b"\0\0\0\0"

GRE_VERSION: Final = 0x0007
GRE_VERSION_PPTP: Final = 1
GRE_PROTO_PPP: Final = 0x880B

PROTOCOL_NAMES: Final = {
    IPPROTO_ICMP: "icmp",
    IPPROTO_TCP: "tcp",
    IPPROTO_UDP: "udp",
    IPPROTO_GRE: "gre",
    IPPROTO_ICMPV6: "icmpv6",
    IPPROTO_SCTP: "sctp",
    IPPROTO_UDPLITE: "udplite",
}


def transport_part(data: bytes, dataoff: int, protonum: int) -> bytes:
    """Cut the last four bytes of the tuple from the transport header at `dataoff` [nf_ct_get_tuple].

    Returns b"" when the header is too short, or is GRE's of PPTP's version and carries no PPP.
    """
    if protonum == IPPROTO_TCP or protonum == IPPROTO_UDP:
        ports = data[dataoff : dataoff + 4]
        return ports if len(ports) == 4 else b""
    if protonum == IPPROTO_ICMP or protonum == IPPROTO_ICMPV6:
        if len(data) < dataoff + 8:
            return b""
        return data[dataoff + 4 : dataoff + 6] + data[dataoff : dataoff + 2]
    if protonum == IPPROTO_SCTP or protonum == IPPROTO_UDPLITE:
        ports = data[dataoff : dataoff + 4]
        return ports if len(ports) == 4 else b""
    if protonum == IPPROTO_GRE:
        return gre_keys(data, dataoff)
    return NO_PORTS


def gre_keys(data: bytes, dataoff: int) -> bytes:
    """Cut the keys of a GRE packet: a call id for PPTP (RFC 2637 4.1), else zeros [gre_pkt_to_tuple]."""
    if not names_call(data, dataoff):
        return NO_PORTS
    if u16(data, dataoff + 2) != GRE_PROTO_PPP:
        return b""
    return b"\0\0" + data[dataoff + 6 : dataoff + 8]


def names_call(data: bytes, dataoff: int) -> bool:
    """Whether a GRE header is PPTP's, with a call id in it; zero is one, too."""
    return len(data) >= dataoff + 8 and u16(data, dataoff) & GRE_VERSION == GRE_VERSION_PPTP


def get_tuple(data: bytes, at: int) -> bytes:
    """Read the tuple of the packet at `at`, or of one that an ICMP error quotes there [nf_ct_get_tuplepr].

    Returns b"" when the packet is too broken to have one.
    """
    if not data:
        return b""
    dataoff, protonum = transport(data, at)
    if dataoff < 0:
        return b""
    part = transport_part(data, dataoff, protonum)
    if not part:
        return b""
    return bytes((protonum,)) + addresses(data, at) + part


def packet_tuple(data: bytes) -> bytes:
    """Read the tuple of a packet as it was captured: padding behind it is not part of it [ip_rcv_core trims it off]."""
    return get_tuple(data[: packet_length(data)], 0)


def inverse_icmp_type(icmp_type: int) -> int:
    """Pair an ICMP query with its answer (RFC 792, RFC 950); -1 for a type that has no pair."""
    if icmp_type == 8:
        return 0
    if icmp_type == 0:
        return 8
    if icmp_type == 13 or icmp_type == 15 or icmp_type == 17:
        return icmp_type + 1
    if icmp_type == 14 or icmp_type == 16 or icmp_type == 18:
        return icmp_type - 1
    return -1


def inverse_icmpv6_type(icmp_type: int) -> int:
    """Pair an ICMPv6 query with its answer (RFC 4443 4, RFC 4620 4); -1 for a type that has no pair."""
    if icmp_type == 128 or icmp_type == 139:
        return icmp_type + 1
    if icmp_type == 129 or icmp_type == 140:
        return icmp_type - 1
    return -1


def invert(tuple_: bytes) -> bytes:
    """Return the tuple of the answer [nf_ct_invert_tuple]; b"" if nothing answers such a packet."""
    size = (len(tuple_) - 5) >> 1
    ports = 1 + 2 * size
    swapped = tuple_[:1] + tuple_[1 + size : ports] + tuple_[1 : 1 + size]
    protonum = tuple_[0]
    if protonum == IPPROTO_ICMP:
        answer = inverse_icmp_type(tuple_[ports + 2])
    elif protonum == IPPROTO_ICMPV6:
        answer = inverse_icmpv6_type(tuple_[ports + 2])
    else:
        return swapped + tuple_[ports + 2 :] + tuple_[ports : ports + 2]
    if answer < 0:
        return b""
    return swapped + tuple_[ports : ports + 2] + bytes((answer, tuple_[ports + 3]))


def source(tuple_: bytes) -> bytes:
    """Cut the source address out of a tuple."""
    return tuple_[1 : 1 + ((len(tuple_) - 5) >> 1)]


def destination(tuple_: bytes) -> bytes:
    """Cut the destination address out of a tuple."""
    size = (len(tuple_) - 5) >> 1
    return tuple_[1 + size : 1 + 2 * size]


def format_tuple(tuple_: bytes) -> str:
    """Write a tuple for people: `tcp 10.0.0.5:1234 > 1.1.1.1:443`. Not for the packet path."""
    size = (len(tuple_) - 5) >> 1
    protonum = tuple_[0]
    name = PROTOCOL_NAMES.get(protonum, f"proto-{protonum}")
    source = ip_address(tuple_[1 : 1 + size])
    target = ip_address(tuple_[1 + size : 1 + 2 * size])
    first, second = u16(tuple_, len(tuple_) - 4), u16(tuple_, len(tuple_) - 2)
    if protonum in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        return f"{name} {source} > {target} type {tuple_[-2]} code {tuple_[-1]} id {first}"
    if protonum not in PROTOCOL_NAMES:
        return f"{name} {source} > {target}"
    if size == 16:
        return f"{name} [{source}]:{first} > [{target}]:{second}"
    return f"{name} {source}:{first} > {target}:{second}"
