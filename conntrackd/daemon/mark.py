"""Our six bits in the packet mark: where the configured mask puts them (docs/mark.md).

The core speaks of a 6-bit number (const.MARK_*); the kernel carries 32 bits per packet. The six highest set
bits of the mask hold our number, most significant bit first; every other bit of the mark belongs to the
user.
"""

from conntrackd.const import MARK_CLASS, MARK_UNCONFIRMED, MARK_UNSEEN

BITS = 6
FULL = 0xFFFFFFFF


class Mark:
    """The place of the six bits for one mask.

    `ours` is the six bits as a mask of the packet mark, `keep` the bits that are left alone, and
    `lay[number]` the number laid into place: a new mark is `old & keep | lay[number]`.
    """

    def __init__(self, mask: int) -> None:
        places = [bit for bit in range(31, -1, -1) if mask >> bit & 1][:BITS]
        assert len(places) == BITS, "the configuration promises a mask with at least six bits"
        self._places = places
        self.lay = [self._lay(number) for number in range(1 << BITS)]
        self.ours = self.lay[-1]
        self.keep = FULL & ~self.ours
        # Neighbouring bits are read with one shift; -1 where the mask has gaps between them.
        self.shift = places[-1] if places[0] - places[-1] == BITS - 1 else -1

    def _lay(self, number: int) -> int:
        laid = 0
        for weight, place in enumerate(reversed(self._places)):
            laid |= (number >> weight & 1) << place
        return laid

    def read(self, mark: int) -> int:
        """Our 6-bit number in a packet mark."""
        if self.shift >= 0:
            return mark >> self.shift & 63
        number = 0
        for place in self._places:
            number = number << 1 | mark >> place & 1
        return number

    def second_look(self) -> list[tuple[int, int]]:
        """(value, mask) pairs that tell the packets which must cross the postrouting queue.

        These are the unconfirmed ones and those whose class bits say nothing of ours: 0 (never seen, or
        overwritten) and 6 and 7 (overwritten).
        """
        classes = self.lay[MARK_CLASS]
        clobbered = self.lay[6 << 3]
        unconfirmed = self.lay[MARK_UNCONFIRMED]
        return [(unconfirmed, unconfirmed), (self.lay[MARK_UNSEEN], classes), (clobbered, clobbered)]
