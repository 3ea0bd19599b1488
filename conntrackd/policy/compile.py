"""From a checked configuration to the ruleset that packets are judged by.

This runs beside the packets, so it is not compiled: compiled code keeps the interpreter to itself until it is done.
"""

from ipaddress import IPv4Network
from typing import Final

from conntrackd.config import Config
from conntrackd.config import Rule as RuleConfig
from conntrackd.policy.index import Builder
from conntrackd.policy.limits import PER_DST, PER_RULE, PER_SRC, Bucket, RateLimit
from conntrackd.policy.ruleset import (
    ACCEPT,
    ACTION_NAMES,
    DROP,
    INVALID,
    LOG,
    NEW,
    NOTRACK,
    REJECT,
    RELATED,
    STATES,
    Rule,
    Ruleset,
)
from conntrackd.policy.sets import Addresses, AddressSet
from conntrackd.values import Source

STATE_NUMBERS: Final = {"new": NEW, "related": RELATED, "invalid": INVALID}
ACTION_NUMBERS: Final = {name: number for number, name in enumerate(ACTION_NAMES)}
PER_NUMBERS: Final = {"rule": PER_RULE, "src": PER_SRC, "dst": PER_DST}


def compile(config: Config, generation: int) -> Ruleset:  # noqa: A001 - as in re.compile
    """Make the ruleset of a checked configuration. It knows no interface until `set_links`."""
    ruleset = Ruleset(generation, list(config.zones))
    _add_zones(ruleset, config)
    for name, section in config.sets.items():
        entry = AddressSet(name)
        addresses = config.addresses(name)
        entry.ipv4.adopt(addresses.ipv4)
        entry.ipv6.adopt(addresses.ipv6)
        entry.timeout_ms = section.timeout
        entry.size = section.size
        ruleset.sets[name] = entry
    ruleset.labels = {bit: name for name, bit in config.labels.items()}
    for order, rule_config in enumerate(config.rule):
        ruleset.rules.append(_rule(ruleset, config, rule_config, order))
    _add_defaults(ruleset, config)
    ruleset.by_name = {rule.name: rule for rule in ruleset.rules}
    ruleset.log_rules = [rule for rule in ruleset.rules if rule.action == LOG]
    ruleset.notrack_rules = [rule for rule in ruleset.rules if rule.action == NOTRACK]
    deciding = [rule for rule in ruleset.rules[: len(config.rule)] if rule.action not in (LOG, NOTRACK)]
    for state in range(STATES):
        asked = [rule for rule in deciding if state in rule.states]
        ruleset.asks[state] = bool(asked)
        for ipv6 in (False, True):
            builder = Builder(ipv6)
            for rule in asked:
                builder.add(rule)
            builder.finish(ruleset.indexes[state * 2 + ipv6])
    return ruleset


def inherit(ruleset: Ruleset, before: Ruleset, now_ms: int) -> None:
    """Take over what runs on from the generation before: added addresses, counters, tokens that were taken."""
    for name, entry in ruleset.sets.items():
        old_set = before.sets.get(name)
        if old_set is not None:
            entry.inherit(old_set, now_ms)
    for rule in ruleset.rules:
        old = before.by_name.get(rule.name)
        if old is None:
            continue
        rule.hits = old.hits
        rule.hit_bytes = old.hit_bytes
        rule.last_hit_ms = old.last_hit_ms
        rule.flows = old.flows
        by_source = rule.account.by_source
        if by_source == old.account.by_source:
            rule.account = old.account
        if rule.rate is not None and old.rate is not None and rule.rate.per == old.rate.per:
            rule.rate.full_ns = old.rate.full_ns
            rule.rate.full_old_ns = old.rate.full_old_ns
            rule.rate.exceeded = old.rate.exceeded


def _add_zones(ruleset: Ruleset, config: Config) -> None:
    for zone, section in config.zones.items():
        number = ruleset.zones[zone]
        if section.conntrack_zone:
            ruleset.conntrack_zones[number] = section.conntrack_zone
        if not section.sources:
            for interface in section.interfaces:
                ruleset.interfaces[interface] = number
        for network in section.sources:
            ipv6 = not isinstance(network, IPv4Network)
            place = (list(section.interfaces), ipv6, int(network.network_address), network.prefixlen, number)
            ruleset.networks.append(place)


def _rule(ruleset: Ruleset, config: Config, given: RuleConfig, order: int) -> Rule:
    rule = Rule(given.name, ACTION_NUMBERS[given.action], order)
    rule.states = [STATE_NUMBERS[state] for state in given.state]
    rule.from_zones = _zone_bits(ruleset, given.from_)
    rule.to_zones = _zone_bits(ruleset, given.to)
    rule.traffic = [number for entry in given.traffic() for number in entry]
    rule.source = _addresses(ruleset, given.source)
    rule.destination = _addresses(ruleset, given.destination)
    rule.ipv4 = _has_family(rule.source, False) and _has_family(rule.destination, False)
    rule.ipv6 = _has_family(rule.source, True) and _has_family(rule.destination, True)
    rule.reject_with = given.reject_with
    rule.log = given.log
    if given.log or rule.action == LOG:
        rule.log_bucket = _log_bucket(config)
    if given.mark is not None:
        rule.mark = given.mark
    for label in given.labels:
        rule.labels |= 1 << config.labels[label]
    rule.helper = given.helper
    if given.timeouts:
        rule.timeouts = config.sysctl()
        for name, value in given.timeouts.items():
            setattr(rule.timeouts, name, value)
    if given.limit is not None:
        rate = given.limit.new
        burst = given.limit.burst or rate.tokens
        rule.rate = RateLimit(rate.tokens, rate.period_ms, burst, PER_NUMBERS[given.limit.per])
    rule.max_flows = given.max_flows
    rule.max_flows_per_src = given.max_flows_per_src
    rule.account.by_source = given.max_flows_per_src > 0
    rule.limited = rule.rate is not None or rule.max_flows > 0 or rule.max_flows_per_src > 0
    return rule


def _log_bucket(config: Config) -> Bucket:
    rate = config.policy.log_limit
    return Bucket(rate.tokens, rate.period_ms, rate.tokens)


def _add_defaults(ruleset: Ruleset, config: Config) -> None:
    policy = config.policy
    defaults = {
        ruleset.default_forward: policy.default,
        ruleset.default_input: policy.input,
        ruleset.default_output: policy.output,
        ruleset.default_related: policy.related,
        ruleset.default_invalid: policy.invalid,
    }
    for rule, action in defaults.items():
        rule.action = ACTION_NUMBERS[action]
        rule.accept = rule.action == ACCEPT
        rule.reject_with = "auto"
        if policy.log_denied and rule.action in (DROP, REJECT):
            rule.log = True
            rule.log_bucket = _log_bucket(config)
        ruleset.rules.append(rule)
    ruleset.fragment_accept = policy.fragment == "accept"
    ruleset.table_full_accept = config.exception.table_full == "accept"
    rate = policy.reject_limit
    ruleset.reject_bucket = Bucket(rate.tokens, rate.period_ms, rate.tokens)


def _zone_bits(ruleset: Ruleset, names: tuple[str, ...]) -> int:
    """Write zones as bits. "any" is every zone, the router itself, and interfaces without a zone: 0."""
    if "any" in names:
        return 0
    bits = 0
    for name in names:
        bits |= 1 << ruleset.zones[name]
    return bits


def _addresses(ruleset: Ruleset, sources: tuple[Source, ...]) -> Addresses | None:
    """Make what a rule says about an address. What stands in the rule itself becomes sets without a name."""
    if not sources:
        return None
    addresses = Addresses()
    for negated in (False, True):
        entries = addresses.excluded if negated else addresses.included
        literal = AddressSet("")
        for source in sources:
            if source.negated != negated:
                continue
            if source.network is None:
                entries.append(ruleset.sets[source.set_name])
                continue
            network = source.network
            prefixes = literal.ipv4 if isinstance(network, IPv4Network) else literal.ipv6
            prefixes.put(int(network.network_address), network.prefixlen, 0)
        if literal.ipv4.shifts or literal.ipv6.shifts:
            entries.append(literal)
    return addresses


def _has_family(addresses: Addresses | None, ipv6: bool) -> bool:
    """Whether an address of a family can match: one that is named must be of it; a set may come to have some."""
    if addresses is None or not addresses.included:
        return True
    return any(entry.name or (entry.ipv6 if ipv6 else entry.ipv4).shifts for entry in addresses.included)
