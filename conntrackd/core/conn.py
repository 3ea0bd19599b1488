"""One connection: the kernel's `struct nf_conn`.

Protocols that keep more than the fields here extend the class in their own file (`proto/tcp.py`: TcpConn), so a
connection is one object whatever it carries.
"""

from typing import TYPE_CHECKING

from mypy_extensions import i32, i64, mypyc_attr, u8

from conntrackd.const import IPS_CONFIRMED, IPS_FIXED_TIMEOUT

if TYPE_CHECKING:
    from conntrackd.core.account import Account
    from conntrackd.core.helper import Help


# Compiled, the garbage collector does not look at connections: the table takes those that end out of their rings.
@mypyc_attr(acyclic=True)
class Conn:
    """A connection, in the table under both of its tuples once it is confirmed.

    Times are integer milliseconds of the monotonic clock that the edge hands in. Bytes count from the IP header on.
    """

    def __init__(self, orig: bytes, reply: bytes, protonum: int, now_ms: int) -> None:
        # Immutable: what the connection is.
        self.orig = orig
        self.reply = reply
        self.created_ms = now_ms
        # Set once: at confirm.
        self.id = 0
        self.rule = ""  # name of the rule that admitted it
        self.account: Account | None = None  # what it counts on, from then to its end
        self.master: Conn | None = None  # the connection that announced it
        # Mutable: its neighbours in the rings that it stands in (core/chain.py), and what has become of it. What every
        # packet needs stands together, as far as it goes: where the table is big, each line of memory takes its time.
        self.mark = 0
        self.older: Conn | None = None
        self.earlier: Conn | None = None
        self.later: Conn | None = None
        self.newer: Conn | None = None
        self.help: Help | None = None  # what its helper keeps, if it has one
        self.expires_ms = 0  # as `timeout` in the kernel: relative until confirmed, a point in time after
        self.seen_ms = now_ms  # its last packet
        self.packets_orig = 0
        self.bytes_orig = 0
        self.packets_reply = 0
        self.bytes_reply = 0
        # Small numbers together, of four bytes and of one: compiled, they share words.
        self.zone: i32 = 0  # conntrack zone: the same tuple in another zone is another connection
        self.iif: i32 = 0  # interface index the first packet came in by; 0 = the router itself
        self.oif: i32 = 0  # interface index it left by; 0 = the router itself
        self.status: i32 = 0
        self.generation: i32 = 0  # of the policy that admitted it
        self.protonum: u8 = protonum
        self.state: u8 = 0  # of its protocol; 0 where the protocol has none
        self.ending: u8 = 0  # CLOSED_FIN or CLOSED_RST from when it began to end; such a one may be evicted
        self.timeouts: u8 = 0  # which settings it lives by: 0 = the tracker's, else net.timeouts[n - 1]
        # One byte of a packet's tuple tells its direction; neither of ours need be read for it.
        at = first_difference(orig, reply)
        self.differs_at: u8 = u8(at)
        self.orig_there: u8 = u8(orig[at]) if at else u8(255 - protonum)  # equal tuples are replies, as in the kernel


def first_difference(one: bytes, other: bytes) -> i64:
    """Give the first index at which two tuples differ; 0, where the protocol is, if nowhere."""
    size: i64 = len(one)
    at: i64 = 1
    while at < size:
        if one[at] != other[at]:
            return at
        at += 1
    return 0


def is_reply(ct: Conn, key: bytes) -> bool:
    """Whether a tuple that is one of the connection's is its reply."""
    return key[ct.differs_at] != ct.orig_there


def refresh(ct: Conn, timeout_ms: int, now_ms: int) -> None:
    """Give the connection `timeout_ms` more to live [__nf_ct_refresh_acct]; relative until it is confirmed."""
    if ct.status & IPS_FIXED_TIMEOUT:
        return
    if ct.status & IPS_CONFIRMED:
        ct.expires_ms = now_ms + timeout_ms
    else:
        ct.expires_ms = timeout_ms


def account(ct: Conn, reply: bool, length: int) -> None:
    """Count a packet of `length` bytes, IP header included, on its direction [nf_ct_acct_update]."""
    if reply:
        ct.packets_reply += 1
        ct.bytes_reply += length
    else:
        ct.packets_orig += 1
        ct.bytes_orig += length
