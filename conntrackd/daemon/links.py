"""Network interfaces: index and name, broadcast addresses, and their changes while the daemon runs."""

import os
import socket
from typing import Final

from conntrackd import rtnetlink

RTMGRP_LINK: Final = 0x1
RTMGRP_IPV4_IFADDR: Final = 0x10
IFA_F_SECONDARY: Final = 1
FIRST_ABSENT: Final = 1 << 30
ABSENT_MAX: Final = 1024


class Links:
    """The interfaces of this network namespace: `names` by index, and `broadcasts`, masks by broadcast address."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._asker = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR))
        # Listen first, look second: a change in between is seen twice rather than never.
        self.names = dict(socket.if_nameindex())
        self.broadcasts = self._read_broadcasts()
        # Interfaces of restored connections that are not there, by numbers that no interface has.
        self.absent: dict[int, str] = {}

    def fileno(self) -> int:
        """The descriptor that is readable after a change."""
        return self._socket.fileno()

    def index(self, name: str) -> int:
        """Find an interface by its name; one that is not there, or not yet, gets a number that stands for its name."""
        for index, known in (*self.names.items(), *self.absent.items()):
            if known == name:
                return index
        if len(self.absent) == ABSENT_MAX:
            return FIRST_ABSENT - 1
        self.absent[FIRST_ABSENT + len(self.absent)] = name
        return FIRST_ABSENT + len(self.absent) - 1

    def read(self) -> bool:
        """Take in one message of changes, never waiting; return whether `names` is another than before."""
        try:
            data = self._socket.recv(rtnetlink.BUFFER)
        except BlockingIOError:
            return False
        except OSError:
            # The kernel had more changes than the socket holds: look at everything once.
            before, self.names = self.names, dict(socket.if_nameindex())
            self.broadcasts = self._read_broadcasts()
            return self.names != before
        changed = False
        for kind, begin, attributes in rtnetlink.messages(data):
            if kind in (rtnetlink.RTM_NEWADDR, rtnetlink.RTM_DELADDR):
                self.broadcasts = self._read_broadcasts()
                continue
            if kind not in (rtnetlink.RTM_NEWLINK, rtnetlink.RTM_DELLINK):
                continue
            family, _, index, _, _ = begin
            # A bridge speaks of its ports as links of family AF_BRIDGE; leaving it does not end the link.
            if family != socket.AF_UNSPEC:
                continue
            name = os.fsdecode(attributes.get(rtnetlink.IFLA_IFNAME, b"").rstrip(b"\0"))
            if kind == rtnetlink.RTM_DELLINK:
                changed |= self.names.pop(index, None) is not None
            elif name and self.names.get(index) != name:
                self.names[index] = name
                changed = True
        return changed

    def interface(self, index: int) -> str | None:
        """Name an interface; one that is gone keeps its number, and 0, the router itself, has no name."""
        return (self.names.get(index) or self.absent.get(index) or f"if{index}") if index else None

    def _read_broadcasts(self) -> dict[bytes, bytes]:
        """Ask for all IPv4 addresses: the mask of the network of each that has a broadcast address."""
        broadcasts: dict[bytes, bytes] = {}
        body = rtnetlink.ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)
        self._asker.sendto(rtnetlink.request(rtnetlink.RTM_GETADDR, rtnetlink.NLM_F_DUMP, body), (0, 0))
        while True:
            for kind, begin, attributes in rtnetlink.messages(self._asker.recv(rtnetlink.BUFFER)):
                if kind == rtnetlink.NLMSG_DONE:
                    return broadcasts
                address = attributes.get(rtnetlink.IFA_BROADCAST)
                if kind == rtnetlink.RTM_NEWADDR and address is not None:
                    _, length, flags, _, _ = begin
                    if not flags & IFA_F_SECONDARY:
                        mask = 0xFFFFFFFF << (32 - length) & 0xFFFFFFFF
                        broadcasts[address] = mask.to_bytes(4, "big")

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._asker.close()
