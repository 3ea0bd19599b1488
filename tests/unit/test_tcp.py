"""What the state table cannot say: flags, windows, resets, timeouts. Numbers are relative (craft.TcpTalk)."""

import struct

import pytest

from conntrackd.const import (
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_TCP_ACK_ABOVE,
    INVALID_TCP_DATA_OFFSET,
    INVALID_TCP_FLAGS,
    INVALID_TCP_NEW,
    INVALID_TCP_PICKUP_OFF,
    INVALID_TCP_RST,
    INVALID_TCP_WINDOW_ABOVE,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
    IPS_SEEN_REPLY,
)
from conntrackd.core.proto.tcp import flags_valid
from conntrackd.core.proto.tcp_conn import FLAG_SACK_PERM, sides
from tests.differential.packets import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG
from tests.unit.craft import CLIENT, SERVER, Talk, TcpTalk, ip, tcp

ESTABLISHED_SECONDS = 432000
WIN = 8192


def established(**settings: int) -> TcpTalk:
    """A connection after its handshake, each side offering a window of 8192 bytes."""
    talk = TcpTalk(**settings)
    talk.handshake(WIN)
    assert talk.state() == "ESTABLISHED"
    return talk


def scale(shift: int) -> bytes:
    return bytes((3, 3, shift))


SACK_PERMITTED = bytes((4, 2))


def sack_block(isn: int, left: int, right: int) -> bytes:
    return bytes((1, 1, 5, 10)) + struct.pack(">II", isn + left, isn + right)


# --- Flags and headers ------------------------------------------------------------------------------------------


def test_exactly_nine_flag_sets_are_valid() -> None:
    valid = {SYN, SYN | URG, SYN | ACK, RST, RST | ACK, FIN | ACK, FIN | ACK | URG, ACK, ACK | URG}
    ignored = PSH | ECE | CWR
    for flags in range(256):
        assert flags_valid(flags) == (flags & ~ignored in valid), flags


def test_invalid_flags_do_not_touch_the_connection() -> None:
    talk = established()
    assert talk.client(FIN, 1) == INVALID_TCP_FLAGS
    assert talk.client(SYN | FIN | RST | PSH | ACK | URG, 1, 1) == INVALID_TCP_FLAGS
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", ESTABLISHED_SECONDS)


def test_header_shorter_than_20_bytes_is_truncated() -> None:
    assert Talk().send(ip(6, tcp(SYN)[20:39])) == INVALID_L4_TRUNCATED


@pytest.mark.parametrize("words", [4, 6, 15])
def test_data_offset_below_20_or_beyond_the_packet_is_invalid(words: int) -> None:
    assert Talk().send(tcp(SYN, words=words)) == INVALID_TCP_DATA_OFFSET


def test_bad_checksum_is_invalid_only_where_checksums_are_verified() -> None:
    assert Talk().send(tcp(SYN, bad=True)) == INVALID_BAD_CHECKSUM
    assert Talk().send(tcp(SYN, bad=True), checksum=False) == IP_CT_NEW
    assert Talk(checksum=0).send(tcp(SYN, bad=True)) == IP_CT_NEW


def test_checksum_of_a_packet_that_was_not_captured_whole_is_not_judged() -> None:
    assert Talk().send(tcp(SYN, data=bytes(100), bad=True)[:100]) == IP_CT_NEW


def test_port_zero_is_valid() -> None:
    assert Talk().send(tcp(SYN, sport=0, dport=0)) == IP_CT_NEW


# --- Beginning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_handshake(family: int) -> None:
    talk = Talk()
    assert talk.send(tcp(SYN, 100, family=family)) == IP_CT_NEW
    assert talk.timeout() == 120
    assert talk.send(tcp(SYN | ACK, 500, 101, family=family, back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.timeout() == 60
    assert not talk.status(IPS_ASSURED)
    assert talk.send(tcp(ACK, 101, 501, family=family)) == IP_CT_ESTABLISHED
    assert talk.timeout() == ESTABLISHED_SECONDS
    assert talk.status(IPS_ASSURED)
    assert talk.the().orig[1 : 1 + len(CLIENT[family])] == CLIENT[family]
    assert talk.the().reply[1 : 1 + len(SERVER[family])] == SERVER[family]


@pytest.mark.parametrize("flags", [SYN | ACK, FIN | ACK, RST, RST | ACK])
def test_only_syn_and_ack_begin_a_connection(flags: int) -> None:
    talk = Talk()
    assert talk.send(tcp(flags, 1, 1)) == INVALID_TCP_NEW
    assert talk.net.table.count == 0


def test_packets_of_the_opener_are_new_until_the_reply() -> None:
    talk = TcpTalk()
    assert talk.client(SYN, 0) == IP_CT_NEW
    assert talk.client(SYN, 0) == IP_CT_NEW
    talk.server(SYN | ACK, 0, 1)
    assert talk.client(ACK, 1, 1) == IP_CT_ESTABLISHED


def test_retransmitted_syn_does_not_keep_the_entry_alive() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    talk.wait(3)
    talk.client(SYN, 0)
    assert talk.timeout() == 117


@pytest.mark.parametrize("isn", [50_000, -50_000])
def test_new_syn_with_other_numbers_takes_over_before_the_reply(isn: int) -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    assert talk.client(SYN, isn) == IP_CT_NEW
    if isn > 0:
        assert talk.server(SYN | ACK, 0, isn + 1) == IP_CT_ESTABLISHED_REPLY
        assert talk.client(ACK, isn + 1, 1) == IP_CT_ESTABLISHED
        assert talk.state() == "ESTABLISHED"


def test_syn_ack_that_acknowledges_what_was_not_sent_is_invalid() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    assert talk.server(SYN | ACK, 0, 2) == INVALID_TCP_ACK_ABOVE
    assert talk.state() == "SYN_SENT"


@pytest.mark.parametrize("acknowledged", [1, 101])
def test_data_in_the_syn_may_be_acknowledged_or_not(acknowledged: int) -> None:
    talk = TcpTalk()
    talk.client(SYN, 0, data=bytes(100))  # RFC 7413
    assert talk.server(SYN | ACK, 0, acknowledged) == IP_CT_ESTABLISHED_REPLY
    assert talk.client(ACK, acknowledged, 1, data=bytes(101 - acknowledged)) == IP_CT_ESTABLISHED
    assert talk.state() == "ESTABLISHED"


def test_simultaneous_open_ends_established_whoever_acknowledges() -> None:
    for last in ("client", "server"):
        talk = TcpTalk()
        talk.client(SYN, 0)
        assert talk.server(SYN, 0) == IP_CT_ESTABLISHED_REPLY
        assert talk.state() == "SYN_SENT2"
        talk.client(SYN | ACK, 0, 1)
        assert talk.state() == "SYN_RECV"
        talk.server(ACK, 1, 1) if last == "server" else talk.client(ACK, 1, 1)
        assert talk.state() == "ESTABLISHED"
        assert talk.status(IPS_ASSURED)


def test_numbers_wrap_around() -> None:
    talk = TcpTalk(client_isn=0xFFFFFFFF - 10, server_isn=0xFFFFFFFF)
    talk.handshake()
    for offset in range(1, 40, 5):
        assert talk.client(ACK, offset, 1, data=bytes(5)) == IP_CT_ESTABLISHED
        assert talk.server(ACK, 1, offset + 5) == IP_CT_ESTABLISHED_REPLY
    assert talk.timeout() == ESTABLISHED_SECONDS
    assert talk.client(ACK, 41 + WIN + 100_000, 1) == INVALID_TCP_WINDOW_ABOVE


# --- Pick-up in the middle --------------------------------------------------------------------------------------


def test_picked_up_connection_is_held_shortly_until_both_sides_are_seen_twice() -> None:
    talk = TcpTalk()
    assert talk.client(ACK, 1000, 2000) == IP_CT_NEW
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", 300)
    talk.server(ACK, 2000, 1000)
    assert talk.timeout() == 300
    assert not talk.status(IPS_ASSURED)
    talk.client(ACK, 1000, 2000)
    assert talk.status(IPS_ASSURED)
    assert talk.timeout() == ESTABLISHED_SECONDS


def test_picked_up_connection_is_judged_mildly_for_life() -> None:
    talk = TcpTalk()
    talk.client(ACK, 1000, 2000)
    talk.server(ACK, 2000, 1000)
    assert talk.client(ACK, 9_000_000, 2000) == IP_CT_ESTABLISHED
    assert talk.server(ACK, 2000, 900_000_000) == IP_CT_ESTABLISHED_REPLY


def test_windows_of_a_picked_up_connection_are_taken_as_they_come() -> None:
    talk = TcpTalk()
    talk.client(ACK, 1000, 2000, win=111)
    talk.server(ACK, 2000, 1000, win=222)
    assert tuple(side.maxwin for side in sides(talk.tcp())) == (111, 222)


def test_no_pick_up_unless_tcp_loose() -> None:
    talk = TcpTalk(tcp_loose=0)
    assert talk.client(ACK, 1000, 2000) == INVALID_TCP_PICKUP_OFF
    assert talk.net.table.count == 0
    assert talk.client(SYN, 0) == IP_CT_NEW


# --- The window -------------------------------------------------------------------------------------------------


def test_segment_that_begins_at_the_windows_edge_passes() -> None:
    talk = established()
    assert talk.client(ACK, 1 + WIN, 1) == IP_CT_ESTABLISHED
    assert talk.timeout() == 300  # data in flight


def test_segment_a_little_beyond_the_window_passes_without_effect() -> None:
    talk = established()
    talk.wait(5)
    assert talk.client(ACK, 2 + WIN, 1) == IP_CT_ESTABLISHED
    assert talk.timeout() == ESTABLISHED_SECONDS - 5


def test_segment_far_beyond_the_window_is_invalid() -> None:
    talk = established()
    talk.wait(5)
    # It overshoots by end - maxend + 1, which must not exceed the receiver's window.
    assert talk.client(ACK, 1 + WIN + WIN, 1) == INVALID_TCP_WINDOW_ABOVE
    assert talk.timeout() == ESTABLISHED_SECONDS - 5
    assert talk.client(ACK, 1 + WIN + WIN - 1, 1) == IP_CT_ESTABLISHED


def test_segment_beyond_the_window_must_be_plausible_otherwise() -> None:
    talk = TcpTalk(server_isn=0x80000000)
    talk.handshake(WIN)
    assert talk.client(ACK, 2 + WIN, 2) == INVALID_TCP_WINDOW_ABOVE  # acknowledges what was not sent
    assert talk.client(ACK, 2 + WIN, 1 - 66_001) == INVALID_TCP_WINDOW_ABOVE  # or what is long over
    assert talk.client(ACK, 2 + WIN, 1 - 66_000) == IP_CT_ESTABLISHED


def test_acknowledgement_of_what_was_not_sent_is_invalid() -> None:
    talk = established()
    assert talk.client(ACK, 1, 2) == INVALID_TCP_ACK_ABOVE
    assert talk.client(ACK, 1, 1) == IP_CT_ESTABLISHED


def test_old_retransmission_passes_without_effect() -> None:
    talk = established()
    for offset in range(0, 5 * WIN, WIN):  # five windows of data, each acknowledged
        talk.client(ACK, 1 + offset, 1, data=bytes(WIN))
        talk.server(ACK, 1, 1 + offset + WIN)
    sent = 5 * WIN
    for end, refreshed in ((1 + sent - WIN, True), (sent - WIN, False)):
        talk.wait(5)
        assert talk.client(ACK, end - 10, 1, data=bytes(10)) == IP_CT_ESTABLISHED
        assert talk.timeout() == (ESTABLISHED_SECONDS if refreshed else ESTABLISHED_SECONDS - 5), end


def test_very_old_acknowledgement_passes_without_effect() -> None:
    talk = established()
    for offset in range(0, 80_000, WIN):
        talk.server(ACK, 1 + offset, 1, data=bytes(WIN))
        talk.client(ACK, 1, 1 + offset + WIN)
    sent = 1 + 80_000 // WIN * WIN + WIN
    for acknowledged, refreshed in ((sent - 66_000, True), (sent - 66_001, False)):
        talk.wait(5)
        assert talk.client(ACK, 1, acknowledged) == IP_CT_ESTABLISHED
        assert talk.timeout() == (ESTABLISHED_SECONDS if refreshed else ESTABLISHED_SECONDS - 5), acknowledged


def test_be_liberal_accepts_what_is_out_of_window() -> None:
    talk = established(tcp_be_liberal=1)
    talk.wait(5)
    assert talk.client(ACK, 10_000_000, 1) == IP_CT_ESTABLISHED
    assert talk.client(ACK, 1, 10_000_000) == IP_CT_ESTABLISHED
    assert talk.timeout() == ESTABLISHED_SECONDS


@pytest.mark.parametrize(("shift", "reach"), [(0, WIN), (3, WIN << 3), (14, WIN << 14), (15, WIN << 14)])
def test_window_is_scaled_by_at_most_14(shift: int, reach: int) -> None:
    talk = TcpTalk()
    talk.handshake(WIN, scale(14), scale(shift))
    talk.server(ACK, 1, 1, win=WIN)
    assert talk.client(ACK, 1 + reach, 1) == IP_CT_ESTABLISHED
    assert sides(talk.tcp())[0].end == talk.client_isn + 1 + reach
    assert talk.client(ACK, 1 + 3 * reach, 1) == INVALID_TCP_WINDOW_ABOVE


def test_window_is_not_scaled_unless_both_sides_offered_it() -> None:
    talk = TcpTalk()
    talk.handshake(WIN, scale(7), b"")
    talk.server(ACK, 1, 1, win=WIN)
    assert talk.client(ACK, 1 + 3 * WIN, 1) == INVALID_TCP_WINDOW_ABOVE


def test_selective_acknowledgement_counts_if_it_was_permitted() -> None:
    talk = TcpTalk()
    talk.handshake(WIN, SACK_PERMITTED, SACK_PERMITTED)
    assert sides(talk.tcp())[0].flags & FLAG_SACK_PERM
    talk.client(ACK, 1, 1, data=bytes(100))
    isn = talk.client_isn
    assert talk.server(ACK, 1, 1, options=sack_block(isn, 51, 101)) == IP_CT_ESTABLISHED_REPLY
    assert talk.server(ACK, 1, 1, options=sack_block(isn, 51, 102)) == INVALID_TCP_ACK_ABOVE


def test_selective_acknowledgement_is_not_read_unless_it_was_permitted() -> None:
    talk = established()
    assert talk.server(ACK, 1, 1, options=sack_block(talk.client_isn, 51, 9000)) == IP_CT_ESTABLISHED_REPLY


@pytest.mark.parametrize("broken", [b"\x03", b"\x03\x00\x07", b"\x03\x01\x07", b"\x03\xff\x07", b"\x00\x03\x03\x07"])
def test_broken_options_offer_nothing(broken: bytes) -> None:
    talk = TcpTalk()
    assert talk.client(SYN, 0, options=broken.rjust(4, b"\x01")) == IP_CT_NEW
    assert sides(talk.tcp())[0].scale == 0


def test_options_that_were_not_captured_offer_nothing() -> None:
    talk = Talk()
    assert talk.send(tcp(SYN, options=scale(7))[:42]) == IP_CT_NEW


def test_options_without_a_block_acknowledge_nothing_more() -> None:
    talk = TcpTalk()
    talk.handshake(WIN, SACK_PERMITTED, SACK_PERMITTED)
    for options in (bytes((1,)) * 4, bytes(4), bytes((8, 10)) + bytes(8) + bytes((1, 1))):
        assert talk.server(ACK, 1, 1, options=options) == IP_CT_ESTABLISHED_REPLY


def test_keepalive_and_its_answer_pass() -> None:
    for data in (b"", b"x"):
        talk = established()
        assert talk.client(ACK, 0, 1, data=data) == IP_CT_ESTABLISHED
        assert talk.server(ACK, 1, 1) == IP_CT_ESTABLISHED_REPLY
        assert talk.timeout() == ESTABLISHED_SECONDS


def test_zero_window_may_be_probed_with_a_byte() -> None:
    talk = established()
    talk.client(ACK, 1, 1, data=bytes(WIN))
    talk.server(ACK, 1, 1 + WIN, win=0)
    assert talk.client(ACK, 1 + WIN, 1, data=b"x") == IP_CT_ESTABLISHED


# --- Resets (RFC 5961 3) ----------------------------------------------------------------------------------------


def test_exact_reset_closes() -> None:
    talk = established()
    assert talk.client(RST, 1) == IP_CT_ESTABLISHED
    assert (talk.state(), talk.timeout()) == ("CLOSE", 10)


def test_reset_below_what_was_acknowledged_is_invalid() -> None:
    for liberal in (0, 1):
        talk = established(tcp_be_liberal=liberal)
        assert talk.client(RST, 0) == INVALID_TCP_RST
        assert talk.state() == "ESTABLISHED"


def test_reset_below_what_was_acknowledged_passes_with_ignore_invalid_rst() -> None:
    talk = established(tcp_ignore_invalid_rst=1)
    assert talk.client(RST, 0) == IP_CT_ESTABLISHED


def test_inexact_reset_in_the_window_shortens_and_the_next_packet_restores() -> None:
    talk = established()
    assert talk.client(RST, 101) == IP_CT_ESTABLISHED
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", 10)
    talk.client(ACK, 1, 1)
    assert talk.timeout() == 300  # the reset's number counts as data in flight
    assert talk.client(RST, 1 + 3 * WIN) == INVALID_TCP_WINDOW_ABOVE


def test_reset_right_behind_the_senders_data_closes() -> None:
    talk = established()
    talk.client(ACK, 1, 1, data=bytes(100))
    talk.client(RST, 101)
    assert talk.state() == "CLOSE"


def test_refused_connection_leaves_nothing() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    assert talk.server(RST | ACK, 0, 1) == IP_CT_ESTABLISHED_REPLY
    assert talk.net.table.count == 0


def test_refusal_with_a_wrong_acknowledgement_is_invalid() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    assert talk.server(RST | ACK, 0, 3) == INVALID_TCP_ACK_ABOVE
    assert talk.state() == "SYN_SENT"


def test_client_that_gives_up_before_the_reply_leaves_nothing() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    assert talk.client(RST, 1) == IP_CT_NEW
    assert talk.net.table.count == 0


@pytest.mark.parametrize("ways", range(5))
def test_reset_of_a_connection_that_is_closing_is_not_checked(ways: int) -> None:
    talk = established()
    closing = [(FIN | ACK, 1, 1), (ACK, 1, 2), (FIN | ACK, 1, 2), (ACK, 2, 2)]
    for turn, (flags, seq, ack) in enumerate(closing[: ways + 1]):
        talk.server(flags, seq, ack) if turn in (1, 2) else talk.client(flags, seq, ack)
    if ways == 4:
        talk.client(RST, 2)
    assert talk.server(RST, 1_000_000) == IP_CT_ESTABLISHED_REPLY
    assert (talk.state(), talk.timeout()) == ("CLOSE", 10)


# --- Ignored segments and their answers (RFC 5961 4) ------------------------------------------------------------


def test_syn_in_an_established_connection_passes_without_effect() -> None:
    talk = established()
    talk.wait(5)
    assert talk.client(SYN, 500_000) == IP_CT_ESTABLISHED
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", ESTABLISHED_SECONDS - 5)


def test_ignored_syn_that_is_answered_restarts_the_connection() -> None:
    talk = established()
    talk.client(SYN, 500_000, win=1234, options=scale(2))
    assert talk.server(SYN | ACK, 700_000, 500_001, options=scale(3)) == IP_CT_ESTABLISHED_REPLY
    assert (talk.state(), talk.timeout()) == ("SYN_RECV", 60)
    assert talk.status(IPS_ASSURED)
    assert sides(talk.tcp())[0].maxwin == 1234
    talk.client(ACK, 500_001, 700_001)
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", ESTABLISHED_SECONDS)
    assert tuple(side.scale for side in sides(talk.tcp())) == (2, 3)


def test_syn_ack_that_answers_no_ignored_syn_passes_without_effect() -> None:
    talk = established()
    talk.client(SYN, 500_000)
    assert talk.server(SYN | ACK, 700_000, 500_002) == IP_CT_ESTABLISHED_REPLY
    assert talk.state() == "ESTABLISHED"


def test_reset_that_answers_an_ignored_syn_closes() -> None:
    talk = established()
    talk.client(SYN, 500_000)
    talk.server(RST | ACK, 0, 500_001)
    assert talk.state() == "CLOSE"


def test_reset_by_the_sender_of_the_ignored_syn_must_be_in_window() -> None:
    """Else whoever can send a SYN with forged addresses could close any connection with a second packet."""
    talk = established()
    talk.client(SYN, 500_000)
    # Its acknowledgement is the end of the SYN's own sequence space.
    ack = talk.client_isn + 500_001 - talk.server_isn
    assert talk.client(RST | ACK, 900_000, ack) == INVALID_TCP_WINDOW_ABOVE
    assert talk.state() == "ESTABLISHED"


def test_challenge_ack_in_last_ack_is_not_the_last_ack() -> None:
    talk = established()
    talk.client(FIN | ACK, 1, 1)
    talk.server(FIN | ACK, 1, 2)
    assert talk.state() == "LAST_ACK"
    talk.client(SYN, 500_000)
    talk.server(ACK, 2, 2)
    assert talk.state() == "LAST_ACK"
    talk.server(ACK, 2, 2)
    assert talk.state() == "TIME_WAIT"


def test_challenge_ack_in_syn_sent_lets_the_clients_reset_through() -> None:
    """The server still has an older connection on these ports: SYN, challenge ACK, RST, and the SYN again."""
    talk = TcpTalk()
    talk.client(SYN, 0)
    assert talk.server(ACK, 300_000, 77_000) == IP_CT_ESTABLISHED_REPLY
    assert talk.state() == "SYN_SENT"
    assert talk.status(IPS_SEEN_REPLY)
    talk.client(RST, 77_000)
    assert (talk.state(), talk.timeout()) == ("CLOSE", 10)
    assert talk.client(SYN, 0) == IP_CT_NEW
    assert talk.state() == "SYN_SENT"


# --- Reopening --------------------------------------------------------------------------------------------------


def test_syn_reopens_what_was_closed_in_order() -> None:
    talk = established()
    talk.close()
    assert talk.state() == "TIME_WAIT"
    old = talk.the()
    assert talk.client(SYN, 600_000) == IP_CT_NEW
    assert talk.the() is not old
    assert (talk.state(), talk.timeout()) == ("SYN_SENT", 120)
    assert talk.net.stats.destroyed == 1


def test_server_may_reopen_and_is_the_opener_then() -> None:
    talk = established()
    talk.close()
    orig = talk.the().orig
    assert talk.server(SYN, 600_000) == IP_CT_NEW
    assert talk.the().reply == orig


def test_only_the_side_that_aborted_may_reopen() -> None:
    talk = established()
    talk.server(RST, 1)
    assert talk.state() == "CLOSE"
    talk.wait(3)
    assert talk.client(SYN, 600_000) == IP_CT_ESTABLISHED
    assert (talk.state(), talk.timeout()) == ("CLOSE", 7)
    talk.wait(7)  # then the old connection is gone
    assert talk.client(SYN, 600_000) == IP_CT_NEW


# --- Closing and timeouts ---------------------------------------------------------------------------------------


def test_close_in_order() -> None:
    talk = established()
    seen = []
    for back, flags, seq, ack in (
        (False, FIN | ACK, 1, 1),
        (True, ACK, 1, 2),
        (True, FIN | ACK, 1, 2),
        (False, ACK, 2, 2),
    ):
        talk.server(flags, seq, ack) if back else talk.client(flags, seq, ack)
        seen.append((talk.state(), talk.timeout()))
    assert seen == [("FIN_WAIT", 120), ("CLOSE_WAIT", 60), ("LAST_ACK", 30), ("TIME_WAIT", 120)]


def test_connection_that_closes_before_it_was_established_is_not_assured() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    talk.server(SYN | ACK, 0, 1)
    talk.server(FIN | ACK, 1, 1)
    assert talk.state() == "FIN_WAIT"
    assert not talk.status(IPS_ASSURED)


def test_only_unanswered_pick_ups_are_capped() -> None:
    talk = TcpTalk(tcp_timeout_unacknowledged=50_000)
    talk.client(SYN, 0)
    assert talk.timeout() == 120


def test_every_timeout_is_a_setting() -> None:
    settings = {
        "tcp_timeout_syn_sent": 1_000,
        "tcp_timeout_syn_recv": 2_000,
        "tcp_timeout_established": 3_000,
        "tcp_timeout_fin_wait": 4_000,
        "tcp_timeout_close_wait": 5_000,
        "tcp_timeout_last_ack": 6_000,
        "tcp_timeout_time_wait": 7_000,
        "tcp_timeout_close": 8_000,
    }
    talk = TcpTalk(**settings)
    seen = []
    for back, flags, seq, ack in (
        (False, SYN, 0, 0),
        (True, SYN | ACK, 0, 1),
        (False, ACK, 1, 1),
        (False, FIN | ACK, 1, 1),
        (True, ACK, 1, 2),
        (True, FIN | ACK, 1, 2),
        (False, ACK, 2, 2),
        (False, RST, 2, 0),
    ):
        talk.server(flags, seq, ack) if back else talk.client(flags, seq, ack)
        seen.append(talk.timeout())
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]


def test_data_in_flight_shortens_until_it_is_acknowledged() -> None:
    talk = established(tcp_timeout_unacknowledged=250_000)
    talk.client(ACK, 1, 1, data=bytes(100))
    assert talk.timeout() == 250
    talk.server(ACK, 1, 101)
    assert talk.timeout() == ESTABLISHED_SECONDS


def test_third_retransmission_shortens_until_something_else_comes() -> None:
    talk = established(tcp_timeout_max_retrans=200_000)
    seen = []
    for _ in range(3):  # the handshake's ACK was the first of its kind
        talk.client(ACK, 1, 1)
        seen.append(talk.timeout())
    assert seen == [ESTABLISHED_SECONDS, ESTABLISHED_SECONDS, 200]
    talk.server(ACK, 1, 1)
    assert talk.timeout() == ESTABLISHED_SECONDS


def test_tcp_max_retrans_is_a_setting() -> None:
    talk = established(tcp_max_retrans=1)
    talk.client(ACK, 1, 1)
    assert talk.timeout() == 300


def test_zero_window_shortens_until_it_opens() -> None:
    talk = established(tcp_timeout_max_retrans=200_000)
    talk.server(ACK, 1, 1, win=0)
    assert talk.timeout() == 200
    talk.client(ACK, 1, 1)
    assert talk.timeout() == ESTABLISHED_SECONDS


def test_invalid_resets_of_both_sides_shorten() -> None:
    talk = established(tcp_timeout_unacknowledged=250_000)
    assert talk.client(RST, 5_000_000) == INVALID_TCP_WINDOW_ABOVE
    assert talk.timeout() == ESTABLISHED_SECONDS
    assert talk.server(RST, 5_000_000) == INVALID_TCP_WINDOW_ABOVE
    assert talk.timeout() == 250


def test_invalid_resets_of_one_side_do_not_shorten() -> None:
    talk = established()
    for _ in range(3):
        assert talk.client(RST, 5_000_000) == INVALID_TCP_WINDOW_ABOVE
    assert talk.timeout() == ESTABLISHED_SECONDS


# --- Accounting -------------------------------------------------------------------------------------------------


def test_accepted_packets_are_counted_with_their_ip_header() -> None:
    talk = established()
    talk.client(ACK, 1, 1, data=bytes(100))
    ct = talk.the()
    assert (ct.packets_orig, ct.bytes_orig) == (3, 40 + 40 + 140)
    assert (ct.packets_reply, ct.bytes_reply) == (1, 40)


def test_refusal_is_counted_on_its_direction() -> None:
    talk = TcpTalk()
    talk.client(SYN, 0)
    talk.server(RST | ACK, 0, 1)
    assert talk.last is not None
    assert (talk.last.packets_orig, talk.last.packets_reply) == (1, 1)


def test_invalid_and_ignored_packets_are_not_counted() -> None:
    talk = established()
    talk.client(SYN, 500_000)
    talk.client(ACK, 10_000_000, 1)
    assert talk.the().packets_orig == 2


def test_bytes_of_a_packet_that_was_not_captured_whole_are_counted_whole() -> None:
    talk = established()
    segment = tcp(ACK, talk.client_isn + 1, talk.server_isn + 1, data=bytes(1000))
    assert talk.send(segment[:60]) == IP_CT_ESTABLISHED
    assert talk.the().bytes_orig == 40 + 40 + 1040
    assert sides(talk.tcp())[0].end == talk.client_isn + 1001
