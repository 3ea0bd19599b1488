"""SANE, scanners over the network [nf_conntrack_sane.c]: the answer to SANE_NET_START names the port for the image."""

from typing import Final

from conntrackd.const import IPPROTO_TCP, NF_ACCEPT, NF_DROP
from conntrackd.core.conn import Conn
from conntrackd.core.expect import ANY_PORT, EXPECT_OK, expect_from
from conntrackd.core.helper import Help, Helper, Message, Policy
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import destination, source
from conntrackd.wire.fields import u16, u32

REQUEST_LENGTH: Final = 8  # code, handle
NET_START: Final = 7
REPLY_LENGTH: Final = 8  # status, zero, port; more follows
STATUS_SUCCESS: Final = 0


class SaneHelp(Help):
    """Whether the next answer is one to SANE_NET_START."""

    def __init__(self, helper: Helper) -> None:
        super().__init__(helper)
        self.start_requested = False

    def freeze(self) -> bytes:
        """Write it as one byte."""
        return b"\1" if self.start_requested else b"\0"

    def thaw(self, kept: bytes) -> bool:
        """Remember what `freeze` wrote; False if it is not that."""
        self.start_requested = kept == b"\1"
        return len(kept) == 1


class Sane(Helper):
    """The helper "sane"."""

    def __init__(self) -> None:
        super().__init__("sane", (IPPROTO_TCP,), [Policy("", 1, 300_000)])

    def new_help(self) -> Help:
        """Make what a control connection keeps."""
        return SaneHelp(self)

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Read a request or an answer; returns NF_ACCEPT or NF_DROP."""
        info = ct.help
        assert isinstance(info, SaneHelp)
        payload = message.payload
        if not message.reply:
            if len(payload) + message.missing == REQUEST_LENGTH:
                info.start_requested = len(payload) >= 4 and u32(payload, 0) == NET_START
            return NF_ACCEPT
        if not info.start_requested:
            return NF_ACCEPT
        info.start_requested = False
        if len(payload) < REPLY_LENGTH or u32(payload, 0) != STATUS_SUCCESS or u16(payload, 4) != 0:
            return NF_ACCEPT
        port = u16(payload, 6)
        expect = expect_from(ct, 0, IPPROTO_TCP, source(ct.orig), ANY_PORT, destination(ct.orig), port)
        inserted = net.table.expectations.insert(expect, False, net.sysctl.expect_max, now_ms)
        return NF_ACCEPT if inserted == EXPECT_OK else NF_DROP
