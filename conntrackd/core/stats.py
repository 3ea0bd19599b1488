"""Counters of the tracker, by the kernel's names (`conntrack -S`) where the kernel has them."""

from conntrackd.const import CLOSED_NAMES, INVALID, INVALID_ICMP_TRUNCATED, STRESSED

CTINFO_SLOTS = 128


class Stats:
    """Counts since start. `ctinfo` holds packets by classification and says why they were INVALID."""

    def __init__(self) -> None:
        self.ctinfo = [0] * CTINFO_SLOTS  # index: ctinfo (const.CTINFO_NAMES)
        self.found = 0
        self.insert = 0  # connections confirmed
        self.insert_failed = 0  # confirmations refused because the tuple was taken
        self.drop = 0  # packets dropped by the tracker itself
        self.early_drop = 0  # connections that were not ASSURED and made room for others in a full table
        self.search_restart = 0
        self.clash_resolve = 0  # packets of a new flow that joined the connection confirmed before them
        self.chaintoolong = 0
        self.expect_new = 0
        self.expect_create = 0
        self.expect_delete = 0
        # Ours.
        self.created = 0  # connections begun, confirmed or not
        self.destroyed = 0  # confirmed connections that ended
        self.unconfirmed_expired = 0  # connections whose first packet never left
        self.unconfirmed_full = 0  # of these: forgotten early because there were too many
        self.expired_when_full = 0  # expired connections that were cleared away because the table was full
        self.emergency_drop = 0  # connections that were ASSURED, but about to end, and made room for others
        self.adaptive_drop = 0  # connections that ended early because the table was filling up
        self.table_full = 0  # new connections refused: the table was full
        self.source_full = 0  # new connections refused: their source had too many
        self.zone_full = 0  # new connections refused: their zone had too many
        self.closed = [0] * len(CLOSED_NAMES)  # confirmed connections that ended, by reason (const.CLOSED_*)

    def invalid(self) -> int:
        """Count INVALID packets as the kernel does: without those its ICMP error handlers found."""
        return sum(self.ctinfo[INVALID:INVALID_ICMP_TRUNCATED])

    def error(self) -> int:
        """Count the INVALID packets that the ICMP error handlers found."""
        return sum(self.ctinfo[INVALID_ICMP_TRUNCATED:STRESSED])
