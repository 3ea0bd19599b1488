"""The connection tracker. Read this file first.

A packet comes to `conntrack_in` at the first hook it meets (PREROUTING, or OUTPUT for the router's own) and leaves with
a ctinfo: what it is to its connection. The steps are the kernel's, in the kernel's order:

    conntrack_in            ICMP error?  ->  RELATED to the connection it quotes
      resolve_normal_ct     tuple -> connection: in the table, or on its way, or new
        init_conntrack        a new one: its answer's tuple, its class, room for it
      handle_packet         the protocol's own rules: proto/tcp.py, proto/udp.py, ...

A new connection is not in the table yet. It is held unconfirmed until `confirm` at the last hook (POSTROUTING, or INPUT
for packets to the router), when it is sure that the packet leaves: a packet that the router drops leaves no trace.

Nothing here knows the operating system, the clock or the policy: `now_ms` is an argument, INVALID is a value.
"""

from conntrackd.const import (
    INVALID,
    INVALID_GRE_VERSION,
    INVALID_IP_HEADER,
    INVALID_L4_TRUNCATED,
    INVALID_NOT_INVERTIBLE,
    IP_CT_DIR_ORIGINAL,
    IP_CT_DIR_REPLY,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
    IPCT_ASSURED,
    IPCT_LABEL,
    IPCT_MARK,
    IPCT_REPLY,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPPROTO_UDPLITE,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_DYING,
    IPS_EXPECTED,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
    NF_DROP,
    NF_REPEAT,
    STRESSED_HELPER,
)
from conntrackd.core.conn import Conn, is_reply
from conntrackd.core.helper import help_packet
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.core.proto.generic import generic_packet
from conntrackd.core.proto.gre import GreConn, gre_packet
from conntrackd.core.proto.gre import set_timeouts as set_gre_timeouts
from conntrackd.core.proto.icmp import HEADER as ICMP_HEADER
from conntrackd.core.proto.icmp import NOT_AN_ERROR, icmp_error, icmp_packet, is_error
from conntrackd.core.proto.icmpv6 import icmpv6_error, icmpv6_packet
from conntrackd.core.proto.sctp import SctpConn, sctp_packet
from conntrackd.core.proto.sctp import state_timeout as sctp_state_timeout
from conntrackd.core.proto.tcp import HEADER as TCP_HEADER
from conntrackd.core.proto.tcp import RST, tcp_packet
from conntrackd.core.proto.tcp import first_timeout as first_tcp_timeout
from conntrackd.core.proto.tcp_conn import TcpConn
from conntrackd.core.proto.udp import UdpConn, udp_packet
from conntrackd.core.proto.udplite import udplite_packet
from conntrackd.core.tuples import get_tuple, invert, transport_part
from conntrackd.wire.ip import addresses, packet_length, transport

__all__ = ["Conntrack", "attach", "confirm", "conntrack_in", "gc"]


def conntrack_in(
    net: Conntrack, data: bytes, checksum: bool, now_ms: int, zone: int = 0, whole: int = 0
) -> tuple[int, Conn | None]:
    """Track a packet [nf_conntrack_in]: return its ctinfo and its connection.

    `data` is the packet from its IP header on, perhaps less than the whole; then its checksum can't be verified, and
    `whole` is its length, if that is known better than from its header. `checksum` says whether it is to be verified:
    the router's own packets and what the hardware checked are not. Every packet is counted once in `net.stats.ctinfo`.
    """
    ctinfo, ct = track(net, data, whole or packet_length(data), checksum, zone, now_ms)
    net.stats.ctinfo[ctinfo] += 1
    return ctinfo, ct


def track(net: Conntrack, data: bytes, length: int, checksum: bool, zone: int, now_ms: int) -> tuple[int, Conn | None]:
    """Do what conntrack_in says, without the count."""
    if length < len(data):
        data = data[:length]  # padding of the link is not part of the packet
    if not data:
        return INVALID_IP_HEADER, None
    version = data[0] >> 4
    dataoff, protonum = transport(data, 0)
    if dataoff < 0:
        return -dataoff, None
    checksum = checksum and net.sysctl.checksum != 0

    if protonum == IPPROTO_ICMP and version == 4:
        ctinfo, ct = icmp_error(net, data, dataoff, length, checksum, zone, now_ms)
        if ctinfo != NOT_AN_ERROR:
            return ctinfo, ct
    elif protonum == IPPROTO_ICMPV6 and version == 6:
        ctinfo, ct = icmpv6_error(net, data, dataoff, length, checksum, zone, now_ms)
        if ctinfo != NOT_AN_ERROR:
            return ctinfo, ct

    part = transport_part(data, dataoff, protonum)
    if not part:
        return INVALID_GRE_VERSION if protonum == IPPROTO_GRE else INVALID_L4_TRUNCATED, None
    key = bytes((protonum,)) + addresses(data, 0) + part
    if protonum == IPPROTO_GRE:
        key = net.table.gre_tuple(key, data, dataoff, zone)

    while True:
        ctinfo, ct = resolve_normal_ct(net, key, zone, now_ms)
        if ct is None:
            return ctinfo, None
        before = ct.status
        direction = IP_CT_DIR_REPLY if ctinfo == IP_CT_ESTABLISHED_REPLY else IP_CT_DIR_ORIGINAL
        verdict = handle_packet(net, ct, data, dataoff, length, direction, version, checksum, now_ms)
        if verdict != NF_REPEAT:
            break  # a closed connection is reopened once: the one that takes its place is new
    if verdict != NF_ACCEPT:
        assert verdict >= INVALID
        if ct.status != before or net.cached:  # by SCTP chunks in front of the one that spoiled the packet
            ct.seen_ms = now_ms
            changed(net, ct, before, now_ms)
        return verdict, None
    ct.seen_ms = now_ms
    if ctinfo == IP_CT_ESTABLISHED_REPLY:
        ct.status |= IPS_SEEN_REPLY  # after the handler: it must see the first reply as the first
    elif not ct.status & (IPS_CONFIRMED | IPS_DYING) and net.table.find_unconfirmed(key, zone) is not ct:
        net.table.hold_unconfirmed(ct, now_ms)
    if ct.status != before or net.cached:
        changed(net, ct, before, now_ms)
    elif ct.newer is not None:
        net.table.touch(ct)
    # The kernel asks the helper at the last hook, where we do not see packets of confirmed connections.
    if ct.help is not None and ct.status & IPS_CONFIRMED:
        if help_packet(net, ct, data, dataoff, length, ctinfo, now_ms) == NF_DROP:
            return STRESSED_HELPER, None
    return ctinfo, ct


def resolve_normal_ct(net: Conntrack, key: bytes, zone: int, now_ms: int) -> tuple[int, Conn | None]:
    """Find or begin the connection of a tuple, and say what the packet is to it [resolve_normal_ct]."""
    ct = net.table.find(key, now_ms, zone)
    if ct is None:
        # A second packet of a flow whose first is still on its way joins it. The kernel keeps an unconfirmed
        # connection with its one packet and would lose the second at confirm (docs/differences.md).
        ct = net.table.find_unconfirmed(key, zone)
    elif is_reply(ct, key):
        return IP_CT_ESTABLISHED_REPLY, ct
    if ct is None:
        reason, ct = init_conntrack(net, key, zone, now_ms)
        if ct is None:
            return reason, None
    # Seen both ways once, it stays ESTABLISHED. Until then each packet of the opener is NEW.
    if ct.status & IPS_SEEN_REPLY:
        return IP_CT_ESTABLISHED, ct
    if ct.status & IPS_EXPECTED:
        return IP_CT_RELATED, ct
    return IP_CT_NEW, ct


def init_conntrack(net: Conntrack, key: bytes, zone: int, now_ms: int) -> tuple[int, Conn | None]:
    """Begin a connection [init_conntrack]; returns the reason if it can't be."""
    reply = invert(key)
    if not reply:
        return INVALID_NOT_INVERTIBLE, None
    refusal = net.table.refusal(key, zone, now_ms)
    if refusal:
        net.stats.drop += 1
        return refusal, None
    ct = new_conn(key, reply, now_ms)
    ct.zone = zone
    if net.table.expectations.by_id:
        fulfil_expectation(net, ct, now_ms)
    return 0, ct


def new_conn(key: bytes, reply: bytes, now_ms: int) -> Conn:
    """Make a connection of the class of its protocol."""
    protonum = key[0]
    if protonum == IPPROTO_TCP:
        return TcpConn(key, reply, protonum, now_ms)
    if protonum == IPPROTO_UDP:
        return UdpConn(key, reply, protonum, now_ms)
    if protonum == IPPROTO_SCTP:
        return SctpConn(key, reply, protonum, now_ms)
    if protonum == IPPROTO_GRE:
        return GreConn(key, reply, protonum, now_ms)
    return Conn(key, reply, protonum, now_ms)


def fulfil_expectation(net: Conntrack, ct: Conn, now_ms: int) -> None:
    """Make a new connection RELATED to the one that announced it, if one did. Its expectation is used up by that."""
    expect = net.table.expectations.take(ct.orig, ct.zone, now_ms)
    if expect is None:
        return
    master = expect.master
    ct.status |= IPS_EXPECTED
    ct.master = master
    ct.mark = master.mark
    if expect.helper is not None:
        ct.help = expect.helper.new_help()
    if master.help is not None:
        master.help.helper.expected(net.table, ct, expect, now_ms)
    net.stats.expect_new += 1


def changed(net: Conntrack, ct: Conn, before: int, now_ms: int) -> None:
    """Note what a packet changed about a connection: its place in the orders of the table, and an event."""
    bits = net.cached
    net.cached = 0
    if ct.status & (IPS_CONFIRMED | IPS_DYING) != IPS_CONFIRMED:
        return  # what happens before the confirm is part of NEW, and DESTROY has told the rest
    net.table.settle(ct, now_ms)
    if net.events.listeners:
        gained = ct.status & ~before
        if gained & IPS_SEEN_REPLY:
            bits |= IPCT_REPLY
        if gained & IPS_ASSURED:
            bits |= IPCT_ASSURED
        if bits:
            net.table.notify(ct, bits, 0, now_ms)


def set_mark(net: Conntrack, ct: Conn, mark: int, now_ms: int) -> None:
    """Set the mark of a connection, 32 bits; to be called by the policy."""
    if ct.mark == mark:
        return
    ct.mark = mark
    tell(net, ct, IPCT_MARK, now_ms)


def set_labels(net: Conntrack, ct: Conn, labels: int, now_ms: int) -> None:
    """Set the labels of a confirmed connection, 128 bits, on request; those of a new one come with its confirm."""
    assert ct.status & (IPS_CONFIRMED | IPS_DYING) == IPS_CONFIRMED
    if labels:
        net.table.labels[ct.id] = labels
    else:
        net.table.labels.pop(ct.id, None)
    tell(net, ct, IPCT_LABEL, now_ms)


def tell(net: Conntrack, ct: Conn, bits: int, now_ms: int) -> None:
    """Tell those who listen what was changed about a connection from outside; until it is confirmed nobody knows it."""
    if net.events.listeners and ct.status & (IPS_CONFIRMED | IPS_DYING) == IPS_CONFIRMED:
        net.table.notify(ct, bits, 0, now_ms)


def handle_packet(
    net: Conntrack,
    ct: Conn,
    data: bytes,
    dataoff: int,
    length: int,
    direction: int,
    version: int,
    checksum: bool,
    now_ms: int,
) -> int:
    """Hand a packet to its protocol [nf_conntrack_handle_packet].

    Returns NF_ACCEPT, NF_REPEAT, or an INVALID reason.
    """
    if isinstance(ct, TcpConn):
        return tcp_packet(net, ct, data, dataoff, length, direction, checksum, now_ms)
    if isinstance(ct, UdpConn):
        return udp_packet(net, ct, data, dataoff, length, direction, checksum, now_ms)
    protonum = ct.protonum
    if protonum == IPPROTO_ICMP:
        return icmp_packet(net, ct, version, length, direction, now_ms)
    if protonum == IPPROTO_ICMPV6:
        return icmpv6_packet(net, ct, version, length, direction, now_ms)
    if isinstance(ct, SctpConn):
        return sctp_packet(net, ct, data, dataoff, length, direction, checksum, now_ms)
    if isinstance(ct, GreConn):
        return gre_packet(net, ct, length, direction, now_ms)
    if protonum == IPPROTO_UDPLITE:
        return udplite_packet(net, ct, data, dataoff, length, direction, checksum, now_ms)
    return generic_packet(net, ct, length, direction, now_ms)


def attach(net: Conntrack, data: bytes, zone: int = 0) -> bool:
    """Whether the router itself answers a packet that it does not let through [nf_ct_attach].

    Time exceeded, no route, or a REJECT rule: the answer quotes or refuses a connection that is still unconfirmed, and
    that no later packet will find. To the kernel such an answer is RELATED; it says so by the packet in hand.
    """
    if not data or net.table.unconfirmed_count() == 0:
        return False
    dataoff, protonum = transport(data, 0)
    if dataoff < 0:
        return False
    if protonum == IPPROTO_TCP:
        if len(data) < dataoff + TCP_HEADER or not data[dataoff + 13] & RST:
            return False
        refused = invert(get_tuple(data, 0))
    elif len(data) <= dataoff:
        return False
    elif (protonum == IPPROTO_ICMP and is_error(data[dataoff])) or (protonum == IPPROTO_ICMPV6 and data[dataoff] < 128):
        refused = net.table.read_tuple(data, dataoff + ICMP_HEADER, zone)
    else:
        return False
    if net.table.find_unconfirmed(refused, zone) is None:
        return False
    net.stats.ctinfo[IP_CT_RELATED_REPLY] += 1
    return True


def confirm(net: Conntrack, ct: Conn, now_ms: int, labels: int = 0) -> int:
    """Enter a new connection in the table, with its labels: its packet leaves [__nf_conntrack_confirm].

    Returns NF_ACCEPT; NF_DROP when another connection with one of its tuples was confirmed since it began; a STRESSED
    reason when there is no room for it.
    """
    if ct.status & IPS_CONFIRMED:
        return NF_ACCEPT
    table = net.table
    table.drop_unconfirmed(ct)
    if ct.status & IPS_DYING:
        net.stats.drop += 1
        return NF_DROP
    winner = table.find(ct.orig, now_ms, ct.zone) or table.find(ct.reply, now_ms, ct.zone)
    if winner is not None:
        table.forget_help(ct, now_ms)
        return resolve_clash(net, ct, winner)
    refusal = table.make_room(ct, now_ms)
    if refusal:
        table.forget_help(ct, now_ms)
        net.stats.drop += 1
        return refusal
    table.insert(ct, now_ms, labels)
    return NF_ACCEPT


def resolve_clash(net: Conntrack, ct: Conn, winner: Conn) -> int:
    """Decide for the loser of two new connections with the same tuple [nf_ct_resolve_clash].

    Datagrams of one exchange merge: the two sides may just have spoken at once. A stream or a query can't: its state
    would be that of two connections, and its sender will retransmit.
    """
    protonum = ct.protonum
    if protonum == IPPROTO_UDP or protonum == IPPROTO_UDPLITE or protonum == IPPROTO_GRE:
        if winner.orig == ct.orig:
            winner.packets_orig += ct.packets_orig
            winner.bytes_orig += ct.bytes_orig
        else:
            winner.packets_reply += ct.packets_orig
            winner.bytes_reply += ct.bytes_orig
        net.stats.clash_resolve += 1
        return NF_ACCEPT
    net.stats.insert_failed += 1
    net.stats.drop += 1
    return NF_DROP


def gc(net: Conntrack, now_ms: int) -> int:
    """End what has expired, a bounded slice at a time; returns when to come again, in ms."""
    return net.table.gc(now_ms)


def use_timeouts(net: Conntrack, ct: Conn, number: int) -> None:
    """Let a new connection live by the settings of its rule, from its first packet on [nf_ct_timeout_lookup]."""
    ct.timeouts = number
    sysctl = settings_of(net, ct)
    protonum = ct.protonum
    if isinstance(ct, TcpConn):
        ct.expires_ms = first_tcp_timeout(sysctl, ct)
    elif isinstance(ct, SctpConn):
        ct.expires_ms = sctp_state_timeout(sysctl, ct.state)
    elif isinstance(ct, GreConn):
        set_gre_timeouts(ct, sysctl)
        ct.expires_ms = ct.timeout_ms
    elif protonum == IPPROTO_UDP or protonum == IPPROTO_UDPLITE:
        ct.expires_ms = sysctl.udp_timeout
    elif protonum == IPPROTO_ICMP:
        ct.expires_ms = sysctl.icmp_timeout
    elif protonum == IPPROTO_ICMPV6:
        ct.expires_ms = sysctl.icmpv6_timeout
    else:
        ct.expires_ms = sysctl.generic_timeout
