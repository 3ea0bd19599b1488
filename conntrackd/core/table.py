"""The table: every confirmed connection under both of its tuples, and the unconfirmed ones apart.

It is many dictionaries, not one: a dictionary that grows copies itself, and at a million connections no packet
may wait for that. A tuple in a conntrack zone other than 0 is looked up with the zone in front of it.

An expired connection is absent: a lookup that meets one removes it. What nobody looks up is swept by `gc`, without a
timer per connection: each connection stands in one slot of a wheel, with all that are due in the same second. Looking
at one either ends it or moves it to a later slot, so refreshing a connection on the packet path is one store.

A full table makes room for a new connection that the policy admits, in this order: what has expired; what is not
ASSURED, the least recently seen first; what is ASSURED and about to end; and if there is none of these, the new one is
refused. What was seen within `early_drop_timeout` is spared. Connections that may have to go stand in two rings by
activity, so finding one costs the same however many there are; what is ASSURED and not about to end is in neither.
"""

from typing import TYPE_CHECKING, Final

from mypy_extensions import i64

from conntrackd.const import (
    CLOSED_EVICTED,
    CLOSED_KILLED,
    CLOSED_TIMEOUT,
    IPCT_DESTROY,
    IPCT_LABEL,
    IPCT_NEW,
    IPCT_RELATED,
    IPPROTO_GRE,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_COUNTED,
    IPS_DYING,
    IPS_EXPECTED,
    STRESSED_SOURCE_FULL,
    STRESSED_TABLE_FULL,
    STRESSED_ZONE_FULL,
)
from conntrackd.core.chain import activity_ring, due_ring, enter_activity, enter_due, leave_activity, leave_due
from conntrackd.core.conn import Conn
from conntrackd.core.ecache import Event, EventRing
from conntrackd.core.expect import Expectations
from conntrackd.core.stats import Stats
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple, names_call, source
from conntrackd.wire.ip import transport

if TYPE_CHECKING:
    from collections.abc import Iterator

# A key's shard is told by the highest bits of its hash; dictionaries use the lowest.
SHARD_BITS: Final = 8
SHARDS: Final = 1 << SHARD_BITS
SHARD_SHIFT: Final = 64 - SHARD_BITS

# A slot per second; as far ahead as the longest timeout to which a packet can cut another without moving its
# connection to another slot (`settle`).
WHEEL_SLOTS: Final = 320
GC_HORIZON_MS: Final = 300_000
GC_SLICE: Final = 512  # connections looked at in one turn
GC_PAUSE_MS: Final = 1_000

SCALE_BITS: Final = 10
UNSCALED: Final = 1 << SCALE_BITS
EMERGENCY_ENDS_PERCENT: Final = 90


def zone_key(zone: int, key: bytes) -> bytes:
    """Write the key under which a tuple is found in a zone."""
    return bytes((zone >> 8, zone & 0xFF)) + key if zone else key


class Table:
    """Connections by tuple. Everything that enters or leaves the table does so here."""

    def __init__(self, sysctl: Sysctl, stats: Stats, events: EventRing) -> None:
        self.sysctl = sysctl
        self.stats = stats
        self.events = events
        self.shards: list[dict[bytes, Conn]] = [{} for _ in range(SHARDS)]
        self.count = 0
        self.zone_counts: dict[int, int] = {}  # connections by zone, without zone 0
        self.source_counts: list[dict[bytes, int]] = []  # by source, sharded too; made when the limit is first used
        self.labels: dict[int, int] = {}  # of the connections that have any, by id: 128 bits
        self.last_id = 0
        self.expectations = Expectations(stats, events)
        # Tuples of announced PPTP calls, the oldest first, by what a packet tells of them, with its zone: not the id of
        # its own side.
        self.gre_keymap: dict[bytes, list[bytes]] = {}
        # Unconfirmed connections by original tuple, in two generations: `rotate` forgets the old one whole, so a
        # connection whose packet was dropped on the way costs nothing to clean up, however many there are.
        self.unconfirmed: dict[bytes, Conn] = {}
        self.unconfirmed_old: dict[bytes, Conn] = {}
        self.rotated_ms = 0
        # The order in which connections may be evicted.
        self.not_assured = activity_ring()
        self.closing = activity_ring()
        self.emergency = False
        self.scale = UNSCALED  # what adaptive timeouts are multiplied with
        self.wheel: list[Conn] = [due_ring() for _ in range(WHEEL_SLOTS)]
        self.wheel_second = -1  # slots up to this one have been looked at

    def find(self, key: bytes, now_ms: int, zone: int = 0) -> Conn | None:
        """Look a tuple up among the confirmed connections [__nf_conntrack_find_get]; an expired one is a miss."""
        if zone:
            key = zone_key(zone, key)
        hashed: i64 = hash(key)
        ct = self.shards[(hashed >> SHARD_SHIFT) & (SHARDS - 1)].get(key)
        if ct is not None and ct.expires_ms <= now_ms:
            self.expire(ct, now_ms)
            return None
        return ct

    def get(self, key: bytes, zone: int = 0) -> Conn | None:
        """Look a tuple up without ending what has expired: for those who only want to know."""
        key = zone_key(zone, key)
        return self.shard(key).get(key)

    def shard(self, key: bytes) -> dict[bytes, Conn]:
        """Return the dictionary that a key, zone and all, belongs in."""
        hashed: i64 = hash(key)
        return self.shards[(hashed >> SHARD_SHIFT) & (SHARDS - 1)]

    def connections(self) -> "Iterator[Conn]":
        """Go through all connections, expired ones too, each that is there all the time exactly once.

        The table may change meanwhile: what is copied at a time is one shard.
        """
        for shard in self.shards:
            for key, ct in list(shard.items()):
                if key == zone_key(ct.zone, ct.orig) and not ct.status & IPS_DYING:
                    yield ct

    def seen_since(self, since_ms: int) -> "Iterator[Conn]":
        """Go through the connections that had a packet then or later; the table must not change meanwhile.

        Along the wheel, where neighbours mostly are neighbours in memory, this takes a third of the time.
        """
        for slot in self.wheel:
            ct = slot.later
            while ct is not None and ct is not slot:
                if ct.seen_ms >= since_ms:
                    yield ct
                ct = ct.later

    def insert(self, ct: Conn, now_ms: int, labels: int = 0) -> None:
        """Enter a connection under both tuples; its timeout, relative until now, starts to run."""
        assert not ct.status & (IPS_CONFIRMED | IPS_DYING)
        self.last_id += 1
        ct.id = self.last_id
        ct.status |= IPS_CONFIRMED
        ct.expires_ms += now_ms
        ct.seen_ms = now_ms
        self.enter(ct, now_ms)
        self.stats.insert += 1
        if labels:
            self.labels[ct.id] = labels
        if self.events.listeners:
            bits = IPCT_RELATED if ct.status & IPS_EXPECTED else IPCT_NEW
            self.notify(ct, bits | IPCT_LABEL if labels else bits, 0, now_ms)

    def enter(self, ct: Conn, now_ms: int) -> None:
        """Enter a connection that has all it needs: a new one, or one that was there before a restart."""
        orig, reply = zone_key(ct.zone, ct.orig), zone_key(ct.zone, ct.reply)
        orig_shard, reply_shard = self.shard(orig), self.shard(reply)
        assert orig not in orig_shard
        assert reply not in reply_shard
        orig_shard[orig] = ct
        reply_shard[reply] = ct
        self.count += 1
        if ct.zone:
            self.zone_counts[ct.zone] = self.zone_counts.get(ct.zone, 0) + 1
        if self.sysctl.max_per_source:
            self.count_source(ct, 1)
        self.settle(ct, now_ms)

    def kill(self, ct: Conn, now_ms: int, reason: int = CLOSED_KILLED) -> None:
        """Take a connection out [nf_ct_kill], for a reason of const.CLOSED_*. One that is out already stays out."""
        if ct.status & IPS_DYING:
            return
        ct.status |= IPS_DYING
        if not ct.status & IPS_CONFIRMED:
            self.drop_unconfirmed(ct)
            self.forget_help(ct, now_ms)
            return
        orig, reply = zone_key(ct.zone, ct.orig), zone_key(ct.zone, ct.reply)
        orig_shard, reply_shard = self.shard(orig), self.shard(reply)
        assert orig_shard.get(orig) is ct
        assert reply_shard.get(reply) is ct
        del orig_shard[orig]
        if reply != orig:  # a packet from an address and port to themselves answers itself
            del reply_shard[reply]
        leave_activity(ct)
        leave_due(ct)
        self.count -= 1
        if ct.zone:
            left = self.zone_counts[ct.zone] - 1
            if left:
                self.zone_counts[ct.zone] = left
            else:
                del self.zone_counts[ct.zone]
        if ct.status & IPS_COUNTED:
            self.count_source(ct, -1)
        if ct.account is not None:
            ct.account.leave(ct)
        self.stats.destroyed += 1
        self.stats.closed[reason] += 1
        if self.events.listeners:
            self.notify(ct, IPCT_DESTROY, reason, now_ms)
        if self.labels:
            self.labels.pop(ct.id, None)
        self.forget_help(ct, now_ms)

    def expire(self, ct: Conn, now_ms: int) -> None:
        """Take out a connection whose time is up: it timed out, unless it was ending anyway."""
        self.kill(ct, now_ms, ct.ending if ct.ending else CLOSED_TIMEOUT)

    def settle(self, ct: Conn, now_ms: int) -> None:
        """Put a confirmed connection where it belongs in the orders of eviction and expiry, as the one seen last.

        To be called after every packet that changed its status or state.
        """
        leave_activity(ct)
        if not ct.status & IPS_ASSURED:
            enter_activity(self.not_assured, ct)
        elif ct.ending:
            enter_activity(self.closing, ct)
        self.schedule(ct, now_ms)

    def touch(self, ct: Conn) -> None:
        """Make a connection that may be evicted the one seen last."""
        leave_activity(ct)
        enter_activity(self.closing if ct.status & IPS_ASSURED else self.not_assured, ct)

    def notify(self, ct: Conn, bits: int, reason: int, now_ms: int) -> None:
        """Tell those who listen."""
        self.events.add(Event(ct, bits, reason, now_ms, None, self.labels.get(ct.id, 0) if self.labels else 0))

    # --- Limits -------------------------------------------------------------------------------------------

    def refusal(self, orig: bytes, zone: int, now_ms: int) -> int:
        """Say why a new connection can't be confirmed now: a STRESSED reason, or 0.

        Only what has expired is ended here: the new one's packet may still be dropped by the policy.
        """
        sysctl = self.sysctl
        if sysctl.max_per_source and self.from_source(orig, zone) >= sysctl.max_per_source:
            self.stats.source_full += 1
            return STRESSED_SOURCE_FULL
        if zone and sysctl.max_per_zone and self.zone_counts.get(zone, 0) >= sysctl.max_per_zone:
            self.stats.zone_full += 1
            return STRESSED_ZONE_FULL
        if sysctl.max and self.count >= sysctl.max:
            before = self.count
            self.sweep(now_ms)
            self.stats.expired_when_full += before - self.count
            if self.count >= sysctl.max and self.victim(now_ms) is None:
                self.emergency = True
                self.stats.table_full += 1
                return STRESSED_TABLE_FULL
        return 0

    def make_room(self, ct: Conn, now_ms: int) -> int:
        """Make sure that a new connection can be entered [early_drop]; returns a STRESSED reason if it can't, or 0."""
        reason = self.refusal(ct.orig, ct.zone, now_ms)
        if reason:
            return reason
        while self.sysctl.max and self.count >= self.sysctl.max:
            victim = self.victim(now_ms)
            if victim is None:  # `max` was lowered by more than can go now
                self.stats.table_full += 1
                return STRESSED_TABLE_FULL
            self.evict(victim, now_ms)
        return 0

    def victim(self, now_ms: int) -> Conn | None:
        """Choose the connection that goes for a new one, None if none may."""
        spared_ms = now_ms - self.sysctl.early_drop_timeout
        for ring in (self.not_assured, self.closing):
            ct = ring.newer
            if ct is not None and ct is not ring and (ct.seen_ms <= spared_ms or ct.expires_ms <= now_ms):
                return ct
        return None

    def evict(self, ct: Conn, now_ms: int) -> None:
        """End a connection for the sake of a new one, and count it on its rung of the ladder."""
        if ct.expires_ms <= now_ms:
            self.stats.expired_when_full += 1
            self.expire(ct, now_ms)
            return
        if ct.status & IPS_ASSURED:
            self.emergency = True
            self.stats.emergency_drop += 1
        else:
            self.stats.early_drop += 1
        self.kill(ct, now_ms, CLOSED_EVICTED)

    def from_source(self, orig: bytes, zone: int) -> int:
        """Count the connections that the source of a tuple has opened, since that is limited."""
        if not self.source_counts:
            return 0
        address = zone_key(zone, source(orig))
        return self.source_counts[hash(address) >> SHARD_SHIFT & (SHARDS - 1)].get(address, 0)

    def count_source(self, ct: Conn, change: int) -> None:
        """Count a connection on its source, or no more."""
        if not self.source_counts:
            self.source_counts = [{} for _ in range(SHARDS)]
        ct.status |= IPS_COUNTED
        address = zone_key(ct.zone, source(ct.orig))
        counts = self.source_counts[hash(address) >> SHARD_SHIFT & (SHARDS - 1)]
        count = counts.get(address, 0) + change
        if count:
            counts[address] = count
        else:
            del counts[address]

    def adapt(self) -> None:
        """Scale timeouts by how full the table is: linearly from all to nothing between two levels, as pf does."""
        limit = self.sysctl.max
        start = limit * self.sysctl.adaptive_start // 100
        end = limit * self.sysctl.adaptive_end // 100
        if end <= start or self.count <= start:
            self.scale = UNSCALED
        else:
            self.scale = max(0, (end - self.count << SCALE_BITS) // (end - start))
        if self.emergency and self.count < limit * EMERGENCY_ENDS_PERCENT // 100:
            self.emergency = False

    def due_ms(self, ct: Conn) -> int:
        """Say when gc may end a connection: when it expires, or earlier if the table fills up.

        In an emergency that goes for all, before for those that are not ASSURED, or about to end.
        """
        if self.scale == UNSCALED or (ct.status & IPS_ASSURED and not ct.ending and not self.emergency):
            return ct.expires_ms
        return ct.seen_ms + ((ct.expires_ms - ct.seen_ms) * self.scale >> SCALE_BITS)

    def forget_help(self, ct: Conn, now_ms: int) -> None:
        """End what the helper of a connection keeps outside of it: it is over [nf_ct_helper_destroy]."""
        if ct.help is not None:
            ct.help.helper.destroy(self, ct, now_ms)
            self.expectations.unlink_all(ct.help, now_ms)

    def read_tuple(self, data: bytes, at: int, zone: int) -> bytes:
        """Read the tuple of the packet at `at`, be it one of a PPTP call; b"" as get_tuple [nf_ct_get_tuplepr]."""
        key = get_tuple(data, at)
        return self.gre_tuple(key, data, transport(data, at)[0], zone) if key and key[0] == IPPROTO_GRE else key

    def gre_tuple(self, key: bytes, data: bytes, dataoff: int, zone: int) -> bytes:
        """Complete the tuple of a GRE packet: PPTP's names the call of its receiver only [gre_keymap_lookup]."""
        calls = self.gre_keymap.get(zone_key(zone, key)) if self.gre_keymap else None
        return calls[0] if calls and names_call(data, dataoff) else key

    # --- Unconfirmed connections --------------------------------------------------------------------------

    def find_unconfirmed(self, key: bytes, zone: int = 0) -> Conn | None:
        """Look up the connection that a packet on its way through the router began."""
        if zone:
            key = zone_key(zone, key)
        ct = self.unconfirmed.get(key)
        if ct is None and self.unconfirmed_old:
            ct = self.unconfirmed_old.get(key)
        return ct

    def hold_unconfirmed(self, ct: Conn, now_ms: int) -> None:
        """Keep a new connection until its packet reaches the postrouting verdict.

        At the limit the older half is forgotten: a packet that still comes for one of them is tracked afresh.
        """
        if len(self.unconfirmed) >= self.sysctl.unconfirmed_max >> 1:
            self.stats.unconfirmed_full += len(self.unconfirmed_old)
            self.rotate(now_ms)
        self.unconfirmed[zone_key(ct.zone, ct.orig)] = ct
        self.stats.created += 1

    def drop_unconfirmed(self, ct: Conn) -> None:
        """Let go of an unconfirmed connection: it was confirmed, or its packet dropped."""
        key = zone_key(ct.zone, ct.orig)
        if self.unconfirmed.pop(key, None) is None:
            self.unconfirmed_old.pop(key, None)

    def unconfirmed_count(self) -> int:
        """Count the connections that wait for their postrouting verdict."""
        return len(self.unconfirmed) + len(self.unconfirmed_old)

    def rotate(self, now_ms: int) -> None:
        """Forget the unconfirmed connections of the generation before last."""
        self.stats.unconfirmed_expired += len(self.unconfirmed_old)
        self.unconfirmed_old = self.unconfirmed
        self.unconfirmed = {}
        self.rotated_ms = now_ms

    # --- Garbage collection -------------------------------------------------------------------------------

    def schedule(self, ct: Conn, now_ms: int) -> None:
        """Put a connection in the slot in which gc will look at it next."""
        if self.wheel_second < 0:
            self.wheel_second = now_ms // 1000
        due_ms = self.due_ms(ct)
        if due_ms > now_ms + GC_HORIZON_MS:
            due_ms = now_ms + GC_HORIZON_MS
        # Counted from the slot that gc has come to, which may lag behind: the wheel must not come round to it.
        second = min(max(due_ms // 1000, self.wheel_second) + 1, self.wheel_second + WHEEL_SLOTS)
        leave_due(ct)
        enter_due(self.wheel[second % WHEEL_SLOTS], ct)

    def gc(self, now_ms: int) -> int:
        """Look at up to GC_SLICE connections that are due, end the expired ones; return when to come again."""
        if now_ms - self.rotated_ms >= self.sysctl.unconfirmed_timeout >> 1:
            self.rotate(now_ms)
        self.expectations.sweep(now_ms)
        self.adapt()
        return now_ms + GC_PAUSE_MS if self.sweep(now_ms) else now_ms

    def sweep(self, now_ms: int) -> bool:
        """Look at up to GC_SLICE connections that are due; say whether that were all."""
        second = now_ms // 1000
        if self.wheel_second < 0:
            return True
        if second - self.wheel_second > WHEEL_SLOTS:
            self.wheel_second = second - WHEEL_SLOTS  # once round looks at everything
        looked = 0
        while self.wheel_second < second:
            slot = self.wheel[(self.wheel_second + 1) % WHEEL_SLOTS]
            ct = slot.later
            while ct is not None and ct is not slot:
                if looked == GC_SLICE:
                    return False
                looked += 1
                if ct.expires_ms <= now_ms:
                    self.expire(ct, now_ms)
                elif self.due_ms(ct) <= now_ms:
                    self.stats.adaptive_drop += 1
                    self.expire(ct, now_ms)
                else:
                    self.schedule(ct, now_ms)
                ct = slot.later
            self.wheel_second += 1
        return True
