"""PPTP (RFC 2637) [nf_conntrack_pptp.c]: a call that is agreed on over TCP is carried by GRE.

Each side gives the call an id of its own, and a GRE packet names the id of its receiver. A call is expected in both
directions, and the first packet of either takes both expectations: they are one connection. As a packet does not name
its sender's id, the table keeps it (Table.gre_keymap).

The client (PNS) is taken to be the side that opened the TCP connection, and one call per connection is known.
"""

from typing import Final

from conntrackd.const import IPPROTO_GRE, IPPROTO_TCP, NF_ACCEPT
from conntrackd.core.conn import Conn
from conntrackd.core.expect import EXPECT_OK, Expect, expect_from
from conntrackd.core.helper import Help, Helper, Message, Policy
from conntrackd.core.net import Conntrack
from conntrackd.core.proto.gre import GreConn
from conntrackd.core.table import Table, zone_key
from conntrackd.core.tuples import destination, invert, source
from conntrackd.wire.fields import u16, u32

TUPLE: Final = 13  # IPv4 only
CALL_TIMEOUT_MS: Final = 600_000
CALL_STREAM_TIMEOUT_MS: Final = 18_000_000

HEADER: Final = 12  # length, type, magic cookie; message type, zero
CONTROL: Final = 1
MAGIC: Final = 0x1A2B3C4D

# Control messages (RFC 2637 2).
START_REQUEST: Final = 1
START_REPLY: Final = 2
STOP_REQUEST: Final = 3
STOP_REPLY: Final = 4
ECHO_REQUEST: Final = 5
ECHO_REPLY: Final = 6
OUT_CALL_REQUEST: Final = 7
OUT_CALL_REPLY: Final = 8
IN_CALL_REQUEST: Final = 9
IN_CALL_REPLY: Final = 10
IN_CALL_CONNECT: Final = 11
CALL_CLEAR_REQUEST: Final = 12
DISCONNECT_NOTIFY: Final = 13
# By type: what a message holds at least, behind its header.
LENGTHS: Final = (0, 144, 144, 4, 4, 0, 0, 156, 20, 208, 12, 16, 4, 136, 28, 12)

SUCCESS: Final = 1  # of every result code that is read here

# Of the session [enum pptp_ctrlsess_state]; the order counts.
SESSION_NONE: Final = 0
SESSION_ERROR: Final = 1
SESSION_STOPREQ: Final = 2
SESSION_REQUESTED: Final = 3
SESSION_CONFIRMED: Final = 4

# Of the call [enum pptp_ctrlcall_state].
CALL_NONE: Final = 0
CALL_OUT_REQ: Final = 1
CALL_OUT_CONF: Final = 2
CALL_IN_REQ: Final = 3
CALL_IN_REP: Final = 4
CALL_IN_CONF: Final = 5
CALL_CLEAR_REQ: Final = 6


class PptpHelp(Help):
    """The session and its one call; ids as they are on the wire."""

    def __init__(self, helper: Helper) -> None:
        super().__init__(helper)
        self.session = SESSION_NONE
        self.call = CALL_NONE
        self.pns_call_id = b"\0\0"  # the client's
        self.pac_call_id = b"\0\0"  # the server's
        self.keymap: list[bytes] = []  # what of Table.gre_keymap is this session's

    def freeze(self) -> bytes:
        """Write the states, the ids, and the tuples of the call if there is one."""
        return bytes((self.session, self.call)) + self.pns_call_id + self.pac_call_id + b"".join(self.keymap)

    def thaw(self, kept: bytes) -> bool:
        """Remember what `freeze` wrote; False if it is not that."""
        if len(kept) not in (6, 6 + 2 * TUPLE) or kept[0] > SESSION_CONFIRMED or kept[1] > CALL_CLEAR_REQ:
            return False
        self.session, self.call = kept[0], kept[1]
        self.pns_call_id, self.pac_call_id = kept[2:4], kept[4:6]
        self.keymap = [kept[at : at + TUPLE] for at in range(6, len(kept), TUPLE)]
        return True


class Pptp(Helper):
    """The helper "pptp"."""

    def __init__(self) -> None:
        super().__init__("pptp", (IPPROTO_TCP,), [Policy("", 2, 300_000)], ipv6=False)

    def new_help(self) -> Help:
        """Make what a control connection keeps."""
        return PptpHelp(self)

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Read a control message; returns NF_ACCEPT. What is out of order has no effect."""
        info = ct.help
        assert isinstance(info, PptpHelp)
        payload = message.payload
        if len(payload) < HEADER or u16(payload, 2) != CONTROL or u32(payload, 4) != MAGIC:
            return NF_ACCEPT
        kind = u16(payload, 8)
        if kind < len(LENGTHS) and len(payload) >= HEADER + LENGTHS[kind]:
            if message.reply:
                self.from_server(net, ct, info, kind, payload[HEADER:], now_ms)
            else:
                from_client(info, kind, payload[HEADER:])
        return NF_ACCEPT

    def from_server(self, net: Conntrack, ct: Conn, info: PptpHelp, kind: int, body: bytes, now_ms: int) -> None:
        """Follow the server's message [pptp_inbound_pkt]."""
        if kind == START_REPLY:
            if info.session >= SESSION_REQUESTED:
                info.session = SESSION_CONFIRMED if body[2] == SUCCESS else SESSION_ERROR
        elif kind == STOP_REPLY:
            if info.session <= SESSION_STOPREQ:
                info.session = SESSION_NONE if body[0] == SUCCESS else SESSION_ERROR
        elif kind == OUT_CALL_REPLY:
            if info.session != SESSION_CONFIRMED or (info.call != CALL_OUT_REQ and info.call != CALL_OUT_CONF):
                return
            if body[2:4] != info.pns_call_id:
                return
            if body[4] == SUCCESS:
                info.call = CALL_OUT_CONF
                info.pac_call_id = body[0:2]
                expect_call(net, ct, info, now_ms)
            else:
                info.call = CALL_NONE
        elif kind == IN_CALL_REQUEST:
            if info.session == SESSION_CONFIRMED:
                info.call = CALL_IN_REQ
                info.pac_call_id = body[0:2]
        elif kind == IN_CALL_CONNECT:
            if info.session != SESSION_CONFIRMED or (info.call != CALL_IN_REP and info.call != CALL_IN_CONF):
                return
            if body[0:2] == info.pns_call_id:
                info.call = CALL_IN_CONF
                expect_call(net, ct, info, now_ms)
        elif kind == DISCONNECT_NOTIFY:
            info.call = CALL_NONE
            end_call(net.table, ct, info, now_ms)

    def expected(self, table: Table, ct: Conn, expect: Expect, now_ms: int) -> None:
        """Give a call its longer timeouts, and expect no second one in the other direction [pptp_expectfn]."""
        assert isinstance(ct, GreConn)
        ct.timeout_ms = CALL_TIMEOUT_MS
        ct.stream_timeout_ms = CALL_STREAM_TIMEOUT_MS
        other = table.expectations.find(invert(expect.tuple), ct.zone, now_ms)
        if other is not None:
            table.expectations.unlink(other, now_ms)

    def restored(self, table: Table, ct: Conn) -> None:
        """Complete the packets of its call again."""
        info = ct.help
        assert isinstance(info, PptpHelp)
        for key in info.keymap:
            table.gre_keymap.setdefault(shown_key(ct, key), []).append(key)

    def destroy(self, table: Table, ct: Conn, now_ms: int) -> None:
        """End the call with its session."""
        info = ct.help
        assert isinstance(info, PptpHelp)
        end_call(table, ct, info, now_ms)


def from_client(info: PptpHelp, kind: int, body: bytes) -> None:
    """Follow the client's message [pptp_outbound_pkt]."""
    if kind == START_REQUEST:
        if info.session == SESSION_NONE:
            info.session = SESSION_REQUESTED
    elif kind == STOP_REQUEST:
        info.session = SESSION_STOPREQ
    elif kind == OUT_CALL_REQUEST:
        if info.session == SESSION_CONFIRMED:
            info.call = CALL_OUT_REQ
            info.pns_call_id = body[0:2]
    elif kind == IN_CALL_REPLY:
        if (info.call == CALL_IN_REQ or info.call == CALL_IN_REP) and body[2:4] == info.pac_call_id:
            if body[4] == SUCCESS:
                info.call = CALL_IN_REP
                info.pns_call_id = body[0:2]
            else:
                info.call = CALL_NONE
    elif kind == CALL_CLEAR_REQUEST:
        if info.session == SESSION_CONFIRMED:
            info.call = CALL_CLEAR_REQ


def expect_call(net: Conntrack, ct: Conn, info: PptpHelp, now_ms: int) -> None:
    """Expect the GRE packets of a call in both directions, or in none [exp_gre]."""
    client, server = source(ct.orig), destination(ct.orig)
    pns, pac = u16(info.pns_call_id, 0), u16(info.pac_call_id, 0)
    outward = expect_from(ct, 0, IPPROTO_GRE, client, pns, server, pac)
    inward = expect_from(ct, 0, IPPROTO_GRE, server, pac, client, pns)
    expectations, limit = net.table.expectations, net.sysctl.expect_max
    if expectations.insert(outward, False, limit, now_ms) != EXPECT_OK:
        return
    if expectations.insert(inward, False, limit, now_ms) != EXPECT_OK:
        expectations.unlink(outward, now_ms)
        return
    if not info.keymap:
        info.keymap = [outward.tuple, inward.tuple]
        for key in info.keymap:
            net.table.gre_keymap.setdefault(shown_key(ct, key), []).append(key)
    elif info.keymap != [outward.tuple, inward.tuple]:
        # A session has one call until it is disconnected.
        expectations.unlink(outward, now_ms)
        expectations.unlink(inward, now_ms)
        if info.keymap[0][-2:] == outward.tuple[-2:]:
            forget_keys(net.table, ct, info)  # as the kernel: the server's id is the same, the client's is another


def shown_key(ct: Conn, key: bytes) -> bytes:
    """Return what a packet of a session's call shows: the tuple without the id of its own side; in the zone of both."""
    return zone_key(ct.zone, key[:-4] + b"\0\0" + key[-2:])


def forget_keys(table: Table, ct: Conn, info: PptpHelp) -> None:
    """Complete packets of a session's call no more [nf_ct_gre_keymap_destroy]; others may have the same ids."""
    for key in info.keymap:
        shown = shown_key(ct, key)
        calls = table.gre_keymap[shown]
        calls.remove(key)
        if not calls:
            del table.gre_keymap[shown]
    info.keymap = []


def end_call(table: Table, ct: Conn, info: PptpHelp, now_ms: int) -> None:
    """Forget a call, be it expected or under way [pptp_destroy_siblings]."""
    forget_keys(table, ct, info)
    outward = bytes((IPPROTO_GRE,)) + ct.orig[1:9] + info.pns_call_id + info.pac_call_id
    for key in (outward, invert(outward)):
        call = table.find(key, now_ms, ct.zone)
        if call is not None:
            table.kill(call, now_ms)
            continue
        for expect in list(info.expectations):
            if expect.tuple == key:
                table.expectations.unlink(expect, now_ms)
