"""Netlink messages of the queue that NetfilterQueue does not read or write.

Packets with all that the kernel says about them, queue flags, and many verdicts in one message. All go through the
socket that the queue is bound to; the kernel takes them from no other. Sources:
include/uapi/linux/netfilter/nfnetlink_queue.h, include/uapi/linux/netlink.h.
"""

import errno
import os
import socket
import struct
import sys
from typing import Final

from conntrackd.const import NF_REPEAT

LITTLE_ENDIAN: Final = sys.byteorder == "little"

NFNL_SUBSYS_QUEUE: Final = 3
NFQNL_MSG_PACKET: Final = NFNL_SUBSYS_QUEUE << 8 | 0
NFQNL_MSG_VERDICT: Final = NFNL_SUBSYS_QUEUE << 8 | 1
NFQNL_MSG_CONFIG: Final = NFNL_SUBSYS_QUEUE << 8 | 2
NFQNL_MSG_VERDICT_BATCH: Final = NFNL_SUBSYS_QUEUE << 8 | 3

# Attributes of packets and verdicts [enum nfqnl_attr_type].
NFQA_PACKET_HDR: Final = 1
NFQA_VERDICT_HDR: Final = 2
NFQA_MARK: Final = 3
NFQA_IFINDEX_INDEV: Final = 5
NFQA_IFINDEX_OUTDEV: Final = 6
NFQA_PAYLOAD: Final = 10
NFQA_CAP_LEN: Final = 13  # the packet's length, if less than that is in the message
NFQA_SKB_INFO: Final = 14

# NFQA_SKB_INFO. Neither NOTVERIFIED nor NOTREADY (1, left for the hardware to finish): the hardware has verified it.
NFQA_SKB_CSUM_NOTVERIFIED: Final = 1 << 2

NFQA_CFG_QUEUE_MAXLEN: Final = 3
NFQA_CFG_MASK: Final = 4
NFQA_CFG_FLAGS: Final = 5

NFQA_CFG_F_FAIL_OPEN: Final = 1 << 0
NFQA_CFG_F_GSO: Final = 1 << 2
KNOWN_FLAGS: Final = NFQA_CFG_F_FAIL_OPEN | NFQA_CFG_F_GSO

NLMSG_ERROR: Final = 2
NLM_F_REQUEST: Final = 1
NLM_F_ACK: Final = 4
AF_UNSPEC: Final = 0

# nlmsghdr (length, type, flags, sequence, port) in host order, nfgenmsg (family, version, queue) in network order.
HEADER: Final = struct.Struct("=IHHII")
GENERIC: Final = struct.Struct(">BBH")
ATTRIBUTE: Final = struct.Struct("=HH")

# Where the id stands in a packet message: its first attribute is always NFQA_PACKET_HDR, which begins with it.
PACKET_ID_AT: Final = HEADER.size + GENERIC.size + ATTRIBUTE.size

# A verdict message: constant head; verdict and packet id; constant head of the mark; the mark.
VERDICT: Final = struct.Struct(">24sII4sI")


def native16(message: bytes, at: int) -> int:
    """Read a 16-bit number in the order of this machine, as netlink's own headers are."""
    if LITTLE_ENDIAN:
        return message[at] | message[at + 1] << 8
    return message[at] << 8 | message[at + 1]


def verdict_head(queue: int, size: int) -> bytes:
    """Write the 24 bytes with which a verdict message of `size` bytes begins."""
    return (
        HEADER.pack(size, NFQNL_MSG_VERDICT, NLM_F_REQUEST, 0, 0)
        + GENERIC.pack(AF_UNSPEC, 0, queue)
        + ATTRIBUTE.pack(12, NFQA_VERDICT_HDR)
    )


MARK_HEAD: Final = ATTRIBUTE.pack(8, NFQA_MARK)


def settings(queue: int, max_length: int, flags: int) -> bytes:
    """Write a message that sets the length and the flags of a queue that is in use: nobody waits for an answer."""
    body = GENERIC.pack(AF_UNSPEC, 0, queue)
    for kind, value in ((NFQA_CFG_QUEUE_MAXLEN, max_length), (NFQA_CFG_MASK, KNOWN_FLAGS), (NFQA_CFG_FLAGS, flags)):
        body += ATTRIBUTE.pack(8, kind) + struct.pack(">I", value)
    return HEADER.pack(HEADER.size + len(body), NFQNL_MSG_CONFIG, NLM_F_REQUEST, 0, 0) + body


def drop_up_to(queue: int, packet_id: int) -> bytes:
    """Write a message that drops all packets up to an id that still wait for a verdict."""
    body = GENERIC.pack(AF_UNSPEC, 0, queue) + ATTRIBUTE.pack(12, NFQA_VERDICT_HDR) + struct.pack(">II", 0, packet_id)
    return HEADER.pack(HEADER.size + len(body), NFQNL_MSG_VERDICT_BATCH, NLM_F_REQUEST, 0, 0) + body


def set_flags(fd: int, queue: int, flags: int) -> None:
    """Set the flags of a queue that was just bound. Raises OSError when the kernel refuses.

    Packets may come before the kernel's answer does. They are told to come again: none of them is lost, and none waits
    in the queue for ever because nobody knows its id.
    """
    body = GENERIC.pack(AF_UNSPEC, 0, queue)
    for kind in (NFQA_CFG_MASK, NFQA_CFG_FLAGS):
        body += ATTRIBUTE.pack(8, kind) + struct.pack(">I", flags)
    message = HEADER.pack(HEADER.size + len(body), NFQNL_MSG_CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body
    early: list[bytes] = []
    error = -errno.ETIMEDOUT
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.send(message)
        while error == -errno.ETIMEDOUT:
            try:
                answer = sock.recv(0x10000, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break  # the kernel answers at once or its answer was lost
            kind = HEADER.unpack_from(answer)[1]
            if kind == NLMSG_ERROR:
                (error,) = struct.unpack_from("=i", answer, HEADER.size)
            elif kind == NFQNL_MSG_PACKET:
                (packet_id,) = struct.unpack_from(">I", answer, PACKET_ID_AT)
                early.append(verdict_head(queue, 32) + struct.pack(">II", NF_REPEAT, packet_id))
        if early:
            sock.send(b"".join(early))
    if error:
        raise OSError(-error, os.strerror(-error))
