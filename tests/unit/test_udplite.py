import pytest

from conntrackd.const import (
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_UDPLITE_COVERAGE,
    INVALID_UDPLITE_NO_CHECKSUM,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
)
from tests.differential import packets
from tests.unit.craft import CLIENT, DPORT, SERVER, SPORT, Talk, ip, udplite


def test_second_packet_after_an_answer_is_assured_whenever_it_comes() -> None:
    talk = Talk()
    assert talk.send(udplite(b"x"), checksum=False) == IP_CT_NEW
    assert talk.send(udplite(b"x", back=True), checksum=False) == IP_CT_ESTABLISHED_REPLY
    assert talk.timeout() == 30
    assert not talk.status(IPS_ASSURED)
    talk.send(udplite(b"x", back=True), checksum=False)
    assert talk.timeout() == 120
    assert talk.status(IPS_ASSURED)


@pytest.mark.parametrize("coverage", [0, 8, 12])
def test_checksum_covers_what_it_says(coverage: int) -> None:
    packet = udplite(b"four", coverage=coverage)
    assert Talk().send(packet) == IP_CT_NEW
    changed = packet[:-1] + b"!"  # the last byte is covered unless the coverage is the header alone
    assert Talk().send(changed) == (IP_CT_NEW if coverage == 8 else INVALID_BAD_CHECKSUM)


def test_checksum_is_what_the_kernel_takes_for_one() -> None:
    """UDP's number in the pseudo-header, and over IPv4 the low byte of the length."""
    assert Talk().send(udplite(bytes(300))) == IP_CT_NEW
    as_senders_make_it = packets.udplite(CLIENT[4], SERVER[4], SPORT, DPORT, b"x", rfc=True)
    assert Talk().send(ip(136, as_senders_make_it)) == INVALID_BAD_CHECKSUM
    over_ipv6 = packets.udplite(CLIENT[6], SERVER[6], SPORT, DPORT, bytes(300))
    assert Talk().send(ip(136, over_ipv6, family=6)) == IP_CT_NEW


@pytest.mark.parametrize("coverage", [1, 7, 13, 0xFFFF])
def test_coverage_below_the_header_or_beyond_the_packet_is_invalid(coverage: int) -> None:
    assert Talk().send(udplite(b"four", coverage=coverage)) == INVALID_UDPLITE_COVERAGE


def test_checksum_is_mandatory() -> None:
    assert Talk().send(udplite(b"x", zero=True)) == INVALID_UDPLITE_NO_CHECKSUM
    assert Talk().send(udplite(b"x", zero=True), checksum=False) == INVALID_UDPLITE_NO_CHECKSUM


def test_header_that_is_too_short_is_truncated() -> None:
    assert Talk().send(ip(136, bytes(7))) == INVALID_L4_TRUNCATED
