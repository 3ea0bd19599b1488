import random

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.sctp import SCTP, SCTPChunkInit

from conntrackd.wire.checksum import checksum_ok, long_sum, sctp_checksum_ok, word_sum

# Checksums of another author's making; odd and even lengths.
PACKETS = [
    (IP(src="10.0.0.5", dst="192.0.2.80") / TCP(sport=1, dport=2) / b"odd", 20, 6),
    (IP(src="10.0.0.5", dst="192.0.2.80") / UDP(sport=1, dport=2) / b"even", 20, 17),
    (IP(src="10.0.0.5", dst="192.0.2.80") / ICMP() / b"odd", 20, 1),
    (IPv6(src="2001:db8::5", dst="2001:db8::80") / TCP(sport=1, dport=2) / b"even", 40, 6),
    (IPv6(src="2001:db8::5", dst="2001:db8::80") / ICMPv6EchoRequest(data=b"odd"), 40, 58),
]


@pytest.mark.parametrize(("packet", "dataoff", "protonum"), PACKETS)
def test_right_checksum_is_right_and_any_changed_byte_breaks_it(packet: IP, dataoff: int, protonum: int) -> None:
    data = bytes(packet)
    length = len(data) - dataoff
    assert checksum_ok(data, dataoff, len(data), length, protonum)
    for at in range(dataoff, len(data)):
        broken = data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :]
        assert not checksum_ok(broken, dataoff, len(data), length, protonum)


def test_words_and_one_long_number_give_the_same_sum() -> None:
    """One of them counts compiled, the other in the interpreter: every length and place of a packet."""
    rng = random.Random(1071)
    for _ in range(2000):
        data = rng.randbytes(rng.randrange(200)) + b"\xff" * rng.randrange(20)
        start = rng.randrange(len(data) + 1)
        end = rng.randrange(start, len(data) + 1)
        assert word_sum(data, start, end) % 0xFFFF == long_sum(data, start, end) % 0xFFFF


def test_addresses_are_covered_but_not_those_of_icmp_over_ipv4() -> None:
    for packet, dataoff, protonum in PACKETS[:3]:
        data = bytes(packet)
        moved = data[:12] + b"\x7f" + data[13:]
        assert checksum_ok(moved, dataoff, len(data), len(data) - dataoff, protonum) == (protonum == 1)


def test_sctp_checksum_covers_every_byte() -> None:
    data = bytes(IP() / SCTP(sport=1, dport=2, tag=3) / SCTPChunkInit(init_tag=4))
    assert sctp_checksum_ok(data, 20)
    for at in range(20, len(data)):
        changed = data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]
        assert not sctp_checksum_ok(changed, 20)
