"""The settings under which conversations are held: each profile is one router namespace and one Sysctl of ours."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from conntrackd.core.sysctl import TIMEOUTS, Sysctl


class Profile(NamedTuple):
    """Share of the conversations, and what differs from the defaults (the kernel's names; timeouts in seconds)."""

    weight: int
    settings: Mapping[str, int]


SLOW: Final = "short"  # the profile whose conversations wait

# No two timeouts of one protocol alike, so that a wrong choice shows.
_DISTINCT: Final = {
    "tcp_timeout_syn_sent": 111,
    "tcp_timeout_syn_recv": 61,
    "tcp_timeout_established": 4000,
    "tcp_timeout_fin_wait": 121,
    "tcp_timeout_close_wait": 64,
    "tcp_timeout_last_ack": 31,
    "tcp_timeout_time_wait": 131,
    "tcp_timeout_close": 11,
    "tcp_timeout_max_retrans": 91,
    "tcp_timeout_unacknowledged": 71,
    "udp_timeout": 33,
    "udp_timeout_stream": 123,
    "icmp_timeout": 37,
    "icmpv6_timeout": 43,
    "sctp_timeout_closed": 14,
    "sctp_timeout_cookie_wait": 17,
    "sctp_timeout_cookie_echoed": 23,
    "sctp_timeout_established": 220,
    "sctp_timeout_shutdown_sent": 26,
    "sctp_timeout_shutdown_recd": 29,
    "sctp_timeout_shutdown_ack_sent": 32,
    "sctp_timeout_heartbeat_sent": 35,
    "gre_timeout": 36,
    "gre_timeout_stream": 186,
    "generic_timeout": 606,
}
_SHORT: Final = {
    "tcp_timeout_syn_sent": 2,
    "tcp_timeout_syn_recv": 2,
    "tcp_timeout_established": 5,
    "tcp_timeout_fin_wait": 2,
    "tcp_timeout_close_wait": 2,
    "tcp_timeout_last_ack": 1,
    "tcp_timeout_time_wait": 2,
    "tcp_timeout_close": 1,
    "tcp_timeout_max_retrans": 3,
    "tcp_timeout_unacknowledged": 4,
    "udp_timeout": 1,
    "udp_timeout_stream": 3,
    "icmp_timeout": 1,
    "icmpv6_timeout": 1,
    "sctp_timeout_closed": 1,
    "sctp_timeout_cookie_wait": 1,
    "sctp_timeout_cookie_echoed": 1,
    "sctp_timeout_established": 3,
    "sctp_timeout_shutdown_sent": 1,
    "sctp_timeout_shutdown_recd": 1,
    "sctp_timeout_shutdown_ack_sent": 1,
    "sctp_timeout_heartbeat_sent": 2,
    "gre_timeout": 1,
    "gre_timeout_stream": 3,
    "generic_timeout": 2,
}
PROFILES: Final = {
    "default": Profile(5, {}),
    "distinct": Profile(3, _DISTINCT),
    SLOW: Profile(3, _SHORT),
    "liberal": Profile(1, {"tcp_be_liberal": 1, "tcp_ignore_invalid_rst": 1, "tcp_max_retrans": 1}),
    "strict": Profile(1, _DISTINCT | {"tcp_loose": 0, "checksum": 0, "tcp_max_retrans": 0}),
}


def sysctl(profile: str) -> Sysctl:
    """Our settings of a profile."""
    settings = Sysctl()
    for name, value in PROFILES[profile].settings.items():
        assert hasattr(settings, name), f"the core has no setting {name}"
        setattr(settings, name, value * 1000 if name in TIMEOUTS else value)
    return settings
