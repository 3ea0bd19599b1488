"""GRE [nf_conntrack_proto_gre.c]: version 0 is one flow per pair of addresses, version 1 (PPTP) one per call id."""

from mypy_extensions import mypyc_attr

from conntrackd.const import IP_CT_DIR_REPLY, IPS_ASSURED, IPS_SEEN_REPLY, NF_ACCEPT
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.core.sysctl import Sysctl


@mypyc_attr(acyclic=True)
class GreConn(Conn):
    """A GRE flow. The timeouts are its own because a PPTP helper gives its calls longer ones."""

    def __init__(self, orig: bytes, reply: bytes, protonum: int, now_ms: int) -> None:
        super().__init__(orig, reply, protonum, now_ms)
        self.timeout_ms = 0
        self.stream_timeout_ms = 0


def set_timeouts(ct: GreConn, sysctl: Sysctl) -> None:
    """Give a flow the timeouts of these settings; a PPTP call keeps those that its helper gave it."""
    if ct.master is None:
        ct.timeout_ms = sysctl.gre_timeout
        ct.stream_timeout_ms = sysctl.gre_timeout_stream


def gre_packet(net: Conntrack, ct: GreConn, length: int, direction: int, now_ms: int) -> int:
    """Track a GRE packet [nf_conntrack_gre_packet]; returns NF_ACCEPT."""
    if ct.timeout_ms == 0:
        set_timeouts(ct, settings_of(net, ct))
    if ct.status & IPS_SEEN_REPLY:
        refresh(ct, ct.stream_timeout_ms, now_ms)
        ct.status |= IPS_ASSURED
    else:
        refresh(ct, ct.timeout_ms, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
