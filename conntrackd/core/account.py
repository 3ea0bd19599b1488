"""What the connections of one rule amount to: how many there are, and what they carried."""

from typing import TYPE_CHECKING

from conntrackd.core.tuples import source

if TYPE_CHECKING:
    from conntrackd.core.conn import Conn


class Account:
    """A sum over connections. A connection counts on it from when it is confirmed (`Conn.account`) to its end."""

    def __init__(self) -> None:
        self.live = 0  # connections that are there
        # Of connections that have ended: those that are there count for themselves.
        self.packets = 0
        self.bytes = 0  # from the IP header on
        # Connections that are there by source, kept only if somebody wants to know.
        self.by_source = False
        self.sources: dict[bytes, int] = {}

    def enter(self, ct: "Conn") -> None:
        """Count a connection that was just confirmed."""
        ct.account = self
        self.live += 1
        if self.by_source:
            address = source(ct.orig)
            self.sources[address] = self.sources.get(address, 0) + 1

    def leave(self, ct: "Conn") -> None:
        """Count a connection that ends."""
        self.packets += ct.packets_orig + ct.packets_reply
        self.bytes += ct.bytes_orig + ct.bytes_reply
        self.let_go(ct)

    def move(self, ct: "Conn", other: "Account") -> None:
        """Count a connection elsewhere from now on, with all that it has carried."""
        self.let_go(ct)
        other.enter(ct)

    def let_go(self, ct: "Conn") -> None:
        """Count a connection no more."""
        ct.account = None
        self.live -= 1
        if self.by_source:
            address = source(ct.orig)
            left = self.sources.get(address, 0) - 1
            if left > 0:
                self.sources[address] = left
            else:
                self.sources.pop(address, None)
