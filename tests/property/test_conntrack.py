"""No packet, however broken, raises or hangs, and the counters add up: the invariants are those of tests/fuzz."""

from hypothesis import given, settings
from hypothesis import strategies as st

from conntrackd.const import INVALID, IP_CT_ESTABLISHED_REPLY
from conntrackd.core.conntrack import Conntrack, conntrack_in
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple, invert
from tests.fuzz import targets
from tests.fuzz.invariants import check_table
from tests.fuzz.seeds import conversations
from tests.unit.craft import START_MS, Talk

CONVERSATIONS = conversations()
CIRCUMSTANCES = st.integers(0, 255)
SETTINGS = st.integers(0, 255)


@st.composite
def broken(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """A conversation whose packets are lost, repeated, reordered, cut, changed, lengthened, or none at all."""
    packets = [packet for _, packet in draw(st.sampled_from(CONVERSATIONS))]
    steps = []
    for packet in draw(st.lists(st.sampled_from(packets), min_size=1, max_size=2 * len(packets))):
        changed = bytearray(packet)
        for at in draw(st.lists(st.integers(0, len(packet) - 1), max_size=3)):
            changed[at] = draw(st.integers(0, 255))
        cut = draw(st.none() | st.integers(0, len(packet)))
        padding = draw(st.just(b"") | st.binary(max_size=40))
        steps.append((draw(CIRCUMSTANCES), bytes(changed[:cut]) + padding))
    return steps


@st.composite
def in_order(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Whole conversations, one woven into another, under any circumstances."""
    conversations = draw(st.lists(st.sampled_from(CONVERSATIONS), min_size=1, max_size=3))
    order = [number for number, conversation in enumerate(conversations) for _ in conversation]
    iterators = [iter(conversation) for conversation in conversations]
    steps = []
    for number in draw(st.permutations(order)):
        back, packet = next(iterators[number])
        steps.append((draw(CIRCUMSTANCES) & ~targets.FROM_SERVER | (targets.FROM_SERVER if back else 0), packet))
    return steps


STEPS = broken() | in_order() | st.lists(st.tuples(CIRCUMSTANCES, st.binary(max_size=100)), max_size=20)


@settings(deadline=None, max_examples=300)
@given(STEPS, SETTINGS)
def test_conntrack_in_survives_any_packets(steps: list[tuple[int, bytes]], setting: int) -> None:
    targets.conntrack(targets.pack(steps, setting))


@settings(deadline=None, max_examples=300)
@given(STEPS, SETTINGS)
def test_the_hooks_survive_any_packets(steps: list[tuple[int, bytes]], setting: int) -> None:
    targets.hooks(targets.pack(steps, setting))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_the_readers_survive_any_bytes(data: bytes) -> None:
    targets.readers(data)


def test_every_packet_may_be_cut_at_every_length() -> None:
    """In a tracker that knows the connection, and in one that does not."""
    stranger = Conntrack(Sysctl())
    for conversation in CONVERSATIONS:
        known = Talk()
        for _, packet in conversation:
            for size in range(len(packet)):
                targets.readers(packet[:size])
                conntrack_in(stranger, packet[:size], True, START_MS)
                if stranger.table.unconfirmed:
                    stranger = Conntrack(Sysctl())
                known.send(packet[:size])
                targets.hooks(targets.pack([(0, packet[:size])]))
            known.send(packet)
            check_table(known.net, known.now_ms)


def test_every_packet_may_lie_about_its_length() -> None:
    for conversation in CONVERSATIONS:
        for _, packet in conversation:
            at = 2 if packet[0] >> 4 == 4 else 4
            for length in (*range(len(packet) + 2), 0x7FFF, 0xFFFF):
                lie = packet[:at] + length.to_bytes(2, "big") + packet[at + 2 :]
                targets.hooks(targets.pack([(0, lie), (targets.FROM_SERVER, lie)]))


@settings(deadline=None)
@given(in_order())
def test_a_confirmed_connection_is_found_by_its_tuple_and_by_the_inverse(steps: list[tuple[int, bytes]]) -> None:
    talk = Talk()
    for _, packet in steps:
        talk.send(packet)
        for ct in list(talk.net.table.connections()):
            for key in (ct.orig, ct.reply):
                assert talk.net.table.find(key, talk.now_ms) is talk.net.table.find(invert(key), talk.now_ms) is ct


@settings(deadline=None)
@given(in_order())
def test_a_packet_is_a_reply_exactly_if_its_tuple_is_the_reply_of_its_connection(
    steps: list[tuple[int, bytes]],
) -> None:
    talk = Talk()
    for _, packet in steps:
        ctinfo = talk.send(packet)
        if talk.last is not None and ctinfo < INVALID and get_tuple(packet, 0) in (talk.last.orig, talk.last.reply):
            assert (ctinfo == IP_CT_ESTABLISHED_REPLY) == (get_tuple(packet, 0) == talk.last.reply)
