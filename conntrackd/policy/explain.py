"""Explain: which rule decides about a packet, and why each rule before it does not. Nothing is sent or counted."""

import re
from ipaddress import ip_address
from typing import Final, NamedTuple

from conntrackd.const import IPPROTO_ICMP, IPPROTO_ICMPV6
from conntrackd.core.tuples import PROTOCOL_NAMES, format_tuple
from conntrackd.mistakes import any_of, nearest, sentence
from conntrackd.policy.match import in_traffic
from conntrackd.policy.ruleset import (
    ACCEPT,
    ACTION_NAMES,
    INVALID,
    LOG,
    NOTRACK,
    RELATED,
    STATE_NAMES,
    Rule,
    Ruleset,
)
from conntrackd.policy.sets import Addresses
from conntrackd.values import ICMP_TYPES, PROTOCOL_NUMBERS, WITH_PORTS, WITH_TYPES

HOW: Final = (
    "expected as 'tcp 10.0.0.5:1234 > 1.1.1.1:443 in lan out wan' or 'icmp 10.0.0.5 > 1.1.1.1 type 8 in lan out self'"
)
CLIENT_PORT: Final = 40000  # where none is said


class ExplainError(Exception):
    """The packet is not understood; the text is one sentence."""


class Packet(NamedTuple):
    """A packet as it was described. An empty `way_in` or `way_out` was not said."""

    tuple_: bytes
    way_in: str
    way_out: str
    state: int


class Step(NamedTuple):
    """One rule that was asked."""

    rule: str
    action: str
    matches: bool
    why: str


def parse(text: str) -> Packet:
    """Read `PROTOCOL SOURCE[:PORT] > DESTINATION[:PORT] [type N] [in WHERE] [out WHERE] [state STATE]`.

    The `>` may be left out: a shell takes it away, and makes a file, where it is not in quotes.
    """
    found = re.fullmatch(r"\s*(\S+)\s+(\S+?)(?:\s*>\s*|\s+)(\S+)((?:\s+(?:type|code|in|out|state)\s+\S+)*)\s*", text)
    if not found:
        raise ExplainError(f"{text!r} is not understood ({HOW}).")
    protocol, source_text, target_text, rest = found.groups()
    if protocol in PROTOCOL_NUMBERS:
        protonum = PROTOCOL_NUMBERS[protocol]
    elif protocol.isascii() and protocol.isdigit() and int(protocol) < 256:
        protonum = int(protocol)
    else:
        hint = nearest(protocol, list(PROTOCOL_NUMBERS)) or HOW
        raise ExplainError(sentence(f"There is no protocol {protocol!r}", hint))
    words = rest.split()
    more = dict(zip(words[::2], words[1::2], strict=True))
    source, source_port = _endpoint(source_text)
    target, target_port = _endpoint(target_text)
    if len(source) != len(target):
        raise ExplainError(f"{source_text} and {target_text} are of different families.")
    if (source_port >= 0 or target_port >= 0) and protonum not in WITH_PORTS:
        raise ExplainError(f"{protocol} has no ports.")
    tail = b"\0\0\0\0"
    if protonum in WITH_PORTS:
        if target_port < 0:
            place = f"[{ip_address(target)}]" if len(target) == 16 else target_text
            raise ExplainError(f"Say which port: {place}:443.")
        tail = (source_port if source_port >= 0 else CLIENT_PORT).to_bytes(2, "big") + target_port.to_bytes(2, "big")
    elif protonum in WITH_TYPES:
        tail = b"\0\1" + bytes((_icmp_type(protonum, more.get("type", "echo-request")), _code(more.get("code", "0"))))
    state = more.get("state", "new")
    if state not in STATE_NAMES:
        raise ExplainError(f"There is no state {state!r} (expected {any_of(STATE_NAMES)}).")
    tuple_ = bytes((protonum,)) + source + target + tail
    return Packet(tuple_, more.get("in", ""), more.get("out", ""), STATE_NAMES.index(state))


def _endpoint(text: str) -> tuple[bytes, int]:
    """Read `10.0.0.1`, `10.0.0.1:80`, `2001:db8::1` or `[2001:db8::1]:80` as address and port; -1: no port."""
    found = re.fullmatch(r"\[([^\]]+)\](?::(\d{1,5}))?", text) or re.fullmatch(r"([^:]+)(?::(\d{1,5}))?", text)
    address, port = (found[1], found[2]) if found else (text, None)
    try:
        packed = ip_address(address).packed
    except ValueError:
        raise ExplainError(f"{text!r} is no address ({HOW}).") from None
    if port is not None and int(port) > 65535:
        raise ExplainError(f"Port {port} is out of range (expected 0 to 65535).")
    return packed, -1 if port is None else int(port)


def _icmp_type(protonum: int, text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < 256:
        return int(text)
    for number, kind in ICMP_TYPES.get(text, ()):
        if number == protonum:
            return kind
    raise ExplainError(
        f"{PROTOCOL_NAMES[protonum]} has no type {text!r} (expected a number or {any_of(list(ICMP_TYPES))})."
    )


def _code(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < 256:
        return int(text)
    raise ExplainError(f"{text!r} is no code (expected a number from 0 to 255).")


def explain(
    ruleset: Ruleset,
    packet: Packet,
    from_zone: int,
    to_zone: int,
    now_ms: int,
    ways: tuple[str, str] = ("", ""),
) -> list[Step]:
    """Ask the rules one after the other; the last step is the one that decides.

    `ways` are the interfaces it comes and goes by, if they are known: to say which is in no zone.
    """
    steps = []
    names = {number: f"zone {name}" for name, number in ruleset.zones.items()} | {0: "no zone", 1: "the router itself"}
    ends = [
        f"{way}, which is in no zone" if way and not zone else names[zone]
        for way, zone in zip(ways, (from_zone, to_zone), strict=True)
    ]
    for rule in ruleset.rules:
        if rule.order >= len(ruleset.rules):
            continue  # a default
        why = _why_not(rule, packet, from_zone, to_zone, names, ends, now_ms)
        steps.append(Step(rule.name, ACTION_NAMES[rule.action], not why, why or _what_then(rule)))
        if not why and rule.action not in (LOG,):
            return steps
    default = _default(ruleset, packet.state, from_zone, to_zone)
    steps.append(Step(default.name, ACTION_NAMES[default.action], True, "no rule matches"))
    return steps


def _default(ruleset: Ruleset, state: int, from_zone: int, to_zone: int) -> Rule:
    if state == RELATED:
        return ruleset.default_related
    if state == INVALID:
        return ruleset.default_invalid
    if from_zone == ruleset.zones["self"]:
        return ruleset.default_output
    return ruleset.default_input if to_zone == ruleset.zones["self"] else ruleset.default_forward


def _what_then(rule: Rule) -> str:
    if rule.action == LOG:
        return "matches: logged, and the next rules are asked"
    if rule.action == NOTRACK:
        return "matches: passes without being tracked"
    return "matches, as long as its limits allow" if rule.limited and rule.action == ACCEPT else "matches"


def _why_not(
    rule: Rule, packet: Packet, from_zone: int, to_zone: int, names: dict[int, str], ends: list[str], now_ms: int
) -> str:
    """Say what is not true of a packet, which comes from and goes to `ends`; "" if all is."""
    tuple_ = packet.tuple_
    ipv6 = len(tuple_) == 37
    size = 16 if ipv6 else 4
    source, target = tuple_[1 : 1 + size], tuple_[1 + size : 1 + 2 * size]
    if rule.action == NOTRACK:
        if packet.state == RELATED:
            return "it is asked before a packet has a state"
    elif packet.state not in rule.states:
        return f"the packet is {STATE_NAMES[packet.state]}, the rule is about {_zones(rule.states, STATE_NAMES)}"
    if rule.from_zones and not rule.from_zones >> from_zone & 1:
        return f"it comes from {ends[0]}, not from {_named(rule.from_zones, names)}"
    if rule.to_zones and not rule.to_zones >> to_zone & 1:
        return f"it goes to {ends[1]}, not to {_named(rule.to_zones, names)}"
    why = _why_not_traffic(rule.traffic, tuple_)
    if why:
        return why
    for side, addresses, address in (("source", rule.source, source), ("destination", rule.destination, target)):
        if addresses is not None and not addresses.match(int.from_bytes(address, "big"), ipv6, now_ms):
            return _why_not_address(side, addresses, address, now_ms)
    return ""


def _zones(states: list[int], names: tuple[str, ...]) -> str:
    return any_of([names[state] for state in states])


def _named(bits: int, names: dict[int, str]) -> str:
    return any_of([names[number] for number in range(bits.bit_length()) if bits >> number & 1])


def _why_not_traffic(traffic: list[int], tuple_: bytes) -> str:
    protonum, tail = tuple_[0], tuple_[-2] << 8 | tuple_[-1]
    if not traffic or in_traffic(traffic, protonum, tail):
        return ""
    entries = [(traffic[at], traffic[at + 1], traffic[at + 2]) for at in range(0, len(traffic), 3)]
    same = [(first, last) for number, first, last in entries if number == protonum]
    name = PROTOCOL_NAMES.get(protonum, f"protocol {protonum}")
    if not same:
        wanted = list(dict.fromkeys(PROTOCOL_NAMES.get(entry[0], f"protocol {entry[0]}") for entry in entries))
        return f"it is {name}, not {any_of(wanted)}"
    if protonum in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        return f"its type is {tail >> 8}, not {any_of([str(first >> 8) for first, _ in same])}"
    ports = [str(first) if first == last else f"{first}-{last}" for first, last in same]
    return f"its port is {tail}, not {any_of(ports)}"


def _why_not_address(side: str, addresses: Addresses, address: bytes, now_ms: int) -> str:
    number, ipv6 = int.from_bytes(address, "big"), len(address) == 16
    for entry in addresses.excluded:
        if (entry.ipv6 if ipv6 else entry.ipv4).has(number, now_ms):
            return f"its {side} {ip_address(address)} is excluded" + (f" by !@{entry.name}" if entry.name else "")
    named = ["@" + entry.name for entry in addresses.included if entry.name]
    inside = " or ".join(filter(None, ["in " + any_of(named) if named else "", _literal(addresses)]))
    return f"its {side} {ip_address(address)} is not {inside}"


def _literal(addresses: Addresses) -> str:
    return "" if all(entry.name for entry in addresses.included) else "among the rule's addresses"


def title(packet: Packet) -> str:
    """Write the packet as it was understood."""
    return f"{format_tuple(packet.tuple_)}, {STATE_NAMES[packet.state]}"
