"""IRC [nf_conntrack_irc.c]: a client offers another one a direct connection (DCC) to itself.

    PRIVMSG friend :\\1DCC SEND file 167772165 1025\\1

The address is a decimal number. The offer must be the whole of the message, at the beginning of what the client sends:
text that somebody makes it repeat opens nothing.
"""

from typing import Final

from conntrackd.const import IPPROTO_TCP, NF_ACCEPT, NF_DROP
from conntrackd.core.conn import Conn
from conntrackd.core.expect import ANY_PORT, EXPECT_OK, expect_from
from conntrackd.core.helper import Helper, Message, Policy
from conntrackd.core.helpers.text import number_at
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import source

OFFERS: Final = (b"SEND ", b"CHAT ", b"MOVE ", b"TSEND ", b"SCHAT ")
PRIVMSG: Final = b"PRIVMSG "
SHORTEST_PRIVMSG: Final = 10  # with a receiver's name
SHORTEST_OFFER: Final = 26  # from the colon on
SHORTEST_END: Final = 12  # from the address on, with the newline


class Irc(Helper):
    """The helper "irc"."""

    def __init__(self) -> None:
        super().__init__("irc", (IPPROTO_TCP,), [Policy("", 8, 300_000)], ipv6=False)

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Read what the client sends; returns NF_ACCEPT or NF_DROP."""
        if message.reply:
            return NF_ACCEPT
        address, port = read_offer(message.payload)
        own = source(ct.orig)
        if address != own or port == 0:
            return NF_ACCEPT  # no offer, or a forged one
        expect = expect_from(ct, 0, IPPROTO_TCP, b"", ANY_PORT, own, port)
        inserted = net.table.expectations.insert(expect, False, net.sysctl.expect_max, now_ms)
        return NF_ACCEPT if inserted == EXPECT_OK else NF_DROP


def read_offer(payload: bytes) -> tuple[bytes, int]:
    """Read the address and port of an offer; b"" if there is none."""
    at = 0
    limit = len(payload) - SHORTEST_PRIVMSG
    while at < limit and payload[at] in b" \r\n":
        at += 1
    if at < limit:
        if payload[at : at + len(PRIVMSG)].upper() != PRIVMSG:
            return b"", 0
        at += len(PRIVMSG)
    at = payload.find(b" :", at)
    if at < 0 or at >= len(payload) - SHORTEST_OFFER or payload[at + 2 : at + 7] != b"\1DCC ":
        return b"", 0
    at += 7
    for offer in OFFERS:
        if payload.startswith(offer, at):
            return read_end(payload, at + len(offer))
    return b"", 0


def read_end(payload: bytes, at: int) -> tuple[bytes, int]:
    """Read ` address port` behind the argument that begins at `at` [parse_dcc]."""
    at = payload.find(b" ", at) + 1
    if at == 0 or at > len(payload) - SHORTEST_END:
        return b"", 0
    if payload.find(b"\n", at) < 0:
        return b"", 0
    address, at = number_at(payload, at)
    while at < len(payload) and payload[at] == 0x20:
        at += 1
    port, at = number_at(payload, at)
    return (address & 0xFFFFFFFF).to_bytes(4, "big"), port & 0xFFFF
