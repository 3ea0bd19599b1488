"""The steps of conntrack_in and confirm that no protocol changes."""

import pytest

from conntrackd.const import (
    INVALID_FRAGMENT,
    INVALID_IP_HEADER,
    INVALID_L4_TRUNCATED,
    INVALID_NOT_INVERTIBLE,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IP_CT_RELATED,
    IPS_CONFIRMED,
    IPS_EXPECTED,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
    NF_DROP,
    STRESSED_TABLE_FULL,
)
from conntrackd.core.conn import Conn, first_difference, is_reply
from conntrackd.core.conntrack import Conntrack, confirm, conntrack_in, gc
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple, invert
from tests.differential import packets
from tests.differential.packets import ACK, SYN, chunk
from tests.unit.craft import CLIENT, SERVER, START_MS, Talk, gre, icmp, icmpv6, ip, sctp, sctp_init, tcp, udp, udplite


@pytest.fixture
def net() -> Conntrack:
    return Conntrack(Sysctl())


def track(net: Conntrack, data: bytes, now_ms: int = START_MS) -> Conn:
    """Track a packet that belongs to a connection, without confirming it."""
    ct = conntrack_in(net, data, True, now_ms)[1]
    assert ct is not None
    return ct


# --- Resolving --------------------------------------------------------------------------------------------------


def test_new_connection_is_unconfirmed_until_it_is_confirmed(net: Conntrack) -> None:
    ct = track(net, udp())
    assert not ct.status & IPS_CONFIRMED
    assert (net.table.count, net.stats.created, net.stats.insert) == (0, 1, 0)
    assert confirm(net, ct, START_MS) == NF_ACCEPT
    assert ct.status & IPS_CONFIRMED
    assert (net.table.count, net.stats.insert) == (1, 1)
    assert net.table.unconfirmed_count() == 0


def test_second_packet_of_an_unconfirmed_flow_joins_it(net: Conntrack) -> None:
    first = track(net, udp())
    ctinfo, second = conntrack_in(net, udp(), True, START_MS)
    assert ctinfo == IP_CT_NEW
    assert second is first
    assert net.stats.created == 1


def test_answer_to_an_unconfirmed_connection_begins_one_of_its_own(net: Conntrack) -> None:
    first = track(net, udp())
    ctinfo, second = conntrack_in(net, udp(back=True), True, START_MS)
    assert ctinfo == IP_CT_NEW
    assert second is not first


def test_refused_first_packet_leaves_nothing(net: Conntrack) -> None:
    conntrack_in(net, udp(b"x", bad=True), True, START_MS)
    conntrack_in(net, tcp(SYN | ACK), True, START_MS)
    assert net.table.unconfirmed_count() == 0
    assert net.stats.created == 0


def test_seen_reply_is_set_after_the_protocol_saw_the_reply() -> None:
    talk = Talk(gre_timeout=1_000, gre_timeout_stream=2_000)
    talk.send(gre())
    assert talk.send(gre(back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.timeout() == 1  # GRE took it for an unreplied flow
    assert talk.status(IPS_SEEN_REPLY)


def test_expected_connection_is_related_until_a_reply_is_seen() -> None:
    talk = Talk()
    talk.send(udp())
    talk.the().status |= IPS_EXPECTED
    assert talk.send(udp()) == IP_CT_RELATED
    assert talk.send(udp(back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.send(udp()) == IP_CT_ESTABLISHED


def test_expired_connection_is_a_miss() -> None:
    talk = Talk()
    talk.send(udp())
    old = talk.the()
    talk.wait(30)
    assert talk.send(udp(back=True)) == IP_CT_NEW
    assert talk.the() is not old
    assert talk.the().orig == old.reply


def test_families_do_not_meet() -> None:
    """::ffff:10.0.0.5 is another host than 10.0.0.5."""
    talk = Talk()
    mapped = bytes(10) + b"\xff\xff"
    v6 = packets.udp(mapped + CLIENT[4], mapped + SERVER[4], 40000, 80)
    talk.send(udp())
    assert talk.send(packets.ipv6(mapped + CLIENT[4], mapped + SERVER[4], 17, v6)) == IP_CT_NEW
    assert talk.net.table.count == 2


def test_packet_from_a_socket_to_itself_is_tracked() -> None:
    talk = Talk()
    own = packets.ip(CLIENT[4], CLIENT[4], 17, packets.udp(CLIENT[4], CLIENT[4], 53, 53))
    assert talk.send(own) == IP_CT_NEW
    assert talk.send(own) == IP_CT_ESTABLISHED_REPLY  # as the kernel's: the reply's tuple is found first
    assert (talk.net.table.count, sum(map(len, talk.net.table.shards))) == (1, 1)


# --- Broken packets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\x45", bytes(40), b"\x55" + bytes(60), udp()[:19], udp(family=6)[:39]])
def test_packet_without_a_usable_header_is_invalid(net: Conntrack, data: bytes) -> None:
    assert conntrack_in(net, data, True, START_MS) == (INVALID_IP_HEADER, None)


def test_padding_behind_the_packet_is_not_read(net: Conntrack) -> None:
    ct = track(net, udp(b"x") + bytes(18))
    assert ct.bytes_orig == 29
    assert ct.orig == get_tuple(udp(b"x"), 0)


def test_transport_header_in_the_padding_is_not_read(net: Conntrack) -> None:
    short = packets.ipv4(CLIENT[4], SERVER[4], 17, b"\0\1", length=22) + udp()[22:]
    assert conntrack_in(net, short, True, START_MS) == (INVALID_L4_TRUNCATED, None)


def test_fragments_are_invalid_and_never_tracked(net: Conntrack) -> None:
    for fragment in packets.fragments(udp(bytes(64)), [16, 32], 7):
        assert conntrack_in(net, fragment, True, START_MS) == (INVALID_FRAGMENT, None)
    for fragment in packets.fragments(udp(bytes(64), family=6), [16, 32], 7):
        assert conntrack_in(net, fragment, True, START_MS) == (INVALID_FRAGMENT, None)


def test_tuple_that_cannot_be_inverted_is_invalid(net: Conntrack) -> None:
    assert conntrack_in(net, icmp(9), True, START_MS) == (INVALID_NOT_INVERTIBLE, None)
    assert net.stats.invalid() == 1


def test_every_packet_is_counted_once_by_its_ctinfo() -> None:
    talk = Talk()
    sent = [udp(), udp(), udp(back=True), udp(), tcp(SYN, bad=True), icmp(9), b""]
    seen = [talk.send(data) for data in sent]
    assert sum(talk.net.stats.ctinfo) == len(sent)
    assert all(talk.net.stats.ctinfo[ctinfo] == seen.count(ctinfo) for ctinfo in seen)


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (udp(b"x"), udp(b"answer", back=True)),
        (udplite(b"x"), udplite(b"answer", back=True)),
        (icmp(8), icmp(0, rest=b"\0\7\0\1answer", back=True)),
        (icmpv6(128), icmpv6(129, rest=b"\0\7\0\1answer", back=True)),
        (gre(), gre(key=b"answer", back=True)),
        (ip(50, b"x"), ip(50, b"answer", back=True)),
        (sctp(0, chunk(1, 0, sctp_init(1))), sctp(1, chunk(2, 0, sctp_init(2) + b"more"), back=True)),
    ],
)
def test_packets_and_bytes_are_counted_on_their_direction(there: bytes, back: bytes) -> None:
    talk = Talk(checksum=0)
    for data in (there, back):
        talk.wait(1)
        talk.send(data)
        assert talk.the().seen_ms == talk.now_ms
    ct = talk.the()
    assert (ct.packets_orig, ct.bytes_orig) == (1, len(there))
    assert (ct.packets_reply, ct.bytes_reply) == (1, len(back))


# --- Limits -----------------------------------------------------------------------------------------------------


def test_full_table_takes_no_new_connection() -> None:
    talk = Talk(max=2)
    talk.send(udp(sport=1))
    talk.send(udp(sport=2))
    assert talk.send(udp(sport=3)) == STRESSED_TABLE_FULL
    assert talk.net.stats.drop == 1
    assert talk.send(udp(sport=1, back=True)) == IP_CT_ESTABLISHED_REPLY  # those that are in it go on


def test_no_limit_is_zero() -> None:
    talk = Talk(max=0)
    for port in range(10):
        assert talk.send(udp(sport=port)) == IP_CT_NEW


# --- Confirming -------------------------------------------------------------------------------------------------


def test_confirming_twice_changes_nothing(net: Conntrack) -> None:
    ct = track(net, udp())
    confirm(net, ct, START_MS)
    expires_ms = ct.expires_ms
    assert confirm(net, ct, START_MS + 1000) == NF_ACCEPT
    assert (ct.expires_ms, net.stats.insert) == (expires_ms, 1)


def test_timeout_runs_from_the_confirm_on(net: Conntrack) -> None:
    ct = track(net, udp(), START_MS)
    confirm(net, ct, START_MS + 800)
    assert ct.expires_ms == START_MS + 800 + 30_000


def test_connection_that_ended_before_it_was_confirmed_is_dropped(net: Conntrack) -> None:
    ct = track(net, udp())
    net.table.kill(ct, START_MS)
    assert confirm(net, ct, START_MS) == NF_DROP
    assert (net.table.count, net.stats.drop) == (0, 1)


def test_length_of_what_was_cut_is_what_the_kernel_says(net: Conntrack) -> None:
    """Segments put together to more than 64 KiB say 0 in their header."""
    for number, whole in enumerate((0, 150_000)):
        packet = packets.ipv4(CLIENT[4], SERVER[4], 6, tcp(SYN, sport=number)[20:], length=0)
        _, ct = conntrack_in(net, packet, False, START_MS, 0, whole)
        assert ct is not None
        assert ct.bytes_orig == (whole or len(packet))


def twins(net: Conntrack, first: bytes, second: bytes) -> tuple[Conn, Conn]:
    """Two unconfirmed connections that want the same tuples."""
    one = track(net, first)
    net.table.drop_unconfirmed(one)  # as if it had been forgotten, so that the second does not join it
    return one, track(net, second)


@pytest.mark.parametrize("packet", [udp(b"x"), udplite(b"x"), gre()])
def test_datagrams_that_clash_merge(net: Conntrack, packet: bytes) -> None:
    net.sysctl.checksum = 0
    winner, loser = twins(net, packet, packet)
    assert confirm(net, winner, START_MS) == NF_ACCEPT
    assert confirm(net, loser, START_MS) == NF_ACCEPT
    assert net.table.find(winner.orig, START_MS) is winner
    assert (net.stats.clash_resolve, net.stats.insert, net.stats.insert_failed) == (1, 1, 0)
    assert (winner.packets_orig, winner.bytes_orig) == (2, 2 * len(packet))


def test_datagrams_that_cross_are_one_unreplied_connection(net: Conntrack) -> None:
    winner = track(net, udp(b"x"))
    loser = track(net, udp(b"y", back=True))
    confirm(net, winner, START_MS)
    assert confirm(net, loser, START_MS) == NF_ACCEPT
    assert (net.table.count, net.stats.clash_resolve) == (1, 1)
    assert not winner.status & IPS_SEEN_REPLY
    assert (winner.packets_orig, winner.packets_reply) == (1, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [(tcp(SYN), tcp(SYN)), (tcp(SYN), tcp(SYN, back=True)), (icmp(8), icmp(8)), (ip(50, b""), ip(50, b"", back=True))],
)
def test_of_others_that_clash_the_later_is_dropped(net: Conntrack, first: bytes, second: bytes) -> None:
    winner, loser = twins(net, first, second)
    assert confirm(net, winner, START_MS) == NF_ACCEPT
    assert confirm(net, loser, START_MS) == NF_DROP
    assert (net.table.count, net.stats.insert_failed, net.stats.drop) == (1, 1, 1)
    assert net.table.find(winner.orig, START_MS) is winner
    assert net.table.unconfirmed_count() == 0


def test_an_expired_winner_is_no_clash(net: Conntrack) -> None:
    winner, loser = twins(net, tcp(SYN), tcp(SYN))
    confirm(net, winner, START_MS)
    later = START_MS + 120_000
    assert confirm(net, loser, later) == NF_ACCEPT
    assert net.table.find(loser.orig, later) is loser


# --- Ending -----------------------------------------------------------------------------------------------------


def test_gc_ends_what_nobody_asks_for() -> None:
    talk = Talk()
    talk.send(udp())
    talk.wait(31)
    due = gc(talk.net, talk.now_ms)
    while due <= talk.now_ms:
        due = gc(talk.net, talk.now_ms)
    assert not list(talk.net.table.connections())
    assert talk.net.stats.destroyed == 1


def test_gc_forgets_what_was_never_confirmed() -> None:
    talk = Talk(unconfirmed_timeout=3_000)
    track(talk.net, udp(), talk.now_ms)
    for _ in range(4):
        gc(talk.net, talk.now_ms)
        talk.wait(1.5)
    assert talk.net.table.unconfirmed_count() == 0
    assert talk.net.stats.unconfirmed_expired == 1


def test_reply_of_a_reply_is_the_original() -> None:
    talk = Talk()
    talk.send(udp())
    assert invert(talk.the().reply) == talk.the().orig


@pytest.mark.parametrize("there", [0, 0xFF])
def test_a_direction_is_told_by_the_first_byte_in_which_the_tuples_differ(there: int) -> None:
    orig = bytes((17, 10, 0, 0, 1, 10, 0, 0, 2, there, 7, there, 9))
    reply = invert(orig)
    ct = Conn(orig, reply, 17, 0)
    assert first_difference(orig, reply) == 4
    assert (is_reply(ct, orig), is_reply(ct, reply)) == (False, True)


@pytest.mark.parametrize("protonum", [17, 255])
def test_a_connection_whose_tuples_are_equal_sees_replies_only(protonum: int) -> None:
    orig = bytes((protonum, 10, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0))
    assert invert(orig) == orig
    assert is_reply(Conn(orig, orig, protonum, 0), orig)
