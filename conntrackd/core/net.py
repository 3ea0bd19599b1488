"""What the trackers share: the kernel's per-namespace `struct netns_ct`."""

from typing import Final

from conntrackd.core.conn import Conn
from conntrackd.core.ecache import EventRing
from conntrackd.core.stats import Stats
from conntrackd.core.sysctl import SETTINGS, TIMEOUTS, Sysctl
from conntrackd.core.table import Table

ZONE_MASK: Final = 0xFFFF


class Conntrack:
    """One connection tracker: settings, counters, table."""

    def __init__(self, sysctl: Sysctl) -> None:
        self.sysctl = sysctl
        self.stats = Stats()
        self.events = EventRing(sysctl.events_max)
        self.table = Table(sysctl, self.stats, self.events)
        self.cached = 0  # const.IPCT_*: what the packet in hand has changed; nothing between packets
        # Settings that rules give their connections (Conn.timeouts).
        self.timeouts: list[Sysctl] = []
        # Conntrack zones of interfaces, by index; the edge keeps it. What is not there is in zone 0.
        self.zones: dict[int, int] = {}
        # Masks of the networks that the router has a broadcast address in, by that address; the edge keeps it.
        self.broadcasts: dict[bytes, bytes] = {}

    def configure(self, sysctl: Sysctl) -> None:
        """Use other settings from now on; a timeout counts from the next packet of a connection on.

        Of the settings of rules, only the timeouts are their own.
        """
        for own in self.timeouts:
            for name in SETTINGS:
                if name not in TIMEOUTS:
                    setattr(own, name, getattr(sysctl, name))
        self.sysctl = sysctl
        self.table.sysctl = sysctl
        self.events.limit = sysctl.events_max

    def zone_of(self, iif: int, mark: int) -> int:
        """Choose the conntrack zone of a packet: what its mark says, else its interface's, else 0."""
        mask = self.sysctl.zone_mark_mask
        if mask:
            zone = (mark & mask) // (mask & -mask) & ZONE_MASK
            if zone:
                return zone
        return self.zones.get(iif, 0) if self.zones else 0


def settings_of(net: Conntrack, ct: Conn) -> Sysctl:
    """Return the settings that a connection lives by: the tracker's, or those of its rule."""
    return net.timeouts[ct.timeouts - 1] if ct.timeouts else net.sysctl
