"""Events [nf_conntrack_ecache.c]: NEW, UPDATE and DESTROY of connections and expectations, for whoever listens.

What a packet changes is collected while it is tracked and delivered once, as one event. Events go into a ring of fixed
size; a listener reads them by their number, in its own time. Nobody waits for a listener: when it is slower than the
ring is long it loses the oldest events, and is told how many. While nobody listens, nothing is kept.
"""

from typing import TYPE_CHECKING

from mypy_extensions import i16, i32, u8

from conntrackd.const import IPCT_DESTROY, IPCT_NEW, IPCT_RELATED, IPEXP_NEW
from conntrackd.core.conn import Conn

if TYPE_CHECKING:
    from conntrackd.core.expect import Expect


class Event:
    """What happened to a connection, and what it was like then; or to something that a connection expects."""

    def __init__(
        self, ct: Conn, bits: int, reason: int, now_ms: int, expect: "Expect | None" = None, labels: int = 0
    ) -> None:
        self.ct = ct
        self.expect = expect
        self.now_ms = now_ms
        self.bits: i16 = bits  # const.IPCT_*, of an expectation IPEXP_*
        self.reason: u8 = reason  # const.CLOSED_*, of a DESTROY
        self.state: u8 = ct.state
        self.status: i32 = ct.status
        self.expires_ms = ct.expires_ms
        self.mark = ct.mark
        self.labels = labels

    def kind(self) -> str:
        """Name the message that the kernel would send: NEW, UPDATE or DESTROY."""
        if self.expect is not None:
            return "NEW" if self.bits & IPEXP_NEW else "DESTROY"
        if self.bits & (IPCT_NEW | IPCT_RELATED):
            return "NEW"
        return "DESTROY" if self.bits & IPCT_DESTROY else "UPDATE"


class Listener:
    """One reader of the ring. Made by `EventRing.listen`, given back by `EventRing.leave`."""

    def __init__(self, next_seq: int) -> None:
        self.next_seq = next_seq
        self.lost = 0  # events that were overwritten before it read them


class EventRing:
    """The most recent events, numbered from 0 on: number n stands at place n modulo the ring's length."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.listeners = 0
        self.seq = 0  # the number of the next event
        self.lost = 0  # events that some listener did not read in time
        self.ring: list[Event] = []
        self.first_seq = 0  # the number of the oldest event that is kept

    def add(self, event: Event) -> None:
        """Keep an event; at the limit it takes the place of the oldest. To be called only while somebody listens."""
        place, kept = self.seq - self.first_seq, len(self.ring)
        if place == kept and kept < max(self.limit, 1):
            self.ring.append(event)
        else:
            self.ring[place % kept] = event  # once it has wrapped its length stays, whatever the limit is then
        self.seq += 1

    def listen(self) -> Listener:
        """Begin to listen: to what happens from now on."""
        self.listeners += 1
        return Listener(self.seq)

    def leave(self) -> None:
        """Listen no more. With the last listener all events go."""
        self.listeners -= 1
        if self.listeners == 0:
            self.ring = []
            self.first_seq = self.seq

    def read(self, listener: Listener) -> Event | None:
        """Return the next event of a listener, None if it has read all. What it came too late for is counted."""
        if listener.next_seq == self.seq:
            return None
        kept = len(self.ring)
        oldest = self.seq - kept
        if listener.next_seq < oldest:
            self.lost += oldest - listener.next_seq
            listener.lost += oldest - listener.next_seq
            listener.next_seq = oldest
        event = self.ring[(listener.next_seq - self.first_seq) % kept]
        listener.next_seq += 1
        return event
