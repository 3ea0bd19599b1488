"""The ruleset: the configured policy in the form that packets are judged by (match.py judges, index.py finds).

A rule is made of integers and sets of addresses. Zones are small numbers. Rules are asked about new connections, and
some about RELATED and INVALID packets; each kind has indexes of its own, so that it meets no rule of another.
"""

from typing import Final

from conntrackd.const import LABELS_MAX
from conntrackd.core.account import Account
from conntrackd.core.sysctl import Sysctl
from conntrackd.policy.limits import Bucket, RateLimit
from conntrackd.policy.sets import Addresses, AddressSet, Prefixes

# Zone numbers. Zones of the configuration follow.
NO_ZONE: Final = 0  # an interface that belongs to no zone
SELF: Final = 1  # the router itself

# What a rule does.
ACCEPT: Final = 0
DROP: Final = 1
REJECT: Final = 2
NOTRACK: Final = 3
LOG: Final = 4
ACTION_NAMES: Final = ("accept", "drop", "reject", "notrack", "log")

# What rules are asked about.
NEW: Final = 0
RELATED: Final = 1
INVALID: Final = 2
STATES: Final = 3
STATE_NAMES: Final = ("new", "related", "invalid")

ANY_INTERFACE: Final = -1


class Rule:
    """One compiled rule. What is empty, 0 or None matches everything."""

    def __init__(self, name: str, action: int, order: int) -> None:
        # Immutable: what it says.
        self.name = name
        self.action = action
        self.accept = action == ACCEPT
        self.order = order  # in the file; of two that match the lower one decides
        self.states: list[int] = [NEW]
        self.from_zones = 0  # a bit per zone
        self.to_zones = 0
        self.traffic: list[int] = []  # protocol, first, last, protocol, first, last, ... (config.Traffic)
        self.ipv4 = True  # whether it can match anything of this family
        self.ipv6 = True
        self.source: Addresses | None = None
        self.destination: Addresses | None = None
        self.reject_with = ""
        self.log = False
        self.mark = -1  # -1: leaves it alone
        self.labels = 0  # that it sets, 128 bits
        self.helper = ""
        self.timeouts: Sysctl | None = None
        self.timeouts_number = (
            0  # place of `timeouts` in Conntrack.timeouts, from 1; given when the policy is put in force
        )
        self.limited = False  # whether one of the three below is set
        self.rate: RateLimit | None = None
        self.max_flows = 0
        self.max_flows_per_src = 0
        # Mutable: counters, which the rule of this name in the next generation takes over.
        self.hits = 0  # packets that it decided
        self.hit_bytes = 0
        self.last_hit_ms = -1
        self.flows = 0  # connections that it admitted
        self.account = Account()  # what they are and were
        self.log_bucket: Bucket | None = None
        self.unlogged = 0  # lines that were left out of the log


class Mask:
    """The rules of one address that name the same parts of the key (Index.key), by their values of these parts."""

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.first = 1 << 30  # the lowest order of its rules
        self.table: dict[int, list[Rule]] = {}


class AddressRules:
    """The rules of one address."""

    def __init__(self) -> None:
        self.first = 1 << 30
        self.masks: list[Mask] = []  # by `first`


class Column:
    """The rules that name a source, or a destination, with a prefix of one length; by that prefix."""

    def __init__(self, side: int, shift: int) -> None:
        self.side = side
        self.shift = shift
        self.first = 1 << 30
        self.table: dict[int, AddressRules] = {}


class Index:
    """The rules for one state and family, by what can be looked up of them."""

    def __init__(self) -> None:
        self.columns: list[Column] = []  # by `first`


class Ruleset:
    """A compiled policy of one generation."""

    def __init__(self, generation: int, zones: list[str]) -> None:
        self.generation = generation
        self.zones: dict[str, int] = {"self": SELF}
        for zone in zones:
            self.zones[zone] = SELF + len(self.zones)
        self.rules: list[Rule] = []  # all, in the order of the files, the defaults last
        self.by_name: dict[str, Rule] = {}
        self.indexes: list[Index] = [Index() for _ in range(STATES * 2)]  # at state * 2, and one further for IPv6
        self.asks = [False] * STATES  # whether any rule is asked about a state
        self.log_rules: list[Rule] = []  # action = "log": they decide nothing
        self.notrack_rules: list[Rule] = []  # action = "notrack": asked before a packet is tracked
        self.sets: dict[str, AddressSet] = {}
        self.labels: dict[int, str] = {}  # names by bit
        # What decides when no rule does.
        self.default_forward = Rule("default-forward", DROP, 1 << 30)
        self.default_input = Rule("default-input", DROP, 1 << 30)
        self.default_output = Rule("default-output", ACCEPT, 1 << 30)
        self.default_related = Rule("default-related", ACCEPT, 1 << 30)
        self.default_invalid = Rule("default-invalid", DROP, 1 << 30)
        self.fragment_accept = False
        # What happens when the tracker cannot take a packet.
        self.table_full_accept = False
        self.reject_bucket = Bucket(100, 1000, 100)
        # Zones by interface.
        self.interfaces: dict[str, int] = {}  # name or beginning with * -> zone
        self.zone_of: dict[int, int] = {0: SELF}  # interface index -> zone
        # Zones of networks: (names of interfaces, [] for all; ipv6; address; length; zone). `sourced` is made of them.
        self.networks: list[tuple[list[str], bool, int, int, int]] = []
        self.conntrack_zones: dict[int, int] = {}  # zone -> zone of the tracker, where it is not 0
        self.sourced: dict[int, Prefixes] = {}  # interface index * 2 + ipv6 -> zones by network

    def label_bit(self, text: str) -> int:
        """Find the bit of a label by its name or, as every bit, by its number; -1: there is none."""
        if text.isascii() and text.isdigit():
            return int(text) if len(text) < 4 and int(text) < LABELS_MAX else -1
        for bit, name in self.labels.items():
            if name == text:
                return bit
        return -1

    def label_names(self, labels: int) -> list[str]:
        """Name labels in the order of their bits; one that has no name is its number."""
        return [self.labels.get(bit, str(bit)) for bit in range(LABELS_MAX) if labels >> bit & 1]

    def set_links(self, links: dict[int, str]) -> None:
        """Take the interfaces that exist now, as index -> name; to be called whenever they change."""
        zone_of = {0: SELF}
        for ifindex, name in links.items():
            found = best_pattern(name, list(self.interfaces))
            zone_of[ifindex] = self.interfaces[found] if found else NO_ZONE
        sourced: dict[int, Prefixes] = {}
        # The less an entry says about the interface the earlier it is put in, so that those that say more replace it.
        places: list[tuple[int, int, bool, int, int, int]] = []
        for names, ipv6, address, length, zone in self.networks:
            if not names:
                places += [(0, ifindex, ipv6, address, length, zone) for ifindex in (ANY_INTERFACE, *links)]
                continue
            for ifindex, name in links.items():
                found = best_pattern(name, names)
                if found:
                    places.append((len(found) + (found == name), ifindex, ipv6, address, length, zone))
        for _, ifindex, ipv6, address, length, zone in sorted(places):
            at = ifindex * 2 + ipv6
            if at not in sourced:
                sourced[at] = Prefixes(128 if ipv6 else 32)
            sourced[at].put(address, length, zone)
        self.zone_of = zone_of
        self.sourced = sourced

    def zone(self, ifindex: int, address: int, ipv6: bool) -> int:
        """Find the zone of an address at an interface; 0 is the router itself."""
        if self.sourced and ifindex != 0:
            prefixes = self.sourced.get(ifindex * 2 + ipv6)
            if prefixes is None and ifindex not in self.zone_of:
                prefixes = self.sourced.get(ANY_INTERFACE * 2 + ipv6)
            if prefixes is not None:
                found = prefixes.nearest(address)
                if found >= 0:
                    return found
        return self.zone_of.get(ifindex, NO_ZONE)


def best_pattern(name: str, patterns: list[str]) -> str:
    """Choose what fits an interface best: its full name, else its longest beginning with *; "" for none."""
    if name in patterns:
        return name
    for length in range(len(name), -1, -1):
        beginning = name[:length] + "*"
        if beginning in patterns:
            return beginning
    return ""
