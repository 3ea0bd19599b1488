"""The tracker's settings, by the kernel's names (net.netfilter.nf_conntrack_*) and with its defaults."""

from typing import Final


class Sysctl:
    """One attribute per setting. Timeouts are milliseconds, switches 0 or 1.

    Source: Documentation/networking/nf_conntrack-sysctl.rst and the live defaults of Linux 6.18.
    """

    def __init__(self) -> None:
        self.max = 262144  # connections in the table; 0 = no limit
        self.expect_max = 4096  # expectations; 0 = no limit
        self.checksum = 1
        self.tcp_loose = 1
        self.tcp_be_liberal = 0
        self.tcp_ignore_invalid_rst = 0
        self.tcp_max_retrans = 3
        self.tcp_timeout_syn_sent = 120_000
        self.tcp_timeout_syn_recv = 60_000
        self.tcp_timeout_established = 432_000_000
        self.tcp_timeout_fin_wait = 120_000
        self.tcp_timeout_close_wait = 60_000
        self.tcp_timeout_last_ack = 30_000
        self.tcp_timeout_time_wait = 120_000
        self.tcp_timeout_close = 10_000
        self.tcp_timeout_max_retrans = 300_000
        self.tcp_timeout_unacknowledged = 300_000
        self.udp_timeout = 30_000
        self.udp_timeout_stream = 120_000
        self.icmp_timeout = 30_000
        self.icmpv6_timeout = 30_000
        self.sctp_timeout_closed = 10_000
        self.sctp_timeout_cookie_wait = 3_000
        self.sctp_timeout_cookie_echoed = 3_000
        self.sctp_timeout_established = 210_000
        self.sctp_timeout_shutdown_sent = 3_000
        self.sctp_timeout_shutdown_recd = 3_000
        self.sctp_timeout_shutdown_ack_sent = 3_000
        self.sctp_timeout_heartbeat_sent = 30_000
        self.gre_timeout = 30_000
        self.gre_timeout_stream = 180_000
        self.generic_timeout = 600_000
        # Parameters of the kernel's helper modules.
        self.ftp_loose = 0  # let an FTP side announce somebody else's address
        self.sip_direct_media = 1  # expect media between the two ends of the signalling only
        self.sip_direct_signalling = 1  # expect calls from the registrar only
        # Ours.
        self.max_per_source = 0  # connections that one address has opened; 0 = no limit
        self.max_per_zone = 0  # connections in one conntrack zone other than zone 0; 0 = no limit
        self.adaptive_start = 60  # percent of `max` from which on timeouts are scaled down
        self.adaptive_end = 120  # percent of `max` at which they would be nothing
        self.early_drop_timeout = 1_000  # what was seen within this time is not evicted
        self.events_max = 8192  # events that are kept for those who read them
        self.zone_mark_mask = 0  # bits of the packet mark that hold the conntrack zone; 0 = none
        # The kernel keeps an unconfirmed connection with its packet and needs no limits for it.
        self.unconfirmed_max = 16384
        self.unconfirmed_timeout = 3_000


# dir() and not vars(): a compiled class keeps its attributes in no dictionary.
SETTINGS: Final = tuple(name for name in dir(Sysctl()) if not name.startswith("_"))
TIMEOUTS: Final = frozenset(name for name in SETTINGS if "timeout" in name)
# Numbers that are off by default; any other setting that is 0 or 1 by default is a switch.
NUMBERS: Final = frozenset(("max_per_source", "max_per_zone", "zone_mark_mask"))
# Numbers of one byte, as in the kernel; what it counts with them, begins anew after 255.
BYTES: Final = frozenset(("tcp_max_retrans",))
