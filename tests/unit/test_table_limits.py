"""A full table: who goes for a new connection, who stays, and what is refused. And the limits besides `max`."""

import pytest

from conntrackd.const import (
    CLOSED_EVICTED,
    CLOSED_TIMEOUT,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
    IPS_DYING,
    NF_ACCEPT,
    STRESSED_SOURCE_FULL,
    STRESSED_TABLE_FULL,
    STRESSED_ZONE_FULL,
)
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import confirm, conntrack_in, gc
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple
from tests.differential import packets
from tests.differential.packets import ACK, FIN, SYN
from tests.fuzz.invariants import check_table
from tests.unit.craft import SERVER, Talk, tcp, udp

SPARED_S = Sysctl().early_drop_timeout / 1000


def begin(talk: Talk, sport: int) -> Conn:
    """A flow that nobody answers."""
    assert talk.send(udp(sport=sport)) == IP_CT_NEW
    assert talk.last is not None
    return talk.last


def established(talk: Talk, sport: int) -> Conn:
    talk.send(tcp(SYN, 0, sport=sport))
    talk.send(tcp(SYN | ACK, 0, 1, back=True, sport=sport))
    talk.send(tcp(ACK, 1, 1, sport=sport))
    assert talk.last is not None
    assert talk.last.status & IPS_ASSURED
    return talk.last


def closing(talk: Talk, sport: int) -> Conn:
    """An ASSURED connection whose client has closed."""
    ct = established(talk, sport)
    talk.send(tcp(FIN | ACK, 1, 1, sport=sport))
    return ct


def gone(*connections: Conn) -> list[bool]:
    return [ct.status & IPS_DYING != 0 for ct in connections]


# --- The ladder -------------------------------------------------------------------------------------------------


def test_the_least_recently_seen_goes_first() -> None:
    talk = Talk(max=3)
    first, second, third = begin(talk, 1), begin(talk, 2), begin(talk, 3)
    talk.wait(1)
    talk.send(udp(sport=1))
    talk.wait(SPARED_S)
    begin(talk, 4)
    assert gone(first, second, third) == [False, True, False]
    begin(talk, 5)
    assert gone(first, third) == [False, True]
    begin(talk, 6)
    assert gone(first) == [True]
    stats = talk.net.stats
    assert (stats.early_drop, stats.closed[CLOSED_EVICTED], stats.table_full) == (3, 3, 0)
    check_table(talk.net, talk.now_ms)


def test_what_has_expired_goes_before_all_others() -> None:
    talk = Talk(max=2, udp_timeout=60_000)
    living = begin(talk, 1)
    talk.wait(1)
    expired = begin(talk, 2)
    expired.expires_ms = talk.now_ms + 2000
    talk.net.table.settle(expired, talk.now_ms)
    talk.wait(4)
    begin(talk, 3)
    assert gone(living, expired) == [False, True]
    stats = talk.net.stats
    assert (stats.expired_when_full, stats.early_drop, stats.closed[CLOSED_TIMEOUT]) == (1, 0, 1)


def test_what_was_just_seen_is_spared_and_the_new_one_refused() -> None:
    talk = Talk(max=2)
    first, second = begin(talk, 1), begin(talk, 2)
    talk.wait(SPARED_S - 0.001)
    assert talk.send(udp(sport=3)) == STRESSED_TABLE_FULL
    assert gone(first, second) == [False, False]
    assert (talk.net.stats.table_full, talk.net.stats.drop) == (1, 1)
    talk.wait(0.001)
    begin(talk, 3)
    assert gone(first, second) == [True, False]


def test_an_assured_connection_never_goes_but_if_it_is_about_to_end() -> None:
    talk = Talk(max=3)
    alive, leaving = established(talk, 1), closing(talk, 2)
    opener = begin(talk, 3)
    talk.wait(SPARED_S)
    begin(talk, 4)  # at the cost of what is not ASSURED
    assert gone(alive, leaving, opener) == [False, False, True]
    begin(talk, 5)  # nothing else is old enough
    assert gone(alive, leaving) == [False, True]
    assert talk.send(udp(sport=6)) == STRESSED_TABLE_FULL
    talk.wait(SPARED_S)
    talk.send(tcp(ACK, 1, 1, sport=1))
    begin(talk, 7)
    begin(talk, 8)
    talk.wait(3600)
    assert gone(alive) == [False]
    stats = talk.net.stats
    assert (stats.early_drop, stats.emergency_drop, stats.table_full) == (3, 1, 1)


def test_a_connection_that_becomes_assured_is_safe_from_then_on() -> None:
    talk = Talk(max=2)
    talk.send(tcp(SYN, 0))
    talk.wait(1)
    begin(talk, 7)
    talk.send(tcp(SYN | ACK, 0, 1, back=True))
    talk.send(tcp(ACK, 1, 1))
    talk.wait(SPARED_S)
    for number in range(10):
        begin(talk, 100 + number)
        talk.wait(SPARED_S)
    assert talk.send(tcp(ACK, 1, 1)) == IP_CT_ESTABLISHED
    check_table(talk.net, talk.now_ms)


def test_nobody_goes_for_a_packet_that_is_dropped_on_its_way() -> None:
    talk = Talk(max=2)
    first, second = begin(talk, 1), begin(talk, 2)
    talk.wait(SPARED_S)
    _, ct = conntrack_in(talk.net, udp(sport=3), True, talk.now_ms)
    assert ct is not None
    talk.net.table.drop_unconfirmed(ct)  # as the policy does
    assert gone(first, second) == [False, False]


def test_the_table_never_holds_more_than_it_may_however_many_are_on_their_way() -> None:
    talk = Talk(max=3)
    begin(talk, 1)
    waiting = [conntrack_in(talk.net, udp(sport=10 + number), True, talk.now_ms)[1] for number in range(10)]
    verdicts = []
    for ct in waiting:
        assert ct is not None
        verdicts.append(confirm(talk.net, ct, talk.now_ms))
        assert talk.net.table.count <= 3
    assert verdicts == [NF_ACCEPT] * 2 + [STRESSED_TABLE_FULL] * 8
    assert talk.net.stats.table_full == 8


def test_a_syn_flood_costs_no_assured_connection_and_no_memory() -> None:
    """200,000 sources at a table of 10,000, while 1,000 connections go on."""
    limit, flows, sources = 10_000, 1_000, 200_000
    talk = Talk(max=limit, checksum=0)
    for number in range(flows):
        established(talk, 1024 + number)
    head, tail = tcp(SYN, 0)[:12], tcp(SYN, 0)[20:]
    spoofed = [head + (0x0B000000 + number).to_bytes(4, "big") + SERVER[4] + tail for number in range(sources)]
    refused = 0
    for number, packet in enumerate(spoofed):
        if number % 20 == 0:
            talk.now_ms += 1  # 20,000 a second
        refused += talk.send(packet) == STRESSED_TABLE_FULL
        assert talk.net.table.count <= limit
        if number % 200 == 0:
            sport = 1024 + number // 200 % flows
            assert talk.send(tcp(ACK, 1, 1, back=True, sport=sport)) == IP_CT_ESTABLISHED_REPLY
        if number % 2000 == 0:
            gc(talk.net, talk.now_ms)
    for number in range(flows):
        assert talk.send(tcp(ACK, 1, 1, sport=1024 + number)) == IP_CT_ESTABLISHED
    stats, table = talk.net.stats, talk.net.table
    assert sources == stats.insert - flows + refused  # each was let in or refused
    assert refused == stats.table_full == stats.drop
    assert stats.insert - table.count == sum(stats.closed)  # and each that was let in is there, or is said to be gone
    assert stats.closed[CLOSED_EVICTED] == stats.early_drop + stats.emergency_drop
    assert stats.closed[CLOSED_TIMEOUT] >= stats.expired_when_full + stats.adaptive_drop
    assert stats.early_drop > 0
    assert refused > 0
    assert stats.emergency_drop == 0
    assert table.unconfirmed_count() == 0
    check_table(talk.net, talk.now_ms)


# --- Adaptive timeouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fill", "left"), [(60, 1.0), (75, 0.75), (90, 0.5), (100, 1 / 3)])
def test_timeouts_shrink_as_the_table_fills(fill: int, left: float) -> None:
    """Of what is not ASSURED; what is lives as long as ever."""
    talk = Talk(max=100, udp_timeout=100_000)
    alive = established(talk, 1)
    talk.net.table.adapt()
    for number in range(fill - 1):
        begin(talk, 100 + number)
    gc(talk.net, talk.now_ms)
    for ct in list(talk.net.table.connections()):
        talk.net.table.schedule(ct, talk.now_ms)  # as gc's next look would
    talk.now_ms += int(100_000 * left) - 2000
    scale = talk.net.table.scale
    while gc(talk.net, talk.now_ms) <= talk.now_ms:
        pass
    assert talk.net.table.count == fill
    assert scale == pytest.approx(1024 * left, abs=2)
    talk.now_ms += 4000
    talk.net.table.sweep(talk.now_ms)
    assert list(talk.net.table.connections()) == [alive]


def test_a_packet_finds_its_connection_however_full_the_table_is() -> None:
    """Until gc has come: only what nobody asks for goes early."""
    talk = Talk(max=10, udp_timeout=100_000)
    for number in range(10):
        begin(talk, number + 1)
    talk.net.table.adapt()
    talk.wait(99)
    assert talk.find(udp(sport=1)) is not None


# --- Sources and zones ------------------------------------------------------------------------------------------


def test_connections_of_one_source_are_limited() -> None:
    talk = Talk(max_per_source=2)
    first = begin(talk, 1)
    begin(talk, 2)
    assert talk.send(udp(sport=3)) == STRESSED_SOURCE_FULL
    assert talk.send(udp(back=True, sport=9)) == IP_CT_NEW  # another source
    assert talk.send(udp(sport=2)) == IP_CT_NEW  # of a connection that is there
    assert (talk.net.stats.source_full, talk.net.stats.drop) == (1, 1)
    talk.net.table.kill(first, talk.now_ms)
    begin(talk, 3)
    assert talk.net.table.from_source(first.orig, 0) == 2
    talk.wait(60)
    while gc(talk.net, talk.now_ms) <= talk.now_ms:
        pass
    assert not any(talk.net.table.source_counts)  # nothing is left of sources that have nothing


def test_a_limit_that_is_set_later_counts_from_then_on() -> None:
    talk = Talk()
    early = begin(talk, 1)
    talk.net.sysctl.max_per_source = 1
    begin(talk, 2)
    assert talk.send(udp(sport=3)) == STRESSED_SOURCE_FULL
    talk.net.table.kill(early, talk.now_ms)
    assert talk.send(udp(sport=3)) == STRESSED_SOURCE_FULL  # the early one was not counted
    talk.net.sysctl.max_per_source = 0
    begin(talk, 3)


def in_zone(talk: Talk, data: bytes, zone: int) -> tuple[int, Conn | None]:
    ctinfo, ct = conntrack_in(talk.net, data, True, talk.now_ms, zone)
    if ct is not None and ctinfo == IP_CT_NEW:
        assert confirm(talk.net, ct, talk.now_ms) == NF_ACCEPT
    return ctinfo, ct


def test_the_same_tuple_in_two_zones_is_two_connections() -> None:
    talk = Talk()
    _, here = in_zone(talk, udp(), 0)
    _, there = in_zone(talk, udp(), 7)
    assert here is not there
    assert in_zone(talk, udp(back=True), 7) == (IP_CT_ESTABLISHED_REPLY, there)
    assert in_zone(talk, udp(back=True), 0) == (IP_CT_ESTABLISHED_REPLY, here)
    assert in_zone(talk, udp(back=True), 8)[0] == IP_CT_NEW
    assert here is not None
    talk.net.table.kill(here, talk.now_ms)
    assert talk.net.table.find(get_tuple(udp(), 0), talk.now_ms) is None
    assert talk.net.table.find(get_tuple(udp(), 0), talk.now_ms, 7) is there
    check_table(talk.net, talk.now_ms)


def test_connections_of_one_zone_are_limited() -> None:
    talk = Talk(max_per_zone=1)
    _, first = in_zone(talk, udp(sport=1), 7)
    assert in_zone(talk, udp(sport=2), 7)[0] == STRESSED_ZONE_FULL
    assert in_zone(talk, udp(sport=2), 8)[0] == IP_CT_NEW
    assert in_zone(talk, udp(sport=2), 0)[0] == IP_CT_NEW
    assert in_zone(talk, udp(sport=3), 0)[0] == IP_CT_NEW  # zone 0 has `max`
    assert talk.net.stats.zone_full == 1
    assert first is not None
    talk.net.table.kill(first, talk.now_ms)
    assert in_zone(talk, udp(sport=2), 7)[0] == IP_CT_NEW
    assert talk.net.table.zone_counts == {7: 1, 8: 1}


def test_an_icmp_error_belongs_to_the_connection_of_its_own_zone() -> None:
    talk = Talk()
    in_zone(talk, udp(), 7)
    error = packets.ip(SERVER[4], udp()[12:16], 1, packets.icmp(3, 1, bytes(4) + udp()))
    assert in_zone(talk, error, 0)[1] is None
    assert in_zone(talk, error, 7)[1] is not None


@pytest.mark.parametrize(
    ("mask", "mark", "zone"),
    [(0, 0xFFFF, 3), (0xFF00, 0x1200, 0x12), (0xFF00, 0x00FF, 3), (0x3, 0x2, 2), (0xFFFFFFFF, 0x12345, 0x2345)],
)
def test_a_zone_comes_from_the_mark_or_else_from_the_interface(mask: int, mark: int, zone: int) -> None:
    talk = Talk(zone_mark_mask=mask)
    talk.net.zones = {5: 3}
    assert talk.net.zone_of(5, mark) == zone
    assert talk.net.zone_of(6, 0) == 0
