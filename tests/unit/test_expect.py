"""Expectations: what they match, who may make them, how many, and when they go."""

import gc
import weakref

import pytest

from conntrackd.const import IP_CT_ESTABLISHED, IP_CT_NEW, IP_CT_RELATED, IPPROTO_TCP, IPPROTO_UDP, IPS_EXPECTED
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import conntrack_in
from conntrackd.core.conntrack import gc as collect
from conntrackd.core.expect import (
    ANY_PORT,
    EXPECT_ALREADY,
    EXPECT_BUSY,
    EXPECT_FULL,
    EXPECT_INACTIVE,
    EXPECT_OK,
    EXPECT_PERMANENT,
    Expect,
    expect_from,
)
from conntrackd.core.helper import Helper, Policy
from conntrackd.core.tuples import get_tuple
from tests.differential.packets import ACK, SYN
from tests.unit.craft import CLIENT, SERVER, STRANGER, Talk, tcp, udp


class Twice(Helper):
    """Two at a time of the first class for 10 s, one of the second."""

    def __init__(self) -> None:
        super().__init__("twice", (IPPROTO_UDP,), [Policy("", 2, 10_000), Policy("other", 1, 10_000)])


class Masters(Talk):
    """A tracker with connections that have a helper."""

    def master(self, sport: int = 4000, zone: int = 0) -> Conn:
        packet = udp(sport=sport, dport=69)
        conntrack_in(self.net, packet, True, self.now_ms, zone)
        ct = self.net.table.find_unconfirmed(get_tuple(packet, 0), zone)
        assert ct is not None
        ct.help = Twice().new_help()
        self.net.table.drop_unconfirmed(ct)
        self.net.table.insert(ct, self.now_ms)
        return ct

    def insert(self, expect: Expect, any_master: bool = False, limit: int = 0) -> int:
        return self.net.table.expectations.insert(expect, any_master, limit, self.now_ms)

    def count(self) -> int:
        return len(self.net.table.expectations.by_id)


@pytest.fixture
def talk() -> Masters:
    return Masters()


def stream(master: Conn, port: int = 5000, source: bytes = CLIENT[4], sport: int = ANY_PORT, flags: int = 0) -> Expect:
    """Expect a TCP connection to a port of the server."""
    return expect_from(master, 0, IPPROTO_TCP, source, sport, SERVER[4], port, flags)


def test_a_connection_fulfils_it_once(talk: Masters) -> None:
    master = talk.master()
    master.mark = 42
    assert talk.insert(stream(master)) == EXPECT_OK
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_RELATED
    child = talk.last
    assert child is not None
    assert (child.master, child.mark, child.help) == (master, 42, None)
    assert child.status & IPS_EXPECTED
    assert talk.count() == 0
    # RELATED until it is answered, then ESTABLISHED as any other.
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_RELATED
    talk.send(tcp(SYN | ACK, 900, 1, dport=5000, back=True))
    assert talk.send(tcp(ACK, 1, 901, dport=5000)) == IP_CT_ESTABLISHED
    assert talk.send(tcp(SYN, dport=5000, sport=41000)) == IP_CT_NEW
    stats = talk.net.stats
    assert (stats.expect_create, stats.expect_new, stats.expect_delete) == (1, 1, 1)


@pytest.mark.parametrize(
    ("source", "sport", "matches"),
    [
        (CLIENT[4], ANY_PORT, True),
        (CLIENT[4], 40000, True),
        (CLIENT[4], 40001, False),
        (STRANGER[4], ANY_PORT, False),
        (b"", ANY_PORT, True),
        (b"", 40001, False),
    ],
)
def test_source_and_port_may_be_open(talk: Masters, source: bytes, sport: int, matches: bool) -> None:
    talk.insert(stream(talk.master(), source=source, sport=sport))
    assert talk.send(tcp(SYN, dport=5000, sport=40000)) == (IP_CT_RELATED if matches else IP_CT_NEW)


@pytest.mark.parametrize("packet", [tcp(SYN, dport=5001), udp(dport=5000), tcp(SYN, dport=5000, family=6)])
def test_the_destination_is_exact(talk: Masters, packet: bytes) -> None:
    talk.insert(stream(talk.master()))
    assert talk.send(packet) == IP_CT_NEW
    assert talk.count() == 1


def test_a_network_as_source(talk: Masters) -> None:
    master = talk.master()
    exact = stream(master)
    mask = exact.mask[:1] + bytes((255, 255, 255, 0)) + exact.mask[5:]
    talk.insert(Expect(master, 0, exact.tuple, mask, 0))
    neighbour = CLIENT[4][:3] + bytes((CLIENT[4][3] ^ 1,))
    key = get_tuple(tcp(SYN, dport=5000), 0)
    find = talk.net.table.expectations.find
    assert find(key[:1] + neighbour + key[5:], 0, talk.now_ms) is not None
    assert find(key[:1] + STRANGER[4] + key[5:], 0, talk.now_ms) is None


def test_a_permanent_one_stays(talk: Masters) -> None:
    talk.insert(stream(talk.master(), flags=EXPECT_PERMANENT))
    for sport in (41000, 41001):
        assert talk.send(tcp(SYN, dport=5000, sport=sport)) == IP_CT_RELATED
    assert talk.count() == 1


def test_an_inactive_one_matches_nothing(talk: Masters) -> None:
    expect = stream(talk.master(), flags=EXPECT_INACTIVE)
    talk.insert(expect)
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_NEW
    expect.flags = 0
    assert talk.send(tcp(SYN, dport=5000, sport=41000)) == IP_CT_RELATED


def test_it_expires(talk: Masters) -> None:
    talk.insert(stream(talk.master()))
    talk.wait(10.001)
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_NEW
    assert talk.count() == 0


def test_expired_ones_that_nobody_asks_for_are_swept(talk: Masters) -> None:
    master = talk.master()
    for port in (5000, 5001):
        talk.insert(stream(master, port))
    talk.wait(11)
    collect(talk.net, talk.now_ms)
    assert talk.count() == 0
    assert talk.net.table.expectations.hash == {}
    assert master.help is not None
    assert master.help.expectations == []


def test_only_a_living_master_counts(talk: Masters) -> None:
    master = talk.master()
    talk.insert(stream(master))
    master.expires_ms = talk.now_ms
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_NEW


def test_it_goes_with_its_master(talk: Masters) -> None:
    master = talk.master()
    other = talk.master(4001)
    talk.insert(stream(master))
    talk.insert(stream(other, 5001))
    talk.net.table.kill(master, talk.now_ms)
    assert talk.count() == 1
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_NEW
    assert talk.send(tcp(SYN, dport=5001)) == IP_CT_RELATED


def test_a_zone_is_a_world_of_its_own(talk: Masters) -> None:
    talk.insert(stream(talk.master(zone=7)))
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_NEW
    assert talk.insert(stream(talk.master())) == EXPECT_OK
    assert conntrack_in(talk.net, tcp(SYN, dport=5000, sport=41000), True, talk.now_ms, 7)[0] == IP_CT_RELATED
    assert talk.count() == 1


def test_the_same_again_is_renewed(talk: Masters) -> None:
    master = talk.master()
    talk.insert(stream(master))
    talk.wait(8)
    assert talk.insert(stream(master)) == EXPECT_OK
    talk.wait(8)
    assert talk.count() == 1
    assert talk.send(tcp(SYN, dport=5000)) == IP_CT_RELATED


def test_what_overlaps_is_refused(talk: Masters) -> None:
    master, other = talk.master(), talk.master(4001)
    assert talk.insert(stream(master)) == EXPECT_OK
    assert talk.insert(stream(master, source=b"")) == EXPECT_BUSY
    assert talk.insert(stream(master, sport=40000)) == EXPECT_BUSY
    assert talk.insert(stream(other)) == EXPECT_BUSY
    assert talk.insert(stream(master, source=STRANGER[4])) == EXPECT_OK


def test_the_same_of_anybody(talk: Masters) -> None:
    """Two descriptions of one call, or one port for two kinds of media."""
    master, other = talk.master(), talk.master(4001)
    assert talk.insert(stream(master), any_master=True) == EXPECT_OK
    assert talk.insert(stream(other), any_master=True) == EXPECT_ALREADY
    again = stream(master)
    again.expect_class = 1
    assert talk.insert(again, any_master=True) == EXPECT_ALREADY
    assert talk.count() == 1


def test_at_the_limit_of_its_class_the_oldest_makes_room(talk: Masters) -> None:
    master = talk.master()
    for port in (5000, 5001, 5002):
        assert talk.insert(stream(master, port)) == EXPECT_OK
    other_class = stream(master, 5003)
    other_class.expect_class = 1
    assert talk.insert(other_class) == EXPECT_OK
    assert {expect.tuple[-1] for expect in talk.net.table.expectations.by_id.values()} == {0x89, 0x8A, 0x8B}


def test_the_limit_of_all(talk: Masters) -> None:
    master, other = talk.master(), talk.master(4001)
    assert talk.insert(stream(master, 5000), limit=2) == EXPECT_OK
    assert talk.insert(stream(master, 5001), limit=2) == EXPECT_OK
    assert talk.insert(stream(other, 5002), limit=2) == EXPECT_FULL
    talk.wait(11)
    assert talk.insert(stream(talk.master(4002), 5002), limit=2) == EXPECT_OK  # the others have expired
    assert talk.count() == 1


def test_no_connection_is_kept_alive_by_a_circle(talk: Masters) -> None:
    """The daemon runs without Python's collector."""
    gc.disable()
    try:
        master = talk.master()
        expect = stream(master)
        talk.insert(expect)
        assert talk.send(tcp(SYN, dport=5000)) == IP_CT_RELATED
        second = stream(master, 5001)
        talk.insert(second)
        child = talk.last
        assert child is not None
        info = master.help
        assert info is not None
        watched = weakref.ref(second) if hasattr(second, "__weakref__") else None
        for ct in (child, master):
            talk.net.table.kill(ct, talk.now_ms)
        assert info.expectations == []
        del expect, second
        assert watched is None or watched() is None
    finally:
        gc.enable()
