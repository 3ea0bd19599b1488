"""Expectations [nf_conntrack_expect.c]: connections that a helper has heard announced and that will be RELATED.

An expectation is a tuple and a mask over its source: the destination is always exact, the source's address and port may
be left open. It belongs to the connection that announced it, its master, and goes with it. The first connection that
matches takes it away; a permanent one stays until its time is up.

The master holds its expectations in a list that is emptied when the master is killed, so nothing here keeps anything
alive in a circle. Like a connection, an expectation that has expired is absent, and swept later.
"""

from typing import TYPE_CHECKING, Final

from conntrackd.const import IPEXP_DESTROY, IPEXP_NEW, IPS_CONFIRMED, IPS_DYING
from conntrackd.core.ecache import Event, EventRing
from conntrackd.core.stats import Stats

if TYPE_CHECKING:
    from conntrackd.core.conn import Conn
    from conntrackd.core.helper import Help, Helper

EXPECT_PERMANENT: Final = 1  # not taken away by the first match
EXPECT_INACTIVE: Final = 2  # announced but not yet agreed to: matches nothing

EXPECT_FLAG_NAMES: Final = {EXPECT_PERMANENT: "PERMANENT", EXPECT_INACTIVE: "INACTIVE"}

# What `insert` answers.
EXPECT_OK: Final = 0
EXPECT_BUSY: Final = 1  # it overlaps another expectation
EXPECT_FULL: Final = 2  # the class of the helper, or all of us, hold as many as they may
EXPECT_ALREADY: Final = 3  # the same is expected in another class, or by another master

ANY_PORT: Final = -1
SWEEP_SLICE: Final = 512  # expectations looked at in one turn


class Expect:
    """One expected connection. `tuple` and `mask` have the form of a tuple (core/tuples.py)."""

    def __init__(self, master: "Conn", expect_class: int, tuple_: bytes, mask: bytes, flags: int) -> None:
        # Immutable.
        self.master = master
        self.expect_class = expect_class  # index into the policies of the master's helper
        self.tuple = tuple_
        self.mask = mask
        self.helper: Helper | None = None  # of the connection to come
        # Set once: when it is inserted.
        self.id = 0
        # Mutable.
        self.flags = flags
        self.expires_ms = 0

    def matches(self, key: bytes) -> bool:
        """Whether a tuple with the same destination is the expected one."""
        return overlap(self.tuple, key, self.mask)


def overlap(a: bytes, b: bytes, mask: bytes) -> bool:
    """Whether two tuples are equal where the mask has bits [nf_ct_tuple_mask_cmp]."""
    different = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
    return different & int.from_bytes(mask, "big") == 0


def both_masks(a: bytes, b: bytes) -> bytes:
    """Return the mask of what two masks have in common."""
    return (int.from_bytes(a, "big") & int.from_bytes(b, "big")).to_bytes(len(a), "big")


def expect_from(
    master: "Conn",
    expect_class: int,
    protonum: int,
    source: bytes,
    source_port: int,
    target: bytes,
    target_port: int,
    flags: int = 0,
) -> Expect:
    """Make an expectation [nf_ct_expect_init]: source b"" is any address, source_port ANY_PORT any port."""
    size = len(target)
    tuple_ = bytes((protonum,)) + (source or bytes(size)) + target
    mask = b"\xff" + (b"\xff" if source else b"\0") * size + b"\xff" * size
    if source_port == ANY_PORT:
        tuple_ += b"\0\0"
        mask += b"\0\0"
    else:
        tuple_ += source_port.to_bytes(2, "big")
        mask += b"\xff\xff"
    return Expect(master, expect_class, tuple_ + target_port.to_bytes(2, "big"), mask + b"\xff\xff", flags)


def destination_part(key: bytes) -> bytes:
    """Cut out of a tuple what an expectation is exact about: protocol, destination address and port."""
    size = (len(key) - 5) >> 1
    return key[:1] + key[1 + size : 1 + 2 * size] + key[-2:]


class Expectations:
    """All expectations, by destination."""

    def __init__(self, stats: Stats, events: EventRing) -> None:
        self.stats = stats
        self.events = events
        self.hash: dict[bytes, list[Expect]] = {}
        self.by_id: dict[int, Expect] = {}
        self.last_id = 0
        self.to_sweep: list[Expect] = []

    def find(self, key: bytes, zone: int, now_ms: int) -> Expect | None:
        """Look for the expectation of a tuple [__nf_ct_expect_find]; an expired one is absent."""
        for expect in self.at(key, zone, now_ms):
            if expect.matches(key):
                return expect
        return None

    def take(self, key: bytes, zone: int, now_ms: int) -> Expect | None:
        """Find what a new connection fulfils and, unless it is permanent, take it away [nf_ct_find_expectation]."""
        for expect in self.at(key, zone, now_ms):
            if expect.flags & EXPECT_INACTIVE or not expect.matches(key):
                continue
            # A master whose packet has not left yet can have told nobody; one that has ended expects nothing.
            master = expect.master
            if master.status & (IPS_CONFIRMED | IPS_DYING) != IPS_CONFIRMED or master.expires_ms <= now_ms:
                return None
            if not expect.flags & EXPECT_PERMANENT:
                self.unlink(expect, now_ms)
            return expect
        return None

    def at(self, key: bytes, zone: int, now_ms: int) -> list[Expect]:
        """List the expectations with the destination of a tuple in a zone, and take out the expired ones."""
        found = self.hash.get(destination_part(key))
        if not found:
            return []
        self.unlink_expired(list(found), now_ms)
        return [expect for expect in found if expect.master.zone == zone]

    def insert(self, expect: Expect, any_master: bool, limit: int, now_ms: int) -> int:
        """Enter an expectation by the policy of its helper [nf_ct_expect_related]: EXPECT_OK, or why it can't be.

        The same one of the same master is renewed, and so it is whoever's it was with `any_master`. At the limit of its
        class it takes the place of the oldest; `limit` is that of all together.
        """
        info = expect.master.help
        assert info is not None
        for other in self.at(expect.tuple, expect.master.zone, now_ms):
            same_master = any_master or other.master is expect.master
            if same_master and other.tuple == expect.tuple and other.mask == expect.mask:
                if other.expect_class != expect.expect_class or other.master is not expect.master:
                    return EXPECT_ALREADY
                self.unlink(other, now_ms)
                break
            if overlap(other.tuple, expect.tuple, both_masks(other.mask, expect.mask)):
                return EXPECT_BUSY
        policy = info.helper.policies[expect.expect_class]
        same_class = [
            other
            for other in info.expectations
            if other.expect_class == expect.expect_class and other.expires_ms > now_ms
        ]
        if len(same_class) >= policy.max_expected:
            self.unlink(same_class[0], now_ms)
        if limit and len(self.by_id) >= limit:
            self.unlink_expired(list(self.by_id.values()), now_ms)
            if len(self.by_id) >= limit:
                return EXPECT_FULL
        self.last_id += 1
        expect.id = self.last_id
        expect.expires_ms = now_ms + policy.timeout_ms
        self.by_id[expect.id] = expect
        self.hash.setdefault(destination_part(expect.tuple), []).append(expect)
        info.expectations.append(expect)
        self.stats.expect_create += 1
        if self.events.listeners:
            self.events.add(Event(expect.master, IPEXP_NEW, 0, now_ms, expect))
        return EXPECT_OK

    def unlink(self, expect: Expect, now_ms: int) -> None:
        """Take an expectation out [nf_ct_unlink_expect]. One that is out already stays out."""
        if self.by_id.pop(expect.id, None) is None:
            return
        key = destination_part(expect.tuple)
        others = self.hash[key]
        others.remove(expect)
        if not others:
            del self.hash[key]
        info = expect.master.help
        assert info is not None
        info.expectations.remove(expect)
        self.stats.expect_delete += 1
        if self.events.listeners:
            self.events.add(Event(expect.master, IPEXP_DESTROY, 0, now_ms, expect))

    def unlink_all(self, info: "Help", now_ms: int) -> None:
        """Take out what a master expects: it is over [nf_ct_remove_expectations]."""
        for expect in list(info.expectations):
            self.unlink(expect, now_ms)

    def unlink_expired(self, expectations: list[Expect], now_ms: int) -> None:
        """Take out those of a list that have expired."""
        for expect in expectations:
            if expect.expires_ms <= now_ms:
                self.unlink(expect, now_ms)

    def sweep(self, now_ms: int) -> None:
        """Take out what has expired, a bounded slice at a time; all have been looked at after some turns."""
        if not self.to_sweep:
            self.to_sweep = list(self.by_id.values())
        self.unlink_expired(self.to_sweep[-SWEEP_SLICE:], now_ms)
        del self.to_sweep[-SWEEP_SLICE:]
