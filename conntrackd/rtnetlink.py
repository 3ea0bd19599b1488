"""What of rtnetlink(7) we ask and read: interfaces, addresses, and the way to an address.

Sources: include/uapi/linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h.
"""

import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_GETADDR: Final = 22
RTM_NEWROUTE: Final = 24
RTM_GETROUTE: Final = 26
NLM_F_REQUEST: Final = 1
NLM_F_DUMP: Final = 0x300

IFLA_IFNAME: Final = 3
IFA_BROADCAST: Final = 4
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTN_LOCAL: Final = 2

BUFFER: Final = 1 << 16
WAIT_S: Final = 5.0  # the kernel answers at once

HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
LINK: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
ADDRESS: Final = struct.Struct("=BBBBI")  # family, length of the prefix, flags, scope, index
ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, lengths of the prefixes, tos, table, protocol, scope, type, flags
BEGIN: Final = {
    RTM_NEWLINK: LINK,
    RTM_DELLINK: LINK,
    RTM_NEWADDR: ADDRESS,
    RTM_DELADDR: ADDRESS,
    RTM_NEWROUTE: ROUTE,
}
NOTHING: Final = struct.Struct("")


class Message(NamedTuple):
    """One message: what it begins with, and its attributes by their types."""

    kind: int
    begin: tuple[int, ...]
    attributes: dict[int, bytes]


def messages(data: bytes) -> Iterator[Message]:
    """Take apart what was received at once. Of a kind that we do not read, only the kind is told."""
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, at)
        end = at + length
        if not HEADER.size <= length <= len(data) - at:
            return
        begin = BEGIN.get(kind, NOTHING)
        at += HEADER.size
        if begin is NOTHING or at + begin.size > end:
            yield Message(kind, (), {})
        else:
            yield Message(kind, begin.unpack_from(data, at), _attributes(data, at + begin.size, end))
        at = end + 3 & ~3


def _attributes(data: bytes, at: int, end: int) -> dict[int, bytes]:
    found = {}
    while at + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if not ATTRIBUTE.size <= length <= end - at:
            break
        found[kind] = data[at + ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found


def request(kind: int, flags: int, body: bytes) -> bytes:
    """Write a request."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body


def way_to(address: bytes) -> int | None:
    """Ask the kernel by which interface it would send to an address: its index, 0 for ourselves, None for no way."""
    family = socket.AF_INET6 if len(address) == 16 else socket.AF_INET
    body = ROUTE.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0)
    body += ATTRIBUTE.pack(ATTRIBUTE.size + len(address), RTA_DST) + address
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asker:
        asker.settimeout(WAIT_S)
        asker.sendto(request(RTM_GETROUTE, 0, body), (0, 0))
        for message in messages(asker.recv(BUFFER)):
            if message.kind != RTM_NEWROUTE:
                continue
            if message.begin[7] == RTN_LOCAL:
                return 0
            if RTA_OIF in message.attributes:
                return int.from_bytes(message.attributes[RTA_OIF], sys.byteorder)
    return None
