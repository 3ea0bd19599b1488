"""Every cell of the TCP state table against the live kernel: the segment in that state, in window, both answers."""

from collections.abc import Iterator

import pytest

from conntrackd.core.proto.tcp_states import CLASS_NAMES, STATE_NAMES, STATES, TRANSITIONS
from tests.differential import packets
from tests.differential.compare import Twin
from tests.differential.generate.path import addresses
from tests.differential.kernel import CLIENT, SERVER
from tests.differential.packets import ACK, FIN, RST, SYN

# The segments that lead to each state, as (side, flags).
OPEN = [(CLIENT, SYN), (SERVER, SYN | ACK), (CLIENT, ACK)]
CLOSING = [*OPEN, (CLIENT, FIN | ACK)]
PATHS = {
    "NONE": [],
    "SYN_SENT": OPEN[:1],
    "SYN_RECV": OPEN[:2],
    "ESTABLISHED": OPEN,
    "FIN_WAIT": CLOSING,
    "CLOSE_WAIT": [*CLOSING, (SERVER, ACK)],
    "LAST_ACK": [*CLOSING, (SERVER, FIN | ACK)],
    "TIME_WAIT": [*CLOSING, (SERVER, FIN | ACK), (CLIENT, ACK)],
    "CLOSE": [*OPEN, (CLIENT, RST)],
    "SYN_SENT2": [(CLIENT, SYN), (SERVER, SYN)],
}
FLAGS = {"SYN": SYN, "SYN/ACK": SYN | ACK, "FIN": FIN | ACK, "ACK": ACK, "RST": RST, "none": 0}
SIDES = (CLIENT, SERVER)  # original, reply


class Talk:
    """A TCP conversation whose segments are always in window."""

    def __init__(self, number: int, family: int) -> None:
        client, server, _ = addresses(number, family)
        self.hosts = (client, server)
        self.ports = (40000, 443)
        self.seq = [1000, 5000]
        self.keys = (self._key(0), self._key(1))

    def _key(self, side: int) -> bytes:
        ports = b"".join(port.to_bytes(2, "big") for port in (self.ports[side], self.ports[1 - side]))
        return b"\x06" + self.hosts[side] + self.hosts[1 - side] + ports

    def segment(self, side: int, flags: int) -> bytes:
        which = SIDES.index(side)
        ends = self.hosts[which], self.hosts[1 - which]
        ports = self.ports[which], self.ports[1 - which]
        ack = self.seq[1 - which] if flags & ACK else 0
        made = packets.ip(*ends, 6, packets.tcp(*ends, *ports, flags, self.seq[which], ack, 60000))
        self.seq[which] += (1 if flags & SYN else 0) + (1 if flags & FIN else 0)
        return made


@pytest.fixture(scope="module")
def twin() -> Iterator[Twin]:
    with Twin("distinct") as made:
        yield made


CELLS = [(side, name, state) for side in (0, 1) for name in CLASS_NAMES for state in STATE_NAMES]


def test_the_cells_are_the_trackers() -> None:
    assert len(CELLS) == sum(len(row) for rows in TRANSITIONS for row in rows) == 2 * len(FLAGS) * STATES
    assert set(PATHS) == set(STATE_NAMES)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("side", "name", "state"), CELLS)
def test_cell(twin: Twin, side: int, name: str, state: str, family: int) -> None:
    talk = Talk(1 + CELLS.index((side, name, state)), family)
    for step, flags in [*PATHS[state], (SIDES[side], FLAGS[name])]:
        answer = twin.forward(step, talk.segment(step, flags), talk.keys)
        assert isinstance(answer, int), f"kernel and core differ in {answer}"


def test_retransmissions_are_counted_in_one_byte(twin: Twin) -> None:
    """The 256th begins anew, and the connection lives longer again until it has been retransmitted often enough."""
    talk = Talk(len(CELLS) + 1, 4)
    for step, flags in [*OPEN, *[(CLIENT, ACK)] * 262]:
        answer = twin.forward(step, talk.segment(step, flags), talk.keys)
        assert isinstance(answer, int), f"kernel and core differ in {answer}"
