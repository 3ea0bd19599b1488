"""The six bits and their place in the packet mark."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conntrackd.const import MARK_ESTABLISHED, MARK_NEW, MARK_OFFLOADED, MARK_REPLY, MARK_UNCONFIRMED
from conntrackd.daemon.mark import Mark

DEFAULT = 0xFC000000
MASKS = st.integers(0, 0xFFFFFFFF).filter(lambda mask: mask.bit_count() >= 6)
NUMBERS = st.integers(0, 63)
MARKS = st.integers(0, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("number", "laid"),
    [
        (MARK_NEW, 0x20000000),
        (MARK_NEW | MARK_UNCONFIRMED, 0x28000000),
        (MARK_ESTABLISHED, 0x40000000),
        (MARK_ESTABLISHED | MARK_REPLY, 0x50000000),
        (MARK_OFFLOADED, 0x04000000),
        (63, DEFAULT),
    ],
)
def test_default_layout(number: int, laid: int) -> None:
    assert Mark(DEFAULT).lay[number] == laid


def test_mask_with_gaps() -> None:
    mark = Mark(0x8421_0842)  # bits 31 26 21 16 11 6, and 1 to spare
    assert mark.lay[0b100001] == 1 << 31 | 1 << 6
    assert mark.lay[0b010010] == 1 << 26 | 1 << 11
    assert mark.ours == 0x8421_0840


@given(MASKS, NUMBERS, MARKS)
def test_what_is_laid_is_read_and_nothing_else_changes(mask: int, number: int, old: int) -> None:
    mark = Mark(mask)
    new = old & mark.keep | mark.lay[number]
    assert mark.read(new) == number
    assert (new ^ old) & ~mark.ours == 0
    assert mark.ours & ~mask == 0
    assert mark.ours.bit_count() == 6


@given(MASKS, NUMBERS, MARKS)
def test_who_crosses_the_second_queue(mask: int, number: int, old: int) -> None:
    """Unconfirmed packets and those whose class is none that we write; whatever the other bits are."""
    mark = Mark(mask)
    new = old & mark.keep | mark.lay[number]
    queued = any(new & bits == value for value, bits in mark.second_look())
    assert queued == (bool(number & MARK_UNCONFIRMED) or number >> 3 in (0, 6, 7))
