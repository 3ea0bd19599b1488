"""What is probably not meant in a configuration that can be used: warnings, each at its place."""

import os
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, if_nameindex

from conntrackd.config import Config
from conntrackd.const import IPPROTO_TCP
from conntrackd.mistakes import ConfigError, any_of
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.match import decide, first_match
from conntrackd.policy.ruleset import NEW, NOTRACK, Rule, Ruleset, best_pattern
from conntrackd.policy.sets import Addresses, AddressSet

STEPS_MAX = 64  # rules in front of one that are looked at


def lint(config: Config, here: bool) -> list[ConfigError]:
    """List the warnings; `here`: the configuration is for this machine, whose interfaces can be looked at."""
    ruleset = compile_ruleset(config, 1)
    warnings = [*_rules(config, ruleset), *_unused(config), *_watch(config)]
    if here:
        warnings += [config.files().error(("zones", zone), True, why, "") for zone, why in empty_zones(config).items()]
    return sorted(warnings, key=config.files().order)


# --- Rules that never decide ------------------------------------------------------------------------------------------


def _rules(config: Config, ruleset: Ruleset) -> list[ConfigError]:
    warnings = []
    for index, rule in enumerate(ruleset.rules[: len(config.rule)]):
        place = ("rule", index, "name")
        if not rule.ipv4 and not rule.ipv6:
            message = f"rule {rule.name!r} never matches: its source and its destination are of different families"
            warnings.append(config.files().error(place, False, message, ""))
            continue
        cover = _covered_by(ruleset, rule)
        if cover is not None:
            message = f"rule {rule.name!r} is never reached: rule {cover.name!r} decides about all that it matches"
            hint = "move it up" if cover.action != rule.action else "take it out"
            warnings.append(config.files().error(place, False, message, hint))
    return warnings


def _covered_by(ruleset: Ruleset, rule: Rule) -> Rule | None:
    """Find a rule in front that matches all that this one does.

    Whatever covers a rule matches any packet of it: only rules that match one sample have to be compared.
    """
    if rule.action == NOTRACK:
        return None
    for ipv6 in (False, True):
        if not (rule.ipv6 if ipv6 else rule.ipv4):
            continue
        sample = _sample(rule, ipv6)
        if sample is None:
            continue
        probe = Ruleset(0, [])
        probe.indexes = ruleset.indexes
        probe.asks = ruleset.asks
        from_zone, to_zone = _lowest(rule.from_zones), _lowest(rule.to_zones)
        probe.zone_of = {0: 1, 1: from_zone, 2: to_zone}
        iif, oif = (0 if from_zone == 1 else 1), (0 if to_zone == 1 else 2)
        found = first_match(probe, rule.states[0], sample, iif, oif, 0)
        return found if found is not None and found.order < rule.order and _covers(found, rule) else None
    return None


def _lowest(zones: int) -> int:
    return (zones & -zones).bit_length() - 1 if zones else 0


def _sample(rule: Rule, ipv6: bool) -> bytes | None:
    """Make a packet that the rule matches, as far as that is easy; None if it is not."""
    parts = []
    for addresses in (rule.source, rule.destination):
        address = _some_address(addresses, ipv6)
        if address is None:
            return None
        parts.append(address)
    protonum, tail = (rule.traffic[0], rule.traffic[1]) if rule.traffic else (253, 0)
    return bytes((protonum,)) + b"".join(parts) + b"\0\0" + tail.to_bytes(2, "big")


def _some_address(addresses: Addresses | None, ipv6: bool) -> bytes | None:
    size = 16 if ipv6 else 4
    if addresses is None or not addresses.included:
        return bytes(size) if addresses is None or addresses.match(0, ipv6, 0) else None
    for entry in addresses.included:
        prefixes = entry.ipv6 if ipv6 else entry.ipv4
        for shift, table in zip(prefixes.shifts, prefixes.tables, strict=True):
            for prefix in list(table)[:STEPS_MAX]:
                if addresses.match(prefix << shift, ipv6, 0):
                    return int(prefix << shift).to_bytes(size, "big")
    return None


def _covers(rule: Rule, other: Rule) -> bool:
    """Whether a rule matches everything that another one does."""
    if not set(other.states) <= set(rule.states):
        return False
    for mine, theirs in ((rule.from_zones, other.from_zones), (rule.to_zones, other.to_zones)):
        if mine and (not theirs or theirs & ~mine):
            return False
    if not _covers_traffic(rule.traffic, other.traffic):
        return False
    return _covers_addresses(rule.source, other.source) and _covers_addresses(rule.destination, other.destination)


def _covers_traffic(mine: list[int], theirs: list[int]) -> bool:
    if not mine:
        return True
    entries = [mine[at : at + 3] for at in range(0, len(mine), 3)]
    wanted = [theirs[at : at + 3] for at in range(0, len(theirs), 3)]
    return bool(wanted) and all(
        any(number == proto and first <= low and high <= last for number, first, last in entries)
        for proto, low, high in wanted
    )


def _covers_addresses(mine: Addresses | None, theirs: Addresses | None) -> bool:
    if mine is None:
        return True
    if theirs is None or any(entry not in theirs.excluded for entry in mine.excluded if entry.name):
        return False
    if any(not entry.name for entry in mine.excluded):
        return False  # perhaps, but that is not easy to say
    if not mine.included:
        return True
    if not theirs.included:
        return False
    return all(_within(entry, mine.included) for entry in theirs.included)


def _within(entry: AddressSet, others: list[AddressSet]) -> bool:
    """Whether all of a set is in one of the others, whatever is added to it."""
    if entry.name:
        return any(other.name == entry.name for other in others)
    literal = [other for other in others if not other.name]
    for ipv6 in (False, True):
        prefixes = entry.ipv6 if ipv6 else entry.ipv4
        for shift, table in zip(prefixes.shifts, prefixes.tables, strict=True):
            for prefix in table:
                if not any(_has_network(other, ipv6, prefix << shift, shift) for other in literal):
                    return False
    return True


def _has_network(entry: AddressSet, ipv6: bool, address: int, shift: int) -> bool:
    prefixes = entry.ipv6 if ipv6 else entry.ipv4
    return any(
        wider >= shift and address >> wider in table
        for wider, table in zip(prefixes.shifts, prefixes.tables, strict=True)
    )


# --- What nobody uses -------------------------------------------------------------------------------------------------


def _unused(config: Config) -> list[ConfigError]:
    used_zones = {name for rule in config.rule for name in (*rule.from_, *rule.to)}
    used_sets = {entry.set_name for rule in config.rule for entry in (*rule.source, *rule.destination)}
    used_services = {name for rule in config.rule for name in rule.service}
    warnings = []
    for key, one, names, used in (
        ("zones", "zone", config.zones, used_zones),
        ("sets", "set", config.sets, used_sets),
        ("services", "service", config.services, used_services),
    ):
        for name in names:
            if name not in used:
                message = f"{one} {name!r} is used by no rule"
                warnings.append(config.files().error((key, name), True, message, ""))
    for name, section in config.sets.items():
        if name in used_sets and not section.size and not config.addresses(name).count():
            message = f"set {name!r} is empty, and nothing can be added to it"
            warnings.append(config.files().error(("sets", name), True, message, ""))
    return warnings


def _watch(config: Config) -> list[ConfigError]:
    rules = config.rules
    if rules.at_start == "install" or rules.watch == "off" or "watch" not in rules.model_fields_set:
        return []
    message = "nothing is watched: the daemon knows only the rules that it has installed itself"
    return [config.files().error(("rules", "watch"), False, message, "set at_start = 'install'")]


def empty_zones(config: Config) -> dict[str, str]:
    """Find the zones of which this machine has no interface: by their names, what is to be said."""
    names = [name for _, name in if_nameindex()]
    found = {}
    for zone, section in config.zones.items():
        patterns = list(section.interfaces)
        if patterns and not any(best_pattern(name, patterns) for name in names):
            found[zone] = f"zone {zone!r} is empty: this machine has no interface {any_of(patterns)}"
    return found


# --- The connection one is on -----------------------------------------------------------------------------------------


def cuts_ssh(config: Config) -> str:
    """Say in one sentence that a configuration would cut the SSH connection that its user is on; "" if not so."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return ""
    try:
        client, server = ip_address(words[0].split("%")[0]), ip_address(words[2].split("%")[0])
        ports = int(words[1]).to_bytes(2, "big") + int(words[3]).to_bytes(2, "big")
    except (ValueError, OverflowError):
        return ""
    if client.version != server.version:
        return ""
    ruleset = compile_ruleset(config, 1)
    ruleset.set_links(dict(if_nameindex()))
    tuple_ = bytes((IPPROTO_TCP,)) + client.packed + server.packed + ports
    rule = decide(ruleset, NEW, tuple_, _way_to(str(client), client.version == 6), 0, 0)
    if rule.accept:
        return ""
    return (
        f"This would cut the SSH connection that you are on, from {client} to {server} port {words[3]}: "
        f"{rule.name} would not let it in again."
    )


def _way_to(address: str, ipv6: bool) -> int:
    """Ask the kernel by which interface packets of an address come, supposing that they come as they go."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ipr:
            (route,) = ipr.route("get", dst=address, family=AF_INET6 if ipv6 else AF_INET)
    except (NetlinkError, ValueError):
        return -1
    return int(route.get("oif") or -1)
