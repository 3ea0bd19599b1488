"""SCTP [nf_conntrack_proto_sctp.c, RFC 9260].

A packet carries chunks; each moves the state by the table below. What ties a packet to its association is the
verification tag: each side tells the other in its INIT or INIT ACK which tag to use.
"""

from typing import Final

from mypy_extensions import mypyc_attr

from conntrackd.const import (
    CLOSED_FIN,
    CLOSED_RST,
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_SCTP_CHUNKS,
    INVALID_SCTP_NEW,
    INVALID_SCTP_STATE,
    INVALID_SCTP_VTAG,
    IP_CT_DIR_ORIGINAL,
    IP_CT_DIR_REPLY,
    IPCT_PROTOINFO,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
)
from conntrackd.core.conn import Conn, account, refresh
from conntrackd.core.net import Conntrack, settings_of
from conntrackd.core.sysctl import Sysctl
from conntrackd.wire.checksum import sctp_checksum_ok
from conntrackd.wire.fields import u16, u32

HEADER: Final = 12
CHUNK_HEADER: Final = 4
INIT_HEADER: Final = 16  # of the chunk's value: tag, window, streams, number (RFC 9260 3.3.2)

# Chunk types (RFC 9260 3.2).
DATA: Final = 0
INIT: Final = 1
INIT_ACK: Final = 2
HEARTBEAT: Final = 4
HEARTBEAT_ACK: Final = 5
ABORT: Final = 6
SHUTDOWN: Final = 7
SHUTDOWN_ACK: Final = 8
ERROR: Final = 9
COOKIE_ECHO: Final = 10
COOKIE_ACK: Final = 11
SHUTDOWN_COMPLETE: Final = 14
FLAG_T: Final = 0x01  # the tag is the peer's own, reflected (RFC 9260 8.5.1)

# States [enum sctp_conntrack].
NONE: Final = 0
CLOSED: Final = 1
COOKIE_WAIT: Final = 2
COOKIE_ECHOED: Final = 3
ESTABLISHED: Final = 4
SHUTDOWN_SENT: Final = 5
SHUTDOWN_RECD: Final = 6
SHUTDOWN_ACK_SENT: Final = 7
HEARTBEAT_SENT: Final = 8
STATES: Final = 9
IMPOSSIBLE: Final = 9

STATE_NAMES: Final = (
    "NONE", "CLOSED", "COOKIE_WAIT", "COOKIE_ECHOED", "ESTABLISHED",
    "SHUTDOWN_SENT", "SHUTDOWN_RECD", "SHUTDOWN_ACK_SENT", "HEARTBEAT_SENT",
)  # fmt: skip

# The state table [sctp_conntracks]: per direction one row per chunk, one column per state. Chunks that are not listed
# (DATA, SACK) leave the state. A dot leaves it too, a dash is impossible.
#                     NONE  CL  CW  CE  ES  SS  SR  SA  HS
_TABLE: Final = {
    (IP_CT_DIR_ORIGINAL, INIT):              "CL .  .  .  .  CL CL .  CW",  # begins, restarts (RFC 9260 5.1, 5.2)
    (IP_CT_DIR_ORIGINAL, INIT_ACK):          "CL .  .  .  .  .  .  .  CL",  # the answerer's chunk: says nothing here
    (IP_CT_DIR_ORIGINAL, ABORT):             "CL .  CL CL CL CL CL CL CL",  # ends it (9.1)
    (IP_CT_DIR_ORIGINAL, SHUTDOWN):          "CL .  .  .  SS .  .  .  CL",  # the opener closes (9.2)
    (IP_CT_DIR_ORIGINAL, SHUTDOWN_ACK):      "SA .  .  .  .  SA SA .  SA",  # agrees to close
    (IP_CT_DIR_ORIGINAL, ERROR):             "CL .  .  .  .  .  .  .  CL",
    (IP_CT_DIR_ORIGINAL, COOKIE_ECHO):       "CL .  CE .  .  .  .  .  CL",  # the handshake's third step (5.1 C)
    (IP_CT_DIR_ORIGINAL, COOKIE_ACK):        "CL .  .  ES .  .  .  .  CL",
    (IP_CT_DIR_ORIGINAL, SHUTDOWN_COMPLETE): "CL .  .  .  .  .  .  CL CL",  # closed
    (IP_CT_DIR_ORIGINAL, HEARTBEAT):         "HS .  .  .  .  .  .  .  . ",  # a second path begins with one (8.3)
    (IP_CT_DIR_ORIGINAL, HEARTBEAT_ACK):     "CL .  .  .  .  .  .  .  . ",
    (IP_CT_DIR_REPLY, INIT):                 "-  .  .  .  .  .  .  .  - ",  # a collision, or a restart by the answerer
    (IP_CT_DIR_REPLY, INIT_ACK):             "-  CW .  .  .  .  .  .  - ",  # the handshake's second step (5.1 B)
    (IP_CT_DIR_REPLY, ABORT):                "-  .  CL CL CL CL CL CL - ",
    (IP_CT_DIR_REPLY, SHUTDOWN):             "-  .  .  .  SR .  .  .  - ",  # the answerer closes
    (IP_CT_DIR_REPLY, SHUTDOWN_ACK):         "-  .  .  .  .  SA SA .  - ",
    (IP_CT_DIR_REPLY, ERROR):                "-  .  .  CL .  .  .  .  - ",  # a stale cookie (5.2.6)
    (IP_CT_DIR_REPLY, COOKIE_ECHO):          "-  .  CE .  .  .  .  .  - ",
    (IP_CT_DIR_REPLY, COOKIE_ACK):           "-  .  .  ES .  .  .  .  - ",  # the handshake's last step (5.1 D)
    (IP_CT_DIR_REPLY, SHUTDOWN_COMPLETE):    "-  .  .  .  .  .  .  CL - ",
    (IP_CT_DIR_REPLY, HEARTBEAT):            "-  .  .  .  .  .  .  .  . ",
    (IP_CT_DIR_REPLY, HEARTBEAT_ACK):        "-  .  .  .  .  .  .  .  ES",  # the second path works
}  # fmt: skip
_SHORT: Final = {"CL": 1, "CW": 2, "CE": 3, "ES": 4, "SS": 5, "SR": 6, "SA": 7, "HS": 8, "-": IMPOSSIBLE}
CHUNK_TYPES: Final = 16


def _flatten() -> bytes:
    """Lay the table out flat for `next_state`: (direction, chunk, state) -> state."""
    flat = bytearray(state for _ in range(2 * CHUNK_TYPES) for state in range(STATES))
    for (direction, chunk), row in _TABLE.items():
        for state, cell in enumerate(row.split()):
            if cell != ".":
                flat[(direction * CHUNK_TYPES + chunk) * STATES + state] = _SHORT[cell]
    return bytes(flat)


SCTP_CONNTRACKS: Final = _flatten()

CHUNKS_MAX: Final = 1024  # chunks looked at in one packet: four bytes each in a capture of 3900

# follow_chunks' answer when the packet passes without prolonging the association; NF_ACCEPT and reasons besides.
CHUNKS_IGNORE: Final = 0

# SctpConn.flags
HEARTBEAT_VTAG_FAILED: Final = 1
ABORTED: Final = 2  # the last state was reached by an ABORT


@mypyc_attr(acyclic=True)
class SctpConn(Conn):
    """An SCTP association, or one path of it [struct ip_ct_sctp]."""

    def __init__(self, orig: bytes, reply: bytes, protonum: int, now_ms: int) -> None:
        super().__init__(orig, reply, protonum, now_ms)
        # Indexed by direction: the tag that packets of that direction carry; whether an INIT was seen in it.
        self.vtag = [0, 0]
        self.init = [False, False]
        self.last_direction = IP_CT_DIR_ORIGINAL
        self.flags = 0


def next_state(direction: int, chunk: int, state: int) -> int:
    """Look up the state after a chunk; may be IMPOSSIBLE."""
    if chunk >= CHUNK_TYPES:
        return state
    return SCTP_CONNTRACKS[(direction * CHUNK_TYPES + chunk) * STATES + state]


def next_chunk(data: bytes, at: int) -> int:
    """Return the offset of the chunk after the one at `at`, or -1 if none begins there [for_each_sctp_chunk]."""
    if len(data) < at + CHUNK_HEADER:
        return -1
    return at + (u16(data, at + 2) + 3 & ~3)


def chunk_types(data: bytes, dataoff: int) -> int:
    """Collect the chunk types of a packet as a bit set [do_basic_checks]; -1 if their combination is forbidden.

    INIT, INIT ACK and SHUTDOWN COMPLETE travel alone, COOKIE ECHO and COOKIE ACK come first (RFC 9260 6.10). A chunk
    without length spoils the packet, so whoever walks the chunks after this check gets on.
    """
    types = 0
    alone = False
    at = dataoff + HEADER
    for count in range(CHUNKS_MAX):
        after = next_chunk(data, at)
        if after < 0:
            break
        if after == at:
            return -1
        chunk = data[at]
        if chunk == INIT or chunk == INIT_ACK or chunk == SHUTDOWN_COMPLETE:
            alone = True
        if count > 0 and (alone or chunk == COOKIE_ACK or chunk == COOKIE_ECHO):
            return -1
        types |= 1 << chunk
        at = after
    return types or -1


def sctp_new(ct: SctpConn, data: bytes, dataoff: int, types: int) -> int:
    """Begin an association [sctp_new]; returns an INVALID reason, or 0."""
    if types & (1 << ABORT | 1 << SHUTDOWN_COMPLETE | 1 << COOKIE_ACK):
        return INVALID_SCTP_NEW  # out of the blue (RFC 9260 8.4)
    vtag = u32(data, dataoff + 4)
    at = dataoff + HEADER
    for _ in range(CHUNKS_MAX):
        after = next_chunk(data, at)
        if after < 0:
            break
        chunk = data[at]
        if next_state(IP_CT_DIR_ORIGINAL, chunk, NONE) == NONE:
            return INVALID_SCTP_NEW
        if chunk == INIT:
            if vtag != 0:
                return INVALID_SCTP_VTAG  # RFC 9260 8.5.1 A
            if len(data) < at + CHUNK_HEADER + INIT_HEADER:
                return INVALID_SCTP_CHUNKS
            ct.vtag[IP_CT_DIR_REPLY] = u32(data, at + CHUNK_HEADER)
        elif chunk == HEARTBEAT:
            ct.vtag[IP_CT_DIR_ORIGINAL] = vtag  # a second path: the other side's tag is not known here
        elif chunk == SHUTDOWN_ACK:
            ct.vtag[IP_CT_DIR_REPLY] = vtag  # answered by a SHUTDOWN COMPLETE with the tag reflected (8.4 point 5)
        at = after
    return 0


def state_timeout(sysctl: Sysctl, state: int) -> int:
    """Look up the timeout of a state, in ms."""
    if state == ESTABLISHED:
        return sysctl.sctp_timeout_established
    if state == CLOSED:
        return sysctl.sctp_timeout_closed
    if state == COOKIE_WAIT:
        return sysctl.sctp_timeout_cookie_wait
    if state == COOKIE_ECHOED:
        return sysctl.sctp_timeout_cookie_echoed
    if state == SHUTDOWN_SENT:
        return sysctl.sctp_timeout_shutdown_sent
    if state == SHUTDOWN_RECD:
        return sysctl.sctp_timeout_shutdown_recd
    if state == SHUTDOWN_ACK_SENT:
        return sysctl.sctp_timeout_shutdown_ack_sent
    assert state == HEARTBEAT_SENT
    return sysctl.sctp_timeout_heartbeat_sent


def ending(ct: SctpConn) -> int:
    """Say how an association is coming to its end: CLOSED_FIN, CLOSED_RST, or 0 [sctp_can_early_drop]."""
    if ct.state == SHUTDOWN_SENT or ct.state == SHUTDOWN_RECD or ct.state == SHUTDOWN_ACK_SENT:
        return CLOSED_FIN
    if ct.state == CLOSED and ct.status & IPS_SEEN_REPLY:
        return CLOSED_RST if ct.flags & ABORTED else CLOSED_FIN
    return 0


def reflected_vtag_ok(ct: SctpConn, direction: int, vtag: int, chunk_flags: int) -> bool:
    """Check the tag of an ABORT or SHUTDOWN COMPLETE (RFC 9260 8.5.1 B, C)."""
    return vtag == ct.vtag[1 - direction if chunk_flags & FLAG_T else direction]


def init_ack_vtag_ok(ct: SctpConn, direction: int, init_tag: int) -> bool:
    """Check the tag that an INIT ACK announces against what is pending: a late one must not rewrite it."""
    other = 1 - direction
    known = ct.vtag[other]
    if not ct.init[other] and known != 0 and known != init_tag:
        return False
    return not (ct.init[direction] and ct.init[other] and known != init_tag)


def sctp_packet(
    net: Conntrack,
    ct: SctpConn,
    data: bytes,
    dataoff: int,
    length: int,
    direction: int,
    checksum: bool,
    now_ms: int,
) -> int:
    """Track an SCTP packet [nf_conntrack_sctp_packet]; returns NF_ACCEPT or an INVALID reason."""
    if len(data) < dataoff + HEADER:
        return INVALID_L4_TRUNCATED
    if checksum and len(data) == length and not sctp_checksum_ok(data, dataoff):
        return INVALID_BAD_CHECKSUM
    types = chunk_types(data, dataoff)
    if types < 0:
        return INVALID_SCTP_CHUNKS
    if not ct.status & IPS_CONFIRMED and ct.state == NONE:
        reason = sctp_new(ct, data, dataoff, types)
        if reason:
            return reason

    special = 1 << INIT | 1 << SHUTDOWN_COMPLETE | 1 << COOKIE_ECHO | 1 << ABORT
    special |= 1 << SHUTDOWN_ACK | 1 << HEARTBEAT | 1 << HEARTBEAT_ACK
    if not types & special and u32(data, dataoff + 4) != ct.vtag[direction]:
        return INVALID_SCTP_VTAG  # RFC 9260 8.5

    first_state = ct.state
    verdict = follow_chunks(ct, data, dataoff, direction, types)
    if ct.state != first_state:  # also if a later chunk spoiled the packet
        net.cached |= IPCT_PROTOINFO
        ct.ending = ending(ct)
    if verdict == CHUNKS_IGNORE:
        return NF_ACCEPT
    if verdict == NF_ACCEPT:
        refresh(ct, state_timeout(settings_of(net, ct), ct.state), now_ms)
        account(ct, direction == IP_CT_DIR_REPLY, length)
    return verdict


def follow_chunks(ct: SctpConn, data: bytes, dataoff: int, direction: int, types: int) -> int:
    """Check the tag for each chunk of a packet, and move the state; what a chunk has done stays done.

    Returns NF_ACCEPT, CHUNKS_IGNORE, or an INVALID reason.
    """
    other = 1 - direction
    vtag = u32(data, dataoff + 4)
    ignore = False
    at = dataoff + HEADER
    for _ in range(CHUNKS_MAX):
        after = next_chunk(data, at)
        if after < 0:
            break
        chunk = data[at]
        if chunk == INIT:
            if vtag != 0:
                return INVALID_SCTP_VTAG
        elif chunk == ABORT or chunk == SHUTDOWN_COMPLETE:
            if not reflected_vtag_ok(ct, direction, vtag, data[at + 1]):
                return INVALID_SCTP_VTAG
        elif chunk == COOKIE_ECHO:
            if vtag != ct.vtag[direction]:
                return INVALID_SCTP_VTAG
        elif chunk == COOKIE_ACK:
            ct.init = [False, False]  # no INIT is pending any more
        elif chunk == HEARTBEAT:
            if ct.vtag[direction] == 0:
                ct.vtag[direction] = vtag
            elif vtag != ct.vtag[direction]:
                # Perhaps the association was restarted on a path that we did not see: its answer will tell.
                if types & 1 << DATA or ignore:
                    return INVALID_SCTP_VTAG
                ct.flags |= HEARTBEAT_VTAG_FAILED
                ct.last_direction = direction
                ignore = True
                at = after
                continue
            else:
                ct.flags &= ~HEARTBEAT_VTAG_FAILED
        elif chunk == HEARTBEAT_ACK:
            if ct.vtag[direction] == 0:
                ct.vtag[direction] = vtag
            elif vtag != ct.vtag[direction]:
                if types & 1 << DATA or ignore:
                    return INVALID_SCTP_VTAG
                if not ct.flags & HEARTBEAT_VTAG_FAILED or ct.last_direction == direction:
                    return INVALID_SCTP_VTAG
                ct.flags &= ~HEARTBEAT_VTAG_FAILED
                ct.vtag[direction] = vtag
                ct.vtag[other] = 0
            else:
                ct.flags &= ~HEARTBEAT_VTAG_FAILED

        old_state = ct.state
        new_state = next_state(direction, chunk, old_state)
        if new_state == IMPOSSIBLE:
            return INVALID_SCTP_STATE

        if chunk == INIT or chunk == INIT_ACK:
            if len(data) < at + CHUNK_HEADER + INIT_HEADER:
                return INVALID_SCTP_CHUNKS
            init_tag = u32(data, at + CHUNK_HEADER)
            if chunk == INIT:
                # An INIT that repeats what is known of an association is late, or forged: no answer to it is due.
                if old_state == NONE or init_tag != ct.vtag[other]:
                    if ct.init[direction] and ct.init[other]:
                        ct.init[other] = False
                    ct.init[direction] = True
                # As a SYN: a retransmitted INIT must not keep the entry for ever.
                if new_state == CLOSED and old_state == CLOSED and ct.status & IPS_CONFIRMED:
                    ignore = True
            elif not init_ack_vtag_ok(ct, direction, init_tag):
                return INVALID_SCTP_VTAG
            ct.vtag[other] = init_tag

        ct.state = new_state
        if chunk == ABORT:
            ct.flags |= ABORTED
        elif new_state != old_state:
            ct.flags &= ~ABORTED
        if new_state == ESTABLISHED and old_state != ESTABLISHED:
            ct.status |= IPS_ASSURED
        at = after
    return CHUNKS_IGNORE if ignore else NF_ACCEPT
