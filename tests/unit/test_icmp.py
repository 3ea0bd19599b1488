import pytest

from conntrackd.const import (
    INVALID_ICMP_CHECKSUM,
    INVALID_ICMP_FAMILY,
    INVALID_ICMP_INNER_BROKEN,
    INVALID_ICMP_INNER_UNKNOWN,
    INVALID_ICMP_NEW,
    INVALID_ICMP_OUTER_MISMATCH,
    INVALID_ICMP_TRUNCATED,
    INVALID_ICMP_TYPE,
    INVALID_NOT_INVERTIBLE,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
    IPS_ASSURED,
    IPS_SEEN_REPLY,
)
from conntrackd.core.conntrack import conntrack_in
from tests.differential import packets
from tests.differential.packets import ACK, SYN
from tests.unit.craft import CLIENT, SERVER, STRANGER, Talk, error, icmp, ip, tcp, udp


@pytest.mark.parametrize(("query", "answer"), [(8, 0), (13, 14), (15, 16), (17, 18)])
def test_queries_and_their_answers(query: int, answer: int) -> None:
    talk = Talk()
    assert talk.send(icmp(query)) == IP_CT_NEW
    assert talk.send(icmp(answer, back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.send(icmp(query)) == IP_CT_ESTABLISHED
    assert talk.timeout() == 30
    assert not talk.status(IPS_ASSURED)


@pytest.mark.parametrize("answer", [0, 14, 16, 18])
def test_answers_to_nothing_begin_nothing(answer: int) -> None:
    talk = Talk()
    assert talk.send(icmp(answer, back=True)) == INVALID_ICMP_NEW
    assert talk.net.table.count == 0


def test_answer_must_have_the_querys_id_and_code() -> None:
    talk = Talk()
    talk.send(icmp(8, 3, b"\0\7\0\1"))
    assert talk.send(icmp(0, 3, b"\0\x08\0\1", back=True)) == INVALID_ICMP_NEW
    assert talk.send(icmp(0, 0, b"\0\7\0\1", back=True)) == INVALID_ICMP_NEW
    assert talk.send(icmp(0, 3, b"\0\7\0\2", back=True)) == IP_CT_ESTABLISHED_REPLY


@pytest.mark.parametrize("kind", [1, 2, 6, 7, 9, 10])
def test_types_that_nothing_answers_are_invalid(kind: int) -> None:
    assert Talk().send(icmp(kind)) == INVALID_NOT_INVERTIBLE


@pytest.mark.parametrize("kind", [19, 40, 255])
def test_types_above_18_are_a_mystery(kind: int) -> None:
    assert Talk().send(icmp(kind)) == INVALID_ICMP_TYPE


def test_bad_checksum_is_invalid_only_where_checksums_are_verified() -> None:
    assert Talk().send(icmp(8, bad=True)) == INVALID_ICMP_CHECKSUM
    assert Talk().send(icmp(8, bad=True), checksum=False) == IP_CT_NEW
    assert Talk(checksum=0).send(icmp(8, bad=True)) == IP_CT_NEW


def test_header_that_is_too_short_is_truncated() -> None:
    assert Talk().send(ip(1, bytes((8, 0, 0, 0, 0, 0, 0)))) == INVALID_ICMP_TRUNCATED


def test_icmp_over_ipv6_is_invalid() -> None:
    assert Talk().send(ip(1, packets.icmp(8, 0, bytes(4)), family=6)) == INVALID_ICMP_FAMILY


def test_timeout_is_a_setting() -> None:
    talk = Talk(icmp_timeout=5_000)
    talk.send(icmp(8))
    assert talk.timeout() == 5


# --- Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [3, 4, 5, 11, 12])
def test_error_is_related_to_the_connection_it_quotes(kind: int) -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    ct = talk.the()
    assert talk.send(error(udp(b"x"), kind)) == IP_CT_RELATED_REPLY  # it goes to the client
    assert talk.last is ct


def test_error_to_the_server_is_related_in_the_original_direction() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    answer = udp(b"y", back=True)
    talk.send(answer)
    assert talk.send(error(answer)) == IP_CT_RELATED


@pytest.mark.parametrize("quoted", [tcp(SYN), icmp(8), ip(50, b"12345678")])
def test_any_protocol_may_be_quoted(quoted: bytes) -> None:
    talk = Talk()
    talk.send(quoted)
    assert talk.send(error(quoted)) == IP_CT_RELATED_REPLY


def test_error_changes_nothing_about_the_connection() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    talk.wait(5)
    talk.send(error(udp(b"x")))
    assert talk.timeout() == 25
    assert not talk.status(IPS_SEEN_REPLY)
    assert (talk.the().packets_orig, talk.the().packets_reply) == (1, 0)


def test_error_may_come_from_any_router() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    assert talk.send(error(udp(b"x"), source=SERVER[4])) == IP_CT_RELATED_REPLY
    assert talk.send(error(udp(b"x"), source=STRANGER[4])) == IP_CT_RELATED_REPLY


def test_error_that_goes_to_another_host_is_invalid() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    assert talk.send(error(udp(b"x"), target=STRANGER[4])) == INVALID_ICMP_OUTER_MISMATCH


def test_error_about_an_unknown_connection_is_invalid() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    assert talk.send(error(udp(b"x", dport=81))) == INVALID_ICMP_INNER_UNKNOWN


def test_error_about_an_expired_connection_is_invalid() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    talk.wait(30)
    assert talk.send(error(udp(b"x"))) == INVALID_ICMP_INNER_UNKNOWN


def test_error_about_an_unconfirmed_connection_is_invalid() -> None:
    talk = Talk()
    conntrack_in(talk.net, udp(b"x"), True, talk.now_ms)
    assert talk.send(error(udp(b"x"))) == INVALID_ICMP_INNER_UNKNOWN


def test_error_about_an_error_is_invalid() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    assert talk.send(error(error(udp(b"x")))) == INVALID_ICMP_INNER_BROKEN


@pytest.mark.parametrize(("size", "ctinfo"), [(23, INVALID_ICMP_INNER_BROKEN), (24, IP_CT_RELATED_REPLY)])
def test_quoted_ports_are_enough(size: int, ctinfo: int) -> None:
    talk = Talk()
    talk.send(tcp(SYN))
    assert talk.send(error(tcp(SYN)[:size])) == ctinfo


def test_quoted_sequence_number_is_not_looked_at() -> None:
    talk = Talk()
    talk.send(tcp(SYN, 1))
    assert talk.send(error(tcp(ACK, 999_999, 12345))) == IP_CT_RELATED_REPLY


@pytest.mark.parametrize(("fragment", "ctinfo"), [(0x2000, IP_CT_RELATED_REPLY), (0x2001, INVALID_ICMP_INNER_BROKEN)])
def test_first_fragment_may_be_quoted_a_later_one_not(fragment: int, ctinfo: int) -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    quoted = packets.ipv4(CLIENT[4], SERVER[4], 17, udp(b"x")[20:], fragment=fragment)
    assert talk.send(error(quoted)) == ctinfo


def test_error_with_a_bad_checksum_is_invalid() -> None:
    talk = Talk()
    talk.send(udp(b"x"))
    assert talk.send(icmp(3, 1, bytes(4) + udp(b"x"), back=True, bad=True)) == INVALID_ICMP_CHECKSUM


def test_rejected_errors_are_counted_as_errors_and_not_as_invalid() -> None:
    talk = Talk()
    talk.send(error(udp(b"x")))
    assert (talk.net.stats.error(), talk.net.stats.invalid()) == (1, 0)
