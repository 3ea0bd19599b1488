"""What of our rules is not as it should be: what iptables-save prints, beside how it looks with our rules alone."""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

PREFIX: Final = "CONNTRACKD-"
SHOWN: Final = 3  # rules that a sentence quotes

# Rules by (table, chain), in their order, without `-A CHAIN`.
Saved = dict[tuple[str, str], list[str]]


class Deviation(NamedTuple):
    """Something that is not as it should be: `name` is for scripts, `text` one sentence."""

    name: str
    text: str
    mild: bool = False  # no packet goes around us


def parse(text: str) -> Saved:
    """Read the output of iptables-save."""
    saved: Saved = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            saved[table, line[1:].split()[0]] = []
        elif found := re.match(r"-A (\S+) (.*)", line):
            saved.setdefault((table, found[1]), []).append(found[2])
    return saved


def jumps_to(here: Saved, table: str, chain: str) -> list[tuple[str, str]]:
    """List what jumps to a chain: the chain where it stands, and the rule."""
    ends = (f"-j {chain}", f"-g {chain}")
    chains = [(at, rules) for (where, at), rules in here.items() if where == table]
    return [(at, rule) for at, rules in chains for rule in rules if rule.endswith(ends)]


def passing(here: Saved, table: str, rules: list[str]) -> list[str]:
    """Choose those rules of a base chain by which a packet may leave the table; loopback does not count."""
    return [rule for rule in rules if _ends(rule, table, here, True)]


def _ends(rule: str, table: str, here: Saved, base: bool, depth: int = 0) -> bool:
    """Whether a packet that matches may leave the table without meeting what follows."""
    found = re.search(r"-[jg] (\S+)", rule)
    if found is None or re.search(r"(?<!! )-[io] lo\b", rule) or depth > 8:
        return False
    target = found[1]
    if target.startswith(PREFIX):
        return False
    if target in ("ACCEPT", "NFQUEUE", "QUEUE") or (target == "RETURN" and base):
        return True
    return any(_ends(inner, table, here, False, depth + 1) for inner in here.get((table, target), []))


def compare(tool: str, here: Saved, wanted: Saved) -> Iterator[Deviation]:
    """Name everything in which the command's rules differ from ours as they are wanted; rules of others are not asked.

    `wanted`: each of our chains, and each base chain with nothing but our jump.
    """
    ours = [place for place in wanted if place[1].startswith(PREFIX)]
    missing = [place for place in ours if place not in here]
    if ours and len(missing) == len(ours):
        yield Deviation("rules_missing", f"No rule brings {_family(tool)} packets to conntrackd ({tool}).")
        return
    for table, chain in missing:
        yield Deviation("rules_missing", f"The chain {chain} is missing in table {table} ({tool}).")
    for place in ours:
        if place in here:
            yield from _chain(tool, place, here, wanted)
    for table, chain in here:
        if chain.startswith(PREFIX) and (table, chain) not in wanted:
            text = f"The chain {chain} in table {table} ({tool}) is from another version of conntrackd."
            yield Deviation("rules_stale", text, True)


def _chain(tool: str, place: tuple[str, str], here: Saved, wanted: Saved) -> Iterator[Deviation]:
    table, chain = place
    if here[place] != wanted[place]:
        lacking = [rule for rule in wanted[place] if rule not in here[place]]
        name, what = "rules_differ", "differs from what the configuration wants"
        if lacking and all("-m socket" in rule for rule in lacking):
            name, what = "defrag_missing", f"lacks the rule by which the kernel reassembles {_family(tool)} fragments"
        elif not lacking and sorted(here[place]) == sorted(wanted[place]):
            name, what = "rules_order", "has its rules in another order"
        yield Deviation(name, f"The chain {chain} in table {table} ({tool}) {what}.")
    ((base, jump),) = jumps_to(wanted, table, chain)
    jumps = jumps_to(here, table, chain)
    if len(jumps) > 1:
        yield Deviation("rules_twice", f"Table {table} jumps to {chain} {len(jumps)} times ({tool}).", True)
    rules = here.get((table, base), [])
    first = next((index for index, rule in enumerate(rules) if (base, rule) in jumps), -1)
    if first < 0:
        yield Deviation("rules_not_reached", f"Nothing in {table} {base} jumps to {chain} ({tool}).")
        return
    if rules[first] != jump:
        text = f"{table} {base} jumps to {chain} with a condition that is not ours: {rules[first]} ({tool})."
        yield Deviation("rules_differ", text)
    around = passing(here, table, rules[:first])
    if around:
        late = table == "raw"
        text = f"Rules in front of ours in {table} {base} let packets by ({tool}): {quoted(around)}. "
        text += "conntrackd sees them at its second queue only." if late else "Nobody judges them."
        yield Deviation("rules_order", text, late)


def _family(tool: str) -> str:
    return "IPv6" if tool.startswith("ip6") else "IPv4"


def quoted(rules: list[str]) -> str:
    """Quote the first few rules in a sentence."""
    more = f" and {len(rules) - SHOWN} more" if len(rules) > SHOWN else ""
    return "; ".join(f"`{rule}`" for rule in rules[:SHOWN]) + more
