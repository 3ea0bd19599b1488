"""TCP [nf_conntrack_proto_tcp.c].

A segment passes four gates, in this order: flags that a TCP would send (`tcp_error`), the state table
(`tcp_states.py`), what the table cannot say (`tcp_packet`: reopened connections, ignored segments, resets), and the
window (`tcp_in_window`). What passes them all moves the state and the timeout.

Sequence numbers are compared modulo 2^32 (RFC 9293 3.4). The window tracking follows Guido van Rooij, "Real stateful
TCP packet filtering in IP filter": for each side we keep the highest sequence number it has sent (end), the highest it
may send (maxend, what the other side last allowed), and the largest window it has offered (maxwin).
"""

from typing import Final

from mypy_extensions import i64, u8

from conntrackd.const import (
    CLOSED_FIN,
    CLOSED_RST,
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_TCP_ACK_ABOVE,
    INVALID_TCP_DATA_OFFSET,
    INVALID_TCP_FLAGS,
    INVALID_TCP_NEW,
    INVALID_TCP_PICKUP_OFF,
    INVALID_TCP_RST,
    INVALID_TCP_STATE,
    INVALID_TCP_WINDOW_ABOVE,
    IP_CT_DIR_ORIGINAL,
    IP_CT_DIR_REPLY,
    IPCT_PROTOINFO,
    IPPROTO_TCP,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_FIXED_TIMEOUT,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
    NF_REPEAT,
)
from conntrackd.core.conn import account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.core.proto.tcp_conn import (
    FLAG_BE_LIBERAL,
    FLAG_CLOSE_INIT,
    FLAG_DATA_UNACKNOWLEDGED,
    FLAG_EXP_CHALLENGE_ACK,
    FLAG_MAXACK_SET,
    FLAG_SACK_PERM,
    FLAG_SIMULTANEOUS_OPEN,
    FLAG_WINDOW_SCALE,
    MASK,
    TcpConn,
    TcpPeer,
    pack,
    unpack,
)
from conntrackd.core.proto.tcp_states import (
    ACK_SET,
    CLOSE,
    CLOSE_WAIT,
    ESTABLISHED,
    FIN_SET,
    FIN_WAIT,
    IGNORE,
    INVALID,
    LAST_ACK,
    NONE,
    NONE_SET,
    RST_SET,
    SYN_RECV,
    SYN_SENT,
    SYN_SENT2,
    SYN_SET,
    SYNACK_SET,
    TIME_WAIT,
    next_state,
)
from conntrackd.core.sysctl import Sysctl
from conntrackd.wire.checksum import checksum_ok
from conntrackd.wire.fields import u16, u32

HEADER: Final = 20

# Flags (RFC 9293 3.1). PSH, ECE and CWR (RFC 3168) say nothing about the connection.
FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10
URG: Final = 0x20
FLAGS_THAT_MATTER: Final = FIN | SYN | RST | ACK | URG

# Options (RFC 9293 3.2, RFC 7323, RFC 2018).
OPT_END: Final = 0
OPT_NOP: Final = 1
OPT_WINDOW_SCALE: Final = 3
OPT_SACK_PERMITTED: Final = 4
OPT_SACK: Final = 5
WINDOW_SCALE_MAX: Final = 14

# tcp_in_window's answer when the segment passes without moving anything; NF_ACCEPT and reasons besides.
WINDOW_IGNORE: Final = 0

# A sender whose window is smaller may still acknowledge as far back as this [MAXACKWINCONST]
MAXACKWINDOW: Final = 66000
# A simultaneous open has no setting of its own.
SYN_SENT2_TIMEOUT_MS: Final = 120_000
# A connection with less than this left is not shortened by invalid FINs and RSTs.
HANDLE_INVALID_MIN_MS: Final = 120_000


NO_CHALLENGE_ACK: Final[u8] = 0xFF ^ FLAG_EXP_CHALLENGE_ACK

# The two sides of the connection whose segment is in hand.
SENDER: Final = TcpPeer()
RECEIVER: Final = TcpPeer()


def before(a: i64, b: i64) -> bool:
    """Whether sequence number a comes before b."""
    return (a - b) & MASK > 0x7FFFFFFF


def flags_valid(flags: int) -> bool:
    """Whether a TCP would send these flags together [tcp_valid_flags]."""
    flags &= FLAGS_THAT_MATTER
    if flags & ~URG == ACK or flags & ~URG == SYN or flags & ~URG == FIN | ACK:
        return True
    return flags == SYN | ACK or flags == RST or flags == RST | ACK


def segment_class(flags: int) -> int:
    """Reduce flags to a class of the state table [get_conntrack_index]."""
    if flags & RST:
        return RST_SET
    if flags & SYN:
        return SYNACK_SET if flags & ACK else SYN_SET
    if flags & FIN:
        return FIN_SET
    return ACK_SET if flags & ACK else NONE_SET


def tcp_error(data: bytes, dataoff: int, length: int, checksum: bool) -> int:
    """Check the header [tcp_error]; returns an INVALID reason, or 0."""
    if len(data) < dataoff + HEADER:
        return INVALID_L4_TRUNCATED
    header = data[dataoff + 12] >> 4 << 2
    if header < HEADER or header > length - dataoff:
        return INVALID_TCP_DATA_OFFSET
    if checksum and len(data) == length:
        if not checksum_ok(data, dataoff, length, length - dataoff, IPPROTO_TCP):
            return INVALID_BAD_CHECKSUM
    if not flags_valid(data[dataoff + 13]):
        return INVALID_TCP_FLAGS
    return 0


def segment_end(data: bytes, dataoff: int, length: int) -> i64:
    """Sequence number after the segment: SYN and FIN count as a byte each [segment_seq_plus_len]."""
    flags = data[dataoff + 13]
    payload = length - dataoff - (data[dataoff + 12] >> 4 << 2)
    return (u32(data, dataoff + 4) + payload + (1 if flags & SYN else 0) + (1 if flags & FIN else 0)) & MASK


def tcp_options(data: bytes, dataoff: int, peer: TcpPeer) -> None:
    """Read what a SYN offers: window scaling and selective acknowledgements [tcp_options]."""
    at = dataoff + HEADER
    stop = dataoff + (data[dataoff + 12] >> 4 << 2)
    if at == stop or stop > len(data):
        return
    peer.scale = 0
    peer.flags &= FLAG_BE_LIBERAL
    while at < stop:  # at most 40 bytes, each turn takes one or more
        kind = data[at]
        if kind == OPT_END:
            return
        if kind == OPT_NOP:
            at += 1
            continue
        if at + 2 > stop:
            return
        size = data[at + 1]
        if size < 2 or at + size > stop:
            return  # a partial option and whatever follows it is not read
        if kind == OPT_SACK_PERMITTED and size == 2:
            peer.flags |= FLAG_SACK_PERM
        elif kind == OPT_WINDOW_SCALE and size == 3:
            peer.scale = min(data[at + 2], WINDOW_SCALE_MAX)  # RFC 7323 2.3
            peer.flags |= FLAG_WINDOW_SCALE
        at += size


def tcp_sack(data: bytes, dataoff: int, sack: i64) -> i64:
    """Return the highest right edge of the SACK blocks, or `sack` if none is higher [tcp_sack]."""
    at = dataoff + HEADER
    stop = dataoff + (data[dataoff + 12] >> 4 << 2)
    if stop > len(data):
        return sack
    while at < stop:
        kind = data[at]
        if kind == OPT_END:
            return sack
        if kind == OPT_NOP:
            at += 1
            continue
        if at + 2 > stop:
            return sack
        size = data[at + 1]
        if size < 2 or at + size > stop:
            return sack
        if kind == OPT_SACK and size >= 10 and (size - 2) % 8 == 0:
            for block in range(at + 2, at + size, 8):
                edge = u32(data, block + 4)
                if before(sack, edge):
                    sack = edge
            return sack
        at += size
    return sack


def tcp_new(sysctl: Sysctl, sender: TcpPeer, receiver: TcpPeer, data: bytes, dataoff: int, length: int) -> int:
    """Begin a connection with its first segment [tcp_new]; returns an INVALID reason, or 0."""
    state = next_state(IP_CT_DIR_ORIGINAL, segment_class(data[dataoff + 13]), NONE)
    if state == INVALID:
        return INVALID_TCP_NEW
    sender.end = segment_end(data, dataoff, length)
    sender.maxwin = u16(data, dataoff + 14) or 1
    if state == SYN_SENT:
        sender.maxend = sender.end
        tcp_options(data, dataoff, sender)
    else:
        if not sysctl.tcp_loose:
            return INVALID_TCP_PICKUP_OFF
        # In the middle of a connection: its scaling and SACK are lost on us, so assume them and judge mildly.
        sender.maxend = (sender.end + sender.maxwin) & MASK
        sender.flags = FLAG_SACK_PERM | FLAG_BE_LIBERAL
        receiver.flags = FLAG_SACK_PERM | FLAG_BE_LIBERAL
    return 0


def init_sender(
    sender: TcpPeer, receiver: TcpPeer, data: bytes, dataoff: int, end: i64, window: i64, direction: int
) -> None:
    """Learn a side from its SYN or SYN/ACK [tcp_init_sender]."""
    sender.end = end
    sender.maxend = end
    sender.maxwin = window or 1
    tcp_options(data, dataoff, sender)
    # Either both sides offer scaling or none scales (RFC 7323 2.2).
    if direction == IP_CT_DIR_REPLY and not sender.flags & receiver.flags & FLAG_WINDOW_SCALE:
        sender.scale = 0
        receiver.scale = 0


def tcp_in_window(
    sysctl: Sysctl,
    ct: TcpConn,
    sender: TcpPeer,
    receiver: TcpPeer,
    direction: int,
    index: int,
    data: bytes,
    dataoff: int,
    length: int,
) -> int:
    """Check a segment against what both sides have sent and allowed, and learn from it [tcp_in_window].

    Returns NF_ACCEPT, WINDOW_IGNORE, or an INVALID reason.
    """
    flags = data[dataoff + 13]
    seq: i64 = u32(data, dataoff + 4)
    ack: i64 = u32(data, dataoff + 8)
    raw_window = u16(data, dataoff + 14)
    window: i64 = raw_window
    end = segment_end(data, dataoff, length)
    sack = ack
    if receiver.flags & FLAG_SACK_PERM and data[dataoff + 12] >> 4 > 5:
        sack = tcp_sack(data, dataoff, ack)

    if sender.maxwin == 0:
        if flags & SYN:  # SYN/ACK, or the second SYN of a simultaneous open
            init_sender(sender, receiver, data, dataoff, end, window, direction)
            if not flags & ACK:
                return NF_ACCEPT
        else:  # the middle of a connection: take the numbers as they come
            sender.end = end
            sender.maxwin = window << sender.scale or 1
            sender.maxend = (end + sender.maxwin) & MASK
            if receiver.maxwin == 0:
                # Nothing seen of the other side either: let the acknowledgement pass until there is.
                receiver.end = sack
                receiver.maxend = sack
            elif sack == (receiver.end + 1) & MASK:
                receiver.end = sack  # the answer to a keepalive
    elif flags & SYN and before(sender.end, end) and (ct.state == SYN_SENT or ct.state == SYN_RECV):
        # A new attempt with higher numbers (RFC 9293 3.4.1); numbers and options may all have changed.
        init_sender(sender, receiver, data, dataoff, end, window, direction)
        if direction == IP_CT_DIR_REPLY and not flags & ACK:
            return NF_ACCEPT

    if not flags & ACK:
        ack = sack = receiver.end
    elif flags & RST and ack == 0:
        ack = sack = receiver.end  # some stacks set ACK in a RST without a number
    if flags & RST and seq == 0 and ct.state == SYN_SENT:
        seq = end = sender.end  # a RST that answers a SYN carries no number of its own (RFC 9293 3.10.7.1)

    liberal = sender.flags & FLAG_BE_LIBERAL or sysctl.tcp_be_liberal
    ack_reach = max(MAXACKWINDOW, sender.maxwin)

    # I. The segment does not begin beyond what the receiver allowed.
    if before(sender.maxend, seq):
        over = (end - sender.maxend + 1) & MASK
        if (
            receiver.maxwin != 0
            and before(sender.end - receiver.maxwin - 1, end)
            and before(receiver.end - ack_reach - 1, sack)
            and over <= receiver.maxwin
            and not before(receiver.end, sack)
        ):
            # A little too much: if the receiver takes it, its acknowledgement must not look like one of unseen data.
            sender.end = end
            sender.flags |= FLAG_DATA_UNACKNOWLEDGED
            return NF_ACCEPT if liberal else WINDOW_IGNORE
        return NF_ACCEPT if liberal else INVALID_TCP_WINDOW_ABOVE
    # II. It acknowledges nothing that was not sent.
    if before(receiver.end, sack):
        return NF_ACCEPT if liberal else INVALID_TCP_ACK_ABOVE
    # III. It does not end before the receiver's window: data retransmitted that was acknowledged long ago.
    if receiver.maxwin != 0 and not before(sender.end - receiver.maxwin - 1, end):
        return NF_ACCEPT if liberal else WINDOW_IGNORE
    # IV. Its acknowledgement is not older than any window.
    if not before(receiver.end - ack_reach - 1, sack):
        return NF_ACCEPT if liberal else WINDOW_IGNORE

    if not flags & SYN:  # the window of a SYN is never scaled (RFC 7323 2.2)
        window = window << sender.scale
    offered = (window + sack - ack) & MASK
    if sender.maxwin < offered:
        sender.maxwin = offered
    if before(sender.end, end):
        sender.end = end
        sender.flags |= FLAG_DATA_UNACKNOWLEDGED
    if flags & ACK:
        if not sender.flags & FLAG_MAXACK_SET:
            sender.maxack = ack
            sender.flags |= FLAG_MAXACK_SET
        elif before(sender.maxack, ack):
            sender.maxack = ack
    if receiver.maxwin != 0 and before(sender.maxend, end):
        receiver.maxwin += (end - sender.maxend) & MASK
    allowed = (sack + window) & MASK
    if not before(allowed, receiver.maxend):
        receiver.maxend = allowed if window else (allowed + 1) & MASK  # a zero window may be probed with a byte
    if ack == receiver.end:
        receiver.flags &= ~FLAG_DATA_UNACKNOWLEDGED

    if index == ACK_SET:
        if (
            ct.last_direction == direction
            and ct.last_seq == seq
            and ct.last_ack == ack
            and ct.last_end == end
            and ct.last_win == raw_window
        ):
            ct.retrans = ct.retrans + 1 & 0xFF
        else:
            ct.last_direction = direction
            ct.last_seq = seq
            ct.last_ack = ack
            ct.last_end = end
            ct.last_win = raw_window
            ct.retrans = 0
    return NF_ACCEPT


def handle_invalid(sysctl: Sysctl, ct: TcpConn, direction: int, index: int, now_ms: int) -> None:
    """Shorten a connection in which both sides sent a FIN or RST out of window [nf_tcp_handle_invalid].

    They are in step and we are not: the connection is over and must not be held for days.
    """
    if not ct.status & IPS_ASSURED or ct.status & IPS_FIXED_TIMEOUT:
        return
    if index != RST_SET and index != FIN_SET:
        return
    if ct.last_direction != direction and (ct.last_index == FIN_SET or ct.last_index == RST_SET):
        left = ct.expires_ms - now_ms
        if left >= HANDLE_INVALID_MIN_MS and left > sysctl.tcp_timeout_unacknowledged:
            refresh(ct, sysctl.tcp_timeout_unacknowledged, now_ms)
    else:
        ct.last_index = index
        ct.last_direction = direction


def state_timeout(sysctl: Sysctl, state: int) -> int:
    """Look up the timeout of a state, in ms."""
    if state == ESTABLISHED:
        return sysctl.tcp_timeout_established
    if state == SYN_SENT:
        return sysctl.tcp_timeout_syn_sent
    if state == SYN_SENT2:
        return SYN_SENT2_TIMEOUT_MS
    if state == SYN_RECV:
        return sysctl.tcp_timeout_syn_recv
    if state == FIN_WAIT:
        return sysctl.tcp_timeout_fin_wait
    if state == CLOSE_WAIT:
        return sysctl.tcp_timeout_close_wait
    if state == LAST_ACK:
        return sysctl.tcp_timeout_last_ack
    if state == TIME_WAIT:
        return sysctl.tcp_timeout_time_wait
    assert state == CLOSE
    return sysctl.tcp_timeout_close


def ending(state: int) -> int:
    """Say how a connection in this state is coming to its end: CLOSED_FIN, CLOSED_RST, or 0 [tcp_can_early_drop]."""
    if state == FIN_WAIT or state == CLOSE_WAIT or state == LAST_ACK or state == TIME_WAIT:
        return CLOSED_FIN
    return CLOSED_RST if state == CLOSE else 0


def resync(ct: TcpConn, opener: TcpPeer, answerer: TcpPeer) -> None:
    """Restart from a SYN that was ignored and is now answered: both sides were in step, we were not."""
    opener.end = ct.last_end
    opener.maxend = ct.last_end
    window: int = ct.last_win
    opener.maxwin = window or 1
    opener.scale = ct.last_scale
    ct.last_flags &= NO_CHALLENGE_ACK
    opener.flags = ct.last_flags
    answerer.end = 0
    answerer.maxend = 0
    answerer.maxwin = 0
    answerer.maxack = 0
    answerer.scale = 0
    answerer.flags &= FLAG_BE_LIBERAL


def remember_ignored(ct: TcpConn, direction: int, index: int, data: bytes, dataoff: int, length: int) -> None:
    """Note a segment that passes without effect, to understand the answer to it."""
    ct.last_index = index
    ct.last_direction = direction
    ct.last_seq = u32(data, dataoff + 4)
    ct.last_end = segment_end(data, dataoff, length)
    ct.last_win = u16(data, dataoff + 14)
    if index == SYN_SET and direction == IP_CT_DIR_ORIGINAL:
        # A SYN that begins anew what we think is there. If its server agrees, `resync` goes on from here.
        offer = TcpPeer()
        tcp_options(data, dataoff, offer)
        ct.last_flags = offer.flags
        ct.last_scale = offer.scale if offer.flags & FLAG_WINDOW_SCALE else 0
        if ct.state == LAST_ACK:
            # The server's challenge ACK must not be taken for the ACK of the last FIN (RFC 5961 4).
            ct.last_flags |= FLAG_EXP_CHALLENGE_ACK
    if ct.state == SYN_SENT and index == ACK_SET and direction == IP_CT_DIR_REPLY:
        ct.last_ack = u32(data, dataoff + 8)  # perhaps a challenge ACK; the client answers it with a RST


# `reset_state` answers a state, with this bit if the window must not be looked at, or RESET_INVALID.
RESET_SKIPS_WINDOW: Final = 0x10
RESET_INVALID: Final = -1


def reset_state(sysctl: Sysctl, ct: TcpConn, receiver: TcpPeer, direction: int, data: bytes, dataoff: int) -> int:
    """Decide what a RST does (RFC 9293 3.10.7, RFC 5961 3): the state it leads to, or RESET_INVALID."""
    state = ct.state
    # Closing already: the ports may be in use again, and the numbers we know are the old connection's.
    if state == FIN_WAIT or state == CLOSE_WAIT or state == LAST_ACK or state == TIME_WAIT or state == CLOSE:
        return CLOSE | RESET_SKIPS_WINDOW
    # The highest acknowledgement means nothing after a SYN that was let through.
    if receiver.flags & FLAG_MAXACK_SET and ct.last_index != SYN_SET:
        established = state == ESTABLISHED and ct.status & IPS_ASSURED
        seq = u32(data, dataoff + 4)
        if seq == 0 and not established:
            return CLOSE  # likely the answer to a SYN
        if before(seq, receiver.maxack) and not sysctl.tcp_ignore_invalid_rst:
            return RESET_INVALID
        if established and seq != receiver.maxack:
            if ct.last_index == ACK_SET and ct.last_direction == direction and seq == ct.last_end:
                return CLOSE  # a train: the RST follows the sender's last data
            # In the window but not exact: the receiver answers with a challenge ACK and the connection goes on.
            return state
        return CLOSE
    if u32(data, dataoff + 8) == ct.last_end:
        # The answer to a SYN, or to an ACK of a half-open connection, that was let through: what it acknowledges
        # is not in our window.
        if ct.last_index == SYN_SET and ct.last_direction != direction and ct.status & IPS_SEEN_REPLY:
            return CLOSE | RESET_SKIPS_WINDOW
        if ct.last_index == ACK_SET and not ct.status & IPS_ASSURED:
            return CLOSE | RESET_SKIPS_WINDOW
    if (
        state == SYN_SENT
        and ct.last_index == ACK_SET
        and ct.last_direction == IP_CT_DIR_REPLY
        and u32(data, dataoff + 4) == ct.last_ack
    ):
        # The client's answer to a challenge ACK: the server still held the connection before this one (RFC 5961 4).
        return CLOSE | RESET_SKIPS_WINDOW
    return CLOSE


def choose_timeout(sysctl: Sysctl, ct: TcpConn, flags_of_both: int, index: int, state: int) -> int:
    """Choose the timeout after an accepted segment, in ms."""
    timeout = state_timeout(sysctl, state)
    if ct.retrans >= sysctl.tcp_max_retrans and timeout > sysctl.tcp_timeout_max_retrans:
        timeout = sysctl.tcp_timeout_max_retrans
    elif index == RST_SET:
        timeout = sysctl.tcp_timeout_close
    elif flags_of_both & FLAG_DATA_UNACKNOWLEDGED and timeout > sysctl.tcp_timeout_unacknowledged:
        timeout = sysctl.tcp_timeout_unacknowledged
    elif ct.last_win == 0 and timeout > sysctl.tcp_timeout_max_retrans:
        timeout = sysctl.tcp_timeout_max_retrans
    if state == ESTABLISHED and timeout > sysctl.tcp_timeout_unacknowledged and not ct.status & IPS_SEEN_REPLY:
        return sysctl.tcp_timeout_unacknowledged  # picked up in the middle, and nobody answers
    return timeout


def first_timeout(sysctl: Sysctl, ct: TcpConn) -> int:
    """Choose the timeout of a connection that is not confirmed yet, in ms, after the segments that it has seen."""
    return choose_timeout(sysctl, ct, ct.orig_flags | ct.reply_flags, ct.last_index, ct.state)


def tcp_packet(
    net: Conntrack,
    ct: TcpConn,
    data: bytes,
    dataoff: int,
    length: int,
    direction: int,
    checksum: bool,
    now_ms: int,
) -> int:
    """Track a segment [nf_conntrack_tcp_packet].

    Returns NF_ACCEPT, NF_REPEAT (the connection was closed and is reopened: it is gone, look again), or an INVALID
    reason.
    """
    reason = tcp_error(data, dataoff, length, checksum)
    if reason:
        return reason
    sender, receiver = SENDER, RECEIVER
    unpack(ct, direction, sender, receiver)
    verdict = tcp_segment(net, ct, sender, receiver, data, dataoff, length, direction, now_ms)
    pack(ct, direction, sender, receiver)
    return verdict


def tcp_segment(
    net: Conntrack,
    ct: TcpConn,
    sender: TcpPeer,
    receiver: TcpPeer,
    data: bytes,
    dataoff: int,
    length: int,
    direction: int,
    now_ms: int,
) -> int:
    """Track a segment whose header is in order, and whose sides are unpacked; returns what `tcp_packet` returns."""
    sysctl = settings_of(net, ct)
    if not ct.status & IPS_CONFIRMED and ct.state == NONE:
        reason = tcp_new(sysctl, sender, receiver, data, dataoff, length)
        if reason:
            return reason

    index = segment_class(data[dataoff + 13])
    old_state = ct.state
    new_state = next_state(direction, index, old_state)

    if new_state == SYN_SENT and old_state >= TIME_WAIT:
        # "it MAY accept a new SYN from the remote TCP to reopen the connection directly from TIME-WAIT" (RFC 9293
        # 3.6.1), if it was closed in order or aborted by the side that comes back.
        if (sender.flags | receiver.flags) & FLAG_CLOSE_INIT or (
            ct.last_direction == direction and ct.last_index == RST_SET
        ):
            net.table.expire(ct, now_ms)
            return NF_REPEAT
        new_state = IGNORE
    if new_state == IGNORE:
        if (
            index == SYNACK_SET
            and ct.last_index == SYN_SET
            and ct.last_direction != direction
            and u32(data, dataoff + 8) == ct.last_end
        ):
            resync(ct, receiver, sender)
            old_state = SYN_SENT
            new_state = SYN_RECV
        else:
            remember_ignored(ct, direction, index, data, dataoff, length)
            return NF_ACCEPT
    elif new_state == INVALID:
        return INVALID_TCP_STATE
    elif new_state == TIME_WAIT:
        if (
            old_state == LAST_ACK
            and index == ACK_SET
            and ct.last_direction != direction
            and ct.last_index == SYN_SET
            and ct.last_flags & FLAG_EXP_CHALLENGE_ACK
        ):
            ct.last_flags &= NO_CHALLENGE_ACK
            return NF_ACCEPT  # a challenge ACK acknowledges no FIN (RFC 5961 4)
    elif new_state == SYN_SENT2:
        ct.last_flags |= FLAG_SIMULTANEOUS_OPEN  # the table can't remember it once in SYN_RECV
    elif new_state == SYN_RECV:
        if direction == IP_CT_DIR_REPLY and index == ACK_SET and ct.last_flags & FLAG_SIMULTANEOUS_OPEN:
            new_state = ESTABLISHED

    in_window = False
    if new_state == CLOSE and index == RST_SET:
        new_state = reset_state(sysctl, ct, receiver, direction, data, dataoff)
        if new_state == RESET_INVALID:
            return INVALID_TCP_RST
        in_window = new_state & RESET_SKIPS_WINDOW != 0
        new_state &= ~RESET_SKIPS_WINDOW
    if not in_window:
        result = tcp_in_window(sysctl, ct, sender, receiver, direction, index, data, dataoff, length)
        if result == WINDOW_IGNORE:
            return NF_ACCEPT
        if result != NF_ACCEPT:
            handle_invalid(sysctl, ct, direction, index, now_ms)
            return result

    # From here on the segment is in the window.
    ct.last_index = index
    ct.last_direction = direction
    ct.state = new_state
    if new_state != old_state:
        net.cached |= IPCT_PROTOINFO
        ct.ending = ending(new_state)
        if new_state == FIN_WAIT:
            sender.flags |= FLAG_CLOSE_INIT

    timeout = choose_timeout(sysctl, ct, sender.flags | receiver.flags, index, new_state)
    if not ct.status & IPS_SEEN_REPLY:
        if index == RST_SET:
            # Refused, or given up before anything came of it.
            account(ct, direction == IP_CT_DIR_REPLY, length)
            net.table.kill(ct, now_ms, CLOSED_RST)
            return NF_ACCEPT
        if index == SYN_SET and old_state == SYN_SENT:
            # Retransmitted SYNs must not keep an entry for ever: the ports could not be used again.
            return NF_ACCEPT
    elif (
        not ct.status & IPS_ASSURED and new_state == ESTABLISHED and (old_state == SYN_RECV or old_state == ESTABLISHED)
    ):
        ct.status |= IPS_ASSURED
    refresh(ct, timeout, now_ms)
    account(ct, direction == IP_CT_DIR_REPLY, length)
    return NF_ACCEPT
