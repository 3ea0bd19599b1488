"""UDPLite [nf_conntrack_udplite_packet]: UDP whose checksum may leave the end of the payload out (RFC 3828)."""

from typing import Final

from conntrackd.const import (
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_UDPLITE_COVERAGE,
    INVALID_UDPLITE_NO_CHECKSUM,
    IP_CT_DIR_REPLY,
    IPPROTO_UDP,
    IPS_ASSURED,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
)
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.wire.checksum import checksum_ok
from conntrackd.wire.fields import u16

HEADER: Final = 8


def udplite_error(data: bytes, dataoff: int, length: int, checksum: bool) -> int:
    """Check the header (RFC 3828 3.1); returns an INVALID reason, or 0."""
    if len(data) < dataoff + HEADER:
        return INVALID_L4_TRUNCATED
    coverage = u16(data, dataoff + 4)
    if coverage == 0:
        coverage = length - dataoff
    elif coverage < HEADER or coverage > length - dataoff:
        return INVALID_UDPLITE_COVERAGE
    if u16(data, dataoff + 6) == 0:
        return INVALID_UDPLITE_NO_CHECKSUM
    if checksum and len(data) >= dataoff + coverage:
        # The kernel puts UDP's number in the pseudo-header here, not UDPLite's, and over IPv4 a length of 8 bits.
        pseudo = length - dataoff & 0xFF if data[0] >> 4 == 4 else length - dataoff
        if not checksum_ok(data, dataoff, dataoff + coverage, pseudo, IPPROTO_UDP):
            return INVALID_BAD_CHECKSUM
    return 0


def udplite_packet(
    net: Conntrack,
    ct: Conn,
    data: bytes,
    dataoff: int,
    length: int,
    direction: int,
    checksum: bool,
    now_ms: int,
) -> int:
    """Track a UDPLite packet [nf_conntrack_udplite_packet]; returns NF_ACCEPT or an INVALID reason."""
    reason = udplite_error(data, dataoff, length, checksum)
    if reason:
        return reason
    sysctl = settings_of(net, ct)
    if ct.status & IPS_SEEN_REPLY:
        refresh(ct, sysctl.udp_timeout_stream, now_ms)
        ct.status |= IPS_ASSURED
    else:
        refresh(ct, sysctl.udp_timeout, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
