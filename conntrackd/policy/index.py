"""The index of rules: it finds the few rules that could match a packet, however many others there are.

It is a tuple space search, in two steps. A rule stands in a column by a prefix of its source or its destination, if it
names one; there, by what it says of zones, protocol and port, written as one number of which it masks some parts out. A
lookup costs a probe for each prefix length and each mask that is used, some tens at most, and none behind a rule that
is found to match. The index may name rules that do not match, never leave one out: match.py looks at each.
"""

from typing import Final

from conntrackd.policy.ruleset import AddressRules, Column, Index, Mask, Rule
from conntrackd.policy.sets import Addresses

# The key: the two zones, the protocol, and the last two bytes of the tuple (a port, or an ICMP type and code).
FROM_SHIFT: Final = 36
TO_SHIFT: Final = 24
PROTOCOL_SHIFT: Final = 16
ZONE_MASK: Final = 0xFFF
FROM_MASK: Final = ZONE_MASK << FROM_SHIFT
TO_MASK: Final = ZONE_MASK << TO_SHIFT
PROTOCOL_MASK: Final = 0xFF << PROTOCOL_SHIFT

NO_ADDRESS: Final = 0
SOURCE: Final = 1
DESTINATION: Final = 2

# Few lengths make few probes: a prefix is looked up by the next shorter one of these.
LENGTHS4: Final = (32, 28, 24, 20, 16, 12, 8)
LENGTHS6: Final = (128, 112, 96, 80, 64, 56, 48, 32, 16)
# A range of ports is looked up by blocks of 2^n ports, of the smallest size that takes no more than these.
PORT_BLOCKS: Final = (0, 4, 8, 12)
BLOCKS_MAX: Final = 16
# A rule with more addresses than these, or more combinations of the rest, is found by less.
ADDRESSES_MAX: Final = 256
KEYS_MAX: Final = 1024

NOWHERE: Final = 1 << 30


class Builder:
    """Makes one index. Rules are added in their order, one call each: packets go on in between."""

    def __init__(self, ipv6: bool) -> None:
        self.ipv6 = ipv6
        self.columns: dict[tuple[int, int], Column] = {}

    def add(self, rule: Rule) -> None:
        """Add a rule, if it can match anything of this family."""
        if not (rule.ipv6 if self.ipv6 else rule.ipv4):
            return
        keys = keys_of(rule)
        for side, shift, prefix in places_of(rule, self.ipv6):
            column = self.columns.get((side, shift))
            if column is None:
                column = self.columns[side, shift] = Column(side, shift)
                column.first = rule.order
            entry = column.table.get(prefix)
            if entry is None:
                entry = column.table[prefix] = AddressRules()
                entry.first = rule.order
            enter(entry, rule, keys)

    def finish(self, index: Index) -> None:
        """Fill the index."""
        index.columns = sorted(self.columns.values(), key=first_of_column)


def first_of_column(column: Column) -> int:
    """Order columns."""
    return column.first


def enter(entry: AddressRules, rule: Rule, keys: list[tuple[int, int]]) -> None:
    """Add a rule under its keys. Rules come in their order, so lists and masks are in order by themselves."""
    for mask, key in keys:
        found: Mask | None = None
        for known in entry.masks:
            if known.mask == mask:
                found = known
                break
        if found is None:
            found = Mask(mask)
            found.first = rule.order
            entry.masks.append(found)
        rules = found.table.get(key)
        if rules is None:
            found.table[key] = [rule]
        elif rules[-1] is not rule:
            rules.append(rule)


def places_of(rule: Rule, ipv6: bool) -> list[tuple[int, int, int]]:
    """Choose where a rule stands, as (side, shift, prefix): by its longest prefixes, if it has few enough."""
    best: list[tuple[int, int, int]] = []
    best_shift = NOWHERE
    for side, addresses in ((SOURCE, rule.source), (DESTINATION, rule.destination)):
        # A set changes while the daemon runs: only what stands in the rule itself can be indexed.
        if addresses is None or not addresses.included or named(addresses):
            continue
        places: set[tuple[int, int, int]] = set()
        widest = 0
        for entry in addresses.included:
            prefixes = entry.ipv6 if ipv6 else entry.ipv4
            if prefixes.count() > ADDRESSES_MAX:
                widest = NOWHERE
                break
            for shift, table in zip(prefixes.shifts, prefixes.tables, strict=True):
                wider = rounded_shift(shift, ipv6)
                if wider > widest:
                    widest = wider
                for prefix in table:
                    places.add((side, wider, prefix >> (wider - shift)))
        if widest < best_shift and widest < (128 if ipv6 else 32):
            best = sorted(places)
            best_shift = widest
    return best or [(NO_ADDRESS, 0, 0)]


def named(addresses: Addresses) -> bool:
    """Whether a rule names a set."""
    for entry in addresses.included:  # noqa: SIM110 - a generator costs
        if entry.name:
            return True
    return False


def rounded_shift(shift: int, ipv6: bool) -> int:
    """Round the number of bits behind a prefix up to one that is used."""
    bits = 128 if ipv6 else 32
    for length in LENGTHS6 if ipv6 else LENGTHS4:
        if bits - length >= shift:
            return bits - length
    return bits


def keys_of(rule: Rule) -> list[tuple[int, int]]:
    """Write what a rule says of zones, protocol and port as (mask, key) pairs."""
    tails = tails_of(rule.traffic)
    sources = zones_of(rule.from_zones)
    targets = zones_of(rule.to_zones)
    if len(tails) * len(sources) * len(targets) > KEYS_MAX:
        tails = [(0, 0)]
        if len(sources) * len(targets) > KEYS_MAX:
            targets = [-1]
    keys = set()
    for mask, key in tails:
        for source in sources:
            for target in targets:
                whole_mask, whole = mask, key
                if source >= 0:
                    whole_mask |= FROM_MASK
                    whole |= source << FROM_SHIFT
                if target >= 0:
                    whole_mask |= TO_MASK
                    whole |= target << TO_SHIFT
                keys.add((whole_mask, whole))
    return sorted(keys)


def zones_of(bits: int) -> list[int]:
    """List the zones of a rule; [-1] if it names none."""
    if bits == 0:
        return [-1]
    return [zone for zone in range(bits.bit_length()) if bits >> zone & 1]


def tails_of(traffic: list[int]) -> list[tuple[int, int]]:
    """Write protocols and ports as (mask, key) pairs."""
    if not traffic:
        return [(0, 0)]
    tails: list[tuple[int, int]] = []
    for at in range(0, len(traffic), 3):
        protonum, first, last = traffic[at], traffic[at + 1], traffic[at + 2]
        key = protonum << PROTOCOL_SHIFT
        size = block_size(first, last)
        if size < 0:
            tails.append((PROTOCOL_MASK, key))
            continue
        mask = PROTOCOL_MASK | 0xFFFF >> size << size
        for block in range(first >> size, (last >> size) + 1):
            tails.append((mask, key | block << size))
    return tails


def block_size(first: int, last: int) -> int:
    """Choose the blocks for a range of ports, as a power of two; -1: none, the range is too wide."""
    for size in PORT_BLOCKS:
        if (last >> size) - (first >> size) < BLOCKS_MAX:
            return size if first > 0 or last < 0xFFFF else -1
    return -1
