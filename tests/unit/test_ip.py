import pytest

from conntrackd.const import INVALID_FRAGMENT, INVALID_IP_HEADER, INVALID_IPV6_EXTENSION
from conntrackd.wire.ip import EXTENSIONS_MAX, addresses, packet_length, transport
from tests.differential import packets
from tests.differential.packets import AUTH, DEST_OPTS, FRAGMENT, HOP_BY_HOP, NO_NEXT, ROUTING
from tests.unit.craft import CLIENT, SERVER, ip

EIGHT = bytes(7)  # an extension header of 8 bytes, without its first


def extended(*headers: tuple[int, bytes]) -> bytes:
    return packets.ipv6(CLIENT[6], SERVER[6], *packets.extended(headers, 17, bytes(8)))


def test_transport_of_ipv4_begins_after_the_options() -> None:
    assert transport(ip(17, bytes(8)), 0) == (20, 17)
    assert transport(packets.ipv4(CLIENT[4], SERVER[4], 6, bytes(20), options=bytes(8)), 0) == (28, 6)


@pytest.mark.parametrize("words", [0, 4, 15])
def test_ipv4_header_shorter_than_20_or_longer_than_the_packet_is_invalid(words: int) -> None:
    packet = packets.ipv4(CLIENT[4], SERVER[4], 17, bytes(8), words=words)
    assert transport(packet, 0) == (-INVALID_IP_HEADER, 0)


QUOTED_AT = 28  # where an ICMP error quotes a packet


@pytest.mark.parametrize(
    ("fragment", "whole", "quoted"),
    [
        (0x4000, 20, QUOTED_AT + 20),  # don't fragment
        (0x2000, -INVALID_FRAGMENT, QUOTED_AT + 20),  # the first one
        (0x2001, -INVALID_FRAGMENT, -INVALID_FRAGMENT),
        (0x0001, -INVALID_FRAGMENT, -INVALID_FRAGMENT),  # the last one
    ],
)
def test_no_ipv4_fragment_is_tracked_but_the_first_may_be_quoted(fragment: int, whole: int, quoted: int) -> None:
    packet = packets.ipv4(CLIENT[4], SERVER[4], 17, bytes(8), fragment=fragment)
    assert transport(packet, 0)[0] == whole
    assert transport(bytes((0x45,)) + bytes(QUOTED_AT - 1) + packet, QUOTED_AT)[0] == quoted


@pytest.mark.parametrize(
    ("field", "whole", "quoted"),
    [
        (0x0000, 48, 48 + 48),  # atomic: a fragment header without fragments
        (0x0001, -INVALID_FRAGMENT, 48 + 48),
        (0x0009, -INVALID_FRAGMENT, -INVALID_FRAGMENT),
        (0x0008, -INVALID_FRAGMENT, -INVALID_FRAGMENT),
    ],
)
def test_no_ipv6_fragment_is_tracked_but_the_first_may_be_quoted(field: int, whole: int, quoted: int) -> None:
    packet = extended((FRAGMENT, b"\0" + field.to_bytes(2, "big") + bytes(4)))
    assert transport(packet, 0)[0] == whole
    assert transport(bytes((0x60,)) + bytes(47) + packet, 48)[0] == quoted


def test_truncated_headers_are_invalid_at_every_length() -> None:
    for family, header in ((4, 20), (6, 40)):
        packet = ip(17, bytes(8), family=family)
        for size in range(1, header):
            assert transport(packet[:size], 0) == (-INVALID_IP_HEADER, 0)
        assert transport(packet[:header], 0) == (header, 17)


@pytest.mark.parametrize("kind", [HOP_BY_HOP, ROUTING, DEST_OPTS, FRAGMENT])
def test_ipv6_extension_headers_are_skipped(kind: int) -> None:
    assert transport(extended((kind, EIGHT)), 0) == (48, 17)
    assert transport(extended((kind, EIGHT), (DEST_OPTS, EIGHT)), 0) == (56, 17)


def test_length_of_an_extension_header_counts_8_bytes_and_of_authentication_4() -> None:
    assert transport(extended((DEST_OPTS, b"\2" + bytes(22))), 0) == (40 + 24, 17)
    assert transport(extended((AUTH, b"\4" + bytes(22))), 0) == (40 + 24, 17)


def test_no_next_header_and_cut_off_extension_headers_are_invalid() -> None:
    assert transport(ip(NO_NEXT, b"", family=6), 0) == (-INVALID_IPV6_EXTENSION, 0)
    for kind, needed in ((HOP_BY_HOP, 2), (ROUTING, 2), (DEST_OPTS, 2), (AUTH, 2), (FRAGMENT, 4)):
        packet = extended((kind, EIGHT))
        assert transport(packet[: 40 + needed - 1], 0) == (-INVALID_IPV6_EXTENSION, 0)
        assert transport(packet[: 40 + needed], 0)[0] > 0


def test_walk_over_extension_headers_is_bounded() -> None:
    endless = [(DEST_OPTS, EIGHT)] * EXTENSIONS_MAX
    assert transport(extended(*endless), 0) == (-INVALID_IPV6_EXTENSION, 0)
    assert transport(extended(*endless[1:]), 0)[1] == 17


def test_a_quoted_packet_is_read_at_its_offset() -> None:
    quoted = bytes((0x45,)) + bytes(27) + ip(17, bytes(8))
    assert transport(quoted, 28) == (48, 17)
    assert addresses(quoted, 28) == CLIENT[4] + SERVER[4]


@pytest.mark.parametrize("family", [4, 6])
def test_addresses_are_source_and_destination(family: int) -> None:
    assert addresses(ip(17, b"", family=family), 0) == CLIENT[family] + SERVER[family]


@pytest.mark.parametrize("family", [4, 6])
def test_length_is_what_the_header_says_whatever_was_captured(family: int) -> None:
    packet = ip(17, bytes(100), family=family)
    assert packet_length(packet) == len(packet)
    assert packet_length(packet[:60]) == len(packet)
    assert packet_length(packet + b"padding") == len(packet)


@pytest.mark.parametrize(
    "packet",
    [
        packets.ipv6(CLIENT[6], SERVER[6], HOP_BY_HOP, bytes(70), length=0),
        packets.ipv4(CLIENT[4], SERVER[4], 6, bytes(90), length=0),
    ],
    ids=["jumbogram", "segments put together"],
)
def test_length_of_what_is_longer_than_its_header_can_say_is_what_was_captured(packet: bytes) -> None:
    assert packet_length(packet) == 110


@pytest.mark.parametrize("packet", [b"", b"\x45", bytes(64), b"\x50" + bytes(63), b"\x60" + bytes(38)])
def test_length_of_an_unusable_header_is_zero(packet: bytes) -> None:
    assert packet_length(packet) == 0
