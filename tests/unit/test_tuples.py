import pytest

from conntrackd.core.tuples import destination, format_tuple, get_tuple, invert, packet_tuple
from tests.differential import packets
from tests.unit import craft
from tests.unit.craft import CLIENT, DPORT, SERVER, SPORT, tcp, udp

PORTS = SPORT.to_bytes(2, "big") + DPORT.to_bytes(2, "big")


@pytest.mark.parametrize(("family", "size"), [(4, 13), (6, 37)])
def test_tuple_is_protocol_addresses_and_ports(family: int, size: int) -> None:
    key = get_tuple(udp(family=family), 0)
    assert key == bytes((17,)) + CLIENT[family] + SERVER[family] + PORTS
    assert len(key) == size


def test_answer_has_the_inverted_tuple() -> None:
    conversation = [
        (tcp(packets.SYN), tcp(packets.SYN | packets.ACK, back=True)),
        (tcp(packets.SYN, family=6), tcp(packets.SYN | packets.ACK, family=6, back=True)),
        (udp(), udp(back=True)),
        (craft.udplite(), craft.udplite(back=True)),
        (craft.sctp(0), craft.sctp(0, back=True)),
        (craft.icmp(8, 3), craft.icmp(0, 3, back=True)),
        (craft.icmpv6(128), craft.icmpv6(129, back=True)),
        (craft.gre(), craft.gre(back=True)),
        (craft.ip(50, b""), craft.ip(50, b"", back=True)),
    ]
    for question, answer in conversation:
        assert invert(get_tuple(question, 0)) == get_tuple(answer, 0) != b""


def test_icmp_has_id_type_and_code_in_place_of_ports() -> None:
    assert get_tuple(craft.icmp(8, 3), 0)[-4:] == bytes((0, 7, 8, 3))
    assert get_tuple(craft.icmpv6(128, 3), 0)[-4:] == bytes((0, 7, 128, 3))


@pytest.mark.parametrize(("query", "answer"), [(8, 0), (13, 14), (15, 16), (17, 18)])
def test_icmp_types_answer_each_other(query: int, answer: int) -> None:
    key = get_tuple(craft.icmp(query), 0)
    assert invert(key)[-2] == answer
    assert invert(invert(key)) == key


@pytest.mark.parametrize(("query", "answer"), [(128, 129), (139, 140)])
def test_icmpv6_types_answer_each_other(query: int, answer: int) -> None:
    key = get_tuple(craft.icmpv6(query), 0)
    assert invert(key)[-2] == answer
    assert invert(invert(key)) == key


def test_other_icmp_types_have_no_inverse() -> None:
    paired = {0, 8, 13, 14, 15, 16, 17, 18}
    for kind in range(256):
        assert bool(invert(get_tuple(craft.icmp(kind), 0))) == (kind in paired), kind
        assert bool(invert(get_tuple(craft.icmpv6(kind), 0))) == (kind in {128, 129, 139, 140}), kind


def test_gre_has_keys_only_in_pptps_version() -> None:
    assert get_tuple(craft.gre(0, 0x0800, b"\1\2\3\4"), 0)[-4:] == bytes(4)
    assert get_tuple(craft.gre(1, 0x880B, b"\1\2\3\4"), 0)[-4:] == b"\0\0\3\4"  # the call id
    assert get_tuple(craft.gre(1, 0x0800, b"\1\2\3\4"), 0) == b""  # version 1 carries PPP only


def test_protocols_that_are_not_read_have_zeros() -> None:
    assert get_tuple(craft.ip(50, b"\1\2\3\4\5\6\7\10"), 0) == bytes((50,)) + CLIENT[4] + SERVER[4] + bytes(4)


@pytest.mark.parametrize(("protonum", "needed"), [(1, 8), (6, 4), (17, 4), (58, 8), (132, 4), (136, 4)])
def test_transport_header_that_is_too_short_has_no_tuple(protonum: int, needed: int) -> None:
    assert get_tuple(craft.ip(protonum, bytes(needed - 1)), 0) == b""
    assert get_tuple(craft.ip(protonum, bytes(needed)), 0) != b""


def test_packet_that_is_no_packet_has_no_tuple() -> None:
    assert get_tuple(b"", 0) == b""
    assert get_tuple(b"\x45", 0) == b""


@pytest.mark.parametrize("family", [4, 6])
def test_destination_is_the_second_address(family: int) -> None:
    assert destination(get_tuple(udp(family=family), 0)) == SERVER[family]


def test_tuples_are_written_for_people() -> None:
    assert format_tuple(get_tuple(tcp(packets.SYN), 0)) == "tcp 10.0.0.5:40000 > 192.0.2.80:80"
    assert format_tuple(get_tuple(udp(family=6), 0)) == "udp [2001:db8:1::5]:40000 > [2001:db8:2::80]:80"
    assert format_tuple(get_tuple(craft.icmp(8), 0)) == "icmp 10.0.0.5 > 192.0.2.80 type 8 code 0 id 7"
    assert format_tuple(get_tuple(craft.ip(50, b""), 0)) == "proto-50 10.0.0.5 > 192.0.2.80"


@pytest.mark.parametrize("family", [4, 6])
def test_padding_behind_a_captured_packet_is_not_read(family: int) -> None:
    packet = udp(family=family)
    assert packet_tuple(packet + bytes(18)) == packet_tuple(packet) == get_tuple(packet, 0)
    no_ports = craft.ip(17, b"\0\1", family=family)
    assert packet_tuple(no_ports + bytes(18)) == b""


def test_packet_of_no_known_version_has_no_tuple() -> None:
    assert packet_tuple(b"\x50" + bytes(63)) == b""
