"""ICMPv6 [nf_conntrack_proto_icmpv6.c]: errors and queries as in icmp.py, and what is never tracked."""

from typing import Final

from conntrackd.const import (
    INVALID_ICMP_CHECKSUM,
    INVALID_ICMP_FAMILY,
    INVALID_ICMP_NEW,
    INVALID_ICMP_TRUNCATED,
    INVALID_ICMPV6_REDIRECT,
    IP_CT_DIR_REPLY,
    IP_CT_UNTRACKED,
    IPPROTO_ICMPV6,
    NF_ACCEPT,
)
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.core.proto.icmp import HEADER, NOT_AN_ERROR, related_to_quoted
from conntrackd.wire.checksum import checksum_ok

REDIRECT: Final = 137
REDIRECT_MESSAGE: Final = 40  # header, target, destination (RFC 4861 4.5)
ND_OPTION_REDIRECTED_HEADER: Final = 4


def icmpv6_error(
    net: Conntrack, data: bytes, dataoff: int, length: int, checksum: bool, zone: int, now_ms: int
) -> tuple[int, Conn | None]:
    """Handle an ICMPv6 error, a redirect, or what is never tracked [nf_conntrack_icmpv6_error].

    Returns as icmp_error does, and UNTRACKED for neighbour discovery and multicast listeners: they belong to the link.
    """
    if len(data) < dataoff + HEADER:
        return INVALID_ICMP_TRUNCATED, None
    if checksum and len(data) == length and not checksum_ok(data, dataoff, length, length - dataoff, IPPROTO_ICMPV6):
        return INVALID_ICMP_CHECKSUM, None
    icmp_type = data[dataoff]
    if icmp_type < 128:
        return related_to_quoted(net, data, dataoff + HEADER, data[24:40], zone, now_ms)
    if (icmp_type <= 136 and icmp_type >= 130) or icmp_type == 143 or icmp_type == 151 or icmp_type == 152:
        return IP_CT_UNTRACKED, None  # MLD (RFC 2710, RFC 3810), NDP (RFC 4861), router discovery (RFC 4286)
    if icmp_type == REDIRECT:
        return icmpv6_redirect(net, data, dataoff, zone, now_ms)
    return NOT_AN_ERROR, None


def icmpv6_redirect(net: Conntrack, data: bytes, dataoff: int, zone: int, now_ms: int) -> tuple[int, Conn | None]:
    """Handle a redirect: only a link's own router may send one (RFC 4861 8.1) [nf_conntrack_icmpv6_redirect]."""
    if len(data) < dataoff + REDIRECT_MESSAGE:
        return INVALID_ICMP_TRUNCATED, None
    if data[dataoff + 1] != 0:
        return NOT_AN_ERROR, None
    if data[7] != 255 or data[8] != 0xFE or data[9] & 0xC0 != 0x80:
        return INVALID_ICMPV6_REDIRECT, None
    option = dataoff + REDIRECT_MESSAGE
    if len(data) < option + 2 or data[option + 1] == 0:
        return INVALID_ICMPV6_REDIRECT, None
    if data[option] != ND_OPTION_REDIRECTED_HEADER:
        return NOT_AN_ERROR, None
    return related_to_quoted(net, data, option + 8, data[24:40], zone, now_ms)


def icmpv6_packet(net: Conntrack, ct: Conn, version: int, length: int, direction: int, now_ms: int) -> int:
    """Track a query or an answer [nf_conntrack_icmpv6_packet]; returns NF_ACCEPT or an INVALID reason."""
    if version != 6:
        return INVALID_ICMP_FAMILY
    query = ct.orig[-2]
    if query != 128 and query != 139:  # echo (RFC 4443 4.1), node information (RFC 4620 4)
        return INVALID_ICMP_NEW
    refresh(ct, settings_of(net, ct).icmpv6_timeout, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
