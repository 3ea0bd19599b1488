"""TFTP (RFC 1350) [nf_conntrack_tftp.c]: the server answers a request from a port of its choice."""

from typing import Final

from conntrackd.const import IPPROTO_UDP, NF_ACCEPT, NF_DROP
from conntrackd.core.conn import Conn
from conntrackd.core.expect import ANY_PORT, EXPECT_OK, expect_from
from conntrackd.core.helper import Helper, Message, Policy
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import destination, source
from conntrackd.wire.fields import u16

READ: Final = 1
WRITE: Final = 2


class Tftp(Helper):
    """The helper "tftp"."""

    def __init__(self) -> None:
        super().__init__("tftp", (IPPROTO_UDP,), [Policy("", 1, 300_000)])

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Expect the answer to a request; returns NF_ACCEPT or NF_DROP."""
        payload = message.payload
        if len(payload) < 2 or (u16(payload, 0) != READ and u16(payload, 0) != WRITE):
            return NF_ACCEPT
        reply = ct.reply
        client_port = u16(reply, len(reply) - 2)
        expect = expect_from(ct, 0, IPPROTO_UDP, source(reply), ANY_PORT, destination(reply), client_port)
        inserted = net.table.expectations.insert(expect, False, net.sysctl.expect_max, now_ms)
        return NF_ACCEPT if inserted == EXPECT_OK else NF_DROP
