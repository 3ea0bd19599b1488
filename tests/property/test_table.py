"""The tracker against a naive one: a list, no wheel, no generations, every connection looked at every time."""

from dataclasses import dataclass
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conntrackd.const import (
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    NF_ACCEPT,
    STRESSED_TABLE_FULL,
)
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import Conntrack, confirm, conntrack_in, gc
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.table import GC_HORIZON_MS, GC_PAUSE_MS
from conntrackd.core.tuples import get_tuple
from tests.fuzz.invariants import check_table
from tests.unit.craft import START_MS, udp

# From the server?, the client's port, the server's port: two of each, so that flows meet and cross.
Way = tuple[bool, int, int]
WAYS: Final = st.tuples(st.booleans(), st.integers(1, 2), st.integers(1, 2))

TABLE_MAX: Final = 3
UDP_MS: Final = 30_000


def opposite(way: Way) -> Way:
    return (not way[0], *way[1:])


def packet(way: Way) -> bytes:
    back, sport, dport = way
    return udp(b"x", sport=sport, dport=dport, back=back)


def key(way: Way) -> bytes:
    return get_tuple(packet(way), 0)


@dataclass
class Naive:
    """A UDP connection that is in the table."""

    orig: Way
    expires_ms: int
    replied: bool = False


class Tracker(RuleBasedStateMachine):
    """UDP between a client and a server, each of whom may begin; packets are lost or leave; the clock jumps."""

    def __init__(self) -> None:
        super().__init__()
        sysctl = Sysctl()
        sysctl.max = TABLE_MAX
        sysctl.early_drop_timeout = 1 << 40  # nothing living is evicted here: that has its own tests
        sysctl.udp_timeout_stream = UDP_MS  # what a stream is has its own tests
        self.net = Conntrack(sysctl)
        self.now_ms = START_MS
        self.confirmed: list[Naive] = []
        self.waiting: dict[Way, Conn] = {}  # begun by a packet that is between the hooks

    def alive(self, way: Way) -> Naive | None:
        """The living connection that a packet belongs to."""
        found = [naive for naive in self.confirmed if naive.orig in (way, opposite(way))]
        assert len(found) <= 1
        return found[0] if found and found[0].expires_ms > self.now_ms else None

    @rule(way=WAYS)
    def packet_comes(self, way: Way) -> None:
        expected = self.alive(way)
        full = self.net.table.count >= TABLE_MAX
        ctinfo, ct = conntrack_in(self.net, packet(way), True, self.now_ms)
        if expected is not None:
            expected.expires_ms = self.now_ms + UDP_MS
            if way != expected.orig:
                assert ctinfo == IP_CT_ESTABLISHED_REPLY
                expected.replied = True
            else:
                assert ctinfo == (IP_CT_ESTABLISHED if expected.replied else IP_CT_NEW)
        elif way in self.waiting:
            assert ctinfo == IP_CT_NEW
            assert ct is self.waiting[way]
        elif ct is None:
            assert ctinfo == STRESSED_TABLE_FULL
            assert full
        else:
            assert ctinfo == IP_CT_NEW
            self.waiting[way] = ct

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def first_packet_leaves(self, data: st.DataObject) -> None:
        way = data.draw(st.sampled_from(list(self.waiting)))
        taken = self.alive(way)
        living = [naive for naive in self.confirmed if naive.expires_ms > self.now_ms]
        answer = confirm(self.net, self.waiting.pop(way), self.now_ms)
        if taken is None and len(living) >= TABLE_MAX:
            assert answer == STRESSED_TABLE_FULL  # there was room when it began
            return
        assert answer == NF_ACCEPT  # UDP that clashes merges
        if taken is None:
            self.confirmed = [naive for naive in self.confirmed if naive.orig not in (way, opposite(way))]
            self.confirmed.append(Naive(way, self.now_ms + UDP_MS))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def first_packet_is_dropped(self, data: st.DataObject) -> None:
        way = data.draw(st.sampled_from(list(self.waiting)))
        self.net.table.drop_unconfirmed(self.waiting.pop(way))

    @rule(way=WAYS)
    def operator_kills(self, way: Way) -> None:
        naive = self.alive(way)
        ct = self.net.table.find(key(way), self.now_ms)
        assert (naive is None) == (ct is None)
        if naive is not None and ct is not None:
            self.net.table.kill(ct, self.now_ms)
            self.confirmed.remove(naive)

    @rule(ms=st.sampled_from([1, 900, 1_000, 15_000, UDP_MS - 1, UDP_MS, 100_000]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms

    @rule()
    def gc_runs(self) -> None:
        rotated_ms = self.net.table.rotated_ms
        while gc(self.net, self.now_ms) <= self.now_ms:
            pass
        if self.net.table.rotated_ms != rotated_ms:
            # Who has been forgotten the naive tracker cannot know, but it was nobody else's connection.
            held = {way: self.net.table.find_unconfirmed(key(way)) for way in self.waiting}
            assert all(ct is None or ct is self.waiting[way] for way, ct in held.items())
            self.waiting = {way: ct for way, ct in held.items() if ct is not None}

    @rule(turns=st.integers(1, 4))
    def gc_runs_until_the_horizon(self, turns: int) -> None:
        for _ in range(turns):
            self.now_ms += (GC_HORIZON_MS + 2 * GC_PAUSE_MS) // turns + 1
            self.gc_runs()
        assert not list(self.net.table.connections())  # nobody refreshed anything for so long

    @invariant()
    def the_table_is_in_order(self) -> None:
        check_table(self.net, self.now_ms)
        assert self.net.table.unconfirmed_count() == len(self.waiting)

    @invariant()
    def it_holds_what_the_naive_one_holds(self) -> None:
        living = {key(naive.orig): naive for naive in self.confirmed if naive.expires_ms > self.now_ms}
        held = {ct.orig: ct for ct in self.net.table.connections() if ct.expires_ms > self.now_ms}
        assert held.keys() == living.keys()
        assert all(held[orig].expires_ms == naive.expires_ms for orig, naive in living.items())


TestTracker = Tracker.TestCase
TestTracker.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
