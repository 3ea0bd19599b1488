"""Broadcast queries of the router itself [nf_conntrack_broadcast.c]: anyone of the network may answer, not the address.

Of the protocols that do so only the port is known here: NetBIOS name service and SNMP.
"""

from conntrackd.const import IPPROTO_UDP, NF_ACCEPT
from conntrackd.core.conn import Conn, refresh
from conntrackd.core.expect import EXPECT_PERMANENT, Expect
from conntrackd.core.helper import Helper, Message, Policy
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import destination


class Broadcast(Helper):
    """A helper of this kind: its name, the port that is asked, and how long answers may take."""

    def __init__(self, name: str, port: int, timeout_ms: int) -> None:
        super().__init__(name, (IPPROTO_UDP,), [Policy("", 1, timeout_ms)], ipv6=False)
        self.port = port
        self.timeout_ms = timeout_ms

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Expect answers from everywhere in the network that was asked; returns NF_ACCEPT."""
        if message.reply or ct.iif != 0:
            return NF_ACCEPT
        network_mask = net.broadcasts.get(destination(ct.orig))
        if network_mask is None:
            return NF_ACCEPT
        tuple_ = ct.reply[:9] + self.port.to_bytes(2, "big") + ct.reply[11:]
        mask = b"\xff" + network_mask + b"\xff" * 8
        expect = Expect(ct, 0, tuple_, mask, EXPECT_PERMANENT)
        net.table.expectations.insert(expect, False, net.sysctl.expect_max, now_ms)
        refresh(ct, self.timeout_ms, now_ms)
        return NF_ACCEPT
