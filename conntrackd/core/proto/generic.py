"""Any protocol without a tracker of its own: its addresses are the connection [nf_conntrack_proto_generic.c]."""

from conntrackd.const import IP_CT_DIR_REPLY, NF_ACCEPT
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of


def generic_packet(net: Conntrack, ct: Conn, length: int, direction: int, now_ms: int) -> int:
    """Track a packet of a protocol that is not read; returns NF_ACCEPT."""
    refresh(ct, settings_of(net, ct).generic_timeout, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
