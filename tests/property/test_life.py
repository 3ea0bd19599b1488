"""The life of connections against a naive account of it: a dictionary, every connection looked at every time.

Some thousand random operations per run; `python -m tests.property.test_life --operations 1000000` does a million.
"""

import argparse
import random
import time
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

import pytest

from conntrackd.const import (
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
    NF_ACCEPT,
    STRESSED_SOURCE_FULL,
    STRESSED_TABLE_FULL,
    STRESSED_ZONE_FULL,
)
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import Conntrack, confirm, conntrack_in, gc
from conntrackd.core.ecache import Event
from conntrackd.core.proto.udp import STREAM_AFTER_MS
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple
from tests.differential import packets
from tests.fuzz.invariants import check_table

CLIENTS: Final = [ip_address(f"10.0.0.{number}").packed for number in range(1, 6)]
SERVER: Final = ip_address("192.0.2.80").packed
PORTS: Final = range(1, 15)
ZONES: Final = (0, 0, 3, 700)
LIMIT: Final = 40
PER_SOURCE: Final = 9
PER_ZONE: Final = 12
UNCONFIRMED: Final = 16
CHECKED_EVERY: Final = 250

Flow = tuple[int, int, int]  # zone, client, port


def built() -> dict[tuple[int, int, bool], bytes]:
    """A datagram for each flow and direction, by client, port, direction; the zone is not in the packet."""
    made = {}
    for client in range(len(CLIENTS)):
        for port in PORTS:
            there = (CLIENTS[client], SERVER, port, 53)
            back = (SERVER, CLIENTS[client], 53, port)
            for is_back, (source, target, sport, dport) in (False, there), (True, back):
                datagram = packets.udp(source, target, sport, dport, b"x")
                made[client, port, is_back] = packets.ip(source, target, 17, datagram)
    return made


DATAGRAMS: Final = built()
KEYS: Final = {which: get_tuple(data, 0) for which, data in DATAGRAMS.items()}


@dataclass
class Naive:
    """What we know of a connection in the table."""

    expires_ms: int
    seen_ms: int
    stream_ms: int
    from_server: bool
    replied: bool = False
    assured: bool = False
    packets: int = 1


class Life:
    """A tracker and the naive account of what must be in it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sysctl = Sysctl()
        self.sysctl.max = LIMIT
        self.sysctl.max_per_source = PER_SOURCE
        self.sysctl.max_per_zone = PER_ZONE
        self.sysctl.unconfirmed_max = UNCONFIRMED
        self.sysctl.adaptive_end = 0  # what goes early has tests of its own
        self.sysctl.events_max = 64
        self.net = Conntrack(self.sysctl)
        self.now_ms = 1_000_000
        self.confirmed: dict[Flow, Naive] = {}
        self.waiting: dict[tuple[Flow, bool], Conn] = {}  # by flow, and whether the server opens it
        self.listener = self.net.events.listen()
        self.told: dict[str, int] = {"NEW": 0, "UPDATE": 0, "DESTROY": 0}
        self.done = 0

    def run(self, operations: int) -> None:
        ways = (self.packet, self.leave, self.drop, self.kill, self.wait, self.jump, self.collect)
        weights = (60, 22, 3, 3, 9, 1, 2)
        for way in self.random.choices(ways, weights, k=operations):
            way()
            self.done += 1
            self.hear()
            assert self.net.table.count <= LIMIT
            assert self.net.table.unconfirmed_count() <= UNCONFIRMED
            if self.done % CHECKED_EVERY == 0:
                self.check()
        self.check()

    # --- Operations ---------------------------------------------------------------------------------------------

    def packet(self) -> None:
        flow = (self.random.choice(ZONES), self.random.randrange(len(CLIENTS)), self.random.choice(PORTS))
        back = self.random.random() < 0.4
        zone, client, port = flow
        known = self.alive(flow)
        before = self.living()
        data = DATAGRAMS[client, port, back]
        ctinfo, ct = conntrack_in(self.net, data, True, self.now_ms, zone)
        if known is not None:
            is_reply = back != known.from_server
            if is_reply:
                assert ctinfo == IP_CT_ESTABLISHED_REPLY
            else:
                assert ctinfo == (IP_CT_ESTABLISHED if known.replied else IP_CT_NEW)
            timeout = self.sysctl.udp_timeout
            if known.replied and self.now_ms > known.stream_ms:
                timeout = self.sysctl.udp_timeout_stream
                known.assured = True
            known.replied |= is_reply
            known.expires_ms = self.now_ms + timeout
            known.seen_ms = self.now_ms
            known.packets += 1
            return
        assert self.living() == before  # nobody goes for what may still be dropped
        self.forget()
        if (flow, back) in self.waiting:
            assert ctinfo == IP_CT_NEW
            assert ct is self.waiting[flow, back]
        elif ct is None:
            assert self.refusal(flow, back) == ctinfo, (ctinfo, flow)
        else:
            assert ctinfo == IP_CT_NEW
            self.waiting[flow, back] = ct

    def leave(self) -> None:
        """The first packet of a flow leaves: its connection is confirmed, unless it is too late."""
        self.forget()
        if not self.waiting:
            return
        flow, back = self.random.choice(list(self.waiting))
        ct = self.waiting.pop((flow, back))
        before = self.living()
        taken = self.alive(flow)
        victims = self.victims()
        refusal = 0 if taken else self.refusal(flow, back)
        verdict = confirm(self.net, ct, self.now_ms)
        if taken is not None:
            assert verdict == NF_ACCEPT  # datagrams merge
            taken.packets += ct.packets_orig
            assert self.living() == before
        elif verdict != NF_ACCEPT:
            assert verdict == refusal
            assert self.living() == before
        else:
            lost = before.keys() - self.living().keys()
            assert len(lost) <= 1
            if lost:
                assert lost <= victims
                # What has expired goes first; only what did so within the last second may not have been found yet.
                dead = [ct for ct in self.net.table.connections() if ct.expires_ms <= self.now_ms]
                assert len(before) + len(dead) == LIMIT
                assert all(self.now_ms // 1000 == ct.expires_ms // 1000 for ct in dead)
                del self.confirmed[lost.pop()]
            expires_ms = self.now_ms + self.sysctl.udp_timeout
            # How long ago its last packet came to the first hook only the connection knows.
            stream_ms = self.stream_ms(ct)
            self.confirmed[flow] = Naive(expires_ms, self.now_ms, stream_ms, back, packets=ct.packets_orig)

    def drop(self) -> None:
        self.forget()
        if self.waiting:
            which = self.random.choice(list(self.waiting))
            self.net.table.drop_unconfirmed(self.waiting.pop(which))

    def kill(self) -> None:
        living = self.living()
        if living:
            flow = self.random.choice(list(living))
            ct = self.find(flow)
            assert ct is not None
            self.net.table.kill(ct, self.now_ms)
            del self.confirmed[flow]

    def wait(self) -> None:
        self.now_ms += self.random.choice((1, 40, 300, 1000, 2500))

    def jump(self) -> None:
        self.now_ms += self.random.choice((15_000, 29_999, 30_000, 100_000, 119_999, 400_000, 10_000_000))

    def collect(self) -> None:
        while gc(self.net, self.now_ms) <= self.now_ms:
            pass

    # --- What must be -------------------------------------------------------------------------------------------

    def alive(self, flow: Flow) -> Naive | None:
        naive = self.confirmed.get(flow)
        return naive if naive is not None and naive.expires_ms > self.now_ms else None

    def find(self, flow: Flow) -> Conn | None:
        return self.net.table.get(KEYS[flow[1], flow[2], False], flow[0])

    def living(self) -> dict[Flow, Naive]:
        """The connections that must be there, and are: what is missing has gone for another."""
        return {flow: naive for flow, naive in self.confirmed.items() if self.alive(flow) and self.find(flow)}

    def victims(self) -> set[Flow]:
        """Who may have to go next: the least recently seen of what is not ASSURED, if it is not spared."""
        candidates = {flow: naive.seen_ms for flow, naive in self.living().items() if not naive.assured}
        oldest = min(candidates.values(), default=self.now_ms)
        if oldest > self.now_ms - self.sysctl.early_drop_timeout:
            return set()
        return {flow for flow, seen_ms in candidates.items() if seen_ms == oldest}

    def refusal(self, flow: Flow, from_server: bool) -> int:
        """Why a connection would be refused, as the table counts: with what has expired and was not swept yet."""
        zone, client, _ = flow
        held = [ct for ct in self.net.table.connections() if ct.zone == zone]
        source = SERVER if from_server else CLIENTS[client]
        if sum(ct.orig[1:5] == source for ct in held) >= PER_SOURCE:
            return STRESSED_SOURCE_FULL
        if zone and len(held) >= PER_ZONE:
            return STRESSED_ZONE_FULL
        dead = self.net.table.count - len(self.living())
        return STRESSED_TABLE_FULL if self.net.table.count >= LIMIT and not dead and not self.victims() else 0

    def stream_ms(self, ct: Conn) -> int:
        value: int = getattr(ct, "stream_ms")  # noqa: B009 - of UdpConn
        assert value <= self.now_ms + STREAM_AFTER_MS
        return value

    def forget(self) -> None:
        """Let go of the unconfirmed connections that the tracker has forgotten: it may, at its limits."""
        self.waiting = {
            (flow, back): ct
            for (flow, back), ct in self.waiting.items()
            if self.net.table.find_unconfirmed(KEYS[flow[1], flow[2], back], flow[0]) is ct
        }

    def hear(self) -> None:
        """Read the events, and see that they and the counters say the same."""
        while (event := self.net.events.read(self.listener)) is not None:
            self.note(event)
        assert self.listener.lost == 0
        assert self.told["NEW"] == self.net.stats.insert
        assert self.told["DESTROY"] == self.net.stats.destroyed == sum(self.net.stats.closed)

    def note(self, event: Event) -> None:
        self.told[event.kind()] += 1

    def check(self) -> None:
        """The same connections, with the same times and counters, and nothing left over in any index."""
        check_table(self.net, self.now_ms)
        living = {flow: naive for flow, naive in self.confirmed.items() if naive.expires_ms > self.now_ms}
        held = {ct.id: ct for ct in self.net.table.connections() if ct.expires_ms > self.now_ms}
        assert len(held) == len(living)
        for flow, naive in living.items():
            ct = self.find(flow)
            assert ct is not None, flow
            assert held[ct.id] is ct
            assert (ct.expires_ms, ct.seen_ms) == (naive.expires_ms, naive.seen_ms)
            assert ct.packets_orig + ct.packets_reply == naive.packets
            assert (ct.status & IPS_ASSURED != 0) == naive.assured
        table, stats = self.net.table, self.net.stats
        assert stats.insert - stats.destroyed == table.count
        counted = [count for counts in table.source_counts for count in counts.values()]
        assert sum(counted) == table.count
        assert all(count > 0 for count in counted)
        assert sum(table.zone_counts.values()) == sum(ct.zone != 0 for ct in table.connections())
        assert stats.table_full + stats.source_full + stats.zone_full == stats.drop
        self.confirmed = living


@pytest.mark.parametrize("seed", range(4))
def test_random_lives_are_what_a_naive_account_of_them_says(seed: int) -> None:
    life = Life(seed)
    life.run(5_000)
    stats = life.net.stats
    assert stats.early_drop > 0
    assert stats.source_full > 0
    assert stats.zone_full > 0
    assert life.told["UPDATE"] > 0


def test_when_all_is_over_nothing_is_left() -> None:
    life = Life(99)
    life.run(2_000)
    for _ in range(3):
        life.now_ms += 1_000_000
        life.collect()
    table = life.net.table
    assert (table.count, table.unconfirmed_count(), table.zone_counts) == (0, 0, {})
    assert not any(table.shards)
    assert not any(table.source_counts)


def main() -> None:
    """Do as many operations as asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFFFF)
    args = parser.parse_args()
    print(f"seed {args.seed}")
    life = Life(args.seed)
    begin = time.monotonic()
    life.run(args.operations)
    stats = life.net.stats
    print(f"{life.done} operations, {life.done / (time.monotonic() - begin):.0f} a second: the same all the way")
    names = ("insert", "destroyed", "early_drop", "expired_when_full", "table_full", "source_full", "zone_full",
             "clash_resolve", "unconfirmed_expired", "unconfirmed_full")  # fmt: skip
    print(", ".join(f"{name} {getattr(stats, name)}" for name in names))
    print(", ".join(f"{name} {count}" for name, count in life.told.items()))


if __name__ == "__main__":
    main()
