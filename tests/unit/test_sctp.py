import pytest

from conntrackd.const import (
    CLOSED_FIN,
    CLOSED_RST,
    INVALID_BAD_CHECKSUM,
    INVALID_L4_TRUNCATED,
    INVALID_SCTP_CHUNKS,
    INVALID_SCTP_NEW,
    INVALID_SCTP_VTAG,
    IP_CT_DIR_ORIGINAL,
    IP_CT_DIR_REPLY,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
)
from conntrackd.core.proto import sctp as proto
from conntrackd.core.proto.sctp import (
    ABORT,
    COOKIE_ACK,
    COOKIE_ECHO,
    DATA,
    ERROR,
    FLAG_T,
    HEARTBEAT,
    HEARTBEAT_ACK,
    IMPOSSIBLE,
    INIT,
    INIT_ACK,
    SHUTDOWN,
    SHUTDOWN_ACK,
    SHUTDOWN_COMPLETE,
    STATE_NAMES,
    SctpConn,
    next_state,
)
from tests.differential.packets import chunk
from tests.fuzz.invariants import check_table
from tests.unit.craft import Talk, ip, sctp, sctp_init

CLIENT_TAG = 0x11111111  # packets to the client carry it
SERVER_TAG = 0x22222222
SACK = 3


class Association(Talk):
    """An association between two peers who know each other's tag."""

    def client(self, *kinds: int, vtag: int = SERVER_TAG, flags: int = 0, tag: int = CLIENT_TAG) -> int:
        return self.send(self.packet(kinds, 0 if INIT in kinds else vtag, flags, tag, back=False))

    def server(self, *kinds: int, vtag: int = CLIENT_TAG, flags: int = 0, tag: int = SERVER_TAG) -> int:
        return self.send(self.packet(kinds, vtag, flags, tag, back=True))

    def packet(self, kinds: tuple[int, ...], vtag: int, flags: int, tag: int, back: bool) -> bytes:
        values = {INIT: sctp_init(tag), INIT_ACK: sctp_init(tag)}
        return sctp(vtag, *(chunk(kind, flags, values.get(kind, b"data")) for kind in kinds), back=back)

    def established(self) -> "Association":
        self.client(INIT)
        self.server(INIT_ACK)
        self.client(COOKIE_ECHO)
        self.server(COOKIE_ACK)
        assert self.state() == "ESTABLISHED"
        return self

    def state(self) -> str:
        ct = self.the()
        assert isinstance(ct, SctpConn)
        return STATE_NAMES[ct.state]


def test_handshake_and_shutdown() -> None:
    talk = Association()
    seen = []
    for back, kind in (
        (False, INIT),
        (True, INIT_ACK),
        (False, COOKIE_ECHO),
        (True, COOKIE_ACK),
        (False, SHUTDOWN),
        (True, SHUTDOWN_ACK),
        (False, SHUTDOWN_COMPLETE),
    ):
        talk.server(kind) if back else talk.client(kind)
        seen.append((talk.state(), talk.timeout(), talk.status(IPS_ASSURED)))
    assert seen == [
        ("CLOSED", 10, False),
        ("COOKIE_WAIT", 3, False),
        ("COOKIE_ECHOED", 3, False),
        ("ESTABLISHED", 210, True),
        ("SHUTDOWN_SENT", 3, True),
        ("SHUTDOWN_ACK_SENT", 3, True),
        ("CLOSED", 10, True),
    ]


def test_classification_follows_the_reply() -> None:
    talk = Association()
    assert talk.client(INIT) == IP_CT_NEW
    assert talk.server(INIT_ACK) == IP_CT_ESTABLISHED_REPLY
    assert talk.client(COOKIE_ECHO) == IP_CT_ESTABLISHED


def test_server_may_shut_down() -> None:
    talk = Association().established()
    talk.server(SHUTDOWN)
    assert talk.state() == "SHUTDOWN_RECD"
    talk.client(SHUTDOWN_ACK)
    talk.server(SHUTDOWN_COMPLETE)
    assert talk.state() == "CLOSED"


@pytest.mark.parametrize(("kind", "state", "assured"), [(COOKIE_ACK, "ESTABLISHED", True), (ERROR, "CLOSED", False)])
def test_what_a_chunk_has_done_stays_done_when_a_later_one_spoils_the_packet(
    kind: int, state: str, assured: bool
) -> None:
    talk = Association()
    talk.client(INIT)
    talk.server(INIT_ACK)
    talk.client(COOKIE_ECHO)
    assert talk.send(sctp(CLIENT_TAG, chunk(kind), chunk(ABORT, FLAG_T), back=True)) == INVALID_SCTP_VTAG
    assert (talk.state(), talk.status(IPS_ASSURED)) == (state, assured)
    assert talk.net.cached == 0
    check_table(talk.net, talk.now_ms)
    # An association that may not be evicted is in no order of eviction, whatever comes next.
    talk.client(DATA)
    check_table(talk.net, talk.now_ms)


def test_association_that_lives_again_after_an_abort_is_closed_in_order() -> None:
    talk = Association().established()
    talk.client(ABORT)
    assert talk.the().ending == CLOSED_RST
    talk.client(INIT)
    talk.established().client(SHUTDOWN)
    talk.server(SHUTDOWN_ACK)
    talk.client(SHUTDOWN_COMPLETE)
    assert (talk.state(), talk.the().ending) == ("CLOSED", CLOSED_FIN)


def test_data_keeps_the_association_alive() -> None:
    talk = Association().established()
    talk.wait(100)
    assert talk.client(DATA) == IP_CT_ESTABLISHED
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", 210)


def test_several_chunks_move_one_after_another() -> None:
    talk = Association()
    talk.client(INIT)
    talk.server(INIT_ACK)
    assert talk.client(COOKIE_ECHO, DATA) == IP_CT_ESTABLISHED
    assert talk.server(COOKIE_ACK, SACK, DATA) == IP_CT_ESTABLISHED_REPLY
    assert talk.state() == "ESTABLISHED"


# --- What begins an association ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ABORT, SHUTDOWN_COMPLETE, COOKIE_ACK, DATA, SACK, 15, 64, 255])
def test_chunks_that_begin_nothing(kind: int) -> None:
    talk = Association()
    assert talk.client(kind) == INVALID_SCTP_NEW
    assert talk.net.table.count == 0


def test_init_with_a_tag_is_invalid() -> None:
    talk = Talk()
    assert talk.send(sctp(5, chunk(INIT, 0, sctp_init(CLIENT_TAG)))) == INVALID_SCTP_VTAG


def test_init_cut_short_is_invalid() -> None:
    assert Talk().send(sctp(0, chunk(INIT, 0, sctp_init(CLIENT_TAG)[:8]))) == INVALID_SCTP_CHUNKS


def test_second_path_begins_with_a_heartbeat() -> None:
    talk = Association()
    assert talk.client(HEARTBEAT) == IP_CT_NEW
    assert (talk.state(), talk.timeout()) == ("HEARTBEAT_SENT", 30)
    talk.server(HEARTBEAT_ACK)
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", 210)
    assert talk.status(IPS_ASSURED)


def test_retransmitted_init_does_not_keep_the_entry_alive() -> None:
    talk = Association()
    talk.client(INIT)
    talk.wait(4)
    assert talk.client(INIT) == IP_CT_NEW
    assert talk.timeout() == 6


# --- Broken packets ---------------------------------------------------------------------------------------------


def test_header_that_is_too_short_is_truncated() -> None:
    assert Talk().send(ip(132, bytes(11))) == INVALID_L4_TRUNCATED


def test_bad_checksum_is_invalid_only_where_checksums_are_verified() -> None:
    packet = sctp(0, chunk(INIT, 0, sctp_init(1)), bad=True)
    assert Talk().send(packet) == INVALID_BAD_CHECKSUM
    assert Talk().send(packet, checksum=False) == IP_CT_NEW


def test_packet_without_chunks_is_invalid() -> None:
    assert Talk().send(sctp(0)) == INVALID_SCTP_CHUNKS
    assert Talk().send(sctp(0, chunk(INIT, length=0))) == INVALID_SCTP_CHUNKS


@pytest.mark.parametrize("kind", [INIT, INIT_ACK, SHUTDOWN_COMPLETE])
def test_chunks_that_travel_alone(kind: int) -> None:
    assert Association().established().client(kind, DATA) == INVALID_SCTP_CHUNKS
    assert Association().established().client(DATA, kind) == INVALID_SCTP_CHUNKS


@pytest.mark.parametrize("kind", [COOKIE_ECHO, COOKIE_ACK])
def test_chunks_that_come_first(kind: int) -> None:
    assert Association().established().client(DATA, kind) == INVALID_SCTP_CHUNKS
    assert Association().established().client(kind, DATA) == IP_CT_ESTABLISHED


# --- Verification tags (RFC 9260 8.5) ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DATA, SACK, SHUTDOWN, ERROR, COOKIE_ECHO, COOKIE_ACK])
def test_chunks_must_carry_the_receivers_tag(kind: int) -> None:
    talk = Association().established()
    talk.wait(5)
    assert talk.client(kind, vtag=CLIENT_TAG) == INVALID_SCTP_VTAG
    assert talk.server(kind, vtag=SERVER_TAG) == INVALID_SCTP_VTAG
    assert (talk.state(), talk.timeout()) == ("ESTABLISHED", 205)
    assert talk.client(kind) == IP_CT_ESTABLISHED


@pytest.mark.parametrize("kind", [ABORT, SHUTDOWN_COMPLETE])
def test_abort_carries_the_receivers_tag_or_reflects_the_senders(kind: int) -> None:
    assert Association().established().client(kind, vtag=CLIENT_TAG) == INVALID_SCTP_VTAG
    assert Association().established().client(kind, vtag=SERVER_TAG) == IP_CT_ESTABLISHED
    assert Association().established().client(kind, vtag=CLIENT_TAG, flags=proto.FLAG_T) == IP_CT_ESTABLISHED
    assert Association().established().client(kind, vtag=SERVER_TAG, flags=proto.FLAG_T) == INVALID_SCTP_VTAG


def test_abort_closes() -> None:
    talk = Association().established()
    talk.server(ABORT)
    assert (talk.state(), talk.timeout()) == ("CLOSED", 10)


def test_heartbeat_with_another_tag_passes_and_its_answer_brings_us_in_step() -> None:
    talk = Association().established()
    talk.wait(5)
    assert talk.client(HEARTBEAT, vtag=77) == IP_CT_ESTABLISHED
    assert talk.timeout() == 205
    assert talk.server(HEARTBEAT_ACK, vtag=88) == IP_CT_ESTABLISHED_REPLY
    assert talk.server(DATA, vtag=88) == IP_CT_ESTABLISHED_REPLY
    assert talk.server(DATA, vtag=CLIENT_TAG) == INVALID_SCTP_VTAG
    assert talk.client(HEARTBEAT, vtag=77) == IP_CT_ESTABLISHED  # the other direction's tag is learned anew
    assert talk.client(DATA, vtag=77) == IP_CT_ESTABLISHED


def test_heartbeat_with_the_right_tag_forgets_one_with_another() -> None:
    talk = Association().established()
    talk.client(HEARTBEAT, vtag=77)
    talk.client(HEARTBEAT)
    assert talk.server(HEARTBEAT_ACK, vtag=88) == INVALID_SCTP_VTAG


def test_heartbeat_with_another_tag_carries_no_data() -> None:
    assert Association().established().client(HEARTBEAT, DATA, vtag=77) == INVALID_SCTP_VTAG


def test_answer_to_no_heartbeat_must_carry_the_right_tag() -> None:
    assert Association().established().server(HEARTBEAT_ACK, vtag=88) == INVALID_SCTP_VTAG


def test_late_init_leaves_an_established_association_alone() -> None:
    talk = Association().established()
    assert talk.client(INIT, tag=CLIENT_TAG) == IP_CT_ESTABLISHED
    assert talk.state() == "ESTABLISHED"


def test_init_ack_that_answers_no_init_must_not_change_the_tag() -> None:
    talk = Association().established()
    assert talk.client(INIT_ACK, vtag=SERVER_TAG, tag=99) == INVALID_SCTP_VTAG
    assert talk.server(DATA) == IP_CT_ESTABLISHED_REPLY


def test_restart_takes_the_new_tags() -> None:
    talk = Association().established()
    talk.client(INIT, tag=33)
    assert talk.server(INIT_ACK, vtag=33, tag=44) == IP_CT_ESTABLISHED_REPLY
    assert talk.client(COOKIE_ECHO, vtag=44) == IP_CT_ESTABLISHED
    assert talk.server(COOKIE_ACK, vtag=33) == IP_CT_ESTABLISHED_REPLY


# --- Table and timeouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", range(len(STATE_NAMES)))
def test_chunks_that_are_not_in_the_table_leave_the_state(state: int) -> None:
    for direction in (IP_CT_DIR_ORIGINAL, IP_CT_DIR_REPLY):
        for kind in (DATA, SACK, 12, 13, 15, 16, 63, 128, 192, 255):
            assert next_state(direction, kind, state) == state


def test_abort_closes_whatever_the_state() -> None:
    for state in range(2, len(STATE_NAMES)):
        assert next_state(IP_CT_DIR_ORIGINAL, ABORT, state) == proto.CLOSED
    assert next_state(IP_CT_DIR_REPLY, ABORT, proto.HEARTBEAT_SENT) == IMPOSSIBLE


def test_every_timeout_is_a_setting() -> None:
    talk = Association(
        sctp_timeout_closed=1_000,
        sctp_timeout_cookie_wait=2_000,
        sctp_timeout_cookie_echoed=3_000,
        sctp_timeout_established=4_000,
        sctp_timeout_shutdown_sent=5_000,
        sctp_timeout_shutdown_ack_sent=6_000,
    )
    seen = []
    for back, kind in (
        (False, INIT),
        (True, INIT_ACK),
        (False, COOKIE_ECHO),
        (True, COOKIE_ACK),
        (False, SHUTDOWN),
        (True, SHUTDOWN_ACK),
    ):
        talk.server(kind) if back else talk.client(kind)
        seen.append(talk.timeout())
    assert seen == [1, 2, 3, 4, 5, 6]
    other = Association(sctp_timeout_shutdown_recd=7_000).established()
    other.server(SHUTDOWN)
    assert other.timeout() == 7
    path = Association(sctp_timeout_heartbeat_sent=8_000)
    path.client(HEARTBEAT)
    assert path.timeout() == 8
