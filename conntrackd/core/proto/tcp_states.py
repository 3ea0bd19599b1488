"""The TCP state table [tcp_conntracks in nf_conntrack_proto_tcp.c], with the reason of every cell.

The router sees each segment once, on its way to the receiver, and cannot know whether it arrives. So these are not the
states of RFC 9293 3.3.2 but what the pair of endpoints may be in after the segment; where the tracker cannot tell, it
lets the segment pass and waits for the answer (IGNORE).

`TRANSITIONS` is what the tracker runs on, what the documentation is drawn from, and what the tests walk cell by cell.
"""

from typing import Final

NONE: Final = 0
SYN_SENT: Final = 1
SYN_RECV: Final = 2
ESTABLISHED: Final = 3
FIN_WAIT: Final = 4
CLOSE_WAIT: Final = 5
LAST_ACK: Final = 6
TIME_WAIT: Final = 7
CLOSE: Final = 8
SYN_SENT2: Final = 9  # a SYN from either side: simultaneous open
STATES: Final = 10
# Outcomes that are no states.
INVALID: Final = 10
IGNORE: Final = 11

STATE_NAMES: Final = (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT",
    "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2",
)  # fmt: skip

# Segment classes [enum tcp_bit_set], by priority RST > SYN > FIN > ACK.
SYN_SET: Final = 0
SYNACK_SET: Final = 1
FIN_SET: Final = 2
ACK_SET: Final = 3
RST_SET: Final = 4
NONE_SET: Final = 5
CLASSES: Final = 6

CLASS_NAMES: Final = ("SYN", "SYN/ACK", "FIN", "ACK", "RST", "none")

# One row per direction and class, one cell per state the connection is in: the state after, and why.
ORIGINAL_SYN: Final = (
    (SYN_SENT, "a connection begins (RFC 9293 3.5)"),
    (SYN_SENT, "the SYN again: retransmitted, or a new attempt on the same ports"),
    (IGNORE, "late retransmission, or the client forgot the connection: the server's answer will tell"),
    (IGNORE, "the server answers with a challenge ACK if it still has the connection (RFC 5961 4)"),
    (IGNORE, "as in ESTABLISHED"),
    (IGNORE, "as in ESTABLISHED"),
    (IGNORE, "as in ESTABLISHED; the challenge ACK must not be taken for the last ACK"),
    (SYN_SENT, "reopened, when the old connection was really closed (RFC 9293 3.6.1)"),
    (SYN_SENT, "reopened after an abort, when the same side aborted"),
    (SYN_SENT2, "retransmitted SYN of a simultaneous open"),
)
ORIGINAL_SYNACK: Final = (
    (INVALID, "an answer to nothing begins nothing"),
    (INVALID, "the client answers, but the server has not spoken"),
    (SYN_RECV, "retransmitted SYN/ACK of a simultaneous open"),
    (INVALID, "the client answered a SYN that was not sent"),
    (INVALID, "as in ESTABLISHED"),
    (INVALID, "as in ESTABLISHED"),
    (INVALID, "as in ESTABLISHED"),
    (INVALID, "as in ESTABLISHED"),
    (INVALID, "as in ESTABLISHED"),
    (SYN_RECV, "simultaneous open, the first SYN/ACK (RFC 9293 figure 7)"),
)
ORIGINAL_FIN: Final = (
    (INVALID, "too late to learn anything of a connection that is closing"),
    (INVALID, "the client may close in SYN-SENT, but then it sends no FIN (RFC 9293 3.6)"),
    (FIN_WAIT, "closed before the last ACK of the handshake was seen"),
    (FIN_WAIT, "the first FIN"),
    (LAST_ACK, "FIN in both directions, or the first one again: the tracker does not tell them apart"),
    (LAST_ACK, "the second FIN, after the first was acknowledged"),
    (LAST_ACK, "retransmitted FIN"),
    (TIME_WAIT, "retransmitted FIN"),
    (CLOSE, "FIN of a connection that was aborted"),
    (INVALID, "neither side has an established connection to close"),
)
ORIGINAL_ACK: Final = (
    (ESTABLISHED, "picked up in the middle, if tcp_loose allows"),
    (INVALID, "the client acknowledges what the server has not sent"),
    (ESTABLISHED, "the handshake's last ACK"),
    (ESTABLISHED, "data, or an acknowledgement"),
    (CLOSE_WAIT, "the FIN is acknowledged, or was: one half is closed"),
    (CLOSE_WAIT, "data or acknowledgements in the half that is open"),
    (TIME_WAIT, "the last FIN is acknowledged"),
    (TIME_WAIT, "retransmitted last ACK"),
    (CLOSE, "ACK of a connection that was aborted"),
    (INVALID, "neither SYN has been answered"),
)
ORIGINAL_RST: Final = (
    (INVALID, "an abort of nothing"),
    (CLOSE, "the client gives up"),
    (CLOSE, "the client gives up"),
    (CLOSE, "aborted (RFC 9293 3.5.2), if the sequence number is right (RFC 5961 3)"),
    (CLOSE, "aborted"),
    (CLOSE, "aborted"),
    (CLOSE, "aborted"),
    (CLOSE, "aborted"),
    (CLOSE, "retransmitted RST"),
    (CLOSE, "the client gives up"),
)
REPLY_SYN: Final = (
    (INVALID, "no connection to reply to"),
    (SYN_SENT2, "simultaneous open (RFC 9293 figure 7)"),
    (INVALID, "the server answered already"),
    (INVALID, "the server begins a connection on the ports of one that lives"),
    (INVALID, "as in ESTABLISHED"),
    (INVALID, "as in ESTABLISHED"),
    (INVALID, "as in ESTABLISHED"),
    (SYN_SENT, "reopened by the other side: the roles change"),
    (INVALID, "only the side that aborted may reopen"),
    (SYN_SENT2, "retransmitted SYN of a simultaneous open"),
)
REPLY_SYNACK: Final = (
    (INVALID, "no connection to reply to"),
    (SYN_RECV, "the handshake's second segment"),
    (IGNORE, "retransmitted, or the answer to a SYN that was ignored: then it brings us in step"),
    (IGNORE, "as in SYN_RECV"),
    (IGNORE, "as in SYN_RECV"),
    (IGNORE, "as in SYN_RECV"),
    (IGNORE, "as in SYN_RECV"),
    (IGNORE, "as in SYN_RECV"),
    (IGNORE, "as in SYN_RECV"),
    (SYN_RECV, "simultaneous open, the first SYN/ACK"),
)
REPLY_FIN: Final = (
    (INVALID, "no connection to reply to"),
    (INVALID, "the server closes what it has not accepted"),
    (FIN_WAIT, "closed by the server before the client's ACK was seen"),
    (FIN_WAIT, "the first FIN"),
    (LAST_ACK, "FIN in both directions, or the first one again"),
    (LAST_ACK, "the second FIN, after the first was acknowledged"),
    (LAST_ACK, "retransmitted FIN"),
    (TIME_WAIT, "retransmitted FIN"),
    (CLOSE, "FIN of a connection that was aborted"),
    (INVALID, "neither side has an established connection to close"),
)
REPLY_ACK: Final = (
    (INVALID, "no connection to reply to"),
    (IGNORE, "perhaps a challenge ACK: the server has an older connection on these ports"),
    (SYN_RECV, "the client has not acknowledged yet"),
    (ESTABLISHED, "data, or an acknowledgement"),
    (CLOSE_WAIT, "the FIN is acknowledged, or was: one half is closed"),
    (CLOSE_WAIT, "data or acknowledgements in the half that is open"),
    (TIME_WAIT, "the last FIN is acknowledged"),
    (TIME_WAIT, "retransmitted last ACK"),
    (CLOSE, "ACK of a connection that was aborted"),
    (IGNORE, "as in SYN_SENT"),
)
REPLY_RST: Final = (
    (INVALID, "no connection to reply to"),
    (CLOSE, "refused"),
    (CLOSE, "aborted by the server"),
    (CLOSE, "aborted, if the sequence number is right (RFC 5961 3)"),
    (CLOSE, "aborted"),
    (CLOSE, "aborted"),
    (CLOSE, "aborted"),
    (CLOSE, "aborted"),
    (CLOSE, "retransmitted RST"),
    (CLOSE, "refused"),
)
NO_FLAGS: Final = ((INVALID, "neither SYN, FIN, ACK nor RST: no TCP sends this"),) * STATES

# TRANSITIONS[direction][class][state] -> (new state, reason)
TRANSITIONS: Final = (
    (ORIGINAL_SYN, ORIGINAL_SYNACK, ORIGINAL_FIN, ORIGINAL_ACK, ORIGINAL_RST, NO_FLAGS),
    (REPLY_SYN, REPLY_SYNACK, REPLY_FIN, REPLY_ACK, REPLY_RST, NO_FLAGS),
)

# The same, flat, for the packet path: one byte per cell, looked up by `next_state`.
TCP_CONNTRACKS: Final = bytes(cell[0] for rows in TRANSITIONS for row in rows for cell in row)


def next_state(direction: int, index: int, state: int) -> int:
    """Look up the state after a segment of class `index`; may be INVALID or IGNORE."""
    return TCP_CONNTRACKS[(direction * CLASSES + index) * STATES + state]
