"""ICMP, and what ICMP errors of both families share [nf_conntrack_proto_icmp.c].

A query and its answer are a connection of their own. An error message belongs to the connection of the packet that it
quotes: it is RELATED to it, changes nothing about it, and must be on its way to the sender of the quoted packet.
"""

from typing import Final

from conntrackd.const import (
    INVALID_ICMP_CHECKSUM,
    INVALID_ICMP_FAMILY,
    INVALID_ICMP_INNER_BROKEN,
    INVALID_ICMP_INNER_UNKNOWN,
    INVALID_ICMP_NEW,
    INVALID_ICMP_OUTER_MISMATCH,
    INVALID_ICMP_TRUNCATED,
    INVALID_ICMP_TYPE,
    IP_CT_DIR_REPLY,
    IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
    IPPROTO_ICMP,
    NF_ACCEPT,
)
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.core.tuples import destination, invert
from conntrackd.wire.checksum import checksum_ok

HEADER: Final = 8
ICMP_TYPE_MAX: Final = 18  # NR_ICMP_TYPES: the kernel calls anything above a mystery

NOT_AN_ERROR: Final = -1


def is_error(icmp_type: int) -> bool:
    """Whether a message is about another packet, which it quotes [icmp_is_err]."""
    # Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
    return icmp_type == 3 or icmp_type == 4 or icmp_type == 5 or icmp_type == 11 or icmp_type == 12


def icmp_error(
    net: Conntrack, data: bytes, dataoff: int, length: int, checksum: bool, zone: int, now_ms: int
) -> tuple[int, Conn | None]:
    """Handle an ICMP error message [nf_conntrack_icmpv4_error].

    Returns RELATED and the connection it is about, or an INVALID reason, or NOT_AN_ERROR for queries and answers.
    """
    if len(data) < dataoff + HEADER:
        return INVALID_ICMP_TRUNCATED, None
    if checksum and len(data) == length and not checksum_ok(data, dataoff, length, length - dataoff, IPPROTO_ICMP):
        return INVALID_ICMP_CHECKSUM, None
    icmp_type = data[dataoff]
    if icmp_type > ICMP_TYPE_MAX:
        return INVALID_ICMP_TYPE, None
    if is_error(icmp_type):
        return related_to_quoted(net, data, dataoff + HEADER, data[16:20], zone, now_ms)
    return NOT_AN_ERROR, None


def related_to_quoted(
    net: Conntrack, data: bytes, quoted: int, outer_destination: bytes, zone: int, now_ms: int
) -> tuple[int, Conn | None]:
    """Find the connection of the packet quoted at `quoted` [nf_conntrack_inet_error].

    The quoted packet went one way and the error goes back: its inverse names the direction the error takes. Any router
    on the way may have sent the error, so its source says nothing; its destination must be that direction's.
    """
    sent = net.table.read_tuple(data, quoted, zone)
    back = invert(sent) if sent else b""
    if not back:
        return INVALID_ICMP_INNER_BROKEN, None
    ct = net.table.find(back, now_ms, zone)
    if ct is None:
        return INVALID_ICMP_INNER_UNKNOWN, None
    if destination(back) != outer_destination:
        return INVALID_ICMP_OUTER_MISMATCH, None
    return (IP_CT_RELATED_REPLY if back == ct.reply else IP_CT_RELATED), ct


def icmp_packet(net: Conntrack, ct: Conn, version: int, length: int, direction: int, now_ms: int) -> int:
    """Track a query or an answer [nf_conntrack_icmp_packet]; returns NF_ACCEPT or an INVALID reason."""
    if version != 4:
        return INVALID_ICMP_FAMILY
    query = ct.orig[-2]
    # Echo, timestamp, information, address mask (RFC 792, RFC 950). An answer begins nothing.
    if query != 8 and query != 13 and query != 15 and query != 17:
        return INVALID_ICMP_NEW
    refresh(ct, settings_of(net, ct).icmp_timeout, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
