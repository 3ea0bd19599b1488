"""Filters as questions to a connection: `predicate` makes a function of what filter.py has read."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from operator import eq, ge, gt, le, lt, ne
from typing import Final, TypeVar

from conntrackd.const import IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_UDPLITE
from conntrackd.core.conn import Conn
from conntrackd.core.ecache import Event
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATE_NAMES
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATE_NAMES
from conntrackd.filter import (
    Address,
    All,
    And,
    Expression,
    Family,
    Mark,
    Measure,
    Names,
    Not,
    Numbers,
    Or,
    Port,
    Protocol,
    State,
    Status,
)
from conntrackd.policy.ruleset import Ruleset

# Asks whether a connection matches, now. State, status, mark and end are those of the second argument: of the
# connection itself, or of an event that has kept what they were then.
Predicate = Callable[[Conn, Conn | Event, int], bool]
Interface = Callable[[int], str | None]  # the name of an interface index; None for 0, the router itself

T = TypeVar("T", bytes, int)

COMPARE: Final = {"=": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
WITH_PORTS: Final = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP, IPPROTO_UDPLITE)
SELF: Final = "self"  # the router, as in a policy


class UnknownLabelError(Exception):
    """A filter names a label that there is none of; the text is its name."""


def predicate(expression: Expression, interface: Interface, labels: dict[int, int], ruleset: Ruleset) -> Predicate:
    """Make the question that a filter asks; `labels` are those of connections by id. Raises UnknownLabelError."""
    match expression:
        case All():
            return lambda _ct, _then, _now_ms: True
        case Not(part):
            inner = predicate(part, interface, labels, ruleset)
            return lambda ct, then, now_ms: not inner(ct, then, now_ms)
        case And(parts):
            return _all([predicate(part, interface, labels, ruleset) for part in parts])
        case Or(parts):
            return _any([predicate(part, interface, labels, ruleset) for part in parts])
        case Protocol(numbers):
            return lambda ct, _then, _now_ms: ct.protonum in numbers
        case Family(ipv6):
            return lambda ct, _then, _now_ms: (len(ct.orig) != 13) is ipv6
        case Address():
            return _address(expression)
        case Port():
            return _port(expression)
        case State(names):
            return _state(names)
        case Status(bit, wanted):
            return lambda _ct, then, _now_ms: (then.status & bit != 0) is wanted
        case Measure():
            return _measure(expression)
        case Names("label", names):
            return _labels(names, labels, ruleset)
        case Names():
            return _names(expression, interface)
        case Numbers(what, ranges):
            within = _within(ranges)
            if what == "zone":
                return lambda ct, _then, _now_ms: within(ct.zone)
            return lambda ct, _then, _now_ms: within(ct.id)
        case Mark(pairs):
            return lambda _ct, then, _now_ms: any(then.mark & mask == value for value, mask in pairs)


def _all(parts: list[Predicate]) -> Predicate:
    def matches(ct: Conn, then: Conn | Event, now_ms: int) -> bool:
        for part in parts:  # noqa: SIM110 - a generator for every connection costs more than the rest
            if not part(ct, then, now_ms):
                return False
        return True

    return matches


def _any(parts: list[Predicate]) -> Predicate:
    def matches(ct: Conn, then: Conn | Event, now_ms: int) -> bool:
        for part in parts:  # noqa: SIM110 - as above
            if part(ct, then, now_ms):
                return True
        return False

    return matches


def _within(ranges: Iterable[tuple[T, T]]) -> Callable[[T], bool]:
    """Make the question whether a value is in one of many ranges; overlapping ones become one."""
    firsts: list[T] = []
    lasts: list[T] = []
    for first, last in sorted(ranges):
        if lasts and first <= lasts[-1]:
            lasts[-1] = max(last, lasts[-1])
        else:
            firsts.append(first)
            lasts.append(last)

    def within(value: T) -> bool:
        at = bisect_right(firsts, value) - 1
        return at >= 0 and value <= lasts[at]

    return within


def _address(wanted: Address) -> Predicate:
    ipv4 = _within([each for each in wanted.ranges if len(each.first) == 4])
    ipv6 = _within([each for each in wanted.ranges if len(each.first) == 16])
    reply, source, target = wanted.direction == "reply", wanted.side != "dst", wanted.side != "src"

    def matches(ct: Conn, _then: Conn | Event, _now_ms: int) -> bool:
        key = ct.reply if reply else ct.orig
        if len(key) == 13:
            return (source and ipv4(key[1:5])) or (target and ipv4(key[5:9]))
        return (source and ipv6(key[1:17])) or (target and ipv6(key[17:33]))

    return matches


def _port(wanted: Port) -> Predicate:
    within = _within(wanted.ranges)
    reply, source, target = wanted.direction == "reply", wanted.side != "dst", wanted.side != "src"

    def matches(ct: Conn, _then: Conn | Event, _now_ms: int) -> bool:
        if ct.protonum not in WITH_PORTS:
            return False
        key = ct.reply if reply else ct.orig
        return (source and within(int.from_bytes(key[-4:-2], "big"))) or (
            target and within(int.from_bytes(key[-2:], "big"))
        )

    return matches


def _state(names: frozenset[str]) -> Predicate:
    tcp = {state for state, name in enumerate(TCP_STATE_NAMES) if name in names}
    sctp = {state for state, name in enumerate(SCTP_STATE_NAMES) if name in names}

    def matches(ct: Conn, then: Conn | Event, _now_ms: int) -> bool:
        if ct.protonum == IPPROTO_TCP:
            return then.state in tcp
        return ct.protonum == IPPROTO_SCTP and then.state in sctp

    return matches


def _measure(wanted: Measure) -> Predicate:
    """Compare what is measured as it is shown: whole seconds, packets, bytes from the IP header on."""
    compare, value = COMPARE[wanted.comparison], wanted.value
    match wanted.what, wanted.direction:
        case "age", _:
            return lambda ct, _then, now_ms: compare((now_ms - ct.created_ms) // 1000, value)
        case "idle", _:
            return lambda ct, _then, now_ms: compare((now_ms - ct.seen_ms) // 1000, value)
        case "timeout", _:
            return lambda _ct, then, now_ms: compare(max(0, then.expires_ms - now_ms) // 1000, value)
        case "bytes", "orig":
            return lambda ct, _then, _now_ms: compare(ct.bytes_orig, value)
        case "bytes", "reply":
            return lambda ct, _then, _now_ms: compare(ct.bytes_reply, value)
        case "bytes", _:
            return lambda ct, _then, _now_ms: compare(ct.bytes_orig + ct.bytes_reply, value)
        case _, "orig":
            return lambda ct, _then, _now_ms: compare(ct.packets_orig, value)
        case _, "reply":
            return lambda ct, _then, _now_ms: compare(ct.packets_reply, value)
        case _:
            return lambda ct, _then, _now_ms: compare(ct.packets_orig + ct.packets_reply, value)


def _labels(names: Sequence[str], labels: dict[int, int], ruleset: Ruleset) -> Predicate:
    """Ask for any of some labels. What is told of a connection later has those that it had then."""
    wanted = 0
    for name in names:
        if "*" in name:
            named = _named((name,))
            wanted |= sum(1 << bit for bit, known in ruleset.labels.items() if named(known))
            continue
        bit = ruleset.label_bit(name)
        if bit < 0:
            raise UnknownLabelError(name)
        wanted |= 1 << bit

    def matches(ct: Conn, then: Conn | Event, _now_ms: int) -> bool:
        if isinstance(then, Event) and then.expect is None:
            return then.labels & wanted != 0
        return labels.get(ct.id, 0) & wanted != 0

    return matches


def _named(names: Sequence[str]) -> Callable[[str], bool]:
    exact = {name for name in names if "*" not in name}
    patterns = [name.replace("[", "[[]").replace("?", "[?]") for name in names if "*" in name]
    return lambda name: name in exact or any(fnmatchcase(name, pattern) for pattern in patterns)


def _names(wanted: Names, interface: Interface) -> Predicate:
    named = _named(wanted.names)
    match wanted.what:
        case "rule":
            return lambda ct, _then, _now_ms: named(ct.rule)
        case "helper":
            return lambda ct, _then, _now_ms: ct.help is not None and named(ct.help.helper.name)
        case "in":
            return lambda ct, _then, _now_ms: named(interface(ct.iif) or SELF)
        case _:
            return lambda ct, _then, _now_ms: named(interface(ct.oif) or SELF)
