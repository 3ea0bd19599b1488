from conntrackd.const import CTINFO_NAMES, INVALID, STRESSED
from conntrackd.core.stats import Stats


def test_every_ctinfo_has_a_slot() -> None:
    assert len(Stats().ctinfo) > max(CTINFO_NAMES)


def test_each_invalid_reason_is_counted_as_invalid_or_as_error_as_the_kernel_does() -> None:
    for value, name in CTINFO_NAMES.items():
        stats = Stats()
        stats.ctinfo[value] = 3
        found_by_icmp_error_handlers = name in {
            "icmp_truncated",
            "icmp_checksum",
            "icmp_type",
            "icmp_inner_broken",
            "icmp_inner_unknown",
            "icmp_outer_mismatch",
            "icmpv6_redirect",
        }
        assert stats.error() == (3 if found_by_icmp_error_handlers else 0), name
        is_invalid = INVALID <= value < STRESSED and not found_by_icmp_error_handlers
        assert stats.invalid() == (3 if is_invalid else 0), name
