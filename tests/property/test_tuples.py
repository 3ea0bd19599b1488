"""Tuples of arbitrary packets: inverting twice gives the tuple back, and packets that answer each other meet."""

from hypothesis import given
from hypothesis import strategies as st

from conntrackd.core.tuples import destination, format_tuple, get_tuple, invert
from tests.differential import packets

PORTS = st.integers(0, 65535)
PROTOCOLS = st.sampled_from([1, 6, 17, 47, 58, 132, 136]) | st.integers(0, 255)


@st.composite
def tuples(draw: st.DrawFn) -> bytes:
    size = draw(st.sampled_from([4, 16]))
    return bytes((draw(PROTOCOLS),)) + draw(st.binary(min_size=2 * size + 4, max_size=2 * size + 4))


@given(tuples())
def test_inverting_twice_gives_the_tuple_back(key: bytes) -> None:
    back = invert(key)
    if back:
        assert invert(back) == key
        assert len(back) == len(key)
        assert back[0] == key[0]
    else:
        assert key[0] in (1, 58)  # only ICMP has messages that nothing answers


@given(tuples())
def test_an_answer_goes_to_where_the_question_came_from(key: bytes) -> None:
    back = invert(key)
    if back:
        size = (len(key) - 5) // 2
        assert destination(back) == key[1 : 1 + size]


@given(tuples())
def test_every_tuple_can_be_written_for_people(key: bytes) -> None:
    assert " > " in format_tuple(key)


@st.composite
def ends(draw: st.DrawFn) -> tuple[bytes, bytes]:
    size = draw(st.sampled_from([4, 16]))
    address = st.binary(min_size=size, max_size=size)
    return draw(address), draw(address)


@given(ends(), st.sampled_from([6, 17, 132, 136]), PORTS, PORTS, st.binary(max_size=30))
def test_packets_both_ways_have_inverse_tuples(
    addresses: tuple[bytes, bytes], protonum: int, sport: int, dport: int, payload: bytes
) -> None:
    source, target = addresses
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    back = dport.to_bytes(2, "big") + sport.to_bytes(2, "big")
    there = get_tuple(packets.ip(source, target, protonum, ports + payload), 0)
    assert there == bytes((protonum,)) + source + target + ports
    assert invert(there) == get_tuple(packets.ip(target, source, protonum, back + payload), 0)


@given(st.binary(max_size=120), st.integers(0, 120))
def test_any_bytes_have_a_tuple_or_none(data: bytes, at: int) -> None:
    assert len(get_tuple(data, at)) in (0, 13, 37)
