"""Single values of the configuration: addresses, ports, protocols, ICMP types, times, rates.

Each reader takes what stands in the file and returns integers, or raises a mistake with one sentence.
"""

import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from socket import AF_INET, AF_INET6, inet_pton
from typing import Final, NamedTuple

from conntrackd.const import (
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPPROTO_UDPLITE,
)
from conntrackd.core.tuples import PROTOCOL_NAMES
from conntrackd.mistakes import any_of, mistake, nearest, shown

PROTOCOL_NUMBERS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
WITH_PORTS: Final = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP, IPPROTO_UDPLITE)
WITH_TYPES: Final = (IPPROTO_ICMP, IPPROTO_ICMPV6)
ANY_PROTOCOL: Final = -1

# The types that start a connection (the others answer one or speak of one), as (protocol, type).
ICMP_TYPES: Final = {
    "echo-request": ((IPPROTO_ICMP, 8), (IPPROTO_ICMPV6, 128)),
    "timestamp-request": ((IPPROTO_ICMP, 13),),
    "information-request": ((IPPROTO_ICMP, 15),),
    "address-mask-request": ((IPPROTO_ICMP, 17),),
    "node-information-query": ((IPPROTO_ICMPV6, 139),),
}

MILLISECONDS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

Network = IPv4Network | IPv6Network


class Source(NamedTuple):
    """One entry of `source` or `destination`: a network, or the name of a set; perhaps negated."""

    negated: bool
    network: Network | None
    set_name: str


class Traffic(NamedTuple):
    """What a packet carries: a protocol, and the range that the last two bytes of its tuple lie in.

    They are the destination port, or type and code of an ICMP message; 0 to 65535 is all of them.
    """

    protonum: int
    first: int
    last: int


class Rate(NamedTuple):
    """So many in so many milliseconds."""

    tokens: int
    period_ms: int


def whole(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number in a range; `true` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def protocol(value: object) -> int:
    """Read a protocol, a name or a number."""
    if isinstance(value, int) and whole(value, 0, 255):
        return value
    if isinstance(value, str) and value in PROTOCOL_NUMBERS:
        return PROTOCOL_NUMBERS[value]
    options = sorted(PROTOCOL_NUMBERS)
    expected = any_of([*options, "a number from 0 to 255"])
    raise mistake(f"unknown protocol {shown(value)} (expected {expected})", nearest(value, options))


def network(value: object) -> Network:
    """Read an address or a network."""
    if isinstance(value, str) and "%" not in value:
        try:
            return ip_network(value)
        except ValueError:
            pass
        try:
            meant = ip_network(value, strict=False)
        except ValueError:
            pass
        else:
            raise mistake(f"{shown(value)} has bits set behind its prefix", f"did you mean '{meant}'?")
    raise mistake(f"{shown(value)} is no address or network (expected as '192.0.2.1', '10.0.0.0/8' or '2001:db8::/32')")


def endpoint(value: object) -> tuple[str, int]:
    """Read an address and a port to listen on, as `127.0.0.1:9799` or `[::1]:9799`."""
    found = re.fullmatch(r"(?:\[([\w:.%]+)\]|([\w.-]+)):(\d{1,5})", value) if isinstance(value, str) else None
    if found and 0 < int(found[3]) <= 65535:
        address = found[1] or found[2]
        try:
            if ip_address(address).version == (6 if found[1] else 4):
                return address, int(found[3])
        except ValueError:
            pass
    raise mistake(f"{shown(value)} is no address with a port (expected as '127.0.0.1:9799' or '[::1]:9799')")


def source(value: object, sets: Sequence[str]) -> Source:
    """Read an address, a network or a set as `@name`; `!` in front of it negates it."""
    text = value if isinstance(value, str) else ""
    negated = text.startswith("!")
    text = text.removeprefix("!")
    if not text.startswith("@"):
        return Source(negated, network(text if negated else value), "")
    name = text[1:]
    if name not in sets:
        known = f" (expected {any_of(['@' + known for known in sets])})" if sets else ""
        raise mistake(f"unknown set {text!r}{known}", nearest(name, sets) or f"define it with [sets.{name}]")
    return Source(negated, None, name)


def port(value: object) -> tuple[int, int]:
    """Read one port or a range of ports as (first, last)."""
    found = re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", str(value), re.ASCII)
    if not found or isinstance(value, bool):
        raise mistake(f"{shown(value)} is no port (expected a number or a range as '8000-8080')")
    first, last = int(found[1]), int(found[2] or found[1])
    if max(first, last) > 65535:
        raise mistake(f"port {shown(value)} is out of range (expected 0 to 65535)")
    if first > last:
        raise mistake(f"port range {shown(value)} is backwards", f"did you mean '{last}-{first}'?")
    return first, last


def icmp_type(value: object, protocols: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Read an ICMP type as (protocol, type) for each of the protocols that has it."""
    if isinstance(value, int) and whole(value, 0, 255):
        return tuple((protonum, value) for protonum in protocols)
    options = [name for name, pairs in ICMP_TYPES.items() if any(pair[0] in protocols for pair in pairs)]
    if value in options and isinstance(value, str):
        return tuple(pair for pair in ICMP_TYPES[value] if pair[0] in protocols)
    expected = any_of([*options, "a number from 0 to 255"])
    raise mistake(f"unknown ICMP type {shown(value)} (expected {expected})", nearest(value, options))


def traffic(value: object) -> tuple[Traffic, ...]:
    """Read an entry of a service: `tcp/443`, `udp/8000-8080`, `icmp/echo-request`, `gre`."""
    if not isinstance(value, str):
        raise mistake(f"{shown(value)} is no part of a service (expected as 'tcp/443', 'icmp/echo-request' or 'gre')")
    name, slash, rest = value.partition("/")
    protonum = protocol(int(name) if name.isascii() and name.isdigit() and len(name) < 9 else name)
    if not slash:
        return (Traffic(protonum, 0, 65535),)
    if protonum in WITH_PORTS:
        return (Traffic(protonum, *port(rest)),)
    if protonum in WITH_TYPES:
        types = icmp_type(int(rest) if rest.isascii() and rest.isdigit() and len(rest) < 9 else rest, (protonum,))
        return tuple(Traffic(number, kind << 8, kind << 8 | 255) for number, kind in types)
    raise mistake(f"{name} has no ports", f"write {name!r} alone")


def time(value: object) -> int:
    """Read a time as milliseconds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value * 1000
    if isinstance(value, str) and (found := re.fullmatch(r"(\d{1,12})\s*(ms|s|m|h|d)", value, re.ASCII)):
        return int(found[1]) * MILLISECONDS[found[2]]
    raise mistake(f"{shown(value)} is no time (expected seconds or as '500ms', '120s', '30m', '2h', '5d')")


def timeout(value: object) -> int:
    """Read a time of more than nothing as milliseconds."""
    milliseconds = time(value)
    if milliseconds <= 0:
        raise mistake(f"a timeout of {shown(value)} would end connections at once (expected more than 0)")
    return milliseconds


def rate(value: object) -> Rate:
    """Read how often: `200/s`, `6/m`."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d{1,9})\s*/\s*(s|m|h|d)", value, re.ASCII)):
        if int(found[1]) == 0:
            raise mistake(f"a rate of {shown(value)} lets nothing pass", "use action = 'drop'")
        return Rate(int(found[1]), MILLISECONDS[found[2]])
    raise mistake(f"{shown(value)} is no rate (expected as '200/s', '6/m', '100/h' or '1000/d')")


# --- Lists of addresses -----------------------------------------------------------------------------------------

# Prefix length -> the networks of that length, as integers without the bits behind the prefix; the value is the
# time at which an entry ends, and 0 for those that stand in the configuration.
Prefixes = dict[int, dict[int, int]]


class Addresses:
    """Networks of both families, by prefix length."""

    def __init__(self) -> None:
        self.ipv4: Prefixes = {}
        self.ipv6: Prefixes = {}

    def add(self, network: Network) -> None:
        """Add a network."""
        family = self.ipv4 if isinstance(network, IPv4Network) else self.ipv6
        length = network.prefixlen
        family.setdefault(length, {})[int(network.network_address) >> network.max_prefixlen - length] = 0

    def add_text(self, text: str) -> bool:
        """Add an address or network as it is written; False, and no change, if it is none. Fast, for long lists."""
        address, slash, suffix = text.partition("/")
        try:
            if ":" in address:
                number, bits, family = int.from_bytes(inet_pton(AF_INET6, address), "big"), 128, self.ipv6
            else:
                number, bits, family = int.from_bytes(inet_pton(AF_INET, address), "big"), 32, self.ipv4
        except OSError:
            return False
        length = bits
        if slash:
            if not (suffix.isascii() and suffix.isdigit() and len(suffix) < 4):
                return False
            length = int(suffix)
        if length > bits:
            return False
        prefix = number >> bits - length
        if prefix << bits - length != number:
            return False
        table = family.get(length)
        if table is None:
            table = family[length] = {}
        table[prefix] = 0
        return True

    def count(self) -> int:
        """Count the networks."""
        return sum(len(table) for family in (self.ipv4, self.ipv6) for table in family.values())
