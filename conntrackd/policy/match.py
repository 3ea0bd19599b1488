"""The judgement: which rule decides about a packet. The first that matches does.

This is on the path of every new packet: integers and bytes, plain functions.
"""

from conntrackd.const import IPPROTO_ICMP, IPPROTO_ICMPV6
from conntrackd.core.tuples import invert
from conntrackd.policy.index import DESTINATION, FROM_SHIFT, NOWHERE, PROTOCOL_SHIFT, SOURCE, TO_SHIFT
from conntrackd.policy.ruleset import INVALID, NO_ZONE, RELATED, Rule, Ruleset


def judge(ruleset: Ruleset, state: int, tuple_: bytes, iif: int, oif: int, now_ms: int) -> Rule:
    """Return the rule that decides and count its hit; interface index 0 is the router itself.

    There is always one: a default stands behind the configured rules. `state` is one of NEW, RELATED and INVALID; the
    way out of an INVALID packet is not known, and no rule for it asks.
    """
    rule = decide(ruleset, state, tuple_, iif, oif, now_ms)
    rule.hits += 1
    rule.last_hit_ms = now_ms
    return rule


def decide(ruleset: Ruleset, state: int, tuple_: bytes, iif: int, oif: int, now_ms: int) -> Rule:
    """Return the rule that decides, and count nothing."""
    rule = first_match(ruleset, state, tuple_, iif, oif, now_ms)
    if rule is not None:
        return rule
    if state == RELATED:
        return ruleset.default_related
    if state == INVALID:
        return ruleset.default_invalid
    if iif == 0:
        return ruleset.default_output
    if oif == 0:
        return ruleset.default_input
    return ruleset.default_forward


def first_match(ruleset: Ruleset, state: int, tuple_: bytes, iif: int, oif: int, now_ms: int) -> Rule | None:
    """Find the first configured rule that matches, if one does."""
    if not ruleset.asks[state]:
        return None
    ipv6 = len(tuple_) == 37
    size = 16 if ipv6 else 4
    source = int.from_bytes(tuple_[1 : 1 + size], "big")
    destination = int.from_bytes(tuple_[1 + size : 1 + 2 * size], "big")
    from_zone = ruleset.zone(iif, source, ipv6)
    to_zone = ruleset.zone(oif, destination, ipv6)
    protonum = tuple_[0]
    tail = tuple_[-2] << 8 | tuple_[-1]
    key = from_zone << FROM_SHIFT | to_zone << TO_SHIFT | protonum << PROTOCOL_SHIFT | tail
    best: Rule | None = None
    order = NOWHERE
    for column in ruleset.indexes[state * 2 + ipv6].columns:
        if column.first >= order:
            break
        if column.side == SOURCE:
            entry = column.table.get(source >> column.shift)
        elif column.side == DESTINATION:
            entry = column.table.get(destination >> column.shift)
        else:
            entry = column.table.get(0)
        if entry is None or entry.first >= order:
            continue
        for mask in entry.masks:
            if mask.first >= order:
                break
            rules = mask.table.get(key & mask.mask)
            if rules is None:
                continue
            for rule in rules:
                if rule.order >= order:
                    break
                if matches(rule, from_zone, to_zone, protonum, tail, source, destination, ipv6, now_ms):
                    best = rule
                    order = rule.order
                    break
    return best


def matches(
    rule: Rule,
    from_zone: int,
    to_zone: int,
    protonum: int,
    tail: int,
    source: int,
    destination: int,
    ipv6: bool,
    now_ms: int,
) -> bool:
    """Whether all that a rule names is true of a packet."""
    if rule.from_zones and not rule.from_zones >> from_zone & 1:
        return False
    if rule.to_zones and not rule.to_zones >> to_zone & 1:
        return False
    if rule.traffic and not in_traffic(rule.traffic, protonum, tail):
        return False
    if rule.source is not None and not rule.source.match(source, ipv6, now_ms):
        return False
    return rule.destination is None or rule.destination.match(destination, ipv6, now_ms)


def in_traffic(traffic: list[int], protonum: int, tail: int) -> bool:
    """Whether protocol and port are among those of a rule: protocol, first, last, protocol, first, last, ..."""
    for at in range(0, len(traffic), 3):
        if traffic[at] == protonum and traffic[at + 1] <= tail <= traffic[at + 2]:
            return True
    return False


def untracked(ruleset: Ruleset, tuple_: bytes, iif: int, now_ms: int) -> bool:
    """Whether a rule with action = "notrack" is about a packet, or about packets that it answers, and count its hit.

    Where it goes is not known yet, so an answer may come from anywhere.
    """
    ipv6 = len(tuple_) == 37
    size = 16 if ipv6 else 4
    source = int.from_bytes(tuple_[1 : 1 + size], "big")
    destination = int.from_bytes(tuple_[1 + size : 1 + 2 * size], "big")
    from_zone = ruleset.zone(iif, source, ipv6)
    protonum = tuple_[0]
    tail = tuple_[-2] << 8 | tuple_[-1]
    answered = tail
    if protonum == IPPROTO_ICMP or protonum == IPPROTO_ICMPV6:
        inverse = invert(tuple_)
        if inverse:
            answered = inverse[-2] << 8 | inverse[-1]
    else:
        answered = tuple_[-4] << 8 | tuple_[-3]
    for rule in ruleset.notrack_rules:
        if matches(rule, from_zone, NO_ZONE, protonum, tail, source, destination, ipv6, now_ms) or (
            (not rule.traffic or in_traffic(rule.traffic, protonum, answered))
            and (rule.source is None or rule.source.match(destination, ipv6, now_ms))
            and (rule.destination is None or rule.destination.match(source, ipv6, now_ms))
        ):
            rule.hits += 1
            rule.last_hit_ms = now_ms
            return True
    return False


def log_matches(ruleset: Ruleset, state: int, tuple_: bytes, iif: int, oif: int, order: int, now_ms: int) -> list[Rule]:
    """List the rules with action = "log" that match and stand before the rule that decides, which has this order."""
    found = []
    ipv6 = len(tuple_) == 37
    size = 16 if ipv6 else 4
    source = int.from_bytes(tuple_[1 : 1 + size], "big")
    destination = int.from_bytes(tuple_[1 + size : 1 + 2 * size], "big")
    from_zone = ruleset.zone(iif, source, ipv6)
    to_zone = ruleset.zone(oif, destination, ipv6)
    tail = tuple_[-2] << 8 | tuple_[-1]
    for rule in ruleset.log_rules:
        if rule.order >= order:
            break
        if state not in rule.states:
            continue
        if matches(rule, from_zone, to_zone, tuple_[0], tail, source, destination, ipv6, now_ms):
            rule.hits += 1
            rule.last_hit_ms = now_ms
            found.append(rule)
    return found
