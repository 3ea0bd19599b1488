"""Numbers that the whole project shares: the kernel's where the kernel has them, ours where it does not.

Sources: include/uapi/linux/netfilter/nf_conntrack_common.h, include/uapi/linux/in.h.
"""

from typing import Final

# --- IP protocol numbers (in.h) -----------------------------------------------------------------------------
IPPROTO_ICMP: Final = 1
IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17
IPPROTO_GRE: Final = 47
IPPROTO_ICMPV6: Final = 58
IPPROTO_SCTP: Final = 132
IPPROTO_UDPLITE: Final = 136

# --- Netfilter hooks and verdicts ---------------------------------------------------------------------------
NF_INET_PRE_ROUTING: Final = 0
NF_INET_LOCAL_IN: Final = 1
NF_INET_FORWARD: Final = 2
NF_INET_LOCAL_OUT: Final = 3
NF_INET_POST_ROUTING: Final = 4

NF_DROP: Final = 0
NF_ACCEPT: Final = 1
NF_REPEAT: Final = 4

# --- Directions and status bits of a connection (enum ip_conntrack_dir, enum ip_conntrack_status) --------------
IP_CT_DIR_ORIGINAL: Final = 0
IP_CT_DIR_REPLY: Final = 1

IPS_EXPECTED: Final = 1 << 0
IPS_SEEN_REPLY: Final = 1 << 1
IPS_ASSURED: Final = 1 << 2
IPS_CONFIRMED: Final = 1 << 3
IPS_DYING: Final = 1 << 9
IPS_FIXED_TIMEOUT: Final = 1 << 10
IPS_COUNTED: Final = 1 << 16  # ours, not shown: it counts on the limit of its source
IPS_HELPER: Final = 1 << 13

STATUS_NAMES: Final = {
    IPS_EXPECTED: "EXPECTED",
    IPS_SEEN_REPLY: "SEEN_REPLY",
    IPS_ASSURED: "ASSURED",
    IPS_CONFIRMED: "CONFIRMED",
    IPS_DYING: "DYING",
    IPS_FIXED_TIMEOUT: "FIXED_TIMEOUT",
    IPS_HELPER: "HELPER",
}

# --- ctinfo: what one packet is to its connection -----------------------------------------------------------
# The kernel's values (enum ip_conntrack_info). INVALID is no value there but the absence of a connection; here
# every value from INVALID up is an INVALID packet and says why, and every value from STRESSED up is a packet
# that the tracker drops ("too stressed to deal") and says why.
IP_CT_ESTABLISHED: Final = 0
IP_CT_RELATED: Final = 1
IP_CT_NEW: Final = 2
IP_CT_ESTABLISHED_REPLY: Final = 3
IP_CT_RELATED_REPLY: Final = 4
IP_CT_UNTRACKED: Final = 7

INVALID: Final = 16
INVALID_IP_HEADER: Final = 16
INVALID_IPV6_EXTENSION: Final = 17
INVALID_FRAGMENT: Final = 18
INVALID_L4_TRUNCATED: Final = 19
INVALID_BAD_CHECKSUM: Final = 20
INVALID_NOT_INVERTIBLE: Final = 21
INVALID_ICMP_NEW: Final = 22
INVALID_ICMP_FAMILY: Final = 23
INVALID_TCP_DATA_OFFSET: Final = 24
INVALID_TCP_FLAGS: Final = 25
INVALID_TCP_NEW: Final = 26
INVALID_TCP_PICKUP_OFF: Final = 27
INVALID_TCP_STATE: Final = 28
INVALID_TCP_RST: Final = 29
INVALID_TCP_WINDOW_ABOVE: Final = 30
INVALID_TCP_ACK_ABOVE: Final = 31
INVALID_UDP_LENGTH: Final = 32
INVALID_UDPLITE_COVERAGE: Final = 33
INVALID_UDPLITE_NO_CHECKSUM: Final = 34
INVALID_SCTP_CHUNKS: Final = 35
INVALID_SCTP_NEW: Final = 36
INVALID_SCTP_VTAG: Final = 37
INVALID_SCTP_STATE: Final = 38
INVALID_GRE_VERSION: Final = 39
# Found by the ICMP error handlers: the kernel counts these as `error`, all others as `invalid`.
INVALID_ICMP_TRUNCATED: Final = 40
INVALID_ICMP_CHECKSUM: Final = 41
INVALID_ICMP_TYPE: Final = 42
INVALID_ICMP_INNER_BROKEN: Final = 43
INVALID_ICMP_INNER_UNKNOWN: Final = 44
INVALID_ICMP_OUTER_MISMATCH: Final = 45
INVALID_ICMPV6_REDIRECT: Final = 46

STRESSED: Final = 64
STRESSED_TABLE_FULL: Final = 64
STRESSED_SOURCE_FULL: Final = 66
STRESSED_ZONE_FULL: Final = 67
STRESSED_HELPER: Final = 65  # a helper can't tell what the packet announces, or may not expect it

# One name per ctinfo, the same in every output: stats, drops, traces, metrics, documentation.
CTINFO_NAMES: Final = {
    IP_CT_ESTABLISHED: "established",
    IP_CT_RELATED: "related",
    IP_CT_NEW: "new",
    IP_CT_ESTABLISHED_REPLY: "established_reply",
    IP_CT_RELATED_REPLY: "related_reply",
    IP_CT_UNTRACKED: "untracked",
    INVALID_IP_HEADER: "ip_header",
    INVALID_IPV6_EXTENSION: "ipv6_extension",
    INVALID_FRAGMENT: "fragment",
    INVALID_L4_TRUNCATED: "l4_truncated",
    INVALID_BAD_CHECKSUM: "bad_checksum",
    INVALID_NOT_INVERTIBLE: "not_invertible",
    INVALID_ICMP_NEW: "icmp_new",
    INVALID_ICMP_FAMILY: "icmp_family",
    INVALID_TCP_DATA_OFFSET: "tcp_data_offset",
    INVALID_TCP_FLAGS: "tcp_flags",
    INVALID_TCP_NEW: "tcp_new",
    INVALID_TCP_PICKUP_OFF: "tcp_pickup_off",
    INVALID_TCP_STATE: "tcp_state",
    INVALID_TCP_RST: "tcp_rst",
    INVALID_TCP_WINDOW_ABOVE: "tcp_window_above",
    INVALID_TCP_ACK_ABOVE: "tcp_ack_above",
    INVALID_UDP_LENGTH: "udp_length",
    INVALID_UDPLITE_COVERAGE: "udplite_coverage",
    INVALID_UDPLITE_NO_CHECKSUM: "udplite_no_checksum",
    INVALID_SCTP_CHUNKS: "sctp_chunks",
    INVALID_SCTP_NEW: "sctp_new",
    INVALID_SCTP_VTAG: "sctp_vtag",
    INVALID_SCTP_STATE: "sctp_state",
    INVALID_GRE_VERSION: "gre_version",
    INVALID_ICMP_TRUNCATED: "icmp_truncated",
    INVALID_ICMP_CHECKSUM: "icmp_checksum",
    INVALID_ICMP_TYPE: "icmp_type",
    INVALID_ICMP_INNER_BROKEN: "icmp_inner_broken",
    INVALID_ICMP_INNER_UNKNOWN: "icmp_inner_unknown",
    INVALID_ICMP_OUTER_MISMATCH: "icmp_outer_mismatch",
    INVALID_ICMPV6_REDIRECT: "icmpv6_redirect",
    STRESSED_TABLE_FULL: "table_full",
    STRESSED_SOURCE_FULL: "source_full",
    STRESSED_ZONE_FULL: "zone_full",
    STRESSED_HELPER: "helper",
}

# --- What a packet changed about its connection (enum ip_conntrack_events), as bits -------------------------
IPCT_NEW: Final = 1 << 0
IPCT_RELATED: Final = 1 << 1  # new, and expected by another connection
IPCT_DESTROY: Final = 1 << 2
IPCT_REPLY: Final = 1 << 3
IPCT_ASSURED: Final = 1 << 4
IPCT_PROTOINFO: Final = 1 << 5
IPCT_HELPER: Final = 1 << 6
IPCT_MARK: Final = 1 << 7
IPCT_LABEL: Final = 1 << 10

# What happened to an expectation [enum ip_conntrack_expect_events].
IPEXP_NEW: Final = 1 << 0
IPEXP_DESTROY: Final = 1 << 1

IPCT_NAMES: Final = {
    IPCT_NEW: "NEW",
    IPCT_RELATED: "RELATED",
    IPCT_DESTROY: "DESTROY",
    IPCT_REPLY: "REPLY",
    IPCT_ASSURED: "ASSURED",
    IPCT_PROTOINFO: "PROTOINFO",
    IPCT_HELPER: "HELPER",
    IPCT_MARK: "MARK",
    IPCT_LABEL: "LABEL",
}

LABELS_MAX: Final = 128  # bits of a connection's labels [XT_CONNLABEL_MAXBIT]

# --- Why a connection ended ---------------------------------------------------------------------------------
CLOSED_TIMEOUT: Final = 0
CLOSED_FIN: Final = 1  # closed in order, by FINs or SHUTDOWNs
CLOSED_RST: Final = 2  # refused or aborted
CLOSED_KILLED: Final = 3  # by the operator
CLOSED_EVICTED: Final = 4  # made room for another in a full table
CLOSED_POLICY: Final = 5  # a new policy forbids it

CLOSED_NAMES: Final = ("timeout", "fin", "rst", "killed", "evicted", "policy")

# --- Our six bits of the packet mark, as a number of 6 bits (docs/mark.md) ----------------------------------
# bits 5-3 classification, bit 2 reply direction, bit 1 unconfirmed, bit 0 offloaded. The edge lays them into the
# six highest set bits of the configured mask; all other bits of the mark belong to the user.
MARK_CLASS_SHIFT: Final = 3
MARK_UNSEEN: Final = 0 << 3
MARK_NEW: Final = 1 << 3
MARK_ESTABLISHED: Final = 2 << 3
MARK_RELATED: Final = 3 << 3
MARK_INVALID: Final = 4 << 3
MARK_UNTRACKED: Final = 5 << 3
MARK_CLASS: Final = 7 << 3
MARK_REPLY: Final = 1 << 2
MARK_UNCONFIRMED: Final = 1 << 1
MARK_OFFLOADED: Final = 1 << 0

# What hooks return instead of mark bits when the packet must be dropped.
DROP: Final = -1
