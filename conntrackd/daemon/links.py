"""Network interfaces: index and name, broadcast addresses, and their changes while the daemon runs."""

import socket
import struct
from typing import Final

from pyroute2.netlink.rtnl import RTM_DELADDR, RTM_DELLINK, RTM_GETADDR, RTM_NEWADDR, RTM_NEWLINK
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

RTMGRP_LINK: Final = 0x1
RTMGRP_IPV4_IFADDR: Final = 0x10
NLM_F_REQUEST_DUMP: Final = 0x301
NLMSG_DONE: Final = 3
IFA_F_SECONDARY: Final = 1
BUFFER: Final = 1 << 16
FIRST_ABSENT: Final = 1 << 30
ABSENT_MAX: Final = 1024


class Links:
    """The interfaces of this network namespace: `names` by index, and `broadcasts`, masks by broadcast address."""

    def __init__(self) -> None:
        self._marshal = MarshalRtnl()
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
            data = self._socket.recv(BUFFER)
        except BlockingIOError:
            return False
        except OSError:
            # The kernel had more changes than the socket holds: look at everything once.
            before, self.names = self.names, dict(socket.if_nameindex())
            self.broadcasts = self._read_broadcasts()
            return self.names != before
        changed = False
        for message in self._marshal.parse(data):
            if message["header"]["type"] in (RTM_NEWADDR, RTM_DELADDR):
                self.broadcasts = self._read_broadcasts()
                continue
            # A bridge speaks of its ports as links of family AF_BRIDGE; leaving it does not end the link.
            if message["family"] != socket.AF_UNSPEC:
                continue
            index, name = message["index"], message.get("ifname")
            if message["header"]["type"] == RTM_DELLINK:
                changed |= self.names.pop(index, None) is not None
            elif message["header"]["type"] == RTM_NEWLINK and self.names.get(index) != name:
                self.names[index] = name
                changed = True
        return changed

    def interface(self, index: int) -> str | None:
        """Name an interface; one that is gone keeps its number, and 0, the router itself, has no name."""
        return (self.names.get(index) or self.absent.get(index) or f"if{index}") if index else None

    def _read_broadcasts(self) -> dict[bytes, bytes]:
        """Ask for all IPv4 addresses: the mask of the network of each that has a broadcast address."""
        broadcasts: dict[bytes, bytes] = {}
        ask = struct.pack("=IHHIIB3xI", 24, RTM_GETADDR, NLM_F_REQUEST_DUMP, 0, 0, socket.AF_INET, 0)
        self._asker.sendto(ask, (0, 0))
        while True:
            for message in self._marshal.parse(self._asker.recv(BUFFER)):
                if message["header"]["type"] == NLMSG_DONE:
                    return broadcasts
                address = message.get("broadcast")
                if address is not None and not message["flags"] & IFA_F_SECONDARY:
                    mask = 0xFFFFFFFF << (32 - message["prefixlen"]) & 0xFFFFFFFF
                    broadcasts[socket.inet_aton(address)] = mask.to_bytes(4, "big")

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._asker.close()
