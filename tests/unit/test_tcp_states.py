"""Every cell of the TCP table, walked through the tracker: the table is the one that the tracker runs on."""

import pytest

from conntrackd.const import INVALID as REASONS
from conntrackd.const import (
    INVALID_TCP_FLAGS,
    INVALID_TCP_NEW,
    INVALID_TCP_STATE,
    IP_CT_DIR_ORIGINAL,
    IP_CT_DIR_REPLY,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_DYING,
    IPS_SEEN_REPLY,
)
from conntrackd.core.proto.tcp_states import (
    CLASS_NAMES,
    CLASSES,
    CLOSE,
    ESTABLISHED,
    IGNORE,
    INVALID,
    NONE,
    NONE_SET,
    RST_SET,
    STATE_NAMES,
    STATES,
    SYN_SENT,
    SYN_SET,
    SYNACK_SET,
    TIME_WAIT,
    TRANSITIONS,
    next_state,
)
from tests.differential.packets import ACK, FIN, RST, SYN
from tests.unit.craft import TcpTalk

FLAGS = {"SYN": SYN, "SYN/ACK": SYN | ACK, "FIN": FIN | ACK, "ACK": ACK, "RST": RST, "none": 0}
DIRECTIONS = {IP_CT_DIR_ORIGINAL: "original", IP_CT_DIR_REPLY: "reply"}

# How a conversation gets into a state: (from the server?, flags, sequence number, acknowledgement).
HANDSHAKE = [(False, SYN, 0, 0), (True, SYN | ACK, 0, 1), (False, ACK, 1, 1)]
CLOSING = [(False, FIN | ACK, 1, 1), (True, ACK, 1, 2), (True, FIN | ACK, 1, 2), (False, ACK, 2, 2)]
WAYS = {
    "NONE": [],
    "SYN_SENT": HANDSHAKE[:1],
    "SYN_RECV": HANDSHAKE[:2],
    "ESTABLISHED": HANDSHAKE,
    "FIN_WAIT": HANDSHAKE + CLOSING[:1],
    "CLOSE_WAIT": HANDSHAKE + CLOSING[:2],
    "LAST_ACK": HANDSHAKE + CLOSING[:3],
    "TIME_WAIT": HANDSHAKE + CLOSING,
    "CLOSE": [*HANDSHAKE, (False, RST, 1, 0)],
    "SYN_SENT2": [(False, SYN, 0, 0), (True, SYN, 0, 0)],
}


class Walk(TcpTalk):
    """A conversation in a state, and the numbers that each side would send next."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.next = [0, 0]
        for back, flags, seq, ack in WAYS[STATE_NAMES[state]]:
            self.segment(back, flags, seq, ack)
            self.next[back] = seq + bool(flags & SYN) + bool(flags & FIN)

    def segment(self, back: bool, flags: int, seq: int, ack: int) -> int:
        return self.server(flags, seq, ack) if back else self.client(flags, seq, ack)

    def in_window(self, back: bool, flags: int) -> int:
        """Send a segment that fits: a SYN with the first number, anything else with the next."""
        return self.segment(back, flags, 0 if flags & SYN else self.next[back], self.next[not back])


def cells() -> list[tuple[int, int, int]]:
    """Direction, class, state. Without a connection there is no reply direction."""
    return [
        (direction, index, state)
        for direction in DIRECTIONS
        for index in range(CLASSES)
        for state in range(STATES)
        if state != NONE or direction == IP_CT_DIR_ORIGINAL
    ]


def name(cell: tuple[int, int, int]) -> str:
    direction, index, state = cell
    return f"{DIRECTIONS[direction]}-{CLASS_NAMES[index]}-{STATE_NAMES[state]}"


def reopens(direction: int, index: int, state: int) -> bool:
    """SYN_SENT out of a closed state: the old connection goes and another one begins."""
    return next_state(direction, index, state) == SYN_SENT and state in (TIME_WAIT, CLOSE)


def deletes(index: int, state: int) -> bool:
    """A RST before any reply leaves nothing to track."""
    return index == RST_SET and state == SYN_SENT


@pytest.mark.parametrize("cell", cells(), ids=name)
def test_cell(cell: tuple[int, int, int]) -> None:
    direction, index, state = cell
    talk = Walk(state)
    if state != NONE:
        assert talk.state() == STATE_NAMES[state]
    old = talk.last
    replied = old is not None and old.status & IPS_SEEN_REPLY != 0
    expires_ms = old.expires_ms if old else 0
    talk.wait(1)

    ctinfo = talk.in_window(direction == IP_CT_DIR_REPLY, FLAGS[CLASS_NAMES[index]])

    outcome = TRANSITIONS[direction][index][state][0]
    if index == NONE_SET:
        assert ctinfo == INVALID_TCP_FLAGS  # refused before the table is asked
    elif outcome == INVALID:
        assert ctinfo == (INVALID_TCP_NEW if state == NONE else INVALID_TCP_STATE)
    elif direction == IP_CT_DIR_REPLY and not reopens(*cell):
        assert ctinfo == IP_CT_ESTABLISHED_REPLY
    else:
        assert ctinfo == (IP_CT_ESTABLISHED if replied and not reopens(*cell) else IP_CT_NEW)

    if state == NONE:
        assert talk.net.table.count == (0 if outcome == INVALID else 1)
        if outcome != INVALID:
            assert talk.state() == STATE_NAMES[outcome]
    elif outcome in (INVALID, IGNORE):
        assert talk.the() is old
        assert talk.state() == STATE_NAMES[state]
        assert talk.the().expires_ms == expires_ms
    elif reopens(*cell):
        assert talk.the() is not old
        assert old is not None
        assert old.status & IPS_DYING
        assert talk.the().orig == (old.reply if direction == IP_CT_DIR_REPLY else old.orig)
        assert talk.state() == STATE_NAMES[SYN_SENT]
    elif deletes(index, state):
        assert talk.net.table.count == 0
    else:
        assert talk.the() is old
        assert talk.state() == STATE_NAMES[outcome]
        if (index, state) == (SYN_SET, SYN_SENT):
            assert talk.the().expires_ms == expires_ms  # SYNs alone, from either side, do not keep the entry alive
        else:
            assert talk.the().expires_ms != expires_ms


def test_the_table_that_runs_is_the_one_with_the_reasons() -> None:
    for direction, rows in enumerate(TRANSITIONS):
        for index, row in enumerate(rows):
            for state, (outcome, reason) in enumerate(row):
                assert next_state(direction, index, state) == outcome
                assert reason


def test_the_table_is_complete() -> None:
    assert [len(rows) for rows in TRANSITIONS] == [CLASSES, CLASSES]
    assert {len(row) for rows in TRANSITIONS for row in rows} == {STATES}
    assert len(STATE_NAMES) == STATES
    assert len(CLASS_NAMES) == CLASSES


def test_outcomes_are_no_states() -> None:
    assert {INVALID, IGNORE}.isdisjoint(range(STATES))
    assert IGNORE < REASONS  # nor ctinfo values of INVALID packets


def test_a_reply_without_a_connection_is_impossible_in_every_class() -> None:
    assert {row[NONE][0] for row in TRANSITIONS[IP_CT_DIR_REPLY]} == {INVALID}


def test_no_syn_disturbs_an_established_connection() -> None:
    for index in (SYN_SET, SYNACK_SET):
        for direction in DIRECTIONS:
            assert next_state(direction, index, ESTABLISHED) in (INVALID, IGNORE)
