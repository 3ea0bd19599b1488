"""UDP [nf_conntrack_proto_udp.c]."""

from typing import Final

from mypy_extensions import mypyc_attr

from conntrackd.const import (
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_UDP_LENGTH,
    IP_CT_DIR_REPLY,
    IPPROTO_UDP,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
)
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.wire.checksum import checksum_ok
from conntrackd.wire.fields import u16

HEADER: Final = 8
# A flow is a stream when it still has packets both ways after this long: a DNS question and its answer is none,
# and must not hold the table for the stream's longer timeout.
STREAM_AFTER_MS: Final = 2_000


@mypyc_attr(acyclic=True)
class UdpConn(Conn):
    """A UDP flow."""

    def __init__(self, orig: bytes, reply: bytes, protonum: int, now_ms: int) -> None:
        super().__init__(orig, reply, protonum, now_ms)
        self.stream_ms = now_ms + STREAM_AFTER_MS


def udp_error(data: bytes, dataoff: int, length: int, checksum: bool) -> int:
    """Check the header (RFC 768); returns an INVALID reason, or 0."""
    if len(data) < dataoff + HEADER:
        return INVALID_L4_TRUNCATED
    udp_length = u16(data, dataoff + 4)
    if udp_length < HEADER or udp_length > length - dataoff:
        return INVALID_UDP_LENGTH
    # Zero means "not computed", also over IPv6: whether that is allowed there (RFC 8200 8.1) is the receiver's say.
    if checksum and u16(data, dataoff + 6) != 0 and len(data) == length:
        if not checksum_ok(data, dataoff, length, length - dataoff, IPPROTO_UDP):
            return INVALID_BAD_CHECKSUM
    return 0


def udp_packet(
    net: Conntrack,
    ct: UdpConn,
    data: bytes,
    dataoff: int,
    length: int,
    direction: int,
    checksum: bool,
    now_ms: int,
) -> int:
    """Track a UDP packet [nf_conntrack_udp_packet]; returns NF_ACCEPT or an INVALID reason."""
    reason = udp_error(data, dataoff, length, checksum)
    if reason:
        return reason
    sysctl = settings_of(net, ct)
    if not ct.status & IPS_CONFIRMED:
        ct.stream_ms = now_ms + STREAM_AFTER_MS
    if ct.status & IPS_SEEN_REPLY:
        if now_ms > ct.stream_ms:
            refresh(ct, sysctl.udp_timeout_stream, now_ms)
            ct.status |= IPS_ASSURED
        else:
            refresh(ct, sysctl.udp_timeout, now_ms)
    else:
        refresh(ct, sysctl.udp_timeout, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
