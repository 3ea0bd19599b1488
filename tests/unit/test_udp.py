import pytest

from conntrackd.const import (
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_UDP_LENGTH,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
    IPS_SEEN_REPLY,
)
from tests.unit.craft import Talk, ip, udp


@pytest.mark.parametrize("family", [4, 6])
def test_question_and_answer(family: int) -> None:
    talk = Talk()
    assert talk.send(udp(family=family)) == IP_CT_NEW
    assert talk.send(udp(family=family)) == IP_CT_NEW
    assert not talk.status(IPS_SEEN_REPLY)
    assert talk.send(udp(family=family, back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.status(IPS_SEEN_REPLY)
    assert talk.send(udp(family=family)) == IP_CT_ESTABLISHED
    assert talk.net.table.count == 1


def test_a_short_exchange_is_no_stream() -> None:
    talk = Talk()
    talk.send(udp())
    talk.send(udp(back=True))
    talk.wait(2)
    talk.send(udp())
    assert talk.timeout() == 30
    assert not talk.status(IPS_ASSURED)


def test_packets_both_ways_after_two_seconds_are_a_stream() -> None:
    talk = Talk()
    talk.send(udp())
    talk.send(udp(back=True))
    talk.wait(2.001)
    talk.send(udp())
    assert talk.timeout() == 120
    assert talk.status(IPS_ASSURED)


def test_a_late_first_answer_is_no_stream_but_the_packet_after_it_is() -> None:
    talk = Talk()
    talk.send(udp())
    talk.wait(2.2)
    talk.send(udp(back=True))
    assert talk.timeout() == 30
    assert not talk.status(IPS_ASSURED)
    talk.send(udp(back=True))
    assert talk.timeout() == 120
    assert talk.status(IPS_ASSURED)


def test_one_direction_alone_is_never_a_stream() -> None:
    talk = Talk()
    for _ in range(5):
        talk.send(udp())
        talk.wait(5)
    assert talk.timeout() == 25
    assert not talk.status(IPS_ASSURED)


def test_timeouts_are_settings() -> None:
    talk = Talk(udp_timeout=7_000, udp_timeout_stream=9_000)
    talk.send(udp())
    assert talk.timeout() == 7
    talk.send(udp(back=True))
    talk.wait(3)
    talk.send(udp())
    assert talk.timeout() == 9


@pytest.mark.parametrize("length", [0, 7, 13])
def test_length_below_the_header_or_beyond_the_packet_is_invalid(length: int) -> None:
    assert Talk().send(udp(b"four", length=length, zero=True)) == INVALID_UDP_LENGTH


def test_length_may_be_less_than_the_packet() -> None:
    assert Talk().send(udp(b"four", length=8, zero=True)) == IP_CT_NEW


def test_header_that_is_too_short_is_truncated() -> None:
    assert Talk().send(ip(17, bytes(7))) == INVALID_L4_TRUNCATED


@pytest.mark.parametrize("family", [4, 6])
def test_bad_checksum_is_invalid_and_none_is_not(family: int) -> None:
    assert Talk().send(udp(b"x", family=family, bad=True)) == INVALID_BAD_CHECKSUM
    assert Talk().send(udp(b"x", family=family, zero=True)) == IP_CT_NEW
    assert Talk().send(udp(b"x", family=family, bad=True), checksum=False) == IP_CT_NEW


def test_checksum_of_a_packet_that_was_not_captured_whole_is_not_judged() -> None:
    assert Talk().send(udp(bytes(100), bad=True)[:60]) == IP_CT_NEW


def test_invalid_packets_leave_the_flow_alone() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    talk.wait(5)
    assert talk.send(udp(b"x", bad=True)) == INVALID_BAD_CHECKSUM
    assert talk.send(udp(b"x", bad=True, back=True)) == INVALID_BAD_CHECKSUM
    assert talk.timeout() == 25
    assert not talk.status(IPS_SEEN_REPLY)
    assert (talk.the().packets_orig, talk.the().packets_reply) == (1, 0)


def test_bytes_count_the_ip_header() -> None:
    talk = Talk()
    talk.send(udp(b"12345"))
    talk.send(udp(b"123", back=True))
    ct = talk.the()
    assert (ct.packets_orig, ct.bytes_orig, ct.packets_reply, ct.bytes_reply) == (1, 33, 1, 31)
