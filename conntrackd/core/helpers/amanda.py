"""Amanda [nf_conntrack_amanda.c]: the answer to a backup server names the ports for data, messages and index.

CONNECT DATA 1025 MESG 1026 INDEX 1027
"""

from typing import Final

from conntrackd.const import IPPROTO_TCP, IPPROTO_UDP, NF_ACCEPT, NF_DROP
from conntrackd.core.conn import Conn, refresh
from conntrackd.core.expect import ANY_PORT, EXPECT_OK, expect_from
from conntrackd.core.helper import Helper, Message, Policy
from conntrackd.core.helpers.text import number_at
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import destination, source

MASTER_TIMEOUT_MS: Final = 300_000  # answers may take long
STREAMS: Final = (b"DATA ", b"MESG ", b"INDEX ", b"STATE ")
PORT_DIGITS: Final = 5


class Amanda(Helper):
    """The helper "amanda"."""

    def __init__(self) -> None:
        super().__init__("amanda", (IPPROTO_UDP,), [Policy("", 4, 180_000)])

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Read an answer; returns NF_ACCEPT or NF_DROP."""
        if not message.reply:
            return NF_ACCEPT
        refresh(ct, MASTER_TIMEOUT_MS, now_ms)
        verdict = NF_ACCEPT
        for port in announced_ports(message.payload):
            expect = expect_from(ct, 0, IPPROTO_TCP, source(ct.orig), ANY_PORT, destination(ct.orig), port)
            if net.table.expectations.insert(expect, False, net.sysctl.expect_max, now_ms) != EXPECT_OK:
                verdict = NF_DROP
        return verdict


def announced_ports(payload: bytes) -> list[int]:
    """List the ports of the streams on the first line with CONNECT, in the order of STREAMS."""
    start = payload.find(b"CONNECT ")
    if start < 0:
        return []
    start += len(b"CONNECT ")
    stop = payload.find(b"\n", start)
    if stop < 0:
        return []
    ports: list[int] = []
    for stream in STREAMS:
        at = payload.find(stream, start, stop)
        if at < 0:
            continue
        at += len(stream)
        port, _ = number_at(payload[: min(stop, at + PORT_DIGITS)], at)
        port &= 0xFFFF
        if port == 0:
            break
        ports.append(port)
    return ports
