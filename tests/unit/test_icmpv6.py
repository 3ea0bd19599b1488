import pytest

from conntrackd.const import (
    INVALID_ICMP_CHECKSUM,
    INVALID_ICMP_FAMILY,
    INVALID_ICMP_INNER_BROKEN,
    INVALID_ICMP_INNER_UNKNOWN,
    INVALID_ICMP_NEW,
    INVALID_ICMP_OUTER_MISMATCH,
    INVALID_ICMP_TRUNCATED,
    INVALID_ICMPV6_REDIRECT,
    INVALID_IPV6_EXTENSION,
    INVALID_NOT_INVERTIBLE,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
    IP_CT_UNTRACKED,
)
from tests.differential import packets
from tests.differential.packets import DEST_OPTS, HOP_BY_HOP, NO_NEXT, SYN
from tests.unit.craft import CLIENT, SERVER, STRANGER, Talk, error, icmpv6, ip, tcp, udp

LINK_LOCAL = bytes((0xFE, 0x80)) + bytes(13) + b"\1"


@pytest.mark.parametrize(("query", "answer"), [(128, 129), (139, 140)])
def test_queries_and_their_answers(query: int, answer: int) -> None:
    talk = Talk()
    assert talk.send(icmpv6(answer, back=True)) == INVALID_ICMP_NEW
    assert talk.send(icmpv6(query)) == IP_CT_NEW
    assert talk.send(icmpv6(answer, back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.timeout() == 30


@pytest.mark.parametrize("kind", [130, 131, 132, 133, 134, 135, 136, 143, 151, 152])
def test_what_belongs_to_the_link_is_untracked(kind: int) -> None:
    talk = Talk()
    assert talk.send(icmpv6(kind, rest=bytes(20))) == IP_CT_UNTRACKED
    assert talk.last is None
    assert talk.net.table.count == 0


@pytest.mark.parametrize("kind", [141, 142, 144, 150, 153, 200, 255])
def test_types_that_nothing_answers_are_invalid(kind: int) -> None:
    assert Talk().send(icmpv6(kind)) == INVALID_NOT_INVERTIBLE


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 99, 127])
def test_types_below_128_are_errors_also_unassigned_ones(kind: int) -> None:
    talk = Talk()
    talk.send(udp(b"x", family=6))
    assert talk.send(error(udp(b"x", family=6), kind)) == IP_CT_RELATED_REPLY
    assert talk.send(icmpv6(kind, rest=bytes(4) + b"garbage")) == INVALID_ICMP_INNER_BROKEN


def test_error_to_the_server_is_related_in_the_original_direction() -> None:
    talk = Talk()
    talk.send(udp(b"x", family=6))
    assert talk.send(error(udp(b"y", family=6, back=True))) == IP_CT_RELATED


def test_error_must_go_to_the_sender_of_what_it_quotes() -> None:
    talk = Talk()
    talk.send(tcp(SYN, family=6))
    assert talk.send(error(tcp(SYN, family=6), target=STRANGER[6])) == INVALID_ICMP_OUTER_MISMATCH
    assert talk.send(error(tcp(SYN, family=6, sport=1))) == INVALID_ICMP_INNER_UNKNOWN
    assert talk.send(error(tcp(SYN, family=6))) == IP_CT_RELATED_REPLY


def test_bad_checksum_and_short_header_are_invalid() -> None:
    assert Talk().send(icmpv6(128, bad=True)) == INVALID_ICMP_CHECKSUM
    assert Talk().send(icmpv6(128, bad=True), checksum=False) == IP_CT_NEW
    assert Talk().send(ip(58, bytes(7), family=6)) == INVALID_ICMP_TRUNCATED


def test_icmpv6_over_ipv4_is_invalid() -> None:
    message = packets.icmpv6(CLIENT[4], SERVER[4], 128, 0, bytes(4))
    assert Talk().send(ip(58, message)) == INVALID_ICMP_FAMILY


def test_extension_headers_are_skipped_but_nothing_may_follow_no_next_header() -> None:
    echo = icmpv6(128)[40:]
    for kind in (HOP_BY_HOP, DEST_OPTS):
        chain = packets.extended([(kind, bytes((0, 1, 4, 0, 0, 0, 0)))], 58, echo)
        assert Talk().send(packets.ipv6(CLIENT[6], SERVER[6], *chain)) == IP_CT_NEW
    assert Talk().send(ip(NO_NEXT, b"", family=6)) == INVALID_IPV6_EXTENSION


def test_timeout_is_a_setting() -> None:
    talk = Talk(icmpv6_timeout=5_000)
    talk.send(icmpv6(128))
    assert talk.timeout() == 5


# --- Redirects (RFC 4861 8.1) -----------------------------------------------------------------------------------


def redirect(
    quoted: bytes, *, code: int = 0, hop_limit: int = 255, source: bytes = LINK_LOCAL, option: int = 4, size: int = 0
) -> bytes:
    """A redirect to the client; `size` is the option's length in units of 8 bytes, by default the right one."""
    quoted += bytes(-len(quoted) % 8)
    size = size or 1 + len(quoted) // 8
    rest = bytes(4) + LINK_LOCAL + SERVER[6] + bytes((option, size % 256)) + bytes(6) + quoted
    message = packets.icmpv6(source, CLIENT[6], 137, code, rest)
    return packets.ip(source, CLIENT[6], 58, message, hop_limit)


def test_redirect_is_related_to_the_connection_it_quotes() -> None:
    talk = Talk()
    talk.send(udp(b"x", family=6))
    assert talk.send(redirect(udp(b"x", family=6))) == IP_CT_RELATED_REPLY
    assert talk.send(redirect(udp(b"x", family=6, sport=1))) == INVALID_ICMP_INNER_UNKNOWN


@pytest.mark.parametrize(
    "packet",
    [
        redirect(udp(family=6), hop_limit=254),  # it came through a router
        redirect(udp(family=6), source=STRANGER[6]),  # not from the link
        redirect(udp(family=6), size=256),  # an option without length
    ],
)
def test_redirect_that_did_not_come_from_the_links_router_is_invalid(packet: bytes) -> None:
    talk = Talk()
    talk.send(udp(family=6))
    assert talk.send(packet) == INVALID_ICMPV6_REDIRECT


@pytest.mark.parametrize("packet", [redirect(udp(family=6), code=1), redirect(udp(family=6), option=2)])
def test_redirect_that_quotes_nothing_is_no_query_either(packet: bytes) -> None:
    talk = Talk()
    talk.send(udp(family=6))
    assert talk.send(packet) == INVALID_NOT_INVERTIBLE


def test_redirect_without_an_option_is_invalid() -> None:
    message = packets.icmpv6(LINK_LOCAL, CLIENT[6], 137, 0, bytes(36))
    assert Talk().send(packets.ip(LINK_LOCAL, CLIENT[6], 58, message, 255)) == INVALID_ICMPV6_REDIRECT
    short = packets.icmpv6(LINK_LOCAL, CLIENT[6], 137, 0, bytes(35))
    assert Talk().send(packets.ip(LINK_LOCAL, CLIENT[6], 58, short, 255)) == INVALID_ICMP_TRUNCATED
