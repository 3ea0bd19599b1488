"""Connections and expectations as bytes, and back: the rows of a snapshot (daemon/snapshot.py has the file).

A row holds all that the next packet of the connection is judged by. What many rows have in common, the names of rules,
helpers and interfaces, is written once and then named by its number. Times are those of the clock of who wrote them;
who reads them says by how much his differs. A reply tuple is not written: it is the inverse of the original one.

Rows are read as input: what is cut, contradicts itself or is of a protocol state that there is not gives None.
"""

import struct
from typing import TYPE_CHECKING, Final

from conntrackd.const import (
    IP_CT_DIR_ORIGINAL,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_EXPECTED,
    IPS_FIXED_TIMEOUT,
    IPS_HELPER,
    IPS_SEEN_REPLY,
)
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import new_conn
from conntrackd.core.expect import Expect
from conntrackd.core.helpers import HELPERS
from conntrackd.core.proto.gre import GreConn
from conntrackd.core.proto.sctp import SctpConn
from conntrackd.core.proto.tcp import WINDOW_SCALE_MAX
from conntrackd.core.proto.tcp_conn import MASK, TcpConn, TcpPeer, pack, sides
from conntrackd.core.proto.udp import UdpConn
from conntrackd.core.tuples import invert

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bits that a restored connection may have. IPS_COUNTED is set anew by who counts it.
STATUS_KEPT: Final = IPS_EXPECTED | IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED | IPS_FIXED_TIMEOUT | IPS_HELPER
TUPLE_LENGTHS: Final = (13, 37)
LABELS_SIZE: Final = 16
LIFE_MAX_MS: Final = 1 << 40  # 35 years; what lives longer is written with this
NAMES_MAX: Final = 0xFFFF

# Size of the row, length of the tuple, whether labels follow, state, ending, zone; in, out; status, generation; rule,
# helper; mark; id, master; created, seen, expires; packets and bytes of the original direction and of the reply.
CONN: Final = struct.Struct("<HBBBBHHHIIHHIQQqqqQQQQ")
# Both peers: end, maxend, maxwin, maxack, scale, flags. Last segment: direction, index, seq, ack, end, win, scale,
# flags; retransmissions.
TCP: Final = struct.Struct("<IIIIBBIIIIBBBBIIIIBBI")
UDP: Final = struct.Struct("<q")
SCTP: Final = struct.Struct("<IIBBBB")
GRE: Final = struct.Struct("<II")
# Size, length of the tuple, class, flags, helper; master, expires.
EXPECT: Final = struct.Struct("<HBBHHQq")

TCP_STATES: Final = 9
TCP_INDEXES: Final = 5
SCTP_STATES: Final = 8


class Names:
    """Numbers for names, from 1 on; 0 is no name. `fresh` are those that nobody has been told of yet."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"": 0}
        self.fresh: list[str] = []
        self.interfaces: dict[int, int] = {0: 0}  # numbers of interfaces by index; the router itself has no name

    def number(self, name: str) -> int:
        """Return the number of a name, a new one if it has none; 0 when there are too many."""
        found = self.numbers.get(name)
        if found is not None:
            return found
        if len(self.numbers) > NAMES_MAX:
            return 0
        number = len(self.numbers)
        self.numbers[name] = number
        self.fresh.append(name)
        return number

    def interface(self, index: int, links: dict[int, str]) -> int:
        """Return the number of an interface's name; one that is gone is called after its index."""
        number = self.interfaces.get(index, 0)
        if index and not number:
            number = self.number(links.get(index) or f"if{index}")
            self.interfaces[index] = number
        return number


class ConnRow:
    """A connection that was read, with what it names."""

    def __init__(self, ct: Conn) -> None:
        self.ct = ct
        self.iif = 0
        self.oif = 0
        self.rule = 0
        self.helper = 0
        self.help = b""
        self.master_id = 0
        self.labels = 0


def pack_conns(
    connections: "Iterator[Conn]", count: int, labels: dict[int, int], links: dict[int, str], names: Names
) -> list[bytes]:
    """Write up to `count` connections; fewer only at the end."""
    rows: list[bytes] = []
    for ct in connections:
        rows.append(pack_conn(ct, labels.get(ct.id, 0) if labels else 0, links, names))
        if len(rows) == count:
            break
    return rows


def pack_conn(ct: Conn, labels: int, links: dict[int, str], names: Names) -> bytes:
    """Write one connection."""
    helper, info = 0, b""
    if ct.help is not None:
        helper = names.number(ct.help.helper.name)
        info = ct.help.freeze()
    tail = protocol_part(ct)
    if labels:
        tail += labels.to_bytes(LABELS_SIZE, "big")
    tail += info
    orig = ct.orig
    master = ct.master
    return (
        CONN.pack(
            CONN.size + len(orig) + len(tail),
            len(orig),
            1 if labels else 0,
            ct.state,
            ct.ending,
            ct.zone,
            names.interface(ct.iif, links),
            names.interface(ct.oif, links),
            ct.status,
            ct.generation,
            names.number(ct.rule),
            helper,
            ct.mark,
            ct.id,
            master.id if master is not None else 0,
            ct.created_ms,
            ct.seen_ms,
            min(ct.expires_ms, ct.seen_ms + LIFE_MAX_MS),
            ct.packets_orig,
            ct.bytes_orig,
            ct.packets_reply,
            ct.bytes_reply,
        )
        + orig
        + tail
    )


def protocol_part(ct: Conn) -> bytes:
    """Write what its protocol keeps of a connection besides."""
    if isinstance(ct, TcpConn):
        a, b = sides(ct)
        return TCP.pack(
            a.end,
            a.maxend,
            a.maxwin,
            a.maxack,
            a.scale,
            a.flags,
            b.end,
            b.maxend,
            b.maxwin,
            b.maxack,
            b.scale,
            b.flags,
            ct.last_direction,
            ct.last_index,
            ct.last_seq,
            ct.last_ack,
            ct.last_end,
            ct.last_win,
            ct.last_scale,
            ct.last_flags,
            ct.retrans,
        )
    if isinstance(ct, UdpConn):
        return UDP.pack(ct.stream_ms)
    if isinstance(ct, SctpConn):
        return SCTP.pack(ct.vtag[0], ct.vtag[1], ct.init[0], ct.init[1], ct.last_direction, ct.flags)
    if isinstance(ct, GreConn):
        return GRE.pack(min(ct.timeout_ms, MASK), min(ct.stream_timeout_ms, MASK))
    return b""


def row_end(block: bytes, at: int) -> int:
    """Say where the row at `at` ends, or -1 if it is not all there."""
    if at + 2 > len(block):
        return -1
    size = block[at] | block[at + 1] << 8
    return at + size if 2 < size <= len(block) - at else -1


def read_conn(block: bytes, at: int, end: int, shift_ms: int) -> ConnRow | None:
    """Read a connection whose times are those of a clock that is `shift_ms` behind ours; None if it is none."""
    if end - at < CONN.size:
        return None
    fields = CONN.unpack_from(block, at)
    tuple_length: int = fields[1]
    at += CONN.size
    if tuple_length not in TUPLE_LENGTHS or at + tuple_length > end:
        return None
    orig = block[at : at + tuple_length]
    at += tuple_length
    reply = invert(orig)
    if not reply:
        return None
    created_ms: int = fields[15] + shift_ms
    ct = new_conn(orig, reply, created_ms)
    ct.state = fields[3]
    ct.ending = fields[4] if fields[4] <= 2 else 0
    ct.zone = fields[5]
    ct.status = fields[8] & STATUS_KEPT
    ct.generation = fields[9] & 0x7FFFFFFF
    ct.mark = fields[12]
    ct.id = fields[13]
    ct.seen_ms = fields[16] + shift_ms
    ct.expires_ms = fields[17] + (shift_ms if ct.status & IPS_CONFIRMED else 0)
    ct.packets_orig = fields[18]
    ct.bytes_orig = fields[19]
    ct.packets_reply = fields[20]
    ct.bytes_reply = fields[21]
    at = read_protocol_part(ct, block, at, end, shift_ms)
    if at < 0 or not ct.packets_orig + ct.packets_reply > 0 or ct.expires_ms - ct.seen_ms > LIFE_MAX_MS:
        return None
    row = ConnRow(ct)
    row.iif = fields[6]
    row.oif = fields[7]
    row.rule = fields[10]
    row.helper = fields[11]
    row.master_id = fields[14]
    if fields[2]:
        if at + LABELS_SIZE > end:
            return None
        row.labels = int.from_bytes(block[at : at + LABELS_SIZE], "big")
        at += LABELS_SIZE
    row.help = block[at:end]
    return row


def read_protocol_part(ct: Conn, block: bytes, at: int, end: int, shift_ms: int) -> int:
    """Read what the protocol keeps besides; returns where it ends, or -1 if it is wrong."""
    if isinstance(ct, TcpConn):
        if at + TCP.size > end or not 1 <= ct.state <= TCP_STATES:
            return -1
        fields = TCP.unpack_from(block, at)
        original, replier = TcpPeer(), TcpPeer()
        if not read_peer(original, fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]):
            return -1
        if not read_peer(replier, fields[6], fields[7], fields[8], fields[9], fields[10], fields[11]):
            return -1
        if fields[12] > 1 or fields[13] > TCP_INDEXES or fields[17] > 0xFFFF:
            return -1
        pack(ct, IP_CT_DIR_ORIGINAL, original, replier)
        ct.last_direction = fields[12]
        ct.last_index = fields[13]
        ct.last_seq = fields[14]
        ct.last_ack = fields[15]
        ct.last_end = fields[16]
        ct.last_win = fields[17]
        ct.last_scale = fields[18]
        ct.last_flags = fields[19]
        ct.retrans = fields[20] & 0xFF
        return at + TCP.size
    if isinstance(ct, SctpConn):
        if at + SCTP.size > end or not 1 <= ct.state <= SCTP_STATES:
            return -1
        fields = SCTP.unpack_from(block, at)
        if fields[4] > 1:
            return -1
        ct.vtag = [fields[0], fields[1]]
        ct.init = [fields[2] != 0, fields[3] != 0]
        ct.last_direction = fields[4]
        ct.flags = fields[5]
        return at + SCTP.size
    if ct.state:
        return -1
    if isinstance(ct, UdpConn):
        if at + UDP.size > end:
            return -1
        ct.stream_ms = UDP.unpack_from(block, at)[0] + shift_ms
        return at + UDP.size
    if isinstance(ct, GreConn):
        if at + GRE.size > end:
            return -1
        fields = GRE.unpack_from(block, at)
        ct.timeout_ms = fields[0]
        ct.stream_timeout_ms = fields[1]
        return at + GRE.size
    return at


def read_peer(peer: TcpPeer, end: int, maxend: int, maxwin: int, maxack: int, scale: int, flags: int) -> bool:
    """Set what one side of a TCP connection has sent and may send; False if it can't be."""
    if scale > WINDOW_SCALE_MAX:
        return False
    peer.end = end
    peer.maxend = maxend
    peer.maxwin = maxwin
    peer.maxack = maxack
    peer.scale = scale
    peer.flags = flags
    return True


def pack_expect(expect: Expect, names: Names) -> bytes:
    """Write one expectation."""
    return (
        EXPECT.pack(
            EXPECT.size + 2 * len(expect.tuple),
            len(expect.tuple),
            expect.expect_class,
            expect.flags,
            names.number(expect.helper.name) if expect.helper is not None else 0,
            expect.master.id,
            expect.expires_ms,
        )
        + expect.tuple
        + expect.mask
    )


def read_expect(
    block: bytes, at: int, end: int, shift_ms: int, masters: dict[int, Conn], names: list[str]
) -> Expect | None:
    """Read an expectation of one of these masters, by their id; None if it is none."""
    if end - at < EXPECT.size:
        return None
    fields = EXPECT.unpack_from(block, at)
    length: int = fields[1]
    at += EXPECT.size
    master = masters.get(fields[5])
    if length not in TUPLE_LENGTHS or at + 2 * length != end or master is None or master.help is None:
        return None
    tuple_ = block[at : at + length]
    if len(master.orig) != length or fields[2] >= len(master.help.helper.policies):
        return None
    expect = Expect(master, fields[2], tuple_, block[at + length : end], fields[3] & 3)
    expect.expires_ms = fields[6] + shift_ms
    number: int = fields[4]
    if number:
        expect.helper = HELPERS.get(names[number]) if number < len(names) else None
    return expect
