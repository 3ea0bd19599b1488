"""A TCP connection: what is kept of it between two segments [struct ip_ct_tcp].

A connection keeps its two sides packed, two numbers of 32 bits in one of 64. Among a million connections nearly every
line of memory that a packet needs comes from afar; as objects of their own the sides would be four lines more. For
a segment they are unpacked into two peers, as its sender and its receiver, and packed again when it is judged.
"""

from typing import Final

from mypy_extensions import i32, i64, mypyc_attr, u8

from conntrackd.const import IP_CT_DIR_ORIGINAL
from conntrackd.core.conn import Conn
from conntrackd.core.proto.tcp_states import NONE_SET

MASK: Final = 0xFFFFFFFF

# TcpPeer.flags, TcpConn.last_flags [IP_CT_TCP_FLAG_*, IP_CT_EXP_CHALLENGE_ACK, IP_CT_TCP_SIMULTANEOUS_OPEN]
FLAG_WINDOW_SCALE: Final = 0x01
FLAG_SACK_PERM: Final = 0x02
FLAG_CLOSE_INIT: Final = 0x04  # this side began to close
FLAG_BE_LIBERAL: Final = 0x08  # window failures of this side are accepted
FLAG_DATA_UNACKNOWLEDGED: Final = 0x10
FLAG_MAXACK_SET: Final = 0x20
FLAG_EXP_CHALLENGE_ACK: Final = 0x40
FLAG_SIMULTANEOUS_OPEN: Final = 0x80


@mypyc_attr(acyclic=True)  # numbers only: nothing for the garbage collector
class TcpPeer:
    """What one side has sent and may send [struct ip_ct_tcp_state]. Sequence numbers modulo 2^32."""

    def __init__(self) -> None:
        self.end: i64 = 0  # highest sequence number sent, plus one
        self.maxend: i64 = 0  # highest that the other side allowed, plus one
        self.maxwin: i64 = 0  # largest window offered, in bytes; 0 = nothing seen of this side
        self.maxack: i64 = 0  # highest acknowledgement sent, valid with FLAG_MAXACK_SET
        self.scale = 0
        self.flags = 0


@mypyc_attr(acyclic=True)
class TcpConn(Conn):
    """A TCP connection."""

    def __init__(self, orig: bytes, reply: bytes, protonum: int, now_ms: int) -> None:
        super().__init__(orig, reply, protonum, now_ms)
        # The last segment that mattered, to recognise its retransmission or the answer to it. Compiled, its small
        # numbers share words with those of Conn.
        self.last_direction: u8 = IP_CT_DIR_ORIGINAL
        self.last_index: u8 = NONE_SET
        self.last_scale: u8 = 0
        self.last_flags: u8 = 0
        # Both sides (`unpack`).
        self.orig_scale: u8 = 0
        self.orig_flags: u8 = 0
        self.reply_scale: u8 = 0
        self.reply_flags: u8 = 0
        self.retrans: u8 = 0  # retransmissions of the last segment; begins anew after 255, as in the kernel
        self.last_win: i32 = 0  # as on the wire, not scaled
        self.last_seq = 0
        self.last_ack = 0
        self.last_end = 0
        self.orig_ends: i64 = 0
        self.orig_offers: i64 = 0
        self.reply_ends: i64 = 0
        self.reply_offers: i64 = 0


def unpack(ct: TcpConn, direction: int, sender: TcpPeer, receiver: TcpPeer) -> None:
    """Give the two sides of a connection to those who judge a segment of this direction."""
    if direction == IP_CT_DIR_ORIGINAL:
        original, replier = sender, receiver
    else:
        original, replier = receiver, sender
    numbers = ct.orig_ends
    original.end = numbers >> 32 & MASK
    original.maxend = numbers & MASK
    numbers = ct.orig_offers
    original.maxwin = numbers >> 32 & MASK
    original.maxack = numbers & MASK
    original.scale = ct.orig_scale
    original.flags = ct.orig_flags
    numbers = ct.reply_ends
    replier.end = numbers >> 32 & MASK
    replier.maxend = numbers & MASK
    numbers = ct.reply_offers
    replier.maxwin = numbers >> 32 & MASK
    replier.maxack = numbers & MASK
    replier.scale = ct.reply_scale
    replier.flags = ct.reply_flags


def pack(ct: TcpConn, direction: int, sender: TcpPeer, receiver: TcpPeer) -> None:
    """Keep what a segment of this direction has changed about the two sides."""
    if direction == IP_CT_DIR_ORIGINAL:
        original, replier = sender, receiver
    else:
        original, replier = receiver, sender
    ct.orig_ends = original.end << 32 | original.maxend
    ct.orig_offers = (original.maxwin & MASK) << 32 | original.maxack
    ct.orig_scale = original.scale
    ct.orig_flags = original.flags
    ct.reply_ends = replier.end << 32 | replier.maxend
    ct.reply_offers = (replier.maxwin & MASK) << 32 | replier.maxack
    ct.reply_scale = replier.scale
    ct.reply_flags = replier.flags


def sides(ct: TcpConn) -> tuple[TcpPeer, TcpPeer]:
    """Return copies of the opener's side and of the answerer's."""
    original, replier = TcpPeer(), TcpPeer()
    unpack(ct, IP_CT_DIR_ORIGINAL, original, replier)
    return original, replier


def forget_windows(ct: TcpConn) -> None:
    """Take the numbers as they come again, and judge mildly as after a pickup: packets have passed unseen."""
    ct.orig_ends = ct.orig_offers = ct.reply_ends = ct.reply_offers = 0
    kept: u8 = FLAG_WINDOW_SCALE | FLAG_SACK_PERM | FLAG_CLOSE_INIT
    ct.orig_flags = ct.orig_flags & kept | FLAG_BE_LIBERAL
    ct.reply_flags = ct.reply_flags & kept | FLAG_BE_LIBERAL
    ct.last_index = NONE_SET
    ct.last_flags = 0
    ct.retrans = 0
