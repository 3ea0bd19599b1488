"""Every wanted difference from the kernel (docs/differences.md), shown on both sides where the kernel can show it."""

import struct

import pytest

from conntrackd import const
from conntrackd.core.conntrack import confirm, conntrack_in
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from tests.differential import packets
from tests.differential.compare import CAPTURE, Twin
from tests.differential.generate.path import addresses
from tests.differential.kernel import CLIENT, Router
from tests.differential.packets import ACK, SYN

SADDR, DADDR, _ = addresses(1, 4)

# IPv6 extension headers without their first byte.
FRAGMENT = (packets.FRAGMENT, b"\0" + struct.pack(">HI", 0, 7))
MORE_FRAGMENTS = (packets.FRAGMENT, b"\0" + struct.pack(">HI", 1, 7))
PADDING = (packets.HOP_BY_HOP, b"\x00\x01\x04" + bytes(4))


def segment(flags: int, seq: int, ack: int = 0, ttl: int = 64) -> bytes:
    return packets.ip(SADDR, DADDR, 6, packets.tcp(SADDR, DADDR, 40000, 443, flags, seq, ack, 1000), ttl)


def test_a_second_packet_joins_a_connection_on_its_way() -> None:
    """The kernel would drop the second SYN at confirm (insert_failed)."""
    net = Conntrack(Sysctl())
    ctinfo, first = conntrack_in(net, segment(SYN, 1000), True, 0)
    assert (ctinfo, first is not None) == (const.IP_CT_NEW, True)
    ctinfo, second = conntrack_in(net, segment(SYN, 1000), True, 1)
    assert (ctinfo, second) == (const.IP_CT_NEW, first)
    assert first is not None
    assert confirm(net, first, 2) == const.NF_ACCEPT
    assert confirm(net, first, 3) == const.NF_ACCEPT
    assert net.table.count == 1
    assert net.stats.insert_failed == 0


def test_a_connection_whose_packet_was_lost_on_the_way_is_remembered_for_a_while() -> None:
    """The kernel takes the ACK for the first packet of the flow; to us it follows a SYN that may be on its way."""
    with Router.tracking({}) as router:
        assert not router.forward(CLIENT, segment(SYN, 1000, ttl=1)).left
        assert router.forward(CLIENT, segment(ACK, 1001, 1)).ctinfo == const.IP_CT_NEW
    net = Conntrack(Sysctl())
    conntrack_in(net, segment(SYN, 1000, ttl=1), True, 0)
    ctinfo, _ = conntrack_in(net, segment(ACK, 1001, 1), True, 1)
    assert ctinfo == const.INVALID_TCP_STATE
    # Forgotten after its time, in two halves.
    net.table.gc(net.sysctl.unconfirmed_timeout)
    net.table.gc(2 * net.sysctl.unconfirmed_timeout)
    ctinfo, _ = conntrack_in(net, segment(ACK, 1001, 1), True, 2 * net.sysctl.unconfirmed_timeout)
    assert ctinfo == const.IP_CT_NEW


@pytest.mark.parametrize(
    ("size", "difference"),
    [(CAPTURE, ("classification", "invalid", "new")), (1000, const.INVALID_BAD_CHECKSUM)],
    ids=["cut", "whole"],
)
def test_the_checksum_of_a_packet_that_is_cut_is_not_verified(size: int, difference: object) -> None:
    datagram = packets.udp(SADDR, DADDR, 1, 2, bytes(size), bad=True)
    with Twin("default") as twin:
        assert twin.forward(CLIENT, packets.ip(SADDR, DADDR, 17, datagram), []) == difference


@pytest.mark.parametrize(
    ("headers", "length"),
    [([FRAGMENT, MORE_FRAGMENTS], None), ([PADDING, MORE_FRAGMENTS], 0)],
    ids=["reassembled", "jumbogram"],
)
def test_a_packet_with_a_fragment_header_left_is_a_fragment(
    headers: list[tuple[int, bytes]], length: int | None
) -> None:
    saddr, daddr, _ = addresses(1, 6)
    first, payload = packets.extended(headers, 17, packets.udp(saddr, daddr, 1, 2))
    with Twin("default") as twin:
        difference = twin.forward(CLIENT, packets.ipv6(saddr, daddr, first, payload, length=length), [])
    assert difference == ("classification", "new", "fragment")


def test_insert_counts_connections() -> None:
    with Router.tracking({}) as router:
        assert router.forward(CLIENT, segment(SYN, 1000)).left
        assert len(router.entries()) == 1
        assert router.stats()["insert"] == 0
    net = Conntrack(Sysctl())
    _, ct = conntrack_in(net, segment(SYN, 1000), True, 0)
    assert ct is not None
    confirm(net, ct, 0)
    assert net.stats.insert == 1
